"""AdaDamp: a batch size in inverse proportion to the loss that is left.

Sievert and Shah (2021), "Improving the convergence of SGD through adaptive batch sizes",
arXiv:1910.08222.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _numerics, _validate, base
from arbiter_jax.schedulers import _rule


class AdadampState(NamedTuple):
    """State of :func:`adadamp`."""

    batch_size: jax.Array  # shape=(), dtype=int32, in examples
    min_batch_size: jax.Array  # shape=(), dtype=int32
    max_batch_size: jax.Array  # shape=(), dtype=int32
    initial_loss: jax.Array  # shape=(), dtype=float, F_0, 0 until it is known
    loss: jax.Array  # shape=(), dtype=float, average of the loss
    weight: jax.Array  # shape=(), dtype=float, of that average, 0 at the start
    num_skipped: jax.Array  # shape=(), dtype=int32, steps whose signals carried no information
    requires = ("value",)


def adadamp(
    *,
    optimal_loss: float = 0.0,
    decay: float = 0.95,
    min_batch_size: int = 8,
    max_batch_size: int = 512,
    initial_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Grows the batch as the loss falls, which damps the gradient noise (AdaDamp).

    .. math:: B = \left\lceil B_0 \frac{F_0 - F^*}{E[F] - F^*} \right\rceil

    with F the loss, F_0 that of the first batch, F* the least there can be. The published rule
    evaluates F on the whole data set; E is an exponential average over batches instead, which costs
    nothing.

    Args:
      optimal_loss: F*, a finite number.
      decay: Weight of the past in the average, in [0, 1).
      min_batch_size: Smallest batch size, an integer >= 1.
      max_batch_size: Largest batch size, an integer >= min_batch_size. It is also the decision
        where the average reaches F*.
      initial_batch_size: B_0, in [min_batch_size, max_batch_size]; the smallest if None.

    Returns:
      A transformation that returns the updates unchanged and whose `update` reads `value`, the
      loss.

    Raises:
      ValueError: If an argument is out of its range.
      TypeError: If `update` is called without `value`.

    Reference:
      Sievert and Shah, "Improving the convergence of SGD through adaptive batch sizes",
      arXiv:1910.08222.

    *Guarantees*:
      * Updates unchanged: they pass through as they are.
      * Stays in range: the size is an integer of [min_batch_size, max_batch_size].
      * Skips and counts: a step with a loss that is not finite changes nothing but `num_skipped`;
        neither does a first loss that is not above F*.

    >>> import arbiter_jax as aj, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.adadamp(decay=0, initial_batch_size=32))
    >>> _, state = tx.update({"w": 1.0}, tx.init({"w": 0.0}), value=2.0)
    >>> _, state = tx.update({"w": 1.0}, state, value=0.5)
    >>> int(aj.get_batch_size(state))
    128
    """
    optimal_loss = _validate.in_range(
        -float("inf"), float("inf"), closed="neither", optimal_loss=optimal_loss
    )
    decay = _validate.in_range(0, 1, closed="left", decay=decay)
    low, high, start = _validate.batch_size_range(
        min_batch_size, max_batch_size, initial_batch_size
    )

    def init_fn(params):
        del params
        return AdadampState(
            **_rule.sizes(low, high, start),
            initial_loss=_rule.zero(),
            loss=_rule.zero(),
            weight=_rule.zero(),
            num_skipped=_rule.int32(),
        )

    def update_state(state, *, value: Any = None, **extra_args):
        del extra_args
        base.require("adadamp", value=value)
        sample = jnp.asarray(value)
        first = jnp.where(state.weight > 0, state.initial_loss, sample)
        loss, weight = _numerics.running_mean(state.loss, state.weight, sample, decay)
        size = start * _rule.safe_ratio(first - optimal_loss, loss - optimal_loss)
        new = state._replace(
            batch_size=_rule.to_size(size, low, high, jnp.ceil),
            initial_loss=first,
            loss=loss,
            weight=weight,
        )
        usable = jnp.isfinite(sample) & (first > optimal_loss)
        return _numerics.update_or_skip(usable, new, state)

    return _rule.transformation(init_fn, update_state, (low, high))
