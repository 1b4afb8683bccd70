"""The Gaussian process by features against the textbook form with dense float64 matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbiter_jax.learning_rate import _gaussian_process as gp

GRID = np.linspace(0.0, 1.0, 50)

fit = jax.jit(gp.fit)
posterior = jax.jit(gp.posterior)
gradient = jax.jit(
    lambda parameters, sample: jnp.stack(gp._gradient(parameters, gp._project(sample), sample))
)


def rbf(a, b):
    return np.exp(-((a[:, None] - b[None, :]) ** 2) / (2 * gp.LENGTHSCALE**2))


def make_sample(rng, size=60, observed=45):
    x = rng.permutation(np.arange(200))[:size] / 200
    y = 2 - x + 3 * x**4 + 0.1 * rng.normal(size=size)
    return gp.Sample(jnp.asarray(x, float), jnp.asarray(y, float), jnp.arange(size) < observed)


def make_hyperparameters(noise=4e-3, scale=0.7, constant=1.6):
    def softplus_inverse(value):
        return jnp.asarray(np.log(np.expm1(value)), float)

    return gp.Hyperparameters(
        softplus_inverse(noise - gp.MIN_NOISE),
        softplus_inverse(scale),
        jnp.asarray(constant, float),
    )


def dense(sample, noise=4e-3, scale=0.7, constant=1.6):
    """Posterior mean and Var(f_i - f_last), by the n x n matrices."""
    x, y = (np.asarray(v, np.float64)[np.asarray(sample.mask)] for v in (sample.x, sample.y))
    covariance = scale * rbf(x, x) + noise * np.eye(len(x))
    solved = np.linalg.solve(covariance, y - constant)
    cross = scale * rbf(GRID, x)
    mean = constant + cross @ solved
    posterior = scale * rbf(GRID, GRID) - cross @ np.linalg.solve(covariance, cross.T)
    diagonal = np.diag(posterior)
    return mean, diagonal + diagonal[-1] - 2 * posterior[:, -1]


@pytest.mark.parametrize(("x64", "tolerance"), [(False, 1e-3), (True, 1e-9)])
def test_equals_the_dense_process(x64, tolerance):
    with jax.enable_x64(x64):
        sample = make_sample(np.random.default_rng(0))
        parameters = make_hyperparameters()
        found = posterior(parameters, sample, jnp.asarray(GRID, float))
        mean, variance = (np.asarray(leaf) for leaf in found)
        expected_mean, expected_variance = dense(sample)
    assert mean.dtype == (np.float64 if x64 else np.float32)
    np.testing.assert_allclose(mean, expected_mean, rtol=tolerance)
    np.testing.assert_allclose(variance, expected_variance, atol=tolerance * 0.1)
    assert variance[-1] == 0


def test_features_give_the_kernel():
    with jax.enable_x64(True):
        features = np.asarray(gp.kernel_features(jnp.asarray(GRID)))
    np.testing.assert_allclose(features @ features.T, rbf(GRID, GRID), atol=1e-12)


def dense_likelihood(vector, x, y):
    """Negative log likelihood per observation, by the n x n matrix and its Cholesky factor."""
    noise, scale = jax.nn.softplus(vector[0]) + gp.MIN_NOISE, jax.nn.softplus(vector[1])
    kernel = jnp.exp(-((x[:, None] - x[None, :]) ** 2) / (2 * gp.LENGTHSCALE**2))
    factor = jnp.linalg.cholesky(scale * kernel + noise * jnp.eye(len(x)))
    whitened = jax.scipy.linalg.solve_triangular(factor, y - vector[2], lower=True)
    return (0.5 * whitened @ whitened + jnp.sum(jnp.log(jnp.diag(factor)))) / len(x)


dense_gradient = jax.jit(jax.grad(dense_likelihood))


def test_the_gradient_is_that_of_the_dense_likelihood():
    with jax.enable_x64(True):
        sample = make_sample(np.random.default_rng(1))
        parameters = make_hyperparameters()
        expected = dense_gradient(
            jnp.stack(parameters), sample.x[sample.mask], sample.y[sample.mask]
        )
        np.testing.assert_allclose(gradient(parameters, sample), expected, rtol=1e-8)


@pytest.mark.slow
def test_the_fit_takes_a_hundred_steps_of_adam():
    """And the next fit starts where it ended."""
    with jax.enable_x64(True):
        sample = make_sample(np.random.default_rng(1))
        x, y = sample.x[sample.mask], sample.y[sample.mask]
        process = gp.init()
        vector, moments = np.array([np.log(np.expm1(9e-4)), 0.0, 1.5]), np.zeros((2, 3))
        for step in range(1, 201):
            if step in (1, 101):
                process = fit(process, sample, jnp.asarray(1.5))
                vector[2] = 1.5
            grad = np.asarray(dense_gradient(vector, x, y))
            moments = moments * [[0.9], [0.999]] + np.stack([0.1 * grad, 0.001 * grad**2])
            first, second = moments / [[1 - 0.9**step], [1 - 0.999**step]]
            vector = vector - 0.01 * first / (np.sqrt(second) + 1e-8)
            if step in (100, 200):
                np.testing.assert_allclose(jnp.stack(process.hyperparameters), vector, rtol=1e-6)


def test_rows_outside_the_mask_have_no_effect():
    sample = make_sample(np.random.default_rng(2))
    other = sample._replace(
        x=jnp.where(sample.mask, sample.x, 0.123), y=jnp.where(sample.mask, sample.y, 1e9)
    )
    grid = jnp.asarray(GRID, float)
    results = [
        (fitted.hyperparameters, posterior(fitted.hyperparameters, s, grid))
        for s in (sample, other)
        for fitted in [fit(gp.init(), s, jnp.asarray(1.5))]
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("observed", [0, 1, 60])
@pytest.mark.parametrize("value", [0.0, 2.3, 1e12])
def test_degenerate_samples_stay_finite(observed, value):
    sample = make_sample(np.random.default_rng(3), observed=observed)
    sample = sample._replace(y=jnp.full_like(sample.y, value).at[0].add(value))
    process = gp.init()
    for _ in range(3):
        process = fit(process, sample, jnp.asarray(value))
    found = posterior(process.hyperparameters, sample, jnp.asarray(GRID, float))
    for leaf in jax.tree.leaves((process.hyperparameters, found)):
        assert np.all(np.isfinite(leaf))
    assert np.all(np.asarray(found.variance_to_last) >= 0)
