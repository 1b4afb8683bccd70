"""Batch-size schedules of the noisy quadratic at a fixed number of examples."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbiter_jax import noisy_quadratic
from arbiter_jax.noisy_quadratic._batch_sizes import _as_budget, _as_schedule
from arbiter_jax.noisy_quadratic._moments import excess_of, initial_moments, momentum_step
from arbiter_jax.noisy_quadratic._segments import greedy_size


def problem_of(dimensions: int = 20) -> noisy_quadratic.NoisyQuadratic:
    i = jnp.arange(1, dimensions + 1, dtype=jnp.result_type(float))
    return noisy_quadratic.NoisyQuadratic(1 / i, i, jnp.full_like(i, 10))


@partial(jax.jit, static_argnames="num_steps")
def stepwise(problem, sizes, learning_rate, momentum, num_steps):
    """The excess loss before the first and after each segment, one step at a time."""
    moments = initial_moments(problem)
    losses = [excess_of(problem, moments)]
    for size, steps in zip(sizes, num_steps, strict=True):
        noisy = problem._replace(noise_variance=problem.noise_variance / size)
        for _ in range(steps):
            moments = momentum_step(noisy, moments, learning_rate, momentum)
        losses.append(excess_of(problem, moments))
    return jnp.stack(losses)


as_schedule = jax.jit(_as_schedule)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("learning_rate", [0.1, 1.0])
@pytest.mark.parametrize(("x64", "rtol"), [(True, 1e-9), (False, 1e-4)])
def test_rollout_equals_that_of_single_steps(learning_rate, momentum, x64, rtol):
    """If their number is an integer."""
    with jax.enable_x64(x64):
        problem = problem_of()
        sizes, num_steps = jnp.array([2.0, 8.0, 4.0, 16.0]), (8, 2, 4, 1)
        budget = _as_budget(problem, 64, learning_rate, momentum, 4)
        schedule = as_schedule(problem, budget, sizes)
        np.testing.assert_allclose(schedule.num_steps, num_steps)
        expected = stepwise(problem, sizes, learning_rate, momentum, num_steps)
        np.testing.assert_allclose(schedule.excess_loss, expected, rtol=rtol)


@pytest.mark.slow
def test_rollout_is_smooth_at_a_double_eigenvalue():
    with jax.enable_x64(True):
        # lr h = (1 - sqrt(mu))^2 is a double eigenvalue of the matrix of one step.
        one = jnp.ones(1)
        problem = noisy_quadratic.NoisyQuadratic(one, one, one)

        @jax.jit
        @jax.value_and_grad
        def loss(sizes):
            schedule = noisy_quadratic.rollout_batch_sizes(problem, sizes, 12, 0.25, 0.25)
            return schedule.excess_loss[-1]

        expected = stepwise(problem, jnp.array([1.0, 2.0]), 0.25, 0.25, (6, 3))
        np.testing.assert_allclose(loss(jnp.array([1.0, 2.0]))[0], expected[-1], rtol=1e-9)
        at, step = jnp.array([1.5, 2.5]), jnp.array([1e-6, 0.0])
        slope = (loss(at + step)[0] - loss(at - step)[0]) / 2e-6
        np.testing.assert_allclose(loss(at)[1][0], slope, rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_greedy_size_maximizes_progress_per_example(momentum):
    with jax.enable_x64(True):
        problem = problem_of()
        budget = _as_budget(problem, 6400, 0.5, momentum, 64, min_batch_size=1e-3)
        moments = initial_moments(problem)
        for _ in range(3):
            moments = momentum_step(problem, moments, 0.5, momentum)

        def progress_per_example(size):
            noisy = problem._replace(noise_variance=problem.noise_variance / size)
            after = momentum_step(noisy, moments, 0.5, momentum)
            return (excess_of(problem, moments) - excess_of(problem, after)) / size

        size = greedy_size(problem, moments, budget)
        assert 0.01 < size < 90
        progress, slopes = jax.jit(jax.vmap(jax.value_and_grad(progress_per_example)))(
            size * jnp.array([0.9, 1.0, 1.1])
        )
        np.testing.assert_allclose(slopes[1], 0, atol=1e-10)
        assert progress[1] > progress[0]
        assert progress[1] > progress[2]


def test_greedy_sizes_stay_within_their_limits():
    """And are the smallest without noise."""
    problem = problem_of()
    sizes = noisy_quadratic.greedy_batch_sizes(
        problem, 4096, 1.0, min_batch_size=4, max_batch_size=32
    ).batch_sizes
    assert sizes.min() == 4
    assert sizes.max() == 32
    calm = problem._replace(noise_variance=0 * problem.noise_variance)
    sizes = noisy_quadratic.greedy_batch_sizes(calm, 4096, 0.5, min_batch_size=2).batch_sizes
    np.testing.assert_array_equal(sizes, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("learning_rate", "momentum"), [(1.0, 0.0), (0.1, 0.9)])
def test_greedy_growth_is_short_horizon_bias(learning_rate, momentum):
    problem, examples, segments = problem_of(), 8 * 128, 8
    run = (problem, examples, learning_rate, momentum)
    greedy = noisy_quadratic.greedy_batch_sizes(*run, num_segments=segments)
    optimal = noisy_quadratic.optimal_batch_sizes(*run, num_segments=segments)

    @jax.vmap
    def constant(size):
        sizes = jnp.full(segments, size)
        schedule = noisy_quadratic.rollout_batch_sizes(
            problem, sizes, examples, learning_rate, momentum
        )
        return schedule.excess_loss[-1]

    assert optimal.excess_loss[-1] < 0.95 * constant(2.0 ** jnp.arange(8)).min()
    assert optimal.excess_loss[-1] < 0.8 * greedy.excess_loss[-1]
    assert optimal.batch_sizes[-1] > 4 * optimal.batch_sizes[0]
    assert optimal.batch_sizes.min() >= 1
    assert optimal.batch_sizes.max() <= 128 * (1 + 1e-5)


@pytest.mark.slow
def test_a_longer_horizon_ends_lower():
    schedules = [
        noisy_quadratic.optimal_batch_sizes(
            problem_of(), 8 * 128, 1.0, horizon=horizon, num_segments=8
        )
        for horizon in (1, 3, None)
    ]
    losses = [schedule.excess_loss[-1] for schedule in schedules]
    assert losses[0] > 1.1 * losses[1] > 1.1 * losses[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 1.5}, "learning_rate must be <= 1 / max"),
        ({"learning_rate": 0.5, "momentum": 1.0}, "momentum must be in"),
        ({"learning_rate": 0.5, "max_batch_size": 65.0}, "max_batch_size must be in"),
        ({"learning_rate": 0.5, "num_segments": 0}, "num_segments must be"),
        ({"learning_rate": 0.5, "min_batch_size": 0.0}, "min_batch_size must be"),
    ],
)
def test_arguments_out_of_range(options, message):
    for factory in (noisy_quadratic.greedy_batch_sizes, noisy_quadratic.optimal_batch_sizes):
        with pytest.raises(ValueError, match=message):
            factory(problem_of(), 4096, **options)


def test_batch_sizes_must_be_one_row():
    with pytest.raises(ValueError, match=r"batch_sizes must have shape \(J,\) with J >= 1"):
        noisy_quadratic.rollout_batch_sizes(problem_of(), jnp.ones((2, 2)), 64, 0.5)


def test_a_traced_problem_is_allowed():
    """Then the learning rate is not checked against the curvature."""
    sizes, num_steps = jnp.array([2.0, 8.0, 4.0, 16.0]), (8, 2, 4, 1)
    rollout = jax.jit(lambda p: noisy_quadratic.rollout_batch_sizes(p, sizes, 64, 0.1))
    expected = stepwise(problem_of(), sizes, 0.1, 0.0, num_steps)
    np.testing.assert_allclose(rollout(problem_of()).excess_loss, expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("horizon", "max_iterations"), [(None, 400), (3, 50)])
def test_the_default_number_of_iterations(horizon, max_iterations):
    run = {"num_examples": 8 * 128, "learning_rate": 1.0, "num_segments": 8, "horizon": horizon}
    by_default = noisy_quadratic.optimal_batch_sizes(problem_of(), **run)
    explicit = noisy_quadratic.optimal_batch_sizes(
        problem_of(), **run, max_iterations=max_iterations
    )
    chex.assert_trees_all_equal(by_default, explicit)
