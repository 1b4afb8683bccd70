"""The noisy quadratic against recorded numbers, Monte Carlo, autodiff and facts of the paper."""

import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbiter_jax import noisy_quadratic
from arbiter_jax.noisy_quadratic import NoisyQuadratic
from arbiter_jax.noisy_quadratic._greedy import greedy_rates
from arbiter_jax.noisy_quadratic._moments import Moments, initial_moments, momentum_step

FIXTURES = np.load(pathlib.Path(__file__).parents[1] / "fixtures" / "noisy_quadratic.npz")
PRECISIONS = pytest.mark.parametrize(("x64", "rtol"), [(True, 1e-8), (False, 1e-4)])


def recorded(group: str, field: str) -> np.ndarray:
    return FIXTURES[f"{group}/{field}"]


def problem_of(group: str) -> NoisyQuadratic:
    """The recorded problem in the default float type."""
    h = recorded(group, "curvature")
    noise = np.zeros_like(h) if group == "det" else recorded(group, "noise_variance")
    fields = (h, noise, recorded(group, "initial_second_moment"))
    return NoisyQuadratic(*(jnp.asarray(field, jnp.result_type(float)) for field in fields))


def ill_conditioned() -> NoisyQuadratic:
    i = jnp.arange(1, 1001, dtype=jnp.result_type(float))
    return NoisyQuadratic(1 / i, i, jnp.full_like(i, 10))


@PRECISIONS
@pytest.mark.parametrize(
    ("problem", "schedule"),
    [("dyn", "dyn"), ("dyn", "unit_greedy_mom"), ("dyn", "unit_opt_cap1"), ("iso", "iso")],
)
def test_rollout_equals_the_recorded_one(problem, schedule, x64, rtol):
    with jax.enable_x64(x64):
        rates = recorded(schedule, "learning_rates")
        has_momentum = f"{schedule}/momenta" in FIXTURES
        momenta = recorded(schedule, "momenta") if has_momentum else None
        losses = noisy_quadratic.rollout(problem_of(problem), rates, momenta)
        assert losses.dtype == (jnp.float64 if x64 else jnp.float32)
        np.testing.assert_allclose(losses, recorded(schedule, "excess_loss"), rtol=rtol)


@pytest.mark.parametrize("kind", ["", "sd_", "ritz_"])
def test_rollout_without_noise_equals_the_recorded_one(kind):
    # In float64 only: rounding the recorded rates to float32 alone moves this loss by 9%.
    with jax.enable_x64(True):
        rates = recorded("det", f"{kind}alpha" if kind else "learning_rates")
        momenta = None if kind else recorded("det", "momenta")
        losses = noisy_quadratic.rollout(problem_of("det"), rates, momenta)
        expected = recorded("det", f"{kind}L" if kind else "excess_loss")
        np.testing.assert_allclose(losses, expected, rtol=1e-8)


def test_moments_equal_the_recorded_ones():
    with jax.enable_x64(True):
        problem = problem_of("dyn")
        moments = initial_moments(problem)
        for rate, mu in zip(
            recorded("dyn", "learning_rates"), recorded("dyn", "momenta"), strict=True
        ):
            moments = momentum_step(problem, moments, rate, mu)
        second = moments.position**2 + moments.position_variance
        cross = moments.position * moments.velocity + moments.covariance
        speed = moments.velocity**2 + moments.velocity_variance
        for ours, name in ((second, "A_T"), (cross, "C_T"), (speed, "B_T")):
            np.testing.assert_allclose(ours, recorded("dyn", name), rtol=1e-8)


@PRECISIONS
@pytest.mark.parametrize(
    ("problem", "schedule", "momentum"),
    [
        ("dyn", "unit_greedy", False),
        ("dyn", "unit_greedy_mom", True),
        ("iso", "iso", False),
        ("det", "det", True),
    ],
)
def test_greedy_schedule_equals_the_recorded_one(problem, schedule, momentum, x64, rtol):
    with jax.enable_x64(x64):
        expected = recorded(schedule, "excess_loss")
        greedy = noisy_quadratic.greedy_schedule(
            problem_of(problem), len(expected) - 1, momentum=momentum
        )
        assert greedy.excess_loss.dtype == (jnp.float64 if x64 else jnp.float32)
        np.testing.assert_allclose(greedy.excess_loss, expected, rtol=rtol)
        rates = recorded(schedule, "learning_rates")
        np.testing.assert_allclose(greedy.learning_rates, rates, rtol=rtol)
        if momentum:
            np.testing.assert_allclose(greedy.momenta, recorded(schedule, "momenta"), atol=rtol)


