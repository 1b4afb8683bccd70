"""The noisy quadratic: a model of training whose expected loss under SGD is known in closed form.

Every coordinate has its own curvature and noise, so the first two moments of the parameters and
velocities determine the expected loss exactly, at every step and for every schedule. It shows the
cost of a greedy choice of the learning rate. Wu et al., "Understanding Short-Horizon Bias in
Stochastic Meta-Optimization", ICLR 2018, https://arxiv.org/abs/1803.02021.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


class NoisyQuadratic(NamedTuple):
    r"""A diagonal quadratic whose gradients are noisy.

    The gradient is :math:`g = h (\theta - c)` with :math:`c \sim N(0, \sigma^2)`, and the loss
    :math:`\frac12 \sum_i h_i (\theta_i^2 + \sigma_i^2)`. Its second term is irreducible; the first
    is the *excess loss* that is reported here.

    >>> import arbiter_jax as aj, jax.numpy as jnp
    >>> problem = aj.noisy_quadratic.NoisyQuadratic(
    ...     curvature=jnp.array([1.0, 0.1]),
    ...     noise_variance=jnp.array([1.0, 10.0]),
    ...     initial_second_moment=jnp.array([4.0, 4.0]),
    ... )
    >>> float(problem.curvature.max())
    1.0
    """

    curvature: jax.Array  # shape=(d,), dtype=float, h >= 0
    noise_variance: jax.Array  # shape=(d,), dtype=float, sigma^2 >= 0, of a batch of one example
    initial_second_moment: jax.Array  # shape=(d,), dtype=float, E theta_0^2 >= 0


class Moments(NamedTuple):
    """Moments of parameters and velocities per coordinate, with signal and noise kept separate.

    Only their sums enter the loss. Stored as sums they would be off by 20% at step 10 of a problem
    without noise, because position and velocity nearly cancel.
    """

    position: jax.Array  # shape=(d,), dtype=float, e: the parameter without gradient noise
    velocity: jax.Array  # shape=(d,), dtype=float, u: the velocity without gradient noise
    position_variance: jax.Array  # shape=(d,), dtype=float, V
    velocity_variance: jax.Array  # shape=(d,), dtype=float, W
    covariance: jax.Array  # shape=(d,), dtype=float, S


class RateSchedule(NamedTuple):
    """Learning rates and momenta of T steps, and the excess loss before, between and after them."""

    learning_rates: jax.Array  # shape=(T,), dtype=float
    momenta: jax.Array  # shape=(T,), dtype=float, zeros if only the learning rate is chosen
    excess_loss: jax.Array  # shape=(T + 1,), dtype=float


def as_array(**argument: Any) -> jax.Array:
    """Returns the argument as an array of real numbers, or raises an error."""
    ((name, values),) = argument.items()
    try:
        array = jnp.asarray(np.asarray(values) if isinstance(values, str) else values)
        real = not jnp.issubdtype(array.dtype, jnp.complexfloating)
    except (TypeError, ValueError):
        real = False
    if not real:
        raise ValueError(f"{name} must be an array of real numbers, got {values!r}.")
    return array


def check_range(
    name: str, array: jax.Array, minimum: float = -math.inf, *, closed: bool = True
) -> None:
    """Raises if an array that is known holds a number that is not finite, or below `minimum`.

    Args:
      name: What to call the array in the message.
      array: The array; one that is traced is not checked.
      minimum: The lower end.
      closed: Whether `minimum` itself is allowed.
    """
    if isinstance(array, jax.core.Tracer) or not array.size:
        return
    values = np.asarray(array, np.float64)
    above = values >= minimum if closed else values > minimum
    if not (np.isfinite(values) & above).all():
        low = "" if minimum == -math.inf else f" {'>=' if closed else '>'} {minimum:g}"
        raise ValueError(
            f"{name} must hold finite numbers{low}, got values from {values.min():g} to "
            f"{values.max():g}."
        )


def as_problem(problem: NoisyQuadratic) -> NoisyQuadratic:
    """Returns the problem as float arrays, or raises if it is not valid."""
    if not isinstance(problem, NoisyQuadratic):
        raise ValueError(f"problem must be a NoisyQuadratic, got {type(problem).__name__}.")
    given = [as_array(**{name: field}) for name, field in problem._asdict().items()]
    dtype = jnp.result_type(float, *given)
    fields = [field.astype(dtype) for field in given]
    for name, field in zip(problem._fields, fields, strict=True):
        if field.ndim != 1 or field.shape != fields[0].shape or field.size == 0:
            raise ValueError(
                f"{name} must have shape (d,) with d >= 1, the same for all three fields, "
                f"got {field.shape}."
            )
        check_range(name, field, 0)
    return NoisyQuadratic(*fields)


def initial_moments(problem: NoisyQuadratic) -> Moments:
    """The moments before the first step: E theta_0^2 is all signal, velocities are zero."""
    zeros = jnp.zeros_like(problem.curvature)
    return Moments(jnp.sqrt(problem.initial_second_moment), zeros, zeros, zeros, zeros)


def excess_of(problem: NoisyQuadratic, moments: Moments) -> jax.Array:
    r"""The excess loss :math:`\frac12 \sum_i h_i (e_i^2 + V_i)`."""
    return 0.5 * jnp.sum(problem.curvature * (moments.position**2 + moments.position_variance))


def momentum_step(
    problem: NoisyQuadratic, moments: Moments, learning_rate: jax.Array, momentum: jax.Array
) -> Moments:
    """The moments after one step of v' = mu v - lr g, theta' = theta + v'."""
    e, u, V, W, S = moments
    mu = momentum
    lr_h = learning_rate * problem.curvature
    q = 1.0 - lr_h
    n = lr_h**2 * problem.noise_variance
    next_u = mu * u - lr_h * e
    return Moments(
        position=e + next_u,
        velocity=next_u,
        position_variance=q**2 * V + mu**2 * W + 2 * mu * q * S + n,
        velocity_variance=mu**2 * W + lr_h**2 * V - 2 * mu * lr_h * S + n,
        covariance=mu * (1 - 2 * lr_h) * S - lr_h * q * V + mu**2 * W + n,
    )


