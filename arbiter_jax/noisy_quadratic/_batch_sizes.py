"""Greedy and long-horizon batch-size schedules at a fixed number of examples.

On the noisy quadratic a batch of B examples divides the noise by B and costs B examples. The budget
is divided into segments of equally many examples, each with a constant batch size. The moments at
the end of a segment are known in closed form for any real number of steps, so the loss at the end
of the budget is a smooth function of the sizes. The noisy quadratic: Wu et al., "Understanding
Short-Horizon Bias in Stochastic Meta-Optimization", https://arxiv.org/abs/1803.02021.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from arbiter_jax import _validate
from arbiter_jax.noisy_quadratic import _lbfgs
from arbiter_jax.noisy_quadratic._moments import (
    Moments,
    NoisyQuadratic,
    as_array,
    as_problem,
    check_range,
    excess_of,
    initial_moments,
)
from arbiter_jax.noisy_quadratic._segments import Budget, greedy_size, segment_moments


class BatchSizeSchedule(NamedTuple):
    """Batch sizes of J segments of equally many examples, and the excess loss around them."""

    batch_sizes: jax.Array  # shape=(J,), dtype=float, in examples
    num_steps: jax.Array  # shape=(J,), dtype=float, steps per segment
    excess_loss: jax.Array  # shape=(J + 1,), dtype=float, before each segment and at the end


def _segments(problem: NoisyQuadratic, moments: Moments, budget: Budget, sizes: jax.Array):
    def body(moments, size):
        moments = segment_moments(problem, moments, budget, size)
        return moments, excess_of(problem, moments)

    return jax.lax.scan(body, moments, sizes)[1]


def _as_schedule(problem: NoisyQuadratic, budget: Budget, sizes: jax.Array) -> BatchSizeSchedule:
    start = initial_moments(problem)
    losses = _segments(problem, start, budget, sizes)
    losses = jnp.concatenate([excess_of(problem, start)[None], losses])
    return BatchSizeSchedule(sizes, budget.segment / sizes, losses)


def _decode(z: jax.Array, budget: Budget) -> jax.Array:
    low, high = jnp.log(budget.min_batch_size), jnp.log(budget.max_batch_size)
    return jnp.exp(_lbfgs.from_unconstrained(z, low, high))


def _encode(sizes: jax.Array, budget: Budget) -> jax.Array:
    low, high = jnp.log(budget.min_batch_size), jnp.log(budget.max_batch_size)
    return _lbfgs.to_unconstrained(jnp.log(sizes), low, high)


def _greedy(problem: NoisyQuadratic, moments: Moments, budget: Budget, length: int) -> jax.Array:
    def body(moments, _):
        size = greedy_size(problem, moments, budget)
        return segment_moments(problem, moments, budget, size), size

    return jax.lax.scan(body, moments, None, length=length)[1]


@partial(jax.jit, static_argnames="num_segments")
def _greedy_schedule(problem: NoisyQuadratic, budget: Budget, num_segments: int):
    sizes = _greedy(problem, initial_moments(problem), budget, num_segments)
    return _as_schedule(problem, budget, sizes)


@partial(jax.jit, static_argnames=("num_segments", "horizon", "max_iterations"))
def _recede(
    problem: NoisyQuadratic, budget: Budget, num_segments: int, horizon: int, max_iterations: int
) -> BatchSizeSchedule:
    def body(carry, index):
        moments, plan = carry
        ahead = jnp.minimum(horizon, num_segments - index)

        def objective(z):
            return jnp.log(_segments(problem, moments, budget, _decode(z, budget))[ahead - 1])

        sizes = _decode(_lbfgs.minimize(objective, plan, max_iterations), budget)
        moments = segment_moments(problem, moments, budget, sizes[0])
        plan = _encode(jnp.append(sizes[1:], sizes[-1]), budget)
        return (moments, plan), sizes

    moments = initial_moments(problem)
    # Start from the geometric middle of the range. Greedy sizes are a poor start, because the last
    # of them are far from the optimum.
    middle = jnp.sqrt(budget.min_batch_size * budget.max_batch_size)
    plan = _encode(jnp.full(horizon, middle), budget)
    if horizon == num_segments:  # the first plan is the schedule
        sizes = body((moments, plan), jnp.zeros((), jnp.int32))[1]
    else:
        sizes = jax.lax.scan(body, (moments, plan), jnp.arange(num_segments))[1][:, 0]
    return _as_schedule(problem, budget, sizes)


def _as_budget(
    problem: NoisyQuadratic,
    num_examples: float,
    learning_rate: float,
    momentum: float,
    num_segments: int,
    min_batch_size: float = 1.0,
    max_batch_size: float | None = None,
) -> Budget:
    total = _validate.positive(num_examples=num_examples)
    momentum = _validate.in_range(0.0, 1.0, closed="left", momentum=momentum)
    rate = _validate.positive(learning_rate=learning_rate)
    if not isinstance(problem.curvature, jax.core.Tracer):
        largest = float(np.asarray(problem.curvature).max())
        if not largest:
            raise ValueError("curvature must have an entry > 0, got zeros.")
        limit = 1.0 / largest
        if rate > limit * (1 + 1e-6):
            raise ValueError(
                f"learning_rate must be <= 1 / max(curvature) = {limit:.6g}, got {rate!r}: for "
                "larger rates a real number of steps is not defined."
            )
    segment = total / num_segments
    low = _validate.positive(min_batch_size=min_batch_size)
    high = segment if max_batch_size is None else max_batch_size
    high = _validate.in_range(low, segment, max_batch_size=high)
    dtype = problem.curvature.dtype
    return Budget(*(jnp.asarray(x, dtype) for x in (rate, momentum, segment, low, high)))


def rollout_batch_sizes(
    problem: NoisyQuadratic,
    batch_sizes: jax.Array,
    num_examples: float,
    learning_rate: float,
    momentum: float = 0.0,
) -> BatchSizeSchedule:
    r"""The expected excess loss along a schedule of batch sizes, at a fixed number of examples.

    Segment j takes :math:`n_j = N / (J B_j)` steps with noise :math:`\sigma^2 / B_j`. If :math:`n_j`
    is not an integer, the real power of the matrix of one step interpolates.

    Args:
      problem: The quadratic, float[d] in each field; its noise is that of one example.
      batch_sizes: float[J], in examples, > 0 and <= num_examples / J.
      num_examples: N, > 0, the examples of the whole run; each segment uses N / J.
      learning_rate: Constant rate, in (0, 1 / max h].
      momentum: Constant momentum, in [0, 1).

    Returns:
      A :class:`BatchSizeSchedule`: batch sizes and numbers of steps float[J], excess loss float[J +
      1].

    Raises:
      ValueError: If an argument is outside its range.

    *Guarantees*: equals :func:`rollout` with noise variance / B if every number of steps is an
    integer; differentiable in the batch sizes.

    >>> import arbiter_jax as aj, jax.numpy as jnp
    >>> h = jnp.array([1.0, 0.05])
    >>> problem = aj.noisy_quadratic.NoisyQuadratic(h, 1 / h, 10 * jnp.ones(2))
    >>> schedule = aj.noisy_quadratic.rollout_batch_sizes(problem, jnp.array([2.0, 4.0]), 16, 0.5)
    >>> schedule.num_steps.tolist()
    [4.0, 2.0]
    """
    problem = as_problem(problem)
    sizes = as_array(batch_sizes=batch_sizes).astype(problem.curvature.dtype)
    if sizes.ndim != 1 or sizes.size == 0:
        raise ValueError(f"batch_sizes must have shape (J,) with J >= 1, got {sizes.shape}.")
    budget = _as_budget(problem, num_examples, learning_rate, momentum, sizes.size, 1e-30)
    check_range("batch_sizes", sizes, 0, closed=False)
    segment = num_examples / sizes.size
    if not isinstance(sizes, jax.core.Tracer) and float(np.asarray(sizes).max()) > segment * (
        1 + 1e-6
    ):
        raise ValueError(
            f"batch_sizes must be <= num_examples / {sizes.size} = {segment:g}, so that every segment "
            f"has a step, got {float(np.asarray(sizes).max()):g}."
        )
    return _as_schedule(problem, budget, sizes)


def greedy_batch_sizes(
    problem: NoisyQuadratic,
    num_examples: float,
    learning_rate: float,
    momentum: float = 0.0,
    *,
    min_batch_size: float = 1.0,
    max_batch_size: float | None = None,
    num_segments: int = 64,
) -> BatchSizeSchedule:
    r"""Batch sizes that maximize the expected progress of the next step per example.

    The progress of a step is :math:`p - q / B`, so the greedy size is :math:`2 q / p`, chosen once
    per segment. As p vanishes during training the size grows, and does so too early.

    Args:
      problem: The quadratic, float[d] in each field; its noise is that of one example.
      num_examples: N, > 0, the examples of the whole run.
      learning_rate: Constant rate, in (0, 1 / max h].
      momentum: Constant momentum, in [0, 1).
      min_batch_size: Smallest size, > 0; sizes are real numbers here.
      max_batch_size: Largest size, <= num_examples / num_segments, which is the default.
      num_segments: J, the number of segments, an integer >= 1.

    Returns:
      A :class:`BatchSizeSchedule`: batch sizes and numbers of steps float[J], excess loss float[J +
      1].

    Raises:
      ValueError: If an argument is outside its range.

    *Guarantees*: stays within the limits; chooses the smallest size if there is no noise.

    >>> import arbiter_jax as aj, jax.numpy as jnp
    >>> h = jnp.array([1.0, 0.05])
    >>> problem = aj.noisy_quadratic.NoisyQuadratic(h, 1 / h, 10 * jnp.ones(2))
    >>> sizes = aj.noisy_quadratic.greedy_batch_sizes(problem, 1024, 0.5).batch_sizes
    >>> bool(sizes[0] == 1) and bool(sizes[-1] > 2)
    True
    """
    problem = as_problem(problem)
    num_segments = _validate.integer(num_segments=num_segments, minimum=1)
    budget = _as_budget(
        problem, num_examples, learning_rate, momentum, num_segments, min_batch_size, max_batch_size
    )
    return _greedy_schedule(problem, budget, num_segments)


def optimal_batch_sizes(
    problem: NoisyQuadratic,
    num_examples: float,
    learning_rate: float,
    momentum: float = 0.0,
    *,
    horizon: int | None = None,
    min_batch_size: float = 1.0,
    max_batch_size: float | None = None,
    num_segments: int = 64,
    max_iterations: int | None = None,
) -> BatchSizeSchedule:
    r"""Batch sizes that minimize the excess loss at the end of a budget of examples.

    Minimizes :math:`\log L(B_1 \ldots B_J)` by L-BFGS through the exact dynamics, at a fixed number
    of examples, so that more steps mean more noise. With a horizon, the plan covers only that many
    segments, its first size is applied, and the next segment plans again.

    Args:
      problem: The quadratic, float[d] in each field; its noise is that of one example.
      num_examples: N, > 0, the examples of the whole run.
      learning_rate: Constant rate, in (0, 1 / max h].
      momentum: Constant momentum, in [0, 1).
      horizon: Look-ahead in segments, an integer in [1, num_segments]; if None, to the end.
      min_batch_size: Smallest size, > 0; sizes are real numbers here.
      max_batch_size: Largest size, <= num_examples / num_segments, which is the default.
      num_segments: J, the number of segments, an integer >= 1.
      max_iterations: Maximum number of L-BFGS iterations per plan, an integer >= 1; if None, 400
        for a single plan and 50 for each of several.

    Returns:
      A :class:`BatchSizeSchedule`: batch sizes and numbers of steps float[J], excess loss float[J +
      1].

    Raises:
      ValueError: If an argument is outside its range.

    *Guarantees*: stays within the limits; without a horizon, ends no higher than the greedy
    schedule and any constant size.

    >>> import arbiter_jax as aj, jax.numpy as jnp
    >>> h = jnp.array([1.0, 0.05])
    >>> problem = aj.noisy_quadratic.NoisyQuadratic(h, 1 / h, 10 * jnp.ones(2))
    >>> greedy = aj.noisy_quadratic.greedy_batch_sizes(problem, 1024, 0.5, num_segments=8)
    >>> optimal = aj.noisy_quadratic.optimal_batch_sizes(problem, 1024, 0.5, num_segments=8)
    >>> bool(optimal.excess_loss[-1] < greedy.excess_loss[-1])
    True
    >>> bool(optimal.batch_sizes[0] < optimal.batch_sizes[-1])  # hold, then grow
    True
    """
    problem = as_problem(problem)
    num_segments = _validate.integer(num_segments=num_segments, minimum=1)
    horizon = num_segments if horizon is None else horizon
    horizon = _validate.integer(horizon=horizon, minimum=1, maximum=num_segments)
    if max_iterations is None:
        max_iterations = 400 if horizon == num_segments else 50
    iterations = _validate.integer(max_iterations=max_iterations, minimum=1)
    budget = _as_budget(
        problem, num_examples, learning_rate, momentum, num_segments, min_batch_size, max_batch_size
    )
    return _recede(problem, budget, num_segments, horizon, iterations)
