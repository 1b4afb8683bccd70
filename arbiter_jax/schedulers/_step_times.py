"""How long a step takes: a running regression of measured times on the batch size.

Shared by the rules that weigh what a step brings against what it costs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _numerics
from arbiter_jax.schedulers import _rule

_TIME_DECAY = 0.9  # Weight of the past from one measured time to the next.
_LEAST_SPREAD = 1e-6  # Of the measured sizes, relative: below it no slope can be fitted.


class StepTimes(NamedTuple):
    """A running regression of seconds on the batch size, inside the state of a rule."""

    size: jax.Array  # shape=(), dtype=float, mean size
    seconds: jax.Array  # shape=(), dtype=float, mean time of a step
    size_variance: jax.Array  # shape=(), dtype=float
    covariance: jax.Array  # shape=(), dtype=float, of size and seconds
    weight: jax.Array  # shape=(), dtype=float, 0 before the first measurement
    largest: jax.Array  # shape=(), dtype=int32, largest size measured
    last_seconds: jax.Array  # shape=(), dtype=float, last finite time given, 0 before
    last_batch_size: jax.Array  # shape=(), dtype=int32, applied at the last step
    num_steps: jax.Array  # shape=(), dtype=int32, steps since the last measurement
    interval: jax.Array  # shape=(), dtype=int32, steps between two measurements, 0 if unknown


def init(start: int | jax.Array) -> StepTimes:
    """Before the first measurement, with the size that the run starts with."""
    return StepTimes(
        size=_rule.zero(),
        seconds=_rule.zero(),
        size_variance=_rule.zero(),
        covariance=_rule.zero(),
        weight=_rule.zero(),
        largest=_rule.int32(),
        last_seconds=_rule.zero(),
        last_batch_size=jnp.array(start, jnp.int32),
        num_steps=_rule.int32(),
        interval=_rule.int32(),
    )


def measure(times: StepTimes, step_seconds: jax.Array, applied: jax.Array) -> StepTimes:
    """Takes in a measured time, once, for the size that was applied while it was measured.

    Every step of a window is given the same time, that of the window before. A new window shows in a
    new time or a new size; or, if both are as before, in the number of steps.
    """
    seconds = jnp.asarray(step_seconds, times.seconds.dtype)
    valid = jnp.isfinite(seconds) & (seconds > 0)
    changed = (seconds != times.last_seconds) | (applied != times.last_batch_size)
    repeated = (times.interval > 0) & (times.num_steps >= times.interval)
    weight = _TIME_DECAY * times.weight + 1 / seconds**2  # relative errors count alike
    rate = 1 / (seconds**2 * weight)
    size = times.last_batch_size.astype(seconds.dtype)
    off_size, off_seconds = size - times.size, seconds - times.seconds
    measured = times._replace(
        size=times.size + rate * off_size,
        seconds=times.seconds + rate * off_seconds,
        size_variance=(1 - rate) * (times.size_variance + rate * off_size**2),
        covariance=(1 - rate) * (times.covariance + rate * off_size * off_seconds),
        weight=weight,
        largest=jnp.maximum(times.largest, times.last_batch_size),
        last_seconds=seconds,
        num_steps=jnp.zeros_like(times.num_steps),
        interval=jnp.where(changed, times.num_steps, times.interval),
    )
    usable = valid & (changed | repeated) & _numerics.all_finite(measured)
    times = _numerics.tree_where(usable, measured, times)
    return times._replace(last_batch_size=applied, num_steps=optax.safe_increment(times.num_steps))


def seconds_of(times: StepTimes, size: jax.Array) -> jax.Array:
    """t_0 + t_1 b of the fit, with t_0, t_1 >= 0."""
    enough = times.size_variance > _LEAST_SPREAD * times.size**2
    slope = jnp.where(enough, times.covariance / times.size_variance, 0)
    slope = jnp.clip(slope, 0, times.seconds / times.size)
    return times.seconds + slope * (size - times.size)


def step_cost(times: StepTimes) -> jax.Array:
    """t_0 / t_1 of the fit: what a step costs in examples; 0 until two sizes have been measured."""
    fixed = seconds_of(times, jnp.zeros_like(times.seconds))
    size = jnp.where(times.size > 0, times.size, 1)
    each = (times.seconds - fixed) / size
    known = (times.weight > 0) & (times.size_variance > 0)
    # If the fitted time does not grow with the size the ratio diverges: bound it.
    each = jnp.maximum(each, 1e-6 * times.seconds / size)
    return jnp.where(known, fixed / jnp.where(known, each, 1), 0)
