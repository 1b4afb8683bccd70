"""The host's one read of a rule's decision before each window."""

from __future__ import annotations

import jax

from arbiter_jax.base import PyTree, find_rules, get_batch_size, meta_batch_sizes, nodes
from arbiter_jax.batching import next_bucket


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
