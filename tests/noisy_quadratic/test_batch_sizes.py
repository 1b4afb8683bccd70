"""Batch-size schedules of the noisy quadratic at a fixed number of examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbiter_jax import noisy_quadratic
from arbiter_jax.noisy_quadratic._batch_sizes import _as_budget
from arbiter_jax.noisy_quadratic._moments import excess_of, initial_moments, momentum_step
from arbiter_jax.noisy_quadratic._segments import greedy_size


def problem_of(dimensions: int = 20) -> noisy_quadratic.NoisyQuadratic:
    i = jnp.arange(1, dimensions + 1, dtype=jnp.result_type(float))
    return noisy_quadratic.NoisyQuadratic(1 / i, i, jnp.full_like(i, 10))


def stepwise(problem, sizes, num_steps, learning_rate, momentum):
    """The excess loss after each segment, one step at a time."""
    moments, losses = initial_moments(problem), []
    for size, steps in zip(sizes, num_steps, strict=True):
        noisy = problem._replace(noise_variance=problem.noise_variance / size)
        for _ in range(int(steps)):
            moments = momentum_step(noisy, moments, learning_rate, momentum)
        losses.append(excess_of(problem, moments))
    return np.array(losses)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("learning_rate", [0.1, 1.0])
@pytest.mark.parametrize(("x64", "rtol"), [(True, 1e-9), (False, 1e-4)])
def test_rollout_equals_that_of_single_steps_where_their_number_is_an_integer(
    learning_rate, momentum, x64, rtol
):
    with jax.enable_x64(x64):
        problem = problem_of()
        sizes, num_steps = [2.0, 8.0, 4.0, 16.0], [8, 2, 4, 1]
        schedule = noisy_quadratic.rollout_batch_sizes(
            problem, jnp.array(sizes), 64, learning_rate, momentum
        )
        np.testing.assert_allclose(schedule.num_steps, num_steps)
        expected = stepwise(problem, sizes, num_steps, learning_rate, momentum)
        np.testing.assert_allclose(schedule.excess_loss[1:], expected, rtol=rtol)
        np.testing.assert_allclose(schedule.excess_loss[0], excess_of(problem, initial_moments(problem)), rtol=1e-6)  # fmt: skip # noqa: E501


def test_rollout_is_smooth_where_two_eigenvalues_meet():
    with jax.enable_x64(True):
        # lr h = (1 - sqrt(mu))^2 is a double eigenvalue of the matrix of one step
        one = jnp.ones(1)
        problem = noisy_quadratic.NoisyQuadratic(one, one, one)
        sizes, num_steps = [1.0, 2.0], [6, 3]
        schedule = noisy_quadratic.rollout_batch_sizes(problem, jnp.array(sizes), 12, 0.25, 0.25)
        expected = stepwise(problem, sizes, num_steps, 0.25, 0.25)
        np.testing.assert_allclose(schedule.excess_loss[1:], expected, rtol=1e-9)

        def loss(sizes):
            return noisy_quadratic.rollout_batch_sizes(problem, sizes, 12, 0.25, 0.25).excess_loss[
                -1
            ]

        at = jnp.array([1.5, 2.5])
        slope = jax.grad(loss)(at)
        step = jnp.array([1e-6, 0.0])
        np.testing.assert_allclose(slope[0], (loss(at + step) - loss(at - step)) / 2e-6, rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_greedy_size_makes_the_most_progress_per_example(momentum):
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
        np.testing.assert_allclose(jax.grad(progress_per_example)(size), 0, atol=1e-10)
        assert progress_per_example(size) > progress_per_example(1.1 * size)
        assert progress_per_example(size) > progress_per_example(0.9 * size)


def test_greedy_sizes_stay_within_their_limits_and_at_the_smallest_without_noise():
    problem = problem_of()
    sizes = noisy_quadratic.greedy_batch_sizes(
        problem, 4096, 1.0, min_batch_size=4, max_batch_size=32
    ).batch_sizes
    assert sizes.min() == 4
    assert sizes.max() == 32
    calm = problem._replace(noise_variance=0 * problem.noise_variance)
    sizes = noisy_quadratic.greedy_batch_sizes(calm, 4096, 0.5, min_batch_size=2).batch_sizes
    np.testing.assert_array_equal(sizes, 2)


@pytest.mark.parametrize(("learning_rate", "momentum"), [(1.0, 0.0), (0.1, 0.9)])
def test_greedy_growth_is_short_horizon_bias(learning_rate, momentum):
    problem, examples, segments = problem_of(), 8 * 128, 8
    setting = (problem, examples, learning_rate, momentum)
    greedy = noisy_quadratic.greedy_batch_sizes(*setting, num_segments=segments)
    optimal = noisy_quadratic.optimal_batch_sizes(*setting, num_segments=segments)
    constants = [
        noisy_quadratic.rollout_batch_sizes(
            problem, jnp.full(segments, 2.0**k), examples, learning_rate, momentum
        ).excess_loss[-1]
        for k in range(8)
    ]
    assert optimal.excess_loss[-1] < 0.95 * min(constants)
    assert optimal.excess_loss[-1] < 0.8 * greedy.excess_loss[-1]
    assert optimal.batch_sizes[-1] > 4 * optimal.batch_sizes[0]
    assert optimal.batch_sizes.min() >= 1
    assert optimal.batch_sizes.max() <= 128 * (1 + 1e-5)


def test_a_longer_horizon_ends_lower():
    setting = (problem_of(), 8 * 128, 1.0)
    losses = [
        noisy_quadratic.optimal_batch_sizes(*setting, horizon=horizon, num_segments=8).excess_loss[
            -1
        ]
        for horizon in (1, 3, None)
    ]
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
def test_bad_arguments_are_named(options, message):
    for factory in (noisy_quadratic.greedy_batch_sizes, noisy_quadratic.optimal_batch_sizes):
        with pytest.raises(ValueError, match=message):
            factory(problem_of(), 4096, **options)
