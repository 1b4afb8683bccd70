"""Counts of examples against Python's integers, and sums that do not stand still."""

import operator

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbiter_jax._count import compensated_sum, to_count
from arbiter_jax.base import Count, as_count

LARGEST = 2**31 - 1
NEAR = [n + d for n in (0, 2**24, 2**31, 2**32, 2**33, 10**13) for d in (-1, 0, 1)][1:]
number = st.one_of(st.sampled_from(NEAR), st.integers(0, 2**40), st.integers(0, 2**62))


@jax.jit
def everything(a, b):
    compared = [f(a, b) for f in (operator.lt, operator.le, operator.eq, operator.ge)]
    return a + b, a - b, a // b, a % b, a.since(b), a.minus(b), a.astype(jnp.int32), compared


@pytest.mark.parametrize("x64", [False, True])
@hypothesis.given(a=number, b=number, factor=st.integers(1, 2**31), off=st.integers(-2, 2))
def test_counts_are_pythons_integers(x64, a, b, factor, off):
    with jax.enable_x64(x64):
        near = max(0, (b + 1) * factor % 2**62 + off)  # of a multiple
        for a, b in ((a, b + 1), (near, b + 1)):  # noqa: B020
            total, difference, quotient, rest, since, minus, clipped, compared = everything(
                as_count(a), as_count(b)
            )
            assert int(total) == a + b
            np.testing.assert_allclose(float(difference), a - b, rtol=1.3e-7)
            assert int(quotient) == min(a // b, LARGEST)
            if a // b <= LARGEST:
                np.testing.assert_allclose(float(rest), a % b, rtol=1.3e-7)
            assert int(since) == min(max(a - b, 0), LARGEST)
            assert int(minus) == max(a - b, 0)
            assert int(clipped) == min(a, LARGEST)
            assert [bool(c) for c in compared] == [a < b, a <= b, a == b, a >= b]
            # With integers of the host, of any size, and what is read back from the device.
            for count in (as_count(a), jax.device_get(as_count(a))):
                assert int(count + b) == a + b
                assert bool(count >= b) == (a >= b)
                assert bool(count != b) == (a != b)


@pytest.mark.parametrize("make", [int, np.int64, np.uint64, np.float64, float])
def test_numbers_of_the_host_become_counts(make):
    assert int(as_count(make(2**33 + 4096))) == 2**33 + 4096
    assert int(as_count(make(0))) == 0


def test_arrays_become_counts():
    assert int(as_count(jnp.int32(-5))) == int(as_count(jnp.float32(jnp.nan))) == 0
    assert int(as_count(jnp.float32(2**33 + 4096))) == 2**33 + 4096
    assert int(as_count(jnp.float16(2.5))) == 2
    assert (
        int(as_count(np.float16(3))) == int(as_count(np.array(3))) == int(as_count(np.int8(3))) == 3
    )
    assert np.asarray(to_count(np.array([1, 2**40]))).tolist() == [1, 2**40]
    with jax.enable_x64(True):
        assert int(as_count(jnp.int64(2**40 + 1))) == 2**40 + 1


@pytest.mark.parametrize(
    "value",
    [
        *(float("nan"), float("inf"), 2.5, -3, -3.0, 2**64, 1j, "3", None),
        *(np.float32("nan"), np.float32(2.5), np.int64(-3), np.array(2.5), np.array([1, 2])),
        *(jnp.zeros(3), jnp.ones(1, jnp.int32), jnp.complex64(1)),
    ],
)
def test_what_counts_no_examples_is_refused(value):
    with pytest.raises(ValueError, match=r"a count of examples, .* must be one whole number >= 0"):
        as_count(value)


def test_a_traced_count_is_not_checked():
    assert int(jax.jit(as_count)(-3)) == int(jax.jit(as_count)(jnp.nan)) == 0


def test_a_count_is_a_number_to_others():
    count = as_count(2**33 + 5)
    assert f"{count:,}" == "8,589,934,597"
    assert f"{count}" == "8589934597"
    assert repr(count) == "Count(8589934597)"
    assert (float(count), np.asarray(count).item()) == (2**33 + 5, 2**33 + 5)
    assert jnp.asarray(count).dtype == jnp.float32
    assert float(jnp.minimum(count, 7)) == 7
    assert float(count / 2) == float(1 / (2 / count)) == 2**32
    assert float(2**33 + 6 - count) == 1
    assert float(jnp.float32(3) * as_count(4)) == float(as_count(4) * 3) == 12
    assert int(np.int64(2) + count) == int(jnp.int32(2) + as_count(5)) + 2**33
    assert bool(count > -1)
    assert not bool(count == -1)
    assert bool(count > 0.5)
    assert count != None  # noqa: E711
    assert (as_count(3) >= np.array([-1, 2, 3, 2**40])).tolist() == [True, True, True, False]
    assert list(range(as_count(2))) == [0, 1]


def test_a_count_is_a_pytree_in_transformations():
    """Under `scan`, `vmap` and `eval_shape`."""
    start = as_count(2**32 - 2)
    step = lambda count, n: (count + n, count >= 2**32)
    count, reached = jax.lax.scan(step, start, jnp.ones(4, jnp.int32))
    assert int(count) == 2**32 + 2
    assert reached.tolist() == [False, False, True, True]
    many = jax.vmap(lambda n: start + n)(jnp.arange(4))
    assert np.asarray(many).tolist() == [2**32 - 2 + n for n in range(4)]
    types = jax.tree.map(jax.typeof, count)
    assert types == jax.tree.map(jax.typeof, start)
    assert isinstance(types, Count)
    assert "uint32" in repr(jax.eval_shape(lambda: start))


def test_a_compensated_sum_does_not_stand_still():
    step = lambda pair, x: (compensated_sum(*pair, x), None)
    start = jnp.float32(2**24), jnp.float32(0)
    (total, error), _ = jax.jit(lambda s: jax.lax.scan(step, s, jnp.full(1001, 0.5)))(start)
    assert float(total) - float(error) == 2**24 + 500.5
