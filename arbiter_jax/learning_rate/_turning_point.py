"""Whether a loss curve has started to rise, and where it was lowest: the test of :func:`autowu`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from arbiter_jax.learning_rate import _gaussian_process as gp

_GRID_SIZE = 500
_FIT_SIZE = 100
_POSTERIOR_SIZE = 500
_VARIANCE_FLOOR = 1e-4


class TurningPoint(NamedTuple):
    """Result of the test at the end of an epoch."""

    process: gp.GaussianProcess
    probabilities: jax.Array  # shape=(num_tests,), dtype=float, that the loss was lower before
    positions: jax.Array  # shape=(num_tests,), dtype=float, in [0, 1], where it was lowest
    learning_rate: jax.Array  # shape=(), dtype=float32, mean of the rates at these positions
    collapsed: jax.Array  # shape=(), dtype=bool, no loss of the last epoch was finite


def draw_subsets(key: jax.Array, losses: jax.Array, num_tests: int) -> tuple[jax.Array, jax.Array]:
    """Indices of finite losses, without replacement: int32[n] to fit to, int32[num_tests, m]."""
    num_losses = losses.shape[0]
    scores = jax.random.uniform(key, (1 + num_tests, num_losses))
    scores = jnp.where(jnp.isfinite(losses)[None, :], scores, -1.0)
    _, fit_indices = jax.lax.top_k(scores[0], min(_FIT_SIZE, num_losses))
    _, posterior_indices = jax.lax.top_k(scores[1:], min(_POSTERIOR_SIZE, num_losses))
    return fit_indices, posterior_indices


def _sample(losses: jax.Array, num_losses: jax.Array, indices: jax.Array) -> gp.Sample:
    """The losses at the indices; those not finite or out of range are masked out."""
    y = losses.at[indices].get(mode="fill", fill_value=jnp.nan)
    mask = jnp.isfinite(y)
    x = jnp.where(mask, indices / num_losses, 0.0).astype(losses.dtype)
    return gp.Sample(x, jnp.where(mask, y, 0.0), mask)


def find_turning_point(
    process: gp.GaussianProcess,
    losses: jax.Array,
    num_losses: jax.Array,
    learning_rate: jax.Array,
    fit_indices: jax.Array,
    posterior_indices: jax.Array,
    *,
    steps_per_epoch: int,
    min_learning_rate: float,
) -> TurningPoint:
    """Fits the process and estimates whether the loss was lower before.

    Args:
      process: The process after the previous test.
      losses: float[W], nan if still to come or not finite.
      num_losses: int32[], K, the steps done.
      learning_rate: float32[], the rate of the last of them.
      fit_indices: int32[n], the losses to fit to; an index >= W is padding.
      posterior_indices: int32[num_tests, m], the losses that each posterior is conditioned on.
      steps_per_epoch: Steps per epoch.
      min_learning_rate: The rate at the start of the warm-up.
    """
    finite = jnp.isfinite(losses)
    mean_loss = jnp.sum(jnp.where(finite, losses, 0.0)) / jnp.maximum(jnp.sum(finite), 1)
    process = gp.fit(process, _sample(losses, num_losses, fit_indices), mean_loss)

    last_epoch = (num_losses - steps_per_epoch,)
    collapsed = ~jnp.any(jax.lax.dynamic_slice(finite, last_epoch, (steps_per_epoch,)))
    last_finite = jnp.max(jnp.where(finite, jnp.arange(losses.shape[0]), 0)) / num_losses
    grid = jnp.linspace(0.0, 1.0, _GRID_SIZE, dtype=losses.dtype)

    def regress(indices):
        sample = _sample(losses, num_losses, indices)
        mean, variance = gp.posterior(process.hyperparameters, sample, grid)
        deviation = jnp.sqrt(variance + _VARIANCE_FLOOR)
        lower = jax.scipy.stats.norm.cdf((mean[-1] - mean) / deviation)  # P(f_i < f_last)
        # After a collapse the process only extrapolates beyond the last finite loss: ignore that.
        mean = jnp.where(collapsed & (grid > last_finite), jnp.inf, mean)
        return jnp.max(lower[:-1]), grid[jnp.argmin(mean)]

    probabilities, positions = jax.vmap(regress)(posterior_indices)
    rates = min_learning_rate * (learning_rate / min_learning_rate) ** positions
    # If no loss was ever finite, the smallest rate is the best guess.
    best = jnp.where(jnp.any(finite), jnp.mean(rates), min_learning_rate)
    return TurningPoint(process, probabilities, positions, best.astype(jnp.float32), collapsed)
