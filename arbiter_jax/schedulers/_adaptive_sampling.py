"""Grow the batch until it passes a test of the gradient's accuracy.

A test that fails names the size that would pass.

The norm test bounds the error of the gradient (Byrd et al. 2012; Lau et al. 2024), the inner
product test only the part of it that turns descent into ascent (Bollapragada et al. 2018).
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


class NormTestState(NamedTuple):
    """State of :func:`norm_test`."""

    batch_size: jax.Array  # shape=(), dtype=int32, in examples
    min_batch_size: jax.Array  # shape=(), dtype=int32
    max_batch_size: jax.Array  # shape=(), dtype=int32
    numerator: jax.Array  # shape=(), dtype=float, average of tr S
    denominator: jax.Array  # shape=(), dtype=float, average of |gbar|^2
    weight: jax.Array  # shape=(), dtype=float, of both averages, 0 at the start
    ledger: Count  # training examples up to the last update, if they are counted; see base
    num_skipped: jax.Array  # shape=(), dtype=int32, steps whose signals carried no information
    num_steps: jax.Array  # shape=(), dtype=int32
    signals_due: jax.Array | None  # shape=(), dtype=bool; None: at every step
    requires = ("grad_stats",)


class InnerProductTestState(NamedTuple):
    """State of :func:`inner_product_test`."""

    batch_size: jax.Array  # shape=(), dtype=int32, in examples
    min_batch_size: jax.Array  # shape=(), dtype=int32
    max_batch_size: jax.Array  # shape=(), dtype=int32
    numerator: jax.Array  # shape=(), dtype=float, average of Var_i(g_i . gbar)
    denominator: jax.Array  # shape=(), dtype=float, average of |gbar|^4
    weight: jax.Array  # shape=(), dtype=float, of both averages, 0 at the start
    ledger: Count  # training examples up to the last update, if they are counted; see base
    num_skipped: jax.Array  # shape=(), dtype=int32, steps whose signals carried no information
    num_steps: jax.Array  # shape=(), dtype=int32
    signals_due: jax.Array | None  # shape=(), dtype=bool; None: at every step
    requires = ("grad_stats",)


def norm_test(
    *,
    eta: float = 0.1,
    decay: float = 0.0,
    measure_every: int = 1,
    min_batch_size: int = 8,
    max_batch_size: int = 512,
    initial_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Grows the batch until the relative error of its gradient is below eta (norm test).

    .. math::
      \text{if}\quad \frac{\widehat{tr S}}{B} > \eta^2 |\bar g|^2: \qquad
      B \leftarrow \left\lceil \frac{\widehat{tr S}}{\eta^2 |\bar g|^2} \right\rceil

    with B the applied batch size, gbar the mean gradient of the batch and S the covariance of the
    per-example gradients.

    Args:
      eta: Relative error allowed, > 0. 0.1 as published; 0.25 to 0.5 for deep networks, where 0.1
        asks for the largest size almost at once.
      decay: Weight of the past in the averages of tr S and of \|gbar\|^2, in [0, 1); 0 tests every
        batch by itself, as published.
      measure_every: Steps from one measurement to the next, an integer >= 1. Training loops make
        the statistics only at those steps.
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
      Byrd, Chin, Nocedal and Wu, "Sample Size Selection in Optimization Methods for Machine
      Learning", 2012; Lau, Li, Xu, Liu and Kolar, "AdAdaGrad: Adaptive Batch Size Schemes for
      Adaptive Gradient Methods", arXiv:2402.11215.

    *Guarantees*:
      * Updates unchanged: they pass through as they are.
      * Stays in range: the size is an integer of [min_batch_size, max_batch_size].
      * Skips and counts: a step with a signal that is not finite changes nothing but `num_skipped`.
      * Grows only: no measurement ends in a decision below the applied size.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.norm_test(eta=0.5))
    >>> stats = aj.GradStats(*jnp.array([0.5, 40.0, 32.0, 1.75, 0.2, 3.0]))
    >>> _, state = tx.update({"w": 1.0}, tx.init({"w": 0.0}), grad_stats=stats, batch_size=32)
    >>> int(aj.get_batch_size(state))  # 40 / (0.25 * 1.75) = 91.4
    92
    """
    eta = _validate.positive(eta=eta)
    return _growing_test(
        "norm_test",
        NormTestState,
        lambda stats: (stats.variance_trace, stats.batch_sq_norm),
        eta,
        decay,
        measure_every,
        _validate.batch_size_range(min_batch_size, max_batch_size, initial_batch_size),
    )


