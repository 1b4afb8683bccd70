"""The gradient noise scale as a batch size: where noise and signal of the gradient are equal.

McCandlish, Kaplan, Amodei et al. (2018), "An Empirical Model of Large-Batch Training",
arXiv:1812.06162.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _numerics, _validate, base
from arbiter_jax._count import Count, as_count
from arbiter_jax.schedulers import _rule


class GradientNoiseScaleState(NamedTuple):
    """State of :func:`gradient_noise_scale`."""

    batch_size: jax.Array  # shape=(), dtype=int32, in examples
    min_batch_size: jax.Array  # shape=(), dtype=int32
    max_batch_size: jax.Array  # shape=(), dtype=int32
    variance_trace: jax.Array  # shape=(), dtype=float, average of the estimates of tr S
    mean_sq_norm: jax.Array  # shape=(), dtype=float, average of the estimates of |G|^2
    weight: jax.Array  # shape=(), dtype=float, of both averages, 0 at the start
    ledger: Count  # training examples up to the last update, if they are counted; see base
    num_skipped: jax.Array  # shape=(), dtype=int32, steps whose signals carried no information
    num_steps: jax.Array  # shape=(), dtype=int32
    signals_due: jax.Array | None  # shape=(), dtype=bool; None: at every step
    requires = ("grad_stats",)
    metrics = ("variance_trace", "mean_sq_norm")

    @property
    def noise_scale(self) -> jax.Array:
        """N, the running noise scale in examples; infinite if noise hides the signal, nan at first."""
        return _rule.safe_ratio(self.variance_trace, self.mean_sq_norm)


def gradient_noise_scale(
    *,
    scale: float = 1.0,
    decay: float = 0.99,
    norm: str = "l2",
    measure_every: int = 1,
    min_batch_size: int = 8,
    max_batch_size: int = 512,
    initial_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sets the batch size to the noise scale, where gradient noise and signal are equally large.

    .. math:: B = round\left( c \frac{E[\widehat{tr S}]}{E[\widehat{|G|^2}]} \right)

    with S the covariance of the per-example gradients, G their mean, and E an exponential average
    over steps. Numerator and denominator are averaged apart because a ratio of means is nearly
    unbiased and a mean of ratios is not. Where the average of :math:`|G|^2` is not positive the noise
    hides the gradient, and the size is the largest.

    That is the scale of SGD. Of Adam and other optimizers that step by the sign of a gradient it is
    the same in the l1 norm,

    .. math:: B = c \frac{E[(\sum \sqrt{\widehat{diag S}})^2]}{E[\max(0, \sum G_1 sign(G_2))^2]}

    with G_1 and G_2 the mean gradients of the two halves of the batch, whose noise is independent: in
    pure noise the scale would otherwise follow the size in use.

    Args:
      scale: c, > 0.
      decay: Weight of the past in the averages, in [0, 1).
      norm: "l2" for SGD and momentum, "l1" for Adam and its kin.
      measure_every: Steps from one measurement to the next, an integer >= 1. Training loops make
        the statistics only at those steps.
      min_batch_size: Smallest batch size, an integer >= 1; 1 is taken as 2, because one example
        carries no information about noise.
      max_batch_size: Largest batch size, an integer >= min_batch_size.
      initial_batch_size: Size to start from, in [min_batch_size, max_batch_size]; the smallest
        if None.

    Returns:
      A transformation that returns the updates unchanged and whose `update` reads `grad_stats`.

    Raises:
      ValueError: If an argument is out of its range.
      TypeError: If `update` is called without `grad_stats`.

    Reference:
      McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv:1812.06162, Eq. 2.9 and
      appendix A.1; Naganuma et al., arXiv:2602.03001, for the l1 norm.

    *Guarantees*:
      * Updates unchanged: they pass through as they are.
      * Stays in range: the size is an integer of [min_batch_size, max_batch_size].
      * Skips and counts: a step with a signal that is not finite changes nothing but `num_skipped`.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.gradient_noise_scale())
    >>> stats = aj.GradStats(*jnp.array([0.5, 40.0, 32.0, 1.75, 0.2, 3.0]))
    >>> _, state = tx.update({"w": 1.0}, tx.init({"w": 0.0}), grad_stats=stats)
    >>> int(aj.get_batch_size(state))  # 40 / 0.5
    80
    """
    scale = _validate.positive(scale=scale)
    decay = _validate.in_range(0, 1, closed="left", decay=decay)
    _validate.one_of(("l1", "l2"), norm=norm)
    interval = _validate.int32(measure_every=measure_every, minimum=1)
    always = not isinstance(interval, jax.Array) and interval == 1
    low, high, start = _validate.batch_size_range(
        min_batch_size, max_batch_size, initial_batch_size
    )
    low, high, start = _numerics.measurable_range(low, high, start)

    def init_fn(params):
        del params
        return GradientNoiseScaleState(
            **_rule.sizes(low, high, start),
            variance_trace=_rule.zero(),
            mean_sq_norm=_rule.zero(),
            weight=_rule.zero(),
            ledger=as_count(0),
            num_skipped=_rule.int32(),
            num_steps=_rule.int32(),
            signals_due=None if always else jnp.array(True),
        )

    def update_state(state, *, grad_stats: Any = None, **signals):
        base.require("gradient_noise_scale", grad_stats=grad_stats)
        return _rule.measured_at_interval(
            state, signals, interval, lambda new, update: measured(new, grad_stats, update)
        )

    def measured(state, grad_stats, update):
        sample = grad_stats.variance_trace, grad_stats.mean_sq_norm
        if norm == "l1":
            signal = jnp.maximum(jnp.asarray(grad_stats.abs_signal), 0)
            sample = jnp.square(jnp.asarray(grad_stats.abs_deviation)), jnp.square(signal)
        (variance, signal), weight = _numerics.running_mean(
            (state.variance_trace, state.mean_sq_norm), state.weight, sample, decay
        )
        size = scale * _rule.safe_ratio(variance, signal)
        new = state._replace(
            batch_size=_rule.to_size(update.per_call(size), low, high),
            variance_trace=variance,
            mean_sq_norm=signal,
            weight=weight,
        )
        usable = _rule.is_informative(*sample) & ~jnp.isnan(size)
        return _numerics.update_or_skip(usable, new, state)

    return _rule.transformation(init_fn, update_state, (low, high))
