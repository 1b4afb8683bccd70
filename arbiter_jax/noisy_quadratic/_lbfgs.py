"""L-BFGS for bounded schedules, with a parameterization that attains the bounds.

A schedule x in [low, high] is written as low + (high - low) sin^2(z). Unlike a sigmoid, this attains
both bounds at finite z, where the slope vanishes. An optimum with many steps at a bound (the usual
case: learning rates start at the cap) is then an ordinary minimum, found to machine precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

_MEMORY_SIZE = 20
_MAX_TRIALS = 25  # per line search
_MAX_STALLED = 8  # steps whose gain is within rounding
_SUFFICIENT_DECREASE = 1e-4
_SUFFICIENT_SLOPE = 0.9


def from_unconstrained(z: jax.Array, low: float | jax.Array, high: float | jax.Array) -> jax.Array:
    """Maps any z to [low, high]."""
    return low + (high - low) * jnp.sin(z) ** 2


def to_unconstrained(x: jax.Array, low: float | jax.Array, high: float | jax.Array) -> jax.Array:
    """Inverse of :func:`from_unconstrained`, kept away from the bounds, where the slope is zero."""
    fraction = jnp.clip((x - low) / (high - low), 0.02, 0.98)
    return jnp.arcsin(jnp.sqrt(fraction))


class _State(NamedTuple):
    """The last accepted point, and the line search that starts from it."""

    z: jax.Array  # shape=(...), dtype=float
    value: jax.Array  # shape=(), dtype=float
    grad: jax.Array  # shape=(...), dtype=float
    direction: jax.Array  # shape=(...), dtype=float
    memory: optax.OptState
    step: jax.Array  # shape=(), dtype=float, length of the next trial step
    shortest: jax.Array  # shape=(), dtype=float, known to be too short
    longest: jax.Array  # shape=(), dtype=float, known to be too long; initially inf
    num_trials: jax.Array  # shape=(), dtype=int32, of this line search
    num_steps: jax.Array  # shape=(), dtype=int32, accepted
    num_stalled: jax.Array  # shape=(), dtype=int32


def minimize(
    objective: Callable[[jax.Array], jax.Array], start: jax.Array, max_iterations: int
) -> jax.Array:
    """Minimizes a smooth function by L-BFGS, inside `jit`.

    The line search is the bisection of Lewis and Overton (2013) for the weak Wolfe conditions. Each
    iteration of the single loop makes one trial, so the program contains the objective and its
    gradient once. `optax.lbfgs` contains them several times, and compilation dominates here.

    Args:
      objective: float[...] -> float[].
      start: Initial point.
      max_iterations: Maximum number of steps. The search ends earlier if the gradient vanishes, the
        value no longer falls by more than rounding, or a line search fails.

    Returns:
      The last accepted point: no value along the path rises by more than rounding.
    """
    tx = optax.scale_by_lbfgs(memory_size=_MEMORY_SIZE)
    value_and_grad = jax.value_and_grad(objective)
    eps = float(jnp.finfo(start.dtype).eps)
    one, zero = jnp.ones((), start.dtype), jnp.zeros((), start.dtype)
    none = jnp.zeros((), jnp.int32)

    def search_from(z, value, grad, memory, num_steps, num_stalled):
        direction: Any
        direction, memory = tx.update(grad, memory, z)
        return _State(
            z, value, grad, -direction, memory, one, zero, jnp.inf * one, none, num_steps,
            num_stalled,
        )  # fmt: skip

    def unfinished(state: _State) -> jax.Array:
        return (
            (state.num_steps < max_iterations)
            & (state.num_trials < _MAX_TRIALS)
            & (state.num_stalled < _MAX_STALLED)
            & (jnp.max(jnp.abs(state.grad)) > eps)
        )

    def body(state: _State) -> _State:
        trial = state.z + state.step * state.direction
        value, grad = value_and_grad(trial)
        rounding = 2 * eps * (1 + jnp.abs(state.value))
        slope = jnp.vdot(state.grad, state.direction)
        decreases = (
            value <= state.value + _SUFFICIENT_DECREASE * state.step * slope + rounding
        )  # also false for nan
        flattens = jnp.vdot(grad, state.direction) >= _SUFFICIENT_SLOPE * slope

        def accept(state: _State) -> _State:
            stalls = state.value - value <= rounding
            num_stalled = jnp.where(stalls, state.num_stalled + 1, 0)
            return search_from(trial, value, grad, state.memory, state.num_steps + 1, num_stalled)

        def search_on(state: _State) -> _State:
            shortest = jnp.where(decreases, state.step, state.shortest)
            longest = jnp.where(decreases, state.longest, state.step)
            step = jnp.where(jnp.isfinite(longest), 0.5 * (shortest + longest), 2 * shortest)
            return state._replace(
                step=step, shortest=shortest, longest=longest, num_trials=state.num_trials + 1
            )

        return jax.lax.cond(decreases & flattens, accept, search_on, state)

    # The first iteration is a trial of length zero: it only evaluates the start.
    value = jnp.inf * one
    unit = jnp.ones_like(start)
    state = _State(
        start, value, unit, jnp.zeros_like(start), tx.init(start), zero, zero, value, none, none,
        none,
    )  # fmt: skip
    return jax.lax.while_loop(unfinished, body, state).z