def test_greedy_without_noise_is_conjugate_gradient():
    with jax.enable_x64(True):
        problem = problem_of("det")
        with_momentum = noisy_quadratic.greedy_schedule(problem, 10, momentum=True)
        np.testing.assert_allclose(with_momentum.excess_loss, recorded("det", "cg_L"), rtol=1e-8)
        # and equals the best that ten jointly chosen learning rates can do without momentum
        np.testing.assert_allclose(
            with_momentum.excess_loss[-1], recorded("det", "ritz_L")[-1], rtol=1e-8
        )
        alone = noisy_quadratic.greedy_schedule(problem, 10)
        np.testing.assert_allclose(alone.excess_loss, recorded("det", "sd_L"), rtol=1e-8)
        ratio = alone.excess_loss[-1] / with_momentum.excess_loss[-1]
        np.testing.assert_allclose(ratio, 4.84, atol=0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("x64", "rtol"), [pytest.param(True, 1e-8, marks=pytest.mark.exhaustive), (False, 1e-4)]
)
def test_greedy_costs_a_factor_of_2_3(x64, rtol):
    """With noise and unequal curvatures."""
    with jax.enable_x64(x64):
        greedy = noisy_quadratic.greedy_schedule(ill_conditioned(), 250)
        np.testing.assert_allclose(greedy.excess_loss[-1], 9.1526023, rtol=rtol)
        optimal = noisy_quadratic.optimal_schedule(ill_conditioned(), 250, max_iterations=60)
        assert 4.0 < optimal.excess_loss[-1] <= 4.0022
        assert optimal.learning_rates.max() <= 1.0
        ratio = greedy.excess_loss[-1] / optimal.excess_loss[-1]
        np.testing.assert_allclose(ratio, 2.287, atol=1e-3)


@pytest.mark.slow
def test_greedy_is_optimal_if_all_curvatures_are_equal():
    with jax.enable_x64(True):
        problem = problem_of("dyn")._replace(curvature=jnp.full(4, 0.7))
        greedy = noisy_quadratic.greedy_schedule(problem, 20)
        assert greedy.learning_rates[0] < 1 / 0.7  # the cap of the optimum does not bind
        optimal = noisy_quadratic.optimal_schedule(problem, 20)
        np.testing.assert_allclose(optimal.excess_loss[-1], greedy.excess_loss[-1], rtol=1e-8)
        np.testing.assert_allclose(optimal.learning_rates, greedy.learning_rates, rtol=1e-4)


@PRECISIONS
def test_optimal_schedule_equals_the_recorded_one(x64, rtol):
    with jax.enable_x64(x64):
        optimal = noisy_quadratic.optimal_schedule(problem_of("dyn"), 20, max_learning_rate=1.0)
        expected = recorded("unit_opt_cap1", "excess_loss")
        np.testing.assert_allclose(optimal.excess_loss[-1], expected[-1], rtol=rtol)
        np.testing.assert_allclose(
            optimal.learning_rates, recorded("unit_opt_cap1", "learning_rates"), rtol=1e-2
        )


@pytest.mark.slow
def test_momentum_lowers_the_optimum():
    """And stays within its bounds."""
    problem = problem_of("dyn")
    alone = noisy_quadratic.optimal_schedule(problem, 20)
    both = noisy_quadratic.optimal_schedule(problem, 20, momentum=True)
    np.testing.assert_array_equal(alone.momenta, 0)
    assert both.excess_loss[-1] < 0.75 * alone.excess_loss[-1]
    assert both.momenta.min() >= 0
    assert both.momenta.max() <= 0.99
    assert both.learning_rates.max() <= 1.0
    with_full_horizon = noisy_quadratic.receding_horizon_schedule(problem, 20, 20, momentum=True)
    np.testing.assert_allclose(with_full_horizon.excess_loss[-1], both.excess_loss[-1], rtol=1e-3)


@pytest.mark.slow
def test_the_optimum_has_slope_only_at_its_bounds():
    with jax.enable_x64(True):
        problem = problem_of("dyn")
        optimal = noisy_quadratic.optimal_schedule(problem, 20)

        def objective(rates):
            return jnp.log(noisy_quadratic.rollout(problem, rates)[-1])

        slope = jax.jit(jax.grad(objective))(optimal.learning_rates)
        inside = optimal.learning_rates < 1.0 - 1e-6
        assert 5 < inside.sum() < 15
        np.testing.assert_allclose(slope[inside], 0, atol=1e-6)
        assert (slope[~inside] < 0).all()  # only a larger rate would help


