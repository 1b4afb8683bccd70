"""The noisy quadratic of `short_horizon_bias`: greedy against optimal, all of it in closed form."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg

from arbiter_jax import noisy_quadratic
from arbiter_jax.noisy_quadratic import NoisyQuadratic

SWEEP_DIMENSIONS = 100


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """Sizes and sweeps of the figures on the quadratic."""

    dimensions: int = 1000
    num_steps: int = 250
    momenta: tuple[bool, ...] = (False, True)
    horizons: tuple[int, ...] = (10, 30, 100, 300, 1000)  # lengths of whole runs, in steps
    conditions: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
    sweep_steps: int = 250  # length of the runs over `conditions` and `noises`
    noises: tuple[float, ...] = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0)
    look_aheads: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    look_ahead_steps: int = 100  # length of the run for `look_aheads`
    num_examples: int = 10_000  # budget of the batch-size schedules
    num_segments: int = 32
    segment_look_aheads: tuple[int, ...] = (1, 2, 4, 8)


class Ratios(NamedTuple):
    """Excess loss of greedy rates, or of those of a look-ahead, over that of optimal ones."""

    horizon: np.ndarray
    condition: np.ndarray
    noise: np.ndarray
    look_ahead: np.ndarray


def harmonic(dimensions: int, noise: float = 1.0, second_moment: float = 10.0) -> NoisyQuadratic:
    """Curvatures 1 / i with noise variances i, so that all coordinates end at one excess loss."""
    i = jnp.arange(1.0, dimensions + 1)
    return NoisyQuadratic(1 / i, noise * i, jnp.full_like(i, second_moment))


def geometric(condition: jax.Array, noise: jax.Array) -> NoisyQuadratic:
    """Curvatures evenly spaced on a log axis from 1 to 1 / condition."""
    h = condition ** -jnp.linspace(0.0, 1.0, SWEEP_DIMENSIONS)
    return NoisyQuadratic(h, noise / h, jnp.full_like(h, 10.0))


def schedules(config: ToyConfig) -> dict[str, noisy_quadratic.RateSchedule]:
    """Greedy and optimal schedules of the rate, and of rate and momentum."""
    problem = harmonic(config.dimensions)
    found = {}
    for momentum in config.momenta:
        suffix = ", momentum" if momentum else ""
        steps = (problem, config.num_steps, momentum)
        found["greedy" + suffix] = noisy_quadratic.greedy_schedule(*steps)
        found["optimal" + suffix] = noisy_quadratic.optimal_schedule(*steps)
    return {name: jax.tree.map(np.asarray, schedule) for name, schedule in found.items()}


def _ratio(problem: NoisyQuadratic, num_steps: int) -> jax.Array:
    greedy = noisy_quadratic.greedy_schedule(problem, num_steps)
    return (
        greedy.excess_loss[-1]
        / noisy_quadratic.optimal_schedule(problem, num_steps).excess_loss[-1]
    )


def ratios(config: ToyConfig) -> Ratios:
    """How much worse short-sighted rates end, over every sweep of the config."""
    of_horizon = [_ratio(harmonic(SWEEP_DIMENSIONS), steps) for steps in config.horizons]
    # One program for both sweeps, which differ only in numbers.
    points = [(c, 1.0) for c in config.conditions] + [(100.0, s) for s in config.noises]
    swept = jax.jit(lambda p: jax.lax.map(lambda x: _ratio(geometric(*x), config.sweep_steps), p))(
        tuple(jnp.array(column) for column in zip(*points, strict=True))
    )
    problem, steps, receding = harmonic(SWEEP_DIMENSIONS), config.look_ahead_steps, []
    if config.look_aheads:
        best = noisy_quadratic.optimal_schedule(problem, steps).excess_loss[-1]
        receding = [
            noisy_quadratic.receding_horizon_schedule(problem, steps, ahead).excess_loss[-1] / best
            for ahead in config.look_aheads
        ]
    split = len(config.conditions)
    groups = (of_horizon, swept[:split], swept[split:], receding)
    return Ratios(*(np.asarray(group, float) for group in groups))


def without_noise(config: ToyConfig, num_steps: int = 10) -> dict[str, float]:
    """Excess loss after a few steps without noise: both greedy schedules, and conjugate gradient."""
    problem = harmonic(config.dimensions, noise=0.0, second_moment=1.0)
    losses = {
        name: float(noisy_quadratic.greedy_schedule(problem, num_steps, momentum).excess_loss[-1])
        for name, momentum in (("rate", False), ("rate and momentum", True))
    }
    h = np.asarray(problem.curvature, np.float64)
    moved, _ = scipy.sparse.linalg.cg(scipy.sparse.diags(h), h, rtol=0, maxiter=num_steps)
    return losses | {"conjugate gradient": float(0.5 * h @ (1 - moved) ** 2)}


def batch_sizes(config: ToyConfig, learning_rate: float = 0.5) -> dict[str, Any]:
    """Greedy, look-ahead and optimal batch sizes at equal examples, and the best constant one."""
    problem = harmonic(config.dimensions)
    run = (problem, config.num_examples, learning_rate)
    options = {"num_segments": config.num_segments}
    found = {"greedy": noisy_quadratic.greedy_batch_sizes(*run, **options)}
    for ahead in config.segment_look_aheads:
        found[f"look-ahead {ahead}"] = noisy_quadratic.optimal_batch_sizes(
            *run, horizon=ahead, **options
        )
    found["optimal"] = noisy_quadratic.optimal_batch_sizes(*run, **options)
    largest = config.num_examples / config.num_segments
    grid = jnp.geomspace(1.0, largest, 25)
    constant = jax.jit(
        lambda grid: jax.lax.map(
            lambda size: noisy_quadratic.rollout_batch_sizes(
                problem,
                jnp.full(config.num_segments, size),
                config.num_examples,
                learning_rate,
            ),
            grid,
        )
    )(grid)
    best = int(jnp.argmin(constant.excess_loss[:, -1]))
    found["best constant"] = jax.tree.map(lambda x: x[best], constant)
    return {name: jax.tree.map(np.asarray, schedule) for name, schedule in found.items()}
