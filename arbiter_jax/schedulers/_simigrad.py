"""SimiGrad: hold the cosine between the gradients of two half batches at a target.

Qin, Rajbhandari, Ruwase, Yan, Yang and He (2021), "SimiGrad: Fine-Grained Adaptive Batching for
Large Scale Training using Gradient Similarity Measurement", NeurIPS.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _numerics, _validate, base
from arbiter_jax.schedulers import _rule


class SimigradState(NamedTuple):
    """State of :func:`simigrad`."""

    batch_size: jax.Array  # shape=(), dtype=int32, in examples
    min_batch_size: jax.Array  # shape=(), dtype=int32
    max_batch_size: jax.Array  # shape=(), dtype=int32
    similarity: jax.Array  # shape=(), dtype=float, mean cosine since the last decision
    count: jax.Array  # shape=(), dtype=int32, cosines in that mean, less than `decide_every`
    num_skipped: jax.Array  # shape=(), dtype=int32, steps whose signals carried no information
    requires = ("grad_stats",)


def simigrad(
    *,
    target: float = 0.7,
    factor: float = 1.5,
    decide_every: int = 10,
    min_batch_size: int = 8,
    max_batch_size: int = 512,
    initial_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Grows the batch while the gradients of its halves disagree, else shrinks it (SimiGrad).

    .. math::
      B \leftarrow \begin{cases}
        \lceil a B \rceil & \text{if the mean of } \cos(g_1, g_2) < \gamma \\
        \lfloor B / a \rfloor & \text{otherwise}
      \end{cases}

    with B the applied batch size and g_1, g_2 the gradients of the halves of one batch. The published
    account leaves the factor open; ours of 1.5 and the averaging over ten steps are choices.

    Args:
      target: gamma, the cosine to hold, in (-1, 1).
      factor: a, what the size is multiplied or divided by, > 1.
      decide_every: Steps from one decision to the next, over which the cosine is averaged, an
        integer >= 1. A decision starts from the applied size, so that decisions that are not applied
        do not compound.
      min_batch_size: Smallest batch size, an integer >= 1; 1 is taken as 2, because one example
        carries no information about noise.
      max_batch_size: Largest batch size, an integer >= min_batch_size.
      initial_batch_size: Size to start from, in [min_batch_size, max_batch_size]; the smallest
        if None.

    Returns:
      A transformation that returns the updates unchanged and whose `update` reads `grad_stats` and,
      if given, `batch_size`, the applied size.

    Raises:
      ValueError: If an argument is out of its range.
      TypeError: If `update` is called without `grad_stats`.

    Reference:
      Qin et al., "SimiGrad: Fine-Grained Adaptive Batching for Large Scale Training using Gradient
      Similarity Measurement", NeurIPS 2021.

    *Guarantees*:
      * Updates unchanged: they pass through as they are.
      * Stays in range: the size is an integer of [min_batch_size, max_batch_size].
      * Skips and counts: a step with a signal that is not finite changes nothing but `num_skipped`.
      * One factor per decision: however many steps pass, the size is at most a factor (or one
        example) away from the applied size.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.simigrad(decide_every=1, initial_batch_size=64))
    >>> stats = aj.GradStats(*jnp.array([0.5, 40.0, 64.0, 1.75, 0.2, 3.0]))
    >>> _, state = tx.update({"w": 1.0}, tx.init({"w": 0.0}), grad_stats=stats, batch_size=64)
    >>> int(aj.get_batch_size(state))  # a cosine of 0.2 is below the target
    96
    """
    target = _validate.in_range(-1, 1, closed="neither", target=target)
    factor = _validate.greater(1, factor=factor)
    interval = _validate.int32(decide_every=decide_every, minimum=1)
    low, high, start = _validate.batch_size_range(
        min_batch_size, max_batch_size, initial_batch_size
    )
    low, high, start = _numerics.measurable_range(low, high, start)

    def init_fn(params):
        del params
        return SimigradState(
            **_rule.sizes(low, high, start),
            similarity=_rule.zero(),
            count=_rule.int32(),
            num_skipped=_rule.int32(),
        )

    def update_state(state, *, grad_stats: Any = None, batch_size=None, **extra_args):
        del extra_args
        base.require("simigrad", grad_stats=grad_stats)
        cosine = grad_stats.half_cosine
        count = state.count + 1
        similarity = state.similarity + (cosine - state.similarity) / count
        applied = base.applied_batch_size(batch_size, state)
        # Rounded away from the applied size, or small sizes could never move.
        grown = _rule.to_size(applied * factor, low, high, jnp.ceil)
        shrunk = _rule.to_size(applied / factor, low, high, jnp.floor)
        due = count >= interval
        decision = jnp.where(similarity < target, grown, shrunk)
        new = state._replace(
            batch_size=jnp.where(due, decision, state.batch_size),
            similarity=jnp.where(due, 0, similarity),
            count=jnp.where(due, 0, count),
        )
        return _numerics.update_or_skip(jnp.isfinite(cosine), new, state)

    return _rule.transformation(init_fn, update_state, (low, high))
