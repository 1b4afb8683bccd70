"""Buckets: the few power-of-two shapes that stand for all batch sizes.

A batch size is an exact number that may change at every window; a compiled program has one fixed
shape. Rounding the shape (and not the batch size) up to a power of two bounds the number of
programs by the logarithm of the range.
"""

from __future__ import annotations

from arbiter_jax import _validate


def next_bucket(n: int) -> int:
    """The smallest power of two that is at least n.

    Args:
      n: Number of examples, an integer >= 1. Host side only: the result is a static shape.

    Returns:
      The bucket size, an int.

    Raises:
      ValueError: If n is no integer >= 1.

    >>> [next_bucket(n) for n in (1, 2, 3, 64, 65)]
    [1, 2, 4, 64, 128]
    """
    return 1 << (_validate.integer(n=n, minimum=1) - 1).bit_length()


def all_buckets(minimum: int, maximum: int) -> tuple[int, ...]:
    """Every bucket that a batch size between two bounds can fall into, ascending.

    There are ``log2(next_bucket(maximum) / next_bucket(minimum)) + 1`` of them: the compile
    budget of a run whose batch size stays within the bounds.

    Args:
      minimum: Smallest batch size, an integer >= 1.
      maximum: Largest batch size, an integer >= minimum.

    Returns:
      Powers of two, from ``next_bucket(minimum)`` to ``next_bucket(maximum)``.

    Raises:
      ValueError: If a bound is no integer >= 1, or the two are reversed.

    >>> all_buckets(8, 100)
    (8, 16, 32, 64, 128)
    """
    first, last = next_bucket(minimum), next_bucket(maximum)
    if maximum < minimum:
        raise ValueError(f"maximum must be >= minimum = {minimum}, got {maximum}.")
    return tuple(1 << k for k in range(first.bit_length() - 1, last.bit_length()))
