"""The one sentence that a wrong argument gets: its name, its value, its range."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbiter_jax import _validate


@pytest.mark.parametrize("value", [1, 7, np.int64(7), np.uint8(7), jnp.int32(7), np.array(7)])
def test_integer_takes_any_integer_returns_int(value):
    result = _validate.integer(size=value, minimum=1, maximum=7)
    assert type(result) is int
    assert result == int(value)


@pytest.mark.parametrize(
    "value", [7.0, "7", None, True, np.True_, np.array([7]), jnp.ones(()), 0, 8]
)
def test_integer_refuses_everything_else(value):
    with pytest.raises(ValueError, match=r"size must be an integer >= 1 and <= 7, got "):
        _validate.integer(size=value, minimum=1, maximum=7)


def test_integer_names_only_the_limits_that_there_are():
    with pytest.raises(ValueError, match=r"^n must be an integer >= 2, got 1\.$"):
        _validate.integer(n=1, minimum=2)
    with pytest.raises(ValueError, match=r"^n must be an integer <= 2, got 3\.$"):
        _validate.integer(n=3, maximum=2)
    with pytest.raises(ValueError, match=r"^n must be an integer, got 1\.5\.$"):
        _validate.integer(n=1.5)


@pytest.mark.parametrize("value", [1e-300, 3, np.float32(0.5), jnp.float32(0.5), jnp.int32(2)])
def test_positive_returns_a_float(value):
    result = _validate.positive(rate=value)
    assert type(result) is float
    assert result == float(value)


@pytest.mark.parametrize("value", [0.0, -1, math.nan, math.inf, "1", None, True, np.ones(2)])
def test_positive_refuses(value):
    with pytest.raises(ValueError, match=r"^rate must be a finite number > 0, got "):
        _validate.positive(rate=value)


def test_non_negative_differs_from_positive_by_zero():
    assert _validate.non_negative(rate=0) == 0.0
    for value in (-1e-300, math.nan, math.inf, None):
        with pytest.raises(ValueError, match=r"^rate must be a finite number >= 0, got "):
            _validate.non_negative(rate=value)


@pytest.mark.parametrize(
    ("closed", "inside", "outside", "interval"),
    [
        ("both", (0, 0.5, 1), (-0.1, 1.1), r"\[0, 1\]"),
        ("left", (0, 0.5), (-0.1, 1), r"\[0, 1\)"),
        ("right", (0.5, 1), (0, 1.1), r"\(0, 1\]"),
        ("neither", (0.5,), (0, 1), r"\(0, 1\)"),
    ],
)
def test_in_range_knows_its_ends(closed, inside, outside, interval):
    for value in inside:
        assert _validate.in_range(0, 1, closed=closed, share=value) == value
    for value in (*outside, math.nan, "0.5", True):
        with pytest.raises(ValueError, match=rf"^share must be in {interval}, got "):
            _validate.in_range(0, 1, closed=closed, share=value)


def test_one_of_lists_the_options():
    assert _validate.one_of(("offset", "none"), anchor="none") == "none"
    with pytest.raises(ValueError, match=r"^anchor must be one of 'offset', 'none', got 'None'\.$"):
        _validate.one_of(("offset", "none"), anchor="None")


def test_power_of_two():
    assert [_validate.power_of_two(n=n) for n in (1, 2, np.int32(64))] == [1, 2, 64]
    for n in (0, -2, 3, 12, 2.0, True, None):
        with pytest.raises(ValueError, match=r"^n must be a power of two >= 1, got "):
            _validate.power_of_two(n=n)


def test_batch_size_range_starts_at_the_smallest():
    assert _validate.batch_size_range(np.int64(8), 512) == (8, 512, 8)
    assert _validate.batch_size_range(8, 512, 512) == (8, 512, 512)
    assert _validate.batch_size_range(8, 8, 8) == (8, 8, 8)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((512, 8), "max_batch_size must be >= min_batch_size, got max_batch_size=8 and min_batch"),
        ((0, 8), "min_batch_size must be an integer >= 1, got 0"),
        ((-8, 8), "min_batch_size must be an integer >= 1, got -8"),
        ((8, 64.0), "max_batch_size must be an integer >= 1, got 64.0"),
        ((8, None), "max_batch_size must be an integer >= 1, got None"),
        ((8, 64, 7), "initial_batch_size must be an integer >= 8 and <= 64, got 7"),
        ((8, 64, 65), "initial_batch_size must be an integer >= 8 and <= 64, got 65"),
        ((8, 64, 16.0), "initial_batch_size must be an integer >= 8 and <= 64, got 16.0"),
    ],
)
def test_batch_size_range_names_what_is_wrong(sizes, message):
    with pytest.raises(ValueError, match=message):
        _validate.batch_size_range(*sizes)


def test_a_traced_number_passes_unchecked():
    def check(x):
        numbers = (
            _validate.positive(rate=x),
            _validate.in_range(0, 1, share=x),
            _validate.greater(1, factor=x),
        )
        assert all(number.dtype == jnp.float32 for number in numbers)
        assert _validate.int32(window=x, minimum=1, maximum=4).dtype == jnp.int32
        return numbers[0], _validate.int32(window=x)

    assert jax.jit(check)(jnp.float32(8.5))[0] == 8.5
    assert jax.jit(check)(jnp.int32(8)) == (8.0, 8)
    assert jax.jit(check)(jnp.bfloat16(-8)) == (-8.0, -8)
    assert jax.jit(check)(jnp.float32(7.6))[1] == 8


@pytest.mark.parametrize("value", [jnp.ones(2), jnp.ones((), complex), jnp.array(True)])
def test_traced_value_that_is_no_number(value):
    for check, expected in (
        (lambda x: _validate.positive(rate=x), "rate must be a finite number > 0"),
        (lambda x: _validate.int32(rate=x), "rate must be an integer"),
    ):
        with pytest.raises(ValueError, match=rf"^{expected}, got a traced {value.dtype}\["):
            jax.eval_shape(check, value)


@pytest.mark.parametrize(
    "check", [_validate.integer, _validate.power_of_two, lambda n: _validate.one_of((1, 2), n=n)]
)
def test_traced_value_that_fixes_a_structure(check):
    message = r"^n must be known while tracing, got a traced int32\[\]: .*args=\(\"n\",\)\.(\n|$)"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda n: check(n=n), jnp.int32(2))


def test_int32_returns_an_array_for_an_array():
    assert type(_validate.int32(n=np.int64(3), minimum=1)) is int
    for value in (jnp.int32(3), jnp.float32(3), jnp.uint8(3)):
        result = _validate.int32(n=value, minimum=1, maximum=3)
        assert isinstance(result, jax.Array)
        assert result.dtype == jnp.int32


@pytest.mark.parametrize("value", [3.0, jnp.float32(3.5), jnp.float32(jnp.nan), jnp.ones(1, int)])
def test_int32_refuses_what_is_no_integer(value):
    with pytest.raises(ValueError, match=r"^n must be an integer >= 1, got "):
        _validate.int32(n=value, minimum=1)


@pytest.mark.parametrize("value", [2**31, 2**40, 10**400, np.uint64(2**63)])
def test_int32_refuses_what_it_cannot_hold(value):
    message = r"^n must be an integer >= 1 and <= 2147483647, got \d{10,200}(\.\.\.)?\.$"
    with pytest.raises(ValueError, match=message):
        _validate.int32(n=value, minimum=1)


@pytest.mark.parametrize("value", [10**400, jnp.ones(2), 1j, np.complex64(1), np.ones((2, 2)), {}])
def test_positive_refuses_on_one_line(value):
    with pytest.raises(ValueError, match=r"^rate must be a finite number > 0, got .{1,210}\.$"):
        _validate.positive(rate=value)


@pytest.mark.parametrize("value", [jnp.bfloat16(0.5), np.float16(0.5), np.int8(1)])
def test_small_types_are_numbers(value):
    assert _validate.positive(rate=value) == float(value)


def test_function_names_static_args():
    assert _validate.function("of a count", schedule=len) is len
    with pytest.raises(
        ValueError, match=r'^schedule must be a function .*static_args=\("schedule",'
    ):
        _validate.function("of a count", schedule=jnp.ones(()))
    with pytest.raises(
        ValueError, match=r"^schedule must be a function of a count, got 3, or so\.$"
    ):
        _validate.function("of a count", ", or so", schedule=3)


def test_seed_is_an_integer_or_one_key():
    keys = (jax.random.key(0), jax.random.PRNGKey(0), np.zeros(2, np.uint32))
    for value in (0, -1, np.int64(3), jnp.int32(3), *keys):
        assert _validate.seed(value) is value
    wrong = (0.5, "a", None, True, 2**63, jnp.ones(2), jax.random.split(jax.random.key(0)))
    for value in (*wrong, jax.random.key(0, impl="rbg")):
        with pytest.raises(ValueError, match=r"^seed must be an integer[^\n]*, got [^\n]*\.$"):
            _validate.seed(value)


def test_traced_batch_sizes_stay_in_order():
    def sizes(low, high, start):
        return jnp.stack(_validate.batch_size_range(low, high, start))

    assert jax.jit(sizes)(8, 64, 100).tolist() == [8, 64, 64]
    assert jax.jit(sizes)(8.0, 64.0, 1.0).tolist() == [8, 64, 8]
