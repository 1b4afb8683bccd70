"""AdaScale: a learning rate that grows with the batch size as far as gradient noise allows."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _schedules, _validate
from arbiter_jax._count import Count, as_count, compensated_sum
from arbiter_jax._numerics import scale_updates, update_or_skip
from arbiter_jax.base import applied_update, require
from arbiter_jax.learning_rate._scale_by_batch_size import relative_size


class AdaScaleState(NamedTuple):
    """State of :func:`adascale`."""

    learning_rate: jax.Array  # shape=(), dtype=float32, the factor of the last step
    gain: jax.Array  # shape=(), dtype=float32, r of the last step
    # Kept here, although `fit` sums it too, because your own loop may not pass `progress`.
    progress: jax.Array  # shape=(), dtype=float, sum of the gains, in steps of the reference size
    progress_error: jax.Array  # shape=(), dtype=float, what rounding has added to that sum
    variance: jax.Array  # shape=(), dtype=float, average of s^2, not corrected for its start
    mean_sq_norm: jax.Array  # shape=(), dtype=float, average of m^2, likewise
    num_updates: jax.Array  # shape=(), dtype=int32, tells whether an update was made; may wrap
    ledger: Count  # training examples up to the last update, if they are counted; see base
    num_skipped: jax.Array  # shape=(), dtype=int32, statistics or rates that were not finite

    requires = ("grad_stats",)
    metrics = ("gain", "progress")

    @property
    def progress_per_step(self) -> jax.Array:
        """How many steps of the reference batch size the last update was worth, float32[]."""
        return self.gain


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

    The gain r is near S if gradient noise dominates and near 1 if it is negligible. :math:`\tau`
    counts the steps of the reference size that would have made the same progress, so a schedule of
    it need not know the batch size. The average of :math:`s^2` refers to B_0 and needs no rescaling
    when B changes.

    Args:
      reference: B_0, the batch size that the learning rate was tuned for, an integer >= 1.
      learning_rate: eta, a factor >= 0 or a schedule of :math:`\lfloor \tau \rfloor`, as it was
        at B_0.
      decay: Weight of the past in the averages of s^2 and m^2, in [0, 1); None for the published
        max(1 - S / 1000, 0).

    Returns:
      A transformation to chain after the optimizer. It reads `grad_stats` and `batch_size`; and
      `num_examples`, which inside `optax.MultiSteps` says how many examples B an update has. Its
      state has the `gain` of the last step and the `progress`, :math:`\tau`.

    Raises:
      ValueError: If an argument is outside its range; in `init`, if the schedule does not return a
        scalar, or one that is not finite at 0.
      TypeError: If ``update`` is called without a signal.

    Reference:
      Johnson et al., `AdaScale SGD: A User-Friendly Algorithm for Distributed Training
      <https://arxiv.org/abs/2007.05105>`_, ICML 2020, algorithm 1.

    *Guarantees*:
      * Between 1 and S: the gain never leaves [min(1, S), max(1, S)].
      * The reference is neutral: at B = B_0 the gain is 1.
      * Skips and counts: statistics that are not finite do not enter the averages, and at a step at
        which the schedule is not finite the factor of the step before is kept; `num_skipped` counts
        both.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.adascale(reference=64))
    >>> stats = aj.GradStats(*jnp.array([1.0, 192.0, 256.0, 1.75, 0.1, 9.0]))  # m^2 = 1, s^2 = 3
    >>> updates, state = tx.update(
    ...     {"w": 1.0}, tx.init({"w": 0.0}), grad_stats=stats, batch_size=256
    ... )
    >>> print(f"{state[1].gain:.3f} {updates['w']:.3f}")  # (3 + 1) / (3 / 4 + 1)
    2.286 -0.229
    """
    reference = _validate.int32(reference=reference, minimum=1)
    if not callable(learning_rate):
        learning_rate = _validate.non_negative(learning_rate=learning_rate)
        _schedules.first_rate(learning_rate, learning_rate=learning_rate)
    if decay is not None:
        decay = _validate.in_range(0, 1, closed="left", decay=decay)

    def rate_at(progress):
        if not callable(learning_rate):
            return jnp.asarray(learning_rate)
        return _schedules.schedule_value(progress, float, learning_rate=learning_rate)

    def init_fn(params) -> Any:  # optax's own type of a state knows arrays alone
        del params
        first = rate_at(jnp.asarray(0, jnp.int32))
        if callable(learning_rate):
            _schedules.first_rate(first, learning_rate=learning_rate)
        return AdaScaleState(
            # What is kept if the first rate is not finite, as only a traced one may be: no step.
            learning_rate=jnp.isfinite(first).astype(jnp.float32),
            gain=jnp.ones((), jnp.float32),
            progress=jnp.zeros((), float),
            variance=jnp.zeros((), float),
            mean_sq_norm=jnp.zeros((), float),
            progress_error=jnp.zeros((), float),
            num_updates=jnp.asarray(0, jnp.int32),
            ledger=as_count(0),
            num_skipped=jnp.asarray(0, jnp.int32),
        )

    def update_fn(
        updates,
        state,
        params=None,
        *,
        grad_stats: Any = None,
        batch_size=None,
        probe=None,
        **extra_args,
    ) -> Any:
        del params
        if probe is not None:
            return updates, state
        require("adascale", grad_stats=grad_stats, batch_size=batch_size)
        update = applied_update(state, batch_size=batch_size, **extra_args)
        scale = relative_size(update.size, reference)
        weight = jnp.maximum(1 - scale / 1000, 0.0) if decay is None else decay

        variance = grad_stats.variance_trace / reference
        usable = jnp.isfinite(variance) & jnp.isfinite(grad_stats.mean_sq_norm)
        averaged = state._replace(
            variance=weight * state.variance + (1 - weight) * variance,
            mean_sq_norm=weight * state.mean_sq_norm + (1 - weight) * grad_stats.mean_sq_norm,
        )
        state = update_or_skip(usable, averaged, state)

        # Unbiased estimates may be negative. Both averages have the same bias, which cancels.
        variance = jnp.maximum(state.variance, 0.0)
        mean_sq_norm = jnp.maximum(state.mean_sq_norm, 0.0)
        denominator = variance / scale + mean_sq_norm
        known = (denominator > 0) & jnp.isfinite(variance + mean_sq_norm)
        gain = (variance + mean_sq_norm) / jnp.where(known, denominator, 1.0)
        gain = jnp.clip(jnp.where(known, gain, 1.0), jnp.minimum(scale, 1), jnp.maximum(scale, 1))
        progress = jnp.floor(state.progress).astype(jnp.int32)
        factor = (gain * rate_at(progress)).astype(jnp.float32)
        finite = jnp.isfinite(factor)
        skipped = state.num_skipped + (~finite).astype(jnp.int32)
        factor = jnp.where(finite, factor, state.learning_rate)
        total, error = compensated_sum(state.progress, state.progress_error, gain)
        state = state._replace(
            learning_rate=factor,
            gain=gain.astype(jnp.float32),
            progress=total.astype(state.progress.dtype),
            progress_error=error.astype(state.progress.dtype),
            num_updates=state.num_updates + 1,
            ledger=update.ledger,
            num_skipped=skipped,
        )
        return scale_updates(updates, factor), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
