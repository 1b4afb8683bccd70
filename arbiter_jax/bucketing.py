"""Buckets: the few power-of-two shapes that stand for all batch sizes.

A batch size is an exact number that may change at every window, a compiled program has one fixed
shape. Rounding the shape (and not the batch size) up to a power of two bounds the number of
programs by the logarithm of the range. What a rule has decided is read here, on the host, before a
window: how many examples, in which bucket, for how many steps.
"""

from __future__ import annotations

import jax

from arbiter_jax import _validate
from arbiter_jax.base import PyTree, find_rules, get_batch_size, meta_batch_sizes, nodes


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


def window_sizes(opt_state: PyTree, max_batch_size: int | None = None) -> tuple[int, int]:
    """Reads the decision: the batch size and the bucket of the next window. Host side.

    One bucket serves the training batch and the meta batch of a window: that of the larger one.

    Args:
      opt_state: State of a chain with exactly one batch-size rule.
      max_batch_size: Optional upper limit on both.

    Returns:
      (batch_size, bucket_size), two ints.

    Raises:
      ValueError: If the state holds no rule, or more than one.

    >>> import arbiter_jax as aj
    >>> window_sizes(aj.schedulers.constant(48).init(None))
    (48, 64)
    """
    get_batch_size(opt_state)  # says what is wrong where there is not exactly one rule
    (rule,) = find_rules(opt_state)
    sizes = [rule.batch_size, *meta_batch_sizes(rule)]
    sizes = [int(size.max()) for size in jax.device_get(sizes)]
    if max_batch_size is not None:
        sizes = [min(size, max_batch_size) for size in sizes]
    return sizes[0], next_bucket(max(sizes))


def decision_steps(opt_state: PyTree, window: int) -> int:
    """How many steps the next window should have: fewer than `window` where a rule asks. Host side.

    A state asks with a field `window_steps`, int32[]: apply my decision after so many steps at most.
    A shorter window runs in the same program.

    Args:
      opt_state: State of a chain.
      window: T, int >= 1.

    Returns:
      int in [1, window].

    >>> import arbiter_jax as aj
    >>> rule = aj.schedulers.noise_floor(num_examples=10**6)
    >>> decision_steps(rule.init(None), 20), decision_steps(None, 20)
    (1, 20)
    """
    rules = [node for rule in find_rules(opt_state) for node in nodes(rule)]
    asked = [node.window_steps for node in rules if hasattr(node, "window_steps")]
    return min([window, *(max(1, int(steps.min())) for steps in jax.device_get(asked))])