def inner_product_test(
    *,
    theta: float = 0.9,
    decay: float = 0.0,
    measure_every: int = 1,
    min_batch_size: int = 8,
    max_batch_size: int = 512,
    initial_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Grows the batch until its gradient very likely points downhill (inner-product test).

    .. math::
      \text{if}\quad \frac{Var_i(g_i \cdot \bar g)}{B} > \theta^2 |\bar g|^4: \qquad
      B \leftarrow \left\lceil \frac{Var_i(g_i \cdot \bar g)}{\theta^2 |\bar g|^4} \right\rceil

    with B the applied batch size, g_i the gradient of example i and gbar their mean, both over all
    parameters at once. It asks for smaller batches than :func:`norm_test`.

    Args:
      theta: Error allowed along the gradient, relative to its squared norm, > 0.
      decay: Weight of the past in the averages of numerator and denominator, in [0, 1); 0 tests
        every batch by itself, as published.
      measure_every: Steps from one measurement to the next, an integer >= 1. Training loops make
        the statistics only at those steps.
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
      Bollapragada, Byrd and Nocedal, "Adaptive Sampling Strategies for Stochastic Optimization",
      SIAM Journal on Optimization 28(4), 2018, arXiv:1710.11258.

    *Guarantees*:
      * Updates unchanged: they pass through as they are.
      * Stays in range: the size is an integer of [min_batch_size, max_batch_size].
      * Skips and counts: a step with a signal that is not finite changes nothing but `num_skipped`.
      * Grows only: no measurement ends in a decision below the applied size.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.inner_product_test(theta=0.5))
    >>> stats = aj.GradStats(*jnp.array([0.5, 40.0, 8.0, 2.0, 0.2, 60.0]))
    >>> _, state = tx.update({"w": 1.0}, tx.init({"w": 0.0}), grad_stats=stats, batch_size=8)
    >>> int(aj.get_batch_size(state))  # 60 / (0.25 * 2^2)
    60
    """
    theta = _validate.positive(theta=theta)
    return _growing_test(
        "inner_product_test",
        InnerProductTestState,
        lambda stats: (stats.inner_product_variance, stats.batch_sq_norm**2),
        theta,
        decay,
        measure_every,
        _validate.batch_size_range(min_batch_size, max_batch_size, initial_batch_size),
    )


def _growing_test(
    name: str,
    state_type: Any,
    read: Callable[[base.GradStats], tuple[jax.Array, jax.Array]],
    tolerance: float,
    decay: float,
    measure_every: int,
    limits: tuple[int, int, int],
) -> optax.GradientTransformationExtraArgs:
    """The rule of both tests: B >= numerator / (tolerance^2 denominator), or grow until it is."""
    decay = _validate.in_range(0, 1, closed="left", decay=decay)
    interval = _validate.int32(measure_every=measure_every, minimum=1)
    always = not isinstance(interval, jax.Array) and interval == 1
    low, high, start = _numerics.measurable_range(*limits)

    def init_fn(params):
        del params
        return state_type(
            **_rule.sizes(low, high, start),
            numerator=_rule.zero(),
            denominator=_rule.zero(),
            weight=_rule.zero(),
            ledger=as_count(0),
            num_skipped=_rule.int32(),
            num_steps=_rule.int32(),
            signals_due=None if always else jnp.array(True),
        )

    def update_state(state, *, grad_stats: Any = None, **signals):
        base.require(name, grad_stats=grad_stats)
        return _rule.measured_at_interval(
            state, signals, interval, lambda new, update: measured(new, grad_stats, update)
        )

    def measured(state, grad_stats, update):
        sample = read(grad_stats)
        (numerator, denominator), weight = _numerics.running_mean(
            (state.numerator, state.denominator), state.weight, sample, decay
        )
        needed = _rule.safe_ratio(numerator, denominator) / tolerance**2
        # If the test passes it needs no more than the applied size, which then stays. The
        # comparison is with that size and not with the last decision: noise would otherwise push up
        # decisions that are never applied.
        applied = jnp.clip(update.call_size, low, high)
        new = state._replace(
            batch_size=_rule.to_size(update.per_call(needed), applied, high, jnp.ceil),
            numerator=numerator,
            denominator=denominator,
            weight=weight,
        )
        usable = _rule.is_informative(*sample) & ~jnp.isnan(needed)
        return _numerics.update_or_skip(usable, new, state)

    return _rule.transformation(init_fn, update_state, (low, high))
