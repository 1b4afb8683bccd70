"""Buckets: a few power-of-two shapes that can hold every batch size.

The batch size may change in every window, but a compiled program has a fixed shape. So the shape,
not the batch size, is rounded up to a power of two: the number of programs then grows only with the
logarithm of the range of batch sizes.
"""

from __future__ import annotations

from arbiter_jax import _validate


def next_bucket(n: int) -> int:
    """The smallest power of two that is at least n.

    Args:
      n: Number of examples, an integer >= 1. It cannot be traced: the result is a static shape.

    Returns:
      The bucket size, an int.

    Raises:
      ValueError: If n is not an integer >= 1.

    >>> [next_bucket(n) for n in (1, 2, 3, 64, 65)]
    [1, 2, 4, 64, 128]
    """
    return 1 << (_validate.integer(n=n, minimum=1) - 1).bit_length()


def all_buckets(minimum: int, maximum: int) -> tuple[int, ...]:
    """The buckets of all batch sizes in [minimum, maximum], in ascending order.

    There are ``log2(next_bucket(maximum) / next_bucket(minimum)) + 1`` of them, which bounds the
    number of window programs of a run whose batch size stays in this range.

    Args:
      minimum: Smallest batch size, an integer >= 1.
      maximum: Largest batch size, an integer >= minimum.

    Returns:
      Powers of two, from ``next_bucket(minimum)`` to ``next_bucket(maximum)``.

    Raises:
      ValueError: If a bound is not an integer >= 1, or maximum < minimum.

    >>> all_buckets(8, 100)
    (8, 16, 32, 64, 128)
    """
    first, last = next_bucket(minimum), next_bucket(maximum)
    if maximum < minimum:
        raise ValueError(f"maximum must be >= minimum = {minimum}, got {maximum}.")
    return tuple(1 << k for k in range(first.bit_length() - 1, last.bit_length()))


def batch_of_the_rest(
    batch_size: int, least: int, seen: int, num_steps: int, num_examples: int
) -> int:
    """The size of a last, smaller batch if a whole one exceeds the rest of a budget; 0 for none.

    A rule that leaps, to a batch above the mean of those so far, could leave most of a budget
    unused. This leaves less than a tenth, unless the rule's range holds no smaller batch.

    Args:
      batch_size: What the rule has decided on, more than is left.
      least: The smallest batch that the rule takes.
      seen: Examples so far.
      num_steps: Steps so far.
      num_examples: The budget.

    >>> batch_of_the_rest(4096, least=8, seen=1000, num_steps=10, num_examples=5000)
    2048
    """
    left = num_examples - seen
    if 10 * left < num_examples or batch_size * num_steps <= seen:
        return 0
    smaller = 1 << (left.bit_length() - 1)
    return smaller if smaller >= least else 0
