"""The noise floor: the loss that noise sustains, and the pace of training. NOISE.md, Eqs. 7 to 17."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _validate
from arbiter_jax._numerics import tree_dot, tree_where
from arbiter_jax.objectives._objective import NoiseObjective, power_average, validation_loss
from arbiter_jax.objectives._persistence import Persistence, resolve_persistence


class ValidationPace(NamedTuple):
    """The same averages of the loss of validation examples, at the steps at which noise is measured."""

    recent_loss: jax.Array  # shape=(), dtype=float
    older_loss: jax.Array  # shape=(), dtype=float
    last_step: jax.Array  # shape=(), dtype=int32, the last step in them, counted from 1; 0: none

    requires = ("meta_batch",)


class FloorState(NamedTuple):
    """The loss that noise sustains, and the pace at which the loss falls."""

    noise: jax.Array  # shape=(), dtype=float, B times the noise floor, look i weighing i^3
    noisy_loss: jax.Array  # shape=(), dtype=float, average of the loss at the same steps
    num_looks: jax.Array  # shape=(), dtype=int32, steps in these two
    recent_loss: jax.Array  # shape=(), dtype=float, average of the loss, step t weighing t^3
    older_loss: jax.Array  # shape=(), dtype=float, average of the loss, step t weighing t
    num_steps: jax.Array  # shape=(), dtype=int32, steps in these two
    num_examples: jax.Array  # shape=(), dtype=int32, examples seen, of the budget
    held_batch_size: jax.Array  # shape=(), dtype=float, what is to be held; 0: unknown
    size_when_held: jax.Array  # shape=(), dtype=float, the size in force when that was last told
    validation: ValidationPace | None  # where the objective was given a loss function

    requires = ("value", "gradient_noise", "update_noise", "grad_stats")
    metrics = ("noise", "recent_loss", "older_loss", "held_batch_size")


def floor_objective(
    loss_fn: Callable[..., Any] | None = None,
    *,
    num_examples: int | None = None,
    share: float = 0.3,
    hold: float = 0.6,
    growth: float = 32.0,
    persistence: Persistence = 1.0,
    step_cost: float = 0.0,
    optimal_loss: float = 0.0,
) -> NoiseObjective:
    """The noise floor as a share of the loss still to go: Eqs. 7 to 17."""
    budget = (
        None
        if num_examples is None
        else _validate.integer(num_examples=num_examples, minimum=1, maximum=2**31 - 1)
    )
    share = _validate.positive(share=share)
    hold = _validate.in_range(0, 1, hold=hold)
    if _validate.positive(growth=growth) < 1:
        raise ValueError(f"growth must be >= 1, got {growth!r}.")
    k, cost = resolve_persistence(persistence), _validate.non_negative(step_cost=step_cost)
    infinity = float("inf")
    optimal_loss = _validate.in_range(-infinity, infinity, closed="left", optimal_loss=optimal_loss)

    def init():
        zero = lambda dtype: jnp.zeros((), dtype)
        return FloorState(
            noise=zero(float),
            noisy_loss=zero(float),
            num_looks=zero(jnp.int32),
            recent_loss=zero(float),
            older_loss=zero(float),
            num_steps=zero(jnp.int32),
            num_examples=zero(jnp.int32),
            held_batch_size=zero(float),
            size_when_held=zero(float),
            validation=None
            if loss_fn is None
            else ValidationPace(zero(float), zero(float), zero(jnp.int32)),
        )

    def share_of_budget(state):
        return state.num_examples.astype(float) / (budget or 1)

    def measure(updates, params, batch_size, signals):
        response = -tree_dot(signals["gradient_noise"], signals["update_noise"])
        noise = 0.25 * k * batch_size.astype(float) * response  # Eq. 8
        # No noise in an update that is none: gradients without size say nothing.
        noise = jnp.where((response != 0) | (tree_dot(updates, updates) > 0), noise, jnp.nan)
        stats, tiny = signals["grad_stats"], jnp.finfo(noise.dtype).tiny
        signal = stats.mean_sq_norm / jnp.maximum(stats.variance_trace, tiny)
        signal = jnp.where(jnp.isinf(stats.variance_trace), jnp.nan, signal)  # to be skipped
        bent = noise * batch_size * signal / (2 * k - 1)  # Eq. 15, but for what makes progress
        sample = (noise, jnp.where(noise > 0, bent, 0))
        return sample if loss_fn is None else (*sample, validation_loss(loss_fn, signals)(params))

    def update(state, sample, due, batch_size, signals):
        noise, bent, *other_loss = sample
        value = jnp.asarray(signals["value"], float)
        seen = signals.get("num_examples")
        seen = state.num_examples if seen is None else jnp.asarray(seen, jnp.int32)
        n: Any = optax.safe_increment(state.num_looks)
        t: Any = optax.safe_increment(state.num_steps)
        progress = jnp.maximum(training_pace(state), 0) / t  # of a step
        bent = bent - batch_size * progress / (4 * (2 * k - 1))
        noise = noise + jnp.clip(bent, 0, (_BENT - 1) * jnp.maximum(noise, 0))  # Eq. 15
        looked_at = lambda mean, sample: jnp.where(
            due, power_average(mean, sample, n - 1, n, 3), mean
        )
        new = state._replace(
            noise=looked_at(state.noise, noise),
            noisy_loss=looked_at(state.noisy_loss, value),
            num_looks=jnp.where(due, n, state.num_looks),
            recent_loss=power_average(state.recent_loss, value, t - 1, t, 3),
            older_loss=power_average(state.older_loss, value, t - 1, t, 1),
            num_steps=t,
            num_examples=seen + batch_size,
        )
        if loss_fn is not None:
            old = state.validation
            looked = ValidationPace(
                recent_loss=power_average(old.recent_loss, other_loss[0], old.last_step, t, 3),
                older_loss=power_average(old.older_loss, other_loss[0], old.last_step, t, 1),
                last_step=t,
            )
            new = new._replace(validation=tree_where(due, looked, old))
        # What grows is the last size before growth began.
        size = jnp.clip(floor_size(new), 1 / _LARGEST, _LARGEST)
        settled = (share_of_budget(state) >= hold) & (state.held_batch_size > 0)
        keep = jnp.isnan(size) | (settled if budget is not None else False)
        return new._replace(
            held_batch_size=jnp.where(keep, state.held_batch_size, size),
            size_when_held=jnp.where(keep, state.size_when_held, batch_size.astype(float)),
        )

    def floor_size(state):
        noise, pace = jnp.maximum(state.noise, 0), pace_of_loss(state)
        # Noise, and nothing to gain from steps; but a few losses do not tell.
        beyond = jnp.where((noise > 0) & (state.num_steps > _FEW), jnp.inf, jnp.nan)
        now = noise * _EXPONENT / (share * jnp.where(pace > 0, pace, 1))
        if budget is not None:
            left = jnp.maximum(budget - state.num_examples, 0)
            now = size_for_end(now, jnp.maximum(state.num_steps, 1), left)
        most = state.noisy_loss - optimal_loss  # that any noise can hold
        now = jnp.maximum(now, jnp.where(most > 0, noise / most, 0))  # Eq. 17
        return jnp.where(pace > 0, now, beyond)

    def best(state, cost=cost):
        b = jnp.where(state.held_batch_size > 0, state.held_batch_size, jnp.nan)
        held = 0.5 * (b + jnp.sqrt(b * b + 4 * b * cost))  # Eq. 11
        if budget is None:
            return held
        grown = final_size(
            b,
            jnp.maximum(b, state.size_when_held),  # above b at the lower end of the range
            jnp.maximum(state.num_steps, 1),
            jnp.maximum(budget - state.num_examples, 0).astype(float),
            share=share,
            growth=growth,
        )
        return jnp.where(share_of_budget(state) < hold, held, jnp.maximum(held, grown))

    def objective(state, b, cost=cost):
        target = best(state, cost)
        target = jnp.where(target > 0, jnp.minimum(target, _LARGEST), b)  # unknown: stay
        return jax.lax.stop_gradient(target) / b + jnp.log(b)  # Eq. 13

    signals = FloorState.requires + (() if loss_fn is None else ValidationPace.requires)
    return NoiseObjective(init, measure, update, objective, best, signals)


_FEW = 8  # steps from which no pace can be told
_EXPONENT = 0.25  # p of the loss F* + c t^-p, whose excess over F* is its pace over p. Eq. 9
_NOISE_EXPONENT = 0.15  # s of the noise, B times its floor, that falls as t^-s. Eq. 16
_BENT = 8.0  # how many times more noise than in the limit of small rates one look may tell of
_MEMORY = 2.0  # how many times faster the training loss may fall than that of other examples
_LARGEST = 1e9  # in place of an infinite batch size, where a state holds it; 1 / this for none


def size_for_end(now: Any, num_steps: Any, left: Any) -> jax.Array:
    """The size b of Eq. 10 for pace and noise of the moment, `now`, as it is for the end's: Eq. 16.

    After `num_steps` steps, with `left` examples to go.
    """
    now = jnp.clip(jnp.asarray(now, float), 1 / _LARGEST, _LARGEST)
    b = now
    for _ in range(8):  # an error of log b becomes one of at most a tenth of it
        b = now * (1 + left / (b * num_steps)) ** (_EXPONENT - _NOISE_EXPONENT)
    return b


def final_size(b: Any, in_force: Any, num_steps: Any, left: Any, *, share: float, growth: float):
    """What a held size is to grow to with `left` examples to go, if that is more: Eq. 12.

    `b` is the size that was to be held, `in_force` the one that was, at least b; both after
    `num_steps` steps, in examples.
    """
    factor = growth * (b / in_force) ** 0.5
    worth_the_noise = 0.5 * share / _EXPONENT * b * num_steps  # R
    return factor * in_force / (1 + factor * left / worth_the_noise)


def training_pace(state: FloorState) -> jax.Array:
    """The pace of the training loss alone: Eq. 9."""
    return 4 * (state.older_loss - state.recent_loss)  # 1 / (1/2 - 1/4)


def pace_of_loss(state: FloorState) -> jax.Array:
    """How much the loss falls while the number of steps grows by a factor of e: -dF / d log t.

    An average with weights t^a lags by 1 / (a + 1) in log t, so two of them give the slope. Where
    the pace on validation examples is known, at most a multiple of that.
    """
    pace = training_pace(state)
    if state.validation is None:
        return pace
    other = 4 * (state.validation.older_loss - state.validation.recent_loss)
    return jnp.where(state.num_looks > _FEW, jnp.minimum(pace, _MEMORY * other), pace)  # Eq. 14
