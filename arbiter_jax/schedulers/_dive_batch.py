"""DiveBatch: a batch size in proportion to the diversity of the gradients of the last epoch.

The gradient diversity of Yin et al. (2018, arXiv:1706.05699) bounds the batch sizes at which SGD
still gains as much per example as with single ones; DiveBatch (2025) makes it the next batch size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _numerics, _validate, base
from arbiter_jax._count import Count, as_count
from arbiter_jax.schedulers import _rule


class DiveBatchState(NamedTuple):
    """State of :func:`dive_batch`."""

    batch_size: jax.Array  # shape=(), dtype=int32, in examples
    min_batch_size: jax.Array  # shape=(), dtype=int32
    max_batch_size: jax.Array  # shape=(), dtype=int32
    gradient_sum: base.PyTree  # like the parameters, sum of the g_i of this epoch
    sq_norm_sum: jax.Array  # shape=(), dtype=float, sum of the |g_i|^2 of this epoch
    num_examples: Count  # examples in both sums
    ledger: Count  # training examples up to the last update, if they are counted; see base
    num_skipped: jax.Array  # shape=(), dtype=int32, steps whose signals carried no information
    requires = ("grad_stats",)


def dive_batch(
    dataset_size: int,
    *,
    delta: float = 1e-4,
    min_batch_size: int = 8,
    max_batch_size: int = 512,
    initial_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Grows the batch after an epoch if the gradients of its examples differed widely (DiveBatch).

    .. math::
      B \leftarrow clip(\lfloor \delta N D \rfloor, B, b_{max}), \qquad
      D = \frac{\sum_i |g_i|^2}{|\sum_i g_i|^2}

    with both sums over the examples of one epoch, each gradient taken where the parameters then
    were. The inner sum of a batch comes from the statistics,
    :math:`\sum_i |g_i|^2 = (B - 1) \widehat{tr S} + B |\bar g|^2`, which is exact for per-example
    statistics and unbiased for pieces.

    Place it *before* the optimizer, `optax.chain(dive_batch(...), optax.sgd(0.1))`, where the
    updates still are the gradients; or pass them as `update(..., grad=grads)`, and it may stand
    anywhere. It keeps one sum of gradients, as large as the parameters.

    Args:
      dataset_size: N, number of training examples, an integer >= 1. An epoch ends when this many
        examples have been seen.
      delta: Share of the diversity to use, > 0. N D is of the order of (\|G\|^2 + tr S) / \|G\|^2,
        so that the published 1e-4 moves the size only on gradients that nearly cancel.
      min_batch_size: Smallest batch size, an integer >= 1; 1 is taken as 2, because one example
        carries no information about noise.
      max_batch_size: Largest batch size, an integer >= min_batch_size.
      initial_batch_size: Size to start from, in [min_batch_size, max_batch_size]; the smallest
        if None.

    Returns:
      A transformation that returns the updates unchanged and whose `update` reads `grad_stats` and,
      if given, `grad`, the gradients, and `batch_size`, the applied size.

    Raises:
      ValueError: If an argument is out of its range.
      TypeError: If `update` is called without `grad_stats`.

    Reference:
      "DiveBatch: Accelerating Model Training Through Gradient-Diversity Aware Batch Size
      Adaptation", 2025; Yin et al., "Gradient Diversity: a Key Ingredient for Scalable Distributed
      Learning", AISTATS 2018, arXiv:1706.05699.

    *Guarantees*:
      * Updates unchanged: they pass through as they are.
      * Stays in range: the size is an integer of [min_batch_size, max_batch_size].
      * Skips and counts: a step with a signal that is not finite changes nothing but `num_skipped`.
      * Grows only: no decision is below the applied size.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> tx = optax.chain(aj.schedulers.dive_batch(dataset_size=32, delta=0.5), optax.sgd(0.1))
    >>> stats = aj.GradStats(*jnp.array([0.5, 40.0, 32.0, 1.0, 0.2, 3.0]))
    >>> _, state = tx.update({"w": 1.0}, tx.init({"w": 0.0}), grad_stats=stats)
    >>> int(aj.get_batch_size(state))  # 0.5 * 32 * (31 * 40 + 32 * 1) / (32 * 1)^2 = 19.875
    19
    """
    size_of_epoch = _validate.count(dataset_size=dataset_size)
    delta = _validate.positive(delta=delta)
    low, high, start = _validate.batch_size_range(
        min_batch_size, max_batch_size, initial_batch_size
    )
    low, high, start = _numerics.measurable_range(low, high, start)

    def init_fn(params):
        # Statistics are those of all gradients, and so must be the sum.
        _validate.all_parameters("dive_batch", params)
        return DiveBatchState(
            **_rule.sizes(low, high, start),
            # At least float32: an epoch of bfloat16 gradients would add up to rounding errors.
            gradient_sum=jax.tree.map(
                lambda p: jnp.zeros(
                    jnp.shape(p), jnp.promote_types(jnp.result_type(p), jnp.float32)
                ),
                params,
            ),
            sq_norm_sum=_rule.zero(),
            num_examples=as_count(0),
            ledger=as_count(0),
            num_skipped=_rule.int32(),
        )

    def update_state(state, *, updates, grad_stats: Any = None, grad=None, **signals):
        base.require("dive_batch", grad_stats=grad_stats)
        update = base.applied_update(state, **signals)
        counted = state._replace(ledger=update.ledger)
        size = grad_stats.batch_size
        sq_norm = (size - 1) * grad_stats.variance_trace + size * grad_stats.batch_sq_norm
        if not isinstance(update.num_calls, int):  # what one call says stands for all of them
            sq_norm = update.size / size * sq_norm
            size = update.size.astype(float)
        gradient_sum = jax.tree.map(
            lambda total, g: total + size.astype(total.dtype) * jnp.asarray(g).astype(total.dtype),
            state.gradient_sum,
            updates if grad is None else grad,
        )
        sq_norm_sum = state.sq_norm_sum + sq_norm
        num_examples = state.num_examples + as_count(jnp.round(size))
        diversity = _rule.safe_ratio(sq_norm_sum, optax.tree.norm(gradient_sum, squared=True))
        applied = jnp.clip(update.call_size, low, high)
        # An epoch of zero gradients has no diversity, and leaves the size as it is.
        wanted = update.per_call(delta * jnp.asarray(size_of_epoch, float) * diversity)
        wanted = jnp.where(jnp.isnan(diversity), applied, wanted)
        decision = _rule.to_size(wanted, applied, high, jnp.floor)
        ended = num_examples >= size_of_epoch

        def restart(tree):
            return jax.tree.map(lambda x: jnp.where(ended, jnp.zeros_like(x), x), tree)

        new = counted._replace(
            batch_size=jnp.where(ended, decision, state.batch_size),
            gradient_sum=restart(gradient_sum),
            sq_norm_sum=restart(sq_norm_sum),
            num_examples=restart(num_examples),
        )
        # Judged before the restart, which would hide what is not finite.
        usable = _numerics.all_finite(gradient_sum, sq_norm_sum, size) & (sq_norm != 0)
        return _numerics.update_or_skip(usable, new, counted)

    return _rule.transformation(init_fn, update_state, (low, high))