@pytest.mark.slow
def test_receding_horizon_leads_from_greedy_to_optimal():
    problem = problem_of("dyn")
    greedy = noisy_quadratic.greedy_schedule(problem, 20)
    optimal = noisy_quadratic.optimal_schedule(problem, 20)
    losses = [
        noisy_quadratic.receding_horizon_schedule(problem, 20, horizon).excess_loss[-1]
        for horizon in (1, 3, 20)
    ]
    np.testing.assert_allclose(losses[0], greedy.excess_loss[-1], rtol=1e-4)
    np.testing.assert_allclose(losses[2], optimal.excess_loss[-1], rtol=1e-4)
    assert losses[0] > 1.1 * losses[1] > 1.1 * losses[2]


def test_horizon_one_is_the_greedy_rate_up_to_the_cap():
    problem = problem_of("dyn")
    rates = noisy_quadratic.receding_horizon_schedule(
        problem, 20, 1, max_learning_rate=0.5
    ).learning_rates
    assert rates[0] == pytest.approx(0.5, rel=1e-5)  # the greedy rate is .98
    assert rates[-1] < 0.25


def sample_runs(problem, rates, momenta, num_runs, key):
    """Simulates v' = mu v - lr g itself, with g = h (theta - c)."""
    start_key, noise_key = jax.random.split(key)
    shape = (num_runs, problem.curvature.size)
    deviation = jnp.sqrt(problem.noise_variance)[None]
    start = jnp.sqrt(problem.initial_second_moment)[None] * jax.random.rademacher(
        start_key, shape, dtype=problem.curvature.dtype
    )

    def body(carry, inputs):
        theta, v = carry
        rate, mu, key = inputs
        center = deviation * jax.random.normal(key, shape, problem.curvature.dtype)
        v = mu * v - rate * problem.curvature[None] * (theta - center)
        return (theta + v, v), (theta + v, v)

    keys = jax.random.split(noise_key, rates.size)
    return jax.lax.scan(body, (start, jnp.zeros(shape)), (rates, momenta, keys))[1]


@pytest.mark.slow
def test_moments_equal_those_of_sampled_runs(key):
    problem = problem_of("dyn")
    rates = jnp.asarray(recorded("dyn", "learning_rates"), jnp.float32)
    momenta = jnp.asarray(recorded("dyn", "momenta"), jnp.float32)
    theta, v = jax.jit(sample_runs, static_argnums=3)(problem, rates, momenta, 20_000, key)
    losses = 0.5 * (theta**2).mean(1) @ problem.curvature
    expected = noisy_quadratic.rollout(problem, rates, momenta)[1:]
    np.testing.assert_allclose(losses, expected, rtol=0.03)
    np.testing.assert_allclose((theta[-1] ** 2).mean(0), recorded("dyn", "A_T"), rtol=0.05)
    np.testing.assert_allclose((theta * v)[-1].mean(0), recorded("dyn", "C_T"), atol=0.02)
    np.testing.assert_allclose((v[-1] ** 2).mean(0), recorded("dyn", "B_T"), rtol=0.05)


@pytest.mark.parametrize("momentum", [False, True])
def test_autodiff_finds_no_slope_at_the_greedy_rates(momentum):
    with jax.enable_x64(True):
        problem = problem_of("dyn")

        @jax.jit
        def derivatives():
            moments = initial_moments(problem)
            for rate, mu in ((0.3, 0.0), (0.2, 0.5), (0.1, 0.7)):
                moments = momentum_step(problem, moments, rate, mu)

            def loss(rate, mu):
                after = momentum_step(problem, moments, rate, mu)
                return (problem.curvature * (after.position**2 + after.position_variance)).sum()

            rates = greedy_rates(problem, moments, momentum)
            return jax.grad(loss, argnums=(0, 1))(*rates), jax.hessian(loss)(*rates)

        slopes, curvature = derivatives()
        assert abs(slopes[0]) < 1e-12
        assert (abs(slopes[1]) < 1e-12) == momentum
        assert curvature > 0


def test_rollout_is_differentiable_in_both_schedules():
    with jax.enable_x64(True):
        problem = problem_of("dyn")
        rates, momenta = jnp.full(6, 0.3), jnp.full(6, 0.5)

        @jax.jit
        def loss(rates, momenta):
            return noisy_quadratic.rollout(problem, rates, momenta)[-1]

        slopes = jax.jit(jax.grad(loss, argnums=(0, 1)))(rates, momenta)
        for argument in range(2):
            arguments = np.array([rates, momenta])
            arguments[argument, 2] += 1e-6
            higher = loss(*jnp.asarray(arguments))
            arguments[argument, 2] -= 2e-6
            difference = (higher - loss(*jnp.asarray(arguments))) / 2e-6
            np.testing.assert_allclose(slopes[argument][2], difference, rtol=1e-5)


