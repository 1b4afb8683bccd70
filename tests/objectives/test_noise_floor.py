"""The noise floor as an objective: one measurement, and what follows from the averages."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arbiter_jax as aj
from arbiter_jax import objectives
from arbiter_jax.objectives._noise_floor import FloorSample, log_time_slope
from arbiter_jax.objectives._objective import update_objective
from tests.floor_runs import NOISE, SLOPE, loss_at, noise_signals, size_by_hand

ONE = jnp.ones(())


@pytest.mark.parametrize(("persistence", "signal"), [(1.0, 1 / 64), (10.0, 19 / 32)])
def test_equation_15_a_noisy_gradient_means_more_noise(persistence, signal):
    """B |G|^2 = (2 k - 1) tr S where the loss stands still: 1 + 1 times the floor."""
    objective = objectives.noise_floor(persistence=persistence)
    factor = 1 + 64 * signal / (2 * persistence - 1)
    state = objective.init()
    for _ in range(3):
        signals = {"value": jnp.float32(1.0)} | noise_signals(NOISE / 64, signal)
        state, usable = update_objective(objective, state, ONE, ONE, jnp.asarray(64), signals)
        assert bool(usable)
    assert float(state.noise) == pytest.approx(factor * persistence * NOISE / 4, rel=1e-5)


@pytest.mark.parametrize("drifts", [True, False])
def test_equation_15_progress_is_not_noise(drifts):
    """|G|^2 = slope / (lr t): all of it moves the loss; and a negative estimate takes nothing away."""
    objective, rate = objectives.noise_floor(persistence=1.0), 0.1

    def step(state, t):
        square = SLOPE / (rate * t) if drifts else -5.0
        # tr S = 1 and B = 64, so that xi . du = -lr / 64
        signals = {"value": loss_at(t)} | noise_signals(rate / 64, square)
        return update_objective(objective, state, ONE, ONE, jnp.asarray(64), signals)[0], None

    state, _ = jax.lax.scan(step, objective.init(), jnp.arange(1.0, 200.0))
    assert float(state.noise) == pytest.approx(rate / 4, rel=0.05)


@pytest.mark.parametrize(("rate", "m"), [(0.1, 0.0), (1.5, 0.0), (0.2, 0.9), (3.0, 0.9)])
def test_equation_15_is_exact_for_heavy_ball(rate, m):
    """h V / 2 in equilibrium, by the stationary covariance of (w, u), however large the rate."""
    # u' = m u - lr g and w' = w + u', of curvature 1 and gradient noise of variance 1.
    step, kick = np.array([[1 - rate, m], [-rate, m]]), -rate * np.ones(2)
    covariance = np.linalg.solve(np.eye(4) - np.kron(step, step), np.kron(kick, kick))
    variance = covariance[0]  # of w, and of the mean gradient
    objective = objectives.noise_floor(persistence=1 / (1 - m))
    signals = {"value": jnp.float32(1.0)} | noise_signals(rate, variance)  # B = 1, tr S = 1
    state, _ = update_objective(objective, objective.init(), ONE, ONE, jnp.asarray(1), signals)
    assert float(state.noise) == pytest.approx(0.5 * variance, rel=1e-4)


@pytest.mark.parametrize(("optimal_loss", "factor"), [(0.0, 10), (-math.inf, 1), (-0.3, 1)])
def test_equation_17_noise_is_at_most_all_of_the_loss(optimal_loss, factor):
    """A loss that is a tenth of what (10) would let noise hold."""
    objective = objectives.noise_floor(optimal_loss=optimal_loss, persistence=1.0)
    state, loss = objective.init(), jnp.array(1.2 * SLOPE)
    training = state.training._replace(recent=loss, older=loss + SLOPE / 4, last=jnp.array(100))
    state = state._replace(noise=jnp.array(NOISE / 4), measured_loss=0.1 * loss, training=training)
    sample, signals = FloorSample(NOISE / 4, 0.0, None), {"value": loss}
    state = objective.update(state, sample, False, jnp.asarray(64), signals)
    size = factor * size_by_hand()
    assert float(objective.best(state)) == pytest.approx(size, rel=0.15)


def test_equation_9_the_slope_of_a_loss():
    """The training loss may fall at most twice as fast as the validation loss."""
    objective = objectives.noise_floor(lambda params, batch: batch, persistence=1.0)

    def step(state, t):
        signals = {"value": loss_at(t), "meta_batch": jnp.full(4, loss_at(t, 0.2 * SLOPE))}
        signals |= noise_signals(NOISE / 64)
        return update_objective(objective, state, ONE, ONE, jnp.asarray(64), signals)[0], None

    state, _ = jax.lax.scan(step, objective.init(), jnp.arange(1.0, 400.0))
    assert float(state.training.value()) == pytest.approx(SLOPE, rel=0.03)
    assert float(log_time_slope(state)) == pytest.approx(0.4 * SLOPE, rel=0.03)
    # A few measurements are too few to say so.
    early = state._replace(num_measurements=jnp.int32(8))
    assert float(log_time_slope(early)) == pytest.approx(SLOPE, rel=0.03)


def test_the_constants_can_be_read():
    config = objectives.FloorConfig()
    assert (config.noise_share, config.hold_until, config.final_growth) == (0.3, 0.6, 32.0)


def test_the_persistence_is_asked_for_if_not_given():
    asks = lambda **options: aj.base.requests(objectives.noise_floor(**options).init()).signals
    assert asks() - asks(persistence=1.0) == {"persistence"}
    measured = objectives.Persistence(np.float32(10), np.float32(2))
    noises = []
    for objective, more in (
        (objectives.noise_floor(), {"persistence": measured}),
        (objectives.noise_floor(persistence=10.0), {}),
    ):
        signals = {"value": jnp.float32(1.0), **noise_signals(NOISE / 64, 0.01), **more}
        state = objective.init()
        state, _ = update_objective(objective, state, ONE, ONE, jnp.asarray(64), signals)
        noises.append(float(state.noise))
    assert noises[0] == pytest.approx(noises[1], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_share": 0}, "noise_share must be"),
        ({"optimal_loss": math.inf}, r"optimal_loss must be in \[-inf, inf\)"),
        ({"hold_until": 1.5}, "hold_until must be"),
        ({"final_growth": 0.5}, "final_growth must be a finite number >= 1, got 0.5"),
        ({"persistence": 0.5}, "persistence must be a finite number >= 1, got 0.5; an optimizer"),
        ({"persistence": "adam"}, "persistence must be a finite number >= 1, got 'adam'"),
        ({"num_examples": 0}, "num_examples must be"),
        ({"num_examples": 2**63}, "num_examples must be .* <= 9223372036854775807"),
        ({"step_cost": "free"}, "step_cost must be"),
        (
            {"loss_fn": 100_000},
            "loss_fn must be a function .* got 100000; a budget is given as num",
        ),
        ({"loss_fn": "mse"}, r"loss_fn must be a function .* got 'mse'\."),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        objectives.noise_floor(**options)


# The horizon


@functools.cache
def ends_on_the_noisy_quadratic():
    """Excess loss at the end of 2,000 examples: each constant size, and held then grown by 16."""
    h = 1 / np.arange(1, 101)
    problem = aj.noisy_quadratic.NoisyQuadratic(*map(jnp.asarray, (h, 1 / h, 10 * np.ones(100))))
    rate, total, segments = 0.5, 2000, 40
    sizes = np.geomspace(1, 20, 25)
    growth = 2.0 ** np.clip(np.arange(segments) // 4 - 5, 0, 4)  # from .6 of the examples on
    schedules = np.concatenate([np.outer(sizes, np.ones(segments)), np.outer(sizes, growth)])
    schedules = jnp.asarray(np.clip(schedules, 1, total / segments))
    end = lambda b: aj.noisy_quadratic.rollout_batch_sizes(problem, b, total, rate).excess_loss[-1]
    constant, grown = np.split(np.asarray(jax.jit(jax.vmap(end))(schedules)), 2)
    best = int(np.argmin(constant))
    steps = total / sizes[best] * np.exp([-0.1, 0.1])
    bias = [np.sum(h * 5 * (1 - rate * h) ** (2 * t)) for t in steps]
    floor = rate * np.sum(h) / (4 * sizes[best])
    return constant, grown, floor, (bias[0] - bias[1]) / 0.2


def test_equation_9_the_best_constant_size():
    """Its floor is the slope of the loss."""
    _, _, floor, slope = ends_on_the_noisy_quadratic()
    assert 1 / 1.5 < floor / slope < 1.5


def test_holding_and_growing_beats_every_constant_size():
    constant, grown, _, _ = ends_on_the_noisy_quadratic()
    assert grown.min() < 0.6 * constant.min()
    assert np.argmin(grown) < np.argmin(constant)  # more noise in the meantime
