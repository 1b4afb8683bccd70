"""AdaScale: a learning rate that follows the batch size as far as gradient noise allows."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _validate
from arbiter_jax._numerics import tree_where
from arbiter_jax.base import require
from arbiter_jax.learning_rate._scale_by_batch_size import _relative_size, _scale


class AdaScaleState(NamedTuple):
    """State of :func:`adascale`."""

    learning_rate: jax.Array  # shape=(), dtype=float32, the factor of the last step
    gain: jax.Array  # shape=(), dtype=float32, r of the last step
    progress: jax.Array  # shape=(), dtype=float, sum of the gains, in steps of the reference size
    variance: jax.Array  # shape=(), dtype=float, average of s^2, up to the weight of both averages
    mean_sq_norm: jax.Array  # shape=(), dtype=float, average of m^2, up to the same weight
    num_skipped: jax.Array  # shape=(), dtype=int32, statistics that were not finite

    requires = ("grad_stats",)
    metrics = ("gain", "progress")


def adascale(
    reference: int,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    decay: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the updates by the gain of AdaScale, for SGD at any batch size.

    With S = B / B_0, :math:`s^2 = tr(\Sigma) / B_0` the variance of a gradient of B_0 examples and
    :math:`m^2 = |G|^2`, both averaged over the steps,

    .. math::
      r = \frac{s^2 + m^2}{s^2 / S + m^2}, \qquad \tau \gets \tau + r, \qquad
      \Delta w \to r\, \eta(\lfloor \tau \rfloor)\, \Delta w.

    The gain is near S where noise rules and near 1 where it does not. :math:`\tau` counts steps
    of the reference size that would have brought as far: a schedule of it need not know the batch
    size. Since :math:`s^2` is kept at the reference size, a change of B needs no rescaling of its
    average.

    Args:
      reference: B_0, the batch size that the learning rate was tuned for, an integer >= 1.
      learning_rate: eta, a factor >= 0 or a schedule of :math:`\lfloor \tau \rfloor`, as it was
        at B_0.
      decay: Weight of the past in the averages of s^2 and m^2, in [0, 1); None for the published
        max(1 - S / 1000, 0).

    Returns:
      A transformation to put after the optimizer, which reads `grad_stats` and `batch_size`. Its
      state has the `gain` of the last step and the `progress`, :math:`\tau`.

    Raises:
      ValueError: If an argument is outside of its range.
      TypeError: If ``update`` is called without a signal.

    Reference:
      Johnson et al., `AdaScale SGD: A User-Friendly Algorithm for Distributed Training
      <https://arxiv.org/abs/2007.05105>`_, ICML 2020, algorithm 1.

    *Guarantees*:
      * Between 1 and S: the gain never leaves [min(1, S), max(1, S)].
      * The reference is neutral: at B = B_0 the gain is 1.
      * Skips and counts: statistics that are not finite enter no average; `num_skipped` counts
        them.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.adascale(reference=64))
    >>> stats = aj.GradStats(*jnp.array([1.0, 192.0, 256.0, 1.75, 0.1, 9.0]))  # m^2 = 1, s^2 = 3
    >>> updates, state = tx.update(
    ...     {"w": 1.0}, tx.init({"w": 0.0}), grad_stats=stats, batch_size=256
    ... )
    >>> print(f"{state[1].gain:.3f} {updates['w']:.3f}")  # (3 + 1) / (3 / 4 + 1)
    2.286 -0.229
    """
    reference = _validate.integer(reference=reference, minimum=1)
    if not callable(learning_rate):
        learning_rate = _validate.non_negative(learning_rate=learning_rate)
    if decay is not None:
        decay = _validate.in_range(0, 1, closed="left", decay=decay)

    def init_fn(params):
        del params
        return AdaScaleState(
            learning_rate=jnp.ones((), jnp.float32),
            gain=jnp.ones((), jnp.float32),
            progress=jnp.zeros((), float),
            variance=jnp.zeros((), float),
            mean_sq_norm=jnp.zeros((), float),
            num_skipped=jnp.asarray(0, jnp.int32),
        )

    def update_fn(
        updates,
        state,
        params=None,
        *,
        grad_stats: Any = None,
        batch_size=None,
        **extra_args,
    ):
        del params, extra_args
        require("adascale", grad_stats=grad_stats, batch_size=batch_size)
        scale = _relative_size(batch_size, reference)
        weight = jnp.maximum(1 - scale / 1000, 0.0) if decay is None else decay

        variance = grad_stats.variance_trace / reference
        usable = jnp.isfinite(variance) & jnp.isfinite(grad_stats.mean_sq_norm)
        averaged = state._replace(
            variance=weight * state.variance + (1 - weight) * variance,
            mean_sq_norm=weight * state.mean_sq_norm + (1 - weight) * grad_stats.mean_sq_norm,
        )
        skipped = state._replace(num_skipped=optax.safe_increment(state.num_skipped))
        state = tree_where(usable, averaged, skipped)

        # Unbiased estimates may be negative. Both averages carry the same weight, which cancels.
        variance = jnp.maximum(state.variance, 0.0)
        mean_sq_norm = jnp.maximum(state.mean_sq_norm, 0.0)
        denominator = variance / scale + mean_sq_norm
        known = (denominator > 0) & jnp.isfinite(variance + mean_sq_norm)
        gain = (variance + mean_sq_norm) / jnp.where(known, denominator, 1.0)
        gain = jnp.clip(jnp.where(known, gain, 1.0), jnp.minimum(scale, 1), jnp.maximum(scale, 1))
        progress = jnp.floor(state.progress).astype(jnp.int32)
        rate = learning_rate(progress) if callable(learning_rate) else learning_rate
        factor = (gain * jnp.asarray(rate)).astype(jnp.float32)
        state = state._replace(
            learning_rate=factor,
            gain=gain.astype(jnp.float32),
            progress=(state.progress + gain).astype(state.progress.dtype),
        )
        return _scale(updates, factor), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
