"""Gaussian process regression of a loss curve, the statistics behind :func:`autowu`.

The kernel is an RBF with a fixed lengthscale on [0, 1]. There it equals, up to rounding, the inner
product of 32 features (its Taylor expansion), so the process is a linear regression on them: one
32 x 32 eigendecomposition per sample replaces a Cholesky factorization of the n x n kernel matrix
at every step of the fit. This is an order of magnitude faster, computes variances of differences
without cancellation, and needs no jitter, since every eigenvalue is a sum of squares.

Reference: Rasmussen and Williams, `Gaussian Processes for Machine Learning
<https://gaussianprocess.org/gpml/>`_, 2006, sections 2.1 and 5.4; Kim et al., `Automated Learning
Rate Scheduler for Large-batch Training <https://arxiv.org/abs/2107.05855>`_, 2021.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

LENGTHSCALE = 0.2
MIN_NOISE = 1e-4
INITIAL_NOISE = 1e-3

# The expansion about 1/2 omits the tail beyond 32 of a Poisson distribution of mean
# (1/2)^2 / LENGTHSCALE^2 = 6.25, which is 1e-13: negligible in float32 and in float64.
_NUM_FEATURES = 32
_CENTER = 0.5
_FACTORIALS = np.array([math.factorial(j) for j in range(_NUM_FEATURES)], np.float64)
_MAX_GRADIENT = 1e15  # so that Adam's squares do not overflow float32
_FIT_STEPS = 100
_OPTIMIZER = optax.adam(0.01)


class Hyperparameters(NamedTuple):
    """The fitted parameters; noise and output scale are stored before their softplus."""

    raw_noise: jax.Array  # shape=(), dtype=float, noise variance = softplus(raw) + MIN_NOISE
    raw_output_scale: jax.Array  # shape=(), dtype=float, output scale = softplus(raw)
    constant: jax.Array  # shape=(), dtype=float, the prior mean


class GaussianProcess(NamedTuple):
    """A process between two fits: each fit starts where the previous one ended."""

    hyperparameters: Hyperparameters
    optimizer_state: Any  # of Adam, over the three numbers above as one array


class Sample(NamedTuple):
    """Observations in arrays of fixed shape; rows outside the mask are ignored."""

    x: jax.Array  # shape=(n,), dtype=float, in [0, 1]
    y: jax.Array  # shape=(n,), dtype=float, finite inside the mask
    mask: jax.Array  # shape=(n,), dtype=bool


class Posterior(NamedTuple):
    """The process on a grid, conditioned on a sample."""

    mean: jax.Array  # shape=(grid,), dtype=float
    variance_to_last: jax.Array  # shape=(grid,), dtype=float, Var(f_i - f_last)


class _Projection(NamedTuple):
    """A sample in the eigenbasis of the Gram matrix of its features."""

    eigenvalues: jax.Array  # shape=(features,), dtype=float, >= 0
    basis: jax.Array  # shape=(features, features), dtype=float, one eigenvector per column
    features: jax.Array  # shape=(n, features), dtype=float, rows outside the mask are 0


def init() -> GaussianProcess:
    """The process before the first fit: noise variance 1e-3, output scale softplus(0)."""
    hyperparameters = Hyperparameters(
        # The inverse of softplus.
        raw_noise=jnp.asarray(math.log(math.expm1(INITIAL_NOISE - MIN_NOISE)), float),
        raw_output_scale=jnp.asarray(0.0, float),
        constant=jnp.asarray(0.0, float),
    )
    return GaussianProcess(hyperparameters, _OPTIMIZER.init(jnp.zeros(3)))


def noise(hyperparameters: Hyperparameters) -> jax.Array:
    """The noise variance, float[]."""
    return jax.nn.softplus(hyperparameters.raw_noise) + MIN_NOISE


def output_scale(hyperparameters: Hyperparameters) -> jax.Array:
    """The prior variance of the function at any one point, float[]."""
    return jax.nn.softplus(hyperparameters.raw_output_scale)


def kernel_features(x: jax.Array) -> jax.Array:
    """Features whose inner products are exp(-(x - x')^2 / (2 LENGTHSCALE^2)) on [0, 1]."""
    z = ((x - _CENTER) / LENGTHSCALE)[:, None]
    powers = jnp.arange(_NUM_FEATURES)[None, :]
    # z^j / sqrt(j!) exp(-z^2 / 2)
    scales = jnp.asarray(_FACTORIALS**-0.5, z.dtype)[None, :]
    return jnp.exp(-(z**2) / 2) * z**powers * scales


# jaxlib distributes a batch of matrices over the threads of the CPU client and waits for them on one
# of those threads: two concurrent calls, from one program or from two devices, deadlock. A single
# matrix is never distributed.
@jax.custom_batching.sequential_vmap
def _eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    eigenvalues, basis = jnp.linalg.eigh(matrix)
    return eigenvalues, basis


def _project(sample: Sample) -> _Projection:
    features = jnp.where(sample.mask[:, None], kernel_features(sample.x), 0.0)
    eigenvalues, basis = _eigh(features.T @ features)
    return _Projection(jnp.maximum(eigenvalues, 0.0), basis, features @ basis)


def _spectrum(hyperparameters: Hyperparameters, projection: _Projection) -> jax.Array:
    """Eigenvalues of the covariance of the observations in the span of the features."""
    return output_scale(hyperparameters) * projection.eigenvalues + noise(hyperparameters)


def _gradient(
    hyperparameters: Hyperparameters, projection: _Projection, sample: Sample
) -> Hyperparameters:
    """Gradient of the negative log marginal likelihood per observation.

    In closed form, because automatic differentiation takes several times as long to compile.
    """
    variance, scale = noise(hyperparameters), output_scale(hyperparameters)
    spectrum = _spectrum(hyperparameters, projection)
    residual = jnp.where(sample.mask, sample.y - hyperparameters.constant, 0.0)
    both = jnp.stack([residual, sample.mask.astype(residual.dtype)], axis=1)
    weights = scale * (projection.features.T @ both) / spectrum[:, None]
    unexplained = both - projection.features @ weights  # K^-1 [r, 1], times the noise variance
    num_observations = jnp.sum(sample.mask)
    # tr(K^-1 dK) - r' K^-1 dK K^-1 r. In the n - 32 directions outside the span, K is noise only.
    by_noise = jnp.sum(1 / spectrum) + (num_observations - _NUM_FEATURES) / variance
    by_noise -= jnp.sum((unexplained[:, 0] / variance) ** 2)
    by_scale = jnp.sum(projection.eigenvalues / spectrum) - jnp.sum((weights[:, 0] / scale) ** 2)
    # 1' K^-1 r, in a symmetric form with second-order rounding errors: summing K^-1 r loses digits.
    inner_product = jnp.sum(jnp.prod(unexplained, axis=1)) / variance
    inner_product += jnp.sum(jnp.prod(weights, axis=1)) / scale
    half = 0.5 / jnp.maximum(num_observations, 1)
    return Hyperparameters(
        raw_noise=half * by_noise * jax.nn.sigmoid(hyperparameters.raw_noise),
        raw_output_scale=half * by_scale * jax.nn.sigmoid(hyperparameters.raw_output_scale),
        constant=-2 * half * inner_product,
    )


def fit(process: GaussianProcess, sample: Sample, constant: jax.Array) -> GaussianProcess:
    """100 steps of Adam (learning rate .01) on the marginal likelihood per observation.

    Args:
      process: The process after the previous fit.
      sample: The observations.
      constant: float[], the initial prior mean; it is fitted with the other parameters.
    """
    with jax.default_matmul_precision("highest"):
        projection = _project(sample)

        def step(carry, _):
            vector, optimizer_state = carry
            grads = jnp.stack(_gradient(Hyperparameters(*vector), projection, sample))
            grads = jnp.clip(grads, -_MAX_GRADIENT, _MAX_GRADIENT)
            updates, optimizer_state = _OPTIMIZER.update(grads, optimizer_state)
            return (vector + updates, optimizer_state), None

        start = jnp.stack(process.hyperparameters._replace(constant=constant))
        (vector, optimizer_state), _ = jax.lax.scan(
            step, (start, process.optimizer_state), length=_FIT_STEPS
        )
    return GaussianProcess(Hyperparameters(*vector), optimizer_state)


def posterior(hyperparameters: Hyperparameters, sample: Sample, grid: jax.Array) -> Posterior:
    """The process conditioned on the sample, at points of [0, 1], float[grid]."""
    with jax.default_matmul_precision("highest"):
        projection = _project(sample)
        residual = jnp.where(sample.mask, sample.y - hyperparameters.constant, 0.0)
        scale, spectrum = output_scale(hyperparameters), _spectrum(hyperparameters, projection)
        weights = scale * (projection.features.T @ residual) / spectrum
        features = kernel_features(grid) @ projection.basis
        differences = features - features[-1:]
        # Covariance of the weights, diagonal in this basis: scale - scale^2 eigenvalue / spectrum.
        weight_variance = scale * noise(hyperparameters) / spectrum
        return Posterior(
            mean=hyperparameters.constant + features @ weights,
            variance_to_last=differences**2 @ weight_variance,
        )
