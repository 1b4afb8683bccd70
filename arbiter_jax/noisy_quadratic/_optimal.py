"""Schedules that optimize several steps of the noisy quadratic together, by L-BFGS through them.

The long-horizon optimum minimizes the excess loss at the end of training. A receding horizon
minimizes it a fixed number of steps ahead and applies the first step only; its length interpolates
between greedy and optimal. Wu et al., "Understanding Short-Horizon Bias in Stochastic
Meta-Optimization", ICLR 2018, https://arxiv.org/abs/1803.02021.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from arbiter_jax import _validate
from arbiter_jax.noisy_quadratic import _lbfgs
from arbiter_jax.noisy_quadratic._greedy import greedy_rates, greedy_schedule
from arbiter_jax.noisy_quadratic._moments import (
    Moments,
    NoisyQuadratic,
    RateSchedule,
    as_problem,
    check_range,
    excess_of,
    initial_moments,
    momentum_step,
    rollout,
    rollout_from,
)

MAX_MOMENTUM = 0.99
_INITIAL_MOMENTUM = 0.5


def _decode(z: jax.Array, cap: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Learning rates and momenta, float[T] each, from float[1 or 2, T]."""
    rates = _lbfgs.from_unconstrained(z[0], 0.0, cap)
    if z.shape[0] == 1:
        return rates, jnp.zeros_like(rates)
    return rates, _lbfgs.from_unconstrained(z[1], 0.0, MAX_MOMENTUM)


def _encode(learning_rates: jax.Array, cap: jax.Array, momentum: bool) -> jax.Array:
    """The initial point: the given rates, and all momenta one half."""
    rows = [_lbfgs.to_unconstrained(learning_rates, 0.0, cap)]
    if momentum:
        mus = jnp.full_like(learning_rates, _INITIAL_MOMENTUM)
        rows.append(_lbfgs.to_unconstrained(mus, 0.0, MAX_MOMENTUM))
    return jnp.stack(rows)


def _log(excess_loss: jax.Array) -> jax.Array:
    # The floor keeps the logarithm finite if the problem is solved exactly (no noise, d <= T).
    return jnp.log(excess_loss + jnp.finfo(excess_loss.dtype).tiny)


@partial(jax.jit, static_argnames=("momentum", "max_iterations"))
def _optimize(
    problem: NoisyQuadratic,
    start: jax.Array,
    cap: jax.Array,
    momentum: bool,
    max_iterations: int,
) -> tuple[jax.Array, jax.Array]:
    def objective(z):
        return _log(rollout_from(problem, initial_moments(problem), *_decode(z, cap))[-1])

    z = _lbfgs.minimize(objective, _encode(start, cap, momentum), max_iterations)
    return _decode(z, cap)


def _as_cap(problem: NoisyQuadratic, max_learning_rate: float | None) -> jax.Array:
    if max_learning_rate is None:
        check_range("curvature", jnp.max(problem.curvature), 0, closed=False)
        return 1 / jnp.max(problem.curvature)
    cap = _validate.positive(max_learning_rate=max_learning_rate)
    return jnp.asarray(cap, problem.curvature.dtype)


def optimal_schedule(
    problem: NoisyQuadratic,
    num_steps: int,
    momentum: bool = False,
    max_learning_rate: float | None = None,
    *,
    max_iterations: int = 400,
) -> RateSchedule:
    r"""The schedule that minimizes the excess loss after the last step.

    Minimizes :math:`\log L_T(\alpha_1 \ldots \alpha_T, \mu_1 \ldots \mu_T)` by L-BFGS through the
    exact dynamics, with :math:`0 \le \alpha_t \le` `max_learning_rate` and :math:`0 \le \mu_t \le
    0.99`. Without these bounds the problem has many local minima, among them schedules whose loss
    first rises by orders of magnitude.

    Args:
      problem: The quadratic, float[d] in each field.
      num_steps: T, an integer >= 1.
      momentum: Whether to choose the momenta as well.
      max_learning_rate: Upper bound of the learning rate, > 0; 1 / max h if None.
      max_iterations: Maximum number of L-BFGS iterations, an integer >= 1.

    Returns:
      A :class:`RateSchedule`: learning rates float[T], momenta float[T], excess loss float[T + 1].

    Raises:
      ValueError: If the fields of the problem differ in shape or are negative, or another argument
        is outside its range.

    Reference:
      Wu et al. 2018, https://arxiv.org/abs/1803.02021, section 2.4.

    *Guarantees*: stays within the bounds; without momentum, ends no higher than the greedy schedule
    if that stays within the bounds too. With momentum, the minimum found is a local one.

    >>> import arbiter_jax as aj, jax.numpy as jnp
    >>> h = jnp.array([1.0, 0.05])
    >>> problem = aj.noisy_quadratic.NoisyQuadratic(h, 1 / h, 10 * jnp.ones(2))
    >>> greedy = aj.noisy_quadratic.greedy_schedule(problem, 20)
    >>> optimal = aj.noisy_quadratic.optimal_schedule(problem, 20)
    >>> bool(optimal.excess_loss[-1] < 0.8 * greedy.excess_loss[-1])
    True
    >>> bool(optimal.learning_rates[10] > 2 * greedy.learning_rates[10])  # greedy decays too early
    True
    """
    problem = as_problem(problem)
    num_steps = _validate.integer(num_steps=num_steps, minimum=1, maximum=2**31 - 1)
    momentum = bool(_validate.one_of((False, True), momentum=momentum))
    iterations = _validate.integer(max_iterations=max_iterations, minimum=1)
    cap = _as_cap(problem, max_learning_rate)
    start = greedy_schedule(problem, num_steps).learning_rates
    rates, mus = _optimize(problem, start, cap, momentum, iterations)
    return RateSchedule(rates, mus, rollout(problem, rates, mus))