def rollout_from(
    problem: NoisyQuadratic, moments: Moments, learning_rates: jax.Array, momenta: jax.Array
) -> jax.Array:
    """The excess loss after each step, float[T], without the initial one."""

    def body(moments, rates):
        moments = momentum_step(problem, moments, *rates)
        return moments, excess_of(problem, moments)

    return jax.lax.scan(body, moments, (learning_rates, momenta))[1]


def rollout(
    problem: NoisyQuadratic, learning_rates: jax.Array, momenta: jax.Array | None = None
) -> jax.Array:
    r"""The expected excess loss along a schedule of learning rates and momenta.

    Propagates the moments of :math:`v' = \mu v - \alpha g`, :math:`\theta' = \theta + v'` exactly,
    without sampling.

    Args:
      problem: The quadratic, float[d] in each field.
      learning_rates: float[T], the rate of each step.
      momenta: float[T], in [0, 1); zeros if None.

    Returns:
      float[T + 1], the excess loss before the first step and after each.

    Raises:
      ValueError: If the fields of the problem differ in shape or are negative, the schedules do not
        have the same shape (T,), or a number is outside its range or not finite.

    Reference:
      Wu et al. 2018, https://arxiv.org/abs/1803.02021, section 2.

    *Guarantees*: agrees with the mean of sampled runs; differentiable in both schedules; jittable.

    >>> import arbiter_jax as aj, jax.numpy as jnp
    >>> one = jnp.ones(1)
    >>> problem = aj.noisy_quadratic.NoisyQuadratic(one, 0 * one, 4 * one)
    >>> aj.noisy_quadratic.rollout(problem, jnp.array([0.5, 0.5])).tolist()
    [2.0, 0.5, 0.125]
    """
    problem = as_problem(problem)
    rates = as_array(learning_rates=learning_rates).astype(problem.curvature.dtype)
    mus = jnp.zeros_like(rates)
    if momenta is not None:
        mus = as_array(momenta=momenta).astype(rates.dtype)
    if rates.ndim != 1 or mus.shape != rates.shape:
        raise ValueError(
            "learning_rates and momenta must have the same shape (T,), got "
            f"{rates.shape} and {mus.shape}."
        )
    check_range("learning_rates", rates)
    check_range("momenta", mus)
    start = initial_moments(problem)
    losses = rollout_from(problem, start, rates, mus)
    return jnp.concatenate([excess_of(problem, start)[None], losses])