def test_greedy_excess_loss_never_increases():
    for momentum in (False, True):
        losses = noisy_quadratic.greedy_schedule(problem_of("dyn"), 50, momentum).excess_loss
        assert (jnp.diff(losses) <= 0).all()


def test_without_noise_all_variances_stay_zero():
    with jax.enable_x64(True):
        problem = problem_of("det")
        moments = initial_moments(problem)
        for rate, mu in zip(
            recorded("det", "learning_rates"), recorded("det", "momenta"), strict=True
        ):
            moments = momentum_step(problem, moments, rate, mu)
        for name in ("position_variance", "velocity_variance", "covariance"):
            np.testing.assert_array_equal(getattr(moments, name), 0)
        assert moments._fields == Moments._fields


@pytest.mark.slow
def test_schedules_are_jittable_and_vmap():
    problem = problem_of("dyn")
    scales = jnp.array([1.0, 4.0])

    def losses(scale):
        noisy = problem._replace(noise_variance=scale * problem.noise_variance)
        return (
            noisy_quadratic.greedy_schedule(noisy, 20, momentum=True).excess_loss,
            noisy_quadratic.optimal_schedule(noisy, 20).excess_loss,
        )

    together = jax.jit(jax.vmap(losses))(scales)
    apart = [losses(scale) for scale in scales]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *apart)
    chex.assert_trees_all_close(together, stacked, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: noisy_quadratic.greedy_schedule(p, 0), "num_steps must be an integer >= 1"),
        (lambda p: noisy_quadratic.optimal_schedule(p, 5, max_learning_rate=0.0), "got 0.0"),
        (lambda p: noisy_quadratic.optimal_schedule(p, 5, max_iterations=0), "max_iterations"),
        (lambda p: noisy_quadratic.receding_horizon_schedule(p, 5, 6), "horizon must be"),
        (lambda p: noisy_quadratic.rollout(p, jnp.ones(3), jnp.ones(2)), "same shape"),
        (lambda p: noisy_quadratic.rollout(p._replace(curvature=jnp.ones(3)), jnp.ones(3)), "noise_variance must have shape"),  # noqa: E501
        (lambda p: noisy_quadratic.rollout(p._replace(curvature=-p.curvature), jnp.ones(3)), "curvature must hold finite numbers >= 0"),  # noqa: E501
    ],
)  # fmt: skip
def test_arguments_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call(problem_of("dyn"))


ONES = NoisyQuadratic(np.ones(2), np.ones(2), np.ones(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda nq: nq.rollout(None, [0.1]), "problem must be a NoisyQuadratic, got NoneType"),
        (lambda nq: nq.rollout(tuple(ONES), [0.1]), "problem must be a NoisyQuadratic, got tuple"),
        (
            lambda nq: nq.rollout(ONES._replace(curvature="a"), [0.1]),
            "curvature must be an array of real numbers, got 'a'",
        ),
        (
            lambda nq: nq.rollout(ONES._replace(noise_variance=1j * np.ones(2)), [0.1]),
            "noise_variance must be an array of real numbers",
        ),
        (lambda nq: nq.rollout(ONES, None), "learning_rates must be an array of real numbers"),
        (lambda nq: nq.rollout(ONES, [np.nan]), "learning_rates must hold finite numbers, got"),
        (lambda nq: nq.rollout(ONES, [0.1], [np.inf]), "momenta must hold finite numbers"),
        (lambda nq: nq.greedy_schedule(ONES, 2, momentum="no"), "momentum must be one of False"),
        (lambda nq: nq.optimal_schedule(ONES, 2, momentum=None), "momentum must be one of False"),
        (
            lambda nq: nq.optimal_schedule(ONES._replace(curvature=np.zeros(2)), 2),
            "curvature must hold finite numbers > 0",
        ),
        (
            lambda nq: nq.greedy_batch_sizes(ONES._replace(curvature=np.zeros(2)), 100, 0.1),
            "curvature must have an entry > 0",
        ),
        (
            lambda nq: nq.rollout_batch_sizes(ONES, None, 100, 0.1),
            "batch_sizes must be an array of real numbers",
        ),
        (
            lambda nq: nq.rollout_batch_sizes(ONES, [4.0, -4.0], 100, 0.1),
            "batch_sizes must hold finite numbers > 0, got values from -4 to 4",
        ),
        (
            lambda nq: nq.rollout_batch_sizes(ONES, [4.0, 51.0], 100, 0.1),
            "batch_sizes must be <= num_examples / 2 = 50, .*, got 51",
        ),
    ],
)
def test_arguments_of_another_kind(call, message):
    with pytest.raises(ValueError, match=message):
        call(noisy_quadratic)
