"""A few power-of-two shapes for all batch sizes."""

import jax.numpy as jnp
import numpy as np
import pytest

import arbiter_jax as aj


def test_next_bucket_is_the_next_power_of_two():
    for n in range(1, 2000):
        bucket = aj.next_bucket(n)
        assert bucket & (bucket - 1) == 0
        assert bucket // 2 < n <= bucket


def test_next_bucket_is_exact_for_large_n():
    """Where the logarithm of a float is not."""
    for k in range(1, 62):
        assert aj.next_bucket(2**k) == 2**k
        assert aj.next_bucket(2**k + 1) == 2 ** (k + 1)


@pytest.mark.parametrize("n", [np.int32(65), np.int64(65), jnp.int32(65)])
def test_next_bucket_returns_an_int(n):
    assert type(aj.next_bucket(n)) is int
    assert aj.next_bucket(n) == 128


@pytest.mark.parametrize("n", [0, -1, 1.0, "8", None, True])
def test_next_bucket_refuses_other_values(n):
    with pytest.raises(ValueError, match=r"n must be an integer >= 1, got "):
        aj.next_bucket(n)


@pytest.mark.parametrize(
    ("minimum", "maximum", "buckets"),
    [
        (8, 512, (8, 16, 32, 64, 128, 256, 512)),
        (9, 500, (16, 32, 64, 128, 256, 512)),
        (8, 513, (8, 16, 32, 64, 128, 256, 512, 1024)),
        (1, 2, (1, 2)),
        (5, 5, (8,)),
    ],
)
def test_all_buckets_are_those_of_all_sizes(minimum, maximum, buckets):
    assert aj.all_buckets(minimum, maximum) == buckets
    assert set(buckets) == {aj.next_bucket(n) for n in range(minimum, maximum + 1)}


def test_all_buckets_refuses_a_reversed_range():
    with pytest.raises(ValueError, match=r"maximum must be >= minimum = 512, got 8\."):
        aj.all_buckets(512, 8)
    # Also if both are in the same bucket.
    with pytest.raises(ValueError, match=r"maximum must be >= minimum = 7, got 6\."):
        aj.all_buckets(7, 6)
    with pytest.raises(ValueError, match=r"n must be an integer >= 1, got 0\."):
        aj.all_buckets(0, 8)
