"""Segments of training at a constant batch size, in closed form for any real number of steps.

With a constant learning rate the moments of the noisy quadratic follow a linear recursion, so n
steps are the n-th power of a 2x2 matrix, also for real n. The loss after a fixed number of examples
is then a smooth function of the batch sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from arbiter_jax.noisy_quadratic._moments import Moments, NoisyQuadratic


class Budget(NamedTuple):
    """Everything that stays fixed while the batch sizes vary."""

    learning_rate: jax.Array  # shape=(), dtype=float
    momentum: jax.Array  # shape=(), dtype=float
    segment: jax.Array  # shape=(), dtype=float, examples per segment
    min_batch_size: jax.Array  # shape=(), dtype=float
    max_batch_size: jax.Array  # shape=(), dtype=float


def _power_coefficients(
    lr_h: jax.Array, mu: jax.Array, num_steps: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Coefficients (a, b) of M^n = a M + b I, for the matrix M of one step and a real n.

    M = [[1 - lr h, mu], [-lr h, mu]] has determinant mu and, for lr h <= 1, no negative eigenvalue.
    """
    tiny = 10 * jnp.finfo(lr_h.dtype).eps
    half_trace = 0.5 * (1 - lr_h + mu)
    # Keep the eigenvalues distinct and nonzero, so that every quotient below is defined.
    mu = jnp.maximum(mu, tiny**2)
    gap = half_trace**2 - mu
    gap = jnp.where(jnp.abs(gap) < tiny * mu, tiny * mu, gap)
    larger = half_trace + jnp.sqrt(gap + 0j)
    smaller = mu / larger
    log_larger, log_smaller = jnp.log(larger), jnp.log(smaller)
    # (larger^n - smaller^n) / (larger - smaller) by expm1, which is accurate if they are close.
    ratio = log_smaller - log_larger
    quotient = jnp.expm1(num_steps * ratio) / jnp.expm1(ratio)
    a = jnp.exp((num_steps - 1) * log_larger) * quotient
    quotient = jnp.expm1((num_steps - 1) * ratio) / jnp.expm1(ratio)
    b = -mu * jnp.exp((num_steps - 2) * log_larger) * quotient
    return jnp.real(a), jnp.real(b)


def segment_moments(
    problem: NoisyQuadratic, moments: Moments, budget: Budget, batch_size: jax.Array
) -> Moments:
    """The moments after one segment of steps at one batch size."""
    lr_h = budget.learning_rate * problem.curvature
    mu = budget.momentum
    a, b = _power_coefficients(lr_h, mu, budget.segment / batch_size)
    # Rows of M^n: position and velocity after n steps.
    xx, xv = a * (1 - lr_h) + b, a * mu
    vx, vv = -a * lr_h, a * mu + b

    # The deviation from the stationary covariance of heavy-ball SGD decays by M^n on each side.
    noise = lr_h * problem.noise_variance / batch_size
    V = noise * (1 + mu) / ((1 - mu) * (2 * (1 + mu) - lr_h))
    S = V * lr_h / (1 + mu)
    W = 2 * S
    dV, dW, dS = (
        moments.position_variance - V,
        moments.velocity_variance - W,
        moments.covariance - S,
    )
    return Moments(
        position=xx * moments.position + xv * moments.velocity,
        velocity=vx * moments.position + vv * moments.velocity,
        position_variance=V + xx**2 * dV + 2 * xx * xv * dS + xv**2 * dW,
        velocity_variance=W + vx**2 * dV + 2 * vx * vv * dS + vv**2 * dW,
        covariance=S + xx * vx * dV + (xx * vv + xv * vx) * dS + xv * vv * dW,
    )


def greedy_size(problem: NoisyQuadratic, moments: Moments, budget: Budget) -> jax.Array:
    """The batch size that maximizes the expected progress per example of the next step.

    The progress is p - q / B; per example it is largest at B = 2 q / p. If even a step without
    noise makes no progress (p <= 0), the largest size is returned; without noise (q = 0), the
    smallest.
    """
    h, lr, mu = problem.curvature, budget.learning_rate, budget.momentum
    e, u, V, W, S = moments
    lr_h = lr * h
    # Change of E theta^2 without the noise term, which the batch size divides.
    change = (lr_h**2 - 2 * lr_h) * (e**2 + V) + mu**2 * (u**2 + W)
    change += 2 * mu * (1 - lr_h) * (e * u + S)
    progress = -0.5 * jnp.sum(h * change)
    cost = 0.5 * jnp.sum(h * lr_h**2 * problem.noise_variance)
    size = 2 * cost / jnp.where(progress > 0, progress, jnp.finfo(h.dtype).tiny)
    return jnp.clip(size, budget.min_batch_size, budget.max_batch_size)