@partial(jax.jit, static_argnames=("num_steps", "horizon", "momentum", "max_iterations"))
def _recede(
    problem: NoisyQuadratic,
    cap: jax.Array,
    num_steps: int,
    horizon: int,
    momentum: bool,
    max_iterations: int,
) -> RateSchedule:
    def plan_start(moments: Moments) -> jax.Array:
        def body(moments, _):
            rate, mu = greedy_rates(problem, moments, momentum=False)
            rate = jnp.minimum(rate, cap)
            return momentum_step(problem, moments, rate, mu), rate

        rates = jax.lax.scan(body, moments, None, length=horizon)[1]
        return _encode(rates, cap, momentum)

    def body(carry, step):
        moments, plan = carry
        ahead = jnp.minimum(horizon, num_steps - step)  # not past the end of training

        def objective(z):
            return _log(rollout_from(problem, moments, *_decode(z, cap))[ahead - 1])

        plan = _lbfgs.minimize(objective, plan, max_iterations)
        rate, mu = (row[0] for row in _decode(plan, cap))
        moments = momentum_step(problem, moments, rate, mu)
        # Start the next plan from the rest of this one, moved off bounds that have no slope.
        rates, mus = (jnp.append(row[1:], row[-1]) for row in _decode(plan, cap))
        plan = _lbfgs.to_unconstrained(rates, 0.0, cap)[None]
        if momentum:
            plan = jnp.append(plan, _lbfgs.to_unconstrained(mus, 0.0, MAX_MOMENTUM)[None], axis=0)
        return (moments, plan), (rate, mu, excess_of(problem, moments))

    moments = initial_moments(problem)
    start = excess_of(problem, moments)[None]
    carry = (moments, plan_start(moments))
    _, (rates, mus, losses) = jax.lax.scan(body, carry, jnp.arange(num_steps))
    return RateSchedule(rates, mus, jnp.concatenate([start, losses]))


def receding_horizon_schedule(
    problem: NoisyQuadratic,
    num_steps: int,
    horizon: int,
    momentum: bool = False,
    max_learning_rate: float | None = None,
    *,
    max_iterations: int = 50,
) -> RateSchedule:
    r"""A schedule that optimizes the next `horizon` steps at every step, and applies the first one.

    This is what a meta-optimizer with that look-ahead would do if it solved its own problem exactly.
    The look-ahead does not exceed training: at step t it covers min(horizon, T - t) steps.

    Args:
      problem: The quadratic, float[d] in each field.
      num_steps: T, an integer >= 1.
      horizon: Look-ahead in steps, an integer in [1, num_steps]. 1 is greedy (with the cap), T is
        optimal.
      momentum: Whether to choose the momenta as well.
      max_learning_rate: Upper bound of the learning rate, > 0; 1 / max h if None.
      max_iterations: Maximum number of L-BFGS iterations per step, an integer >= 1.

    Returns:
      A :class:`RateSchedule`: learning rates float[T], momenta float[T], excess loss float[T + 1].

    Raises:
      ValueError: If the fields of the problem differ in shape or are negative, or another argument
        is outside its range.

    Reference:
      Wu et al. 2018, https://arxiv.org/abs/1803.02021, section 2.

    *Guarantees*: with horizon 1, the greedy rate limited to the cap; with horizon T, the optimum.

    >>> import arbiter_jax as aj, jax.numpy as jnp
    >>> h = jnp.array([1.0, 0.05])
    >>> problem = aj.noisy_quadratic.NoisyQuadratic(h, 1 / h, 10 * jnp.ones(2))
    >>> losses = [
    ...     aj.noisy_quadratic.receding_horizon_schedule(problem, 20, horizon).excess_loss[-1]
    ...     for horizon in (1, 5, 20)
    ... ]
    >>> bool(losses[0] > losses[1] > losses[2])
    True
    """
    problem = as_problem(problem)
    num_steps = _validate.integer(num_steps=num_steps, minimum=1, maximum=2**31 - 1)
    momentum = bool(_validate.one_of((False, True), momentum=momentum))
    horizon = _validate.integer(horizon=horizon, minimum=1, maximum=num_steps)
    iterations = _validate.integer(max_iterations=max_iterations, minimum=1)
    cap = _as_cap(problem, max_learning_rate)
    return _recede(problem, cap, num_steps, horizon, momentum, iterations)
