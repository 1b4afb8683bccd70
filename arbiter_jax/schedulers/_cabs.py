"""CABS: a batch size coupled to the learning rate, so that gradient noise falls with the loss.

Balles, Romero and Hennig (2017), "Coupling Adaptive Batch Sizes with Learning Rates", UAI,
arXiv:1612.05086.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _numerics, _validate, base
from arbiter_jax._count import Count, as_count
from arbiter_jax.schedulers import _rule


class CABSState(NamedTuple):
    """State of :func:`cabs`."""

    batch_size: jax.Array  # shape=(), dtype=int32, in examples
    min_batch_size: jax.Array  # shape=(), dtype=int32
    max_batch_size: jax.Array  # shape=(), dtype=int32
    gradient_variance: jax.Array  # shape=(), dtype=float, average of xi
    loss: jax.Array  # shape=(), dtype=float, average of the loss
    weight: jax.Array  # shape=(), dtype=float, of both averages, 0 at the start
    num_steps: jax.Array  # shape=(), dtype=int32
    ledger: Count  # training examples up to the last update, if they are counted; see base
    num_skipped: jax.Array  # shape=(), dtype=int32, steps whose signals carried no information
    requires = ("value", "grad_stats")


def cabs(
    learning_rate: float | Callable[[jax.Array], jax.Array],
    *,
    decay: float = 0.95,
    min_batch_size: int = 16,
    max_batch_size: int = 2048,
    initial_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sets the batch size in proportion to gradient variance over loss, for plain SGD (CABS).

    .. math::
      B = round\left( lr \frac{E[\xi]}{E[F]} \right), \qquad
      \xi = \sum_j \left( \tfrac{1}{B} \sum_i g_{ij}^2 - \bar g_j^2 \right)
          = \frac{B - 1}{B} \widehat{tr S}

    with g_ij entry j of the gradient of example i, F the loss, and E an exponential average. The
    loss is taken to have a minimum near 0. The published code starts its average of the loss at 1;
    here both averages are corrected for their start.

    Args:
      learning_rate: lr, the rate of the SGD in the same chain, > 0, or a schedule of the step.
      decay: Weight of the past in the averages, in [0, 1).
      min_batch_size: Smallest batch size, an integer >= 1; 1 is taken as 2, because one example
        carries no information about noise.
      max_batch_size: Largest batch size, an integer >= min_batch_size.
      initial_batch_size: Size to start from, in [min_batch_size, max_batch_size]; the smallest
        if None.

    Returns:
      A transformation that returns the updates unchanged and whose `update` reads `value`, the
      loss, and `grad_stats`.

    Raises:
      ValueError: If an argument is out of its range.
      TypeError: If `update` is called without a signal.

    Reference:
      Balles, Romero and Hennig, "Coupling Adaptive Batch Sizes with Learning Rates", UAI 2017,
      arXiv:1612.05086.

    *Guarantees*:
      * Updates unchanged: they pass through as they are.
      * Stays in range: the size is an integer of [min_batch_size, max_batch_size].
      * Skips and counts: a step with a signal that is not finite changes nothing but `num_skipped`
        and `num_steps`.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.cabs(learning_rate=0.1))
    >>> stats = aj.GradStats(*jnp.array([0.5, 256.0, 64.0, 4.5, 0.1, 9.0]))
    >>> _, state = tx.update({"w": 1.0}, tx.init({"w": 0.0}), value=0.3, grad_stats=stats)
    >>> int(aj.get_batch_size(state))  # 0.1 * (63 / 64 * 256) / 0.3
    84
    """
    if not callable(learning_rate):
        learning_rate = _validate.positive(learning_rate=learning_rate)
    decay = _validate.in_range(0, 1, closed="left", decay=decay)
    low, high, start = _validate.batch_size_range(
        min_batch_size, max_batch_size, initial_batch_size
    )
    low, high, start = _numerics.measurable_range(low, high, start)

    def init_fn(params):
        del params
        return CABSState(
            **_rule.sizes(low, high, start),
            gradient_variance=_rule.zero(),
            loss=_rule.zero(),
            weight=_rule.zero(),
            num_steps=_rule.int32(),
            ledger=as_count(0),
            num_skipped=_rule.int32(),
        )

    def update_state(state, *, value: Any = None, grad_stats: Any = None, **signals):
        base.require("cabs", value=value, grad_stats=grad_stats)
        rate = learning_rate(state.num_steps) if callable(learning_rate) else learning_rate
        size = grad_stats.batch_size
        xi = grad_stats.variance_trace * (size - 1) / size
        (variance, loss), weight = _numerics.running_mean(
            (state.gradient_variance, state.loss), state.weight, (xi, jnp.asarray(value)), decay
        )
        size = rate * _rule.safe_ratio(variance, loss)
        update = base.applied_update(state, **signals)
        counted = state._replace(
            num_steps=optax.safe_increment(state.num_steps), ledger=update.ledger
        )
        new = counted._replace(
            batch_size=_rule.to_size(update.per_call(size), low, high),
            gradient_variance=variance,
            loss=loss,
            weight=weight,
        )
        usable = _rule.is_informative(xi, jnp.asarray(value)) & ~jnp.isnan(size)
        return _numerics.update_or_skip(usable, new, counted)

    return _rule.transformation(init_fn, update_state, (low, high))
