"""The one sentence that a wrong argument gets: its name, its value, its range."""

import math

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
