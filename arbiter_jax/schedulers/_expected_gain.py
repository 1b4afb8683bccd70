"""Expected gain: the batch size at which a step is expected to gain most for what it costs.

The progress of a step and what noise takes from it are measured on validation examples. Derivation:
``experiments/NOISE.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from arbiter_jax.objectives import GainState, gain_objective
from arbiter_jax.schedulers._from_objective import MeasuredCost, as_step_cost, noise_rule


class ExpectedGainState(NamedTuple):
    """State of :func:`expected_gain`."""

    batch_size: jax.Array  # shape=(), dtype=int32
    window_steps: jax.Array  # shape=(), dtype=int32, apply the decision after at most so many steps
    statistics: GainState  # what a step gains, and what its noise costs
    step_cost: MeasuredCost | None  # the fit of the time of a step, where it is measured
    num_steps: jax.Array  # shape=(), dtype=int32
    num_skipped: jax.Array  # shape=(), dtype=int32, steps whose signals said nothing
    signals_due: jax.Array | None  # shape=(), dtype=bool, is the next one; None: all are


def expected_gain(
    loss_fn: Callable[..., Any],
    *,
    every: int = 10,
    persistence: float | optax.GradientTransformation = 1.0,
    step_cost: float | str = 0.0,
    max_change: float = 2.0,
    min_batch_size: int = 8,
    max_batch_size: int = 512,
    initial_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Maximises the expected progress of the next step per cost, in closed form.

    .. math::
      B = \frac{q + \sqrt{q^2 + A_0\, q\, c_0}}{A_0}, \qquad
      A_0 = F(w) - F(w + u) + \frac{q}{B_{now}}, \qquad
      q = \tfrac12 k^2 B_{now}\, du^\top H\, du

    where u is the update, du its response to half the difference of the gradients of the two halves
    of the batch, and the loss F and its Hessian are taken on validation examples. A step of b
    examples is expected to gain :math:`A_0 - q / b` and costs :math:`c_0 + b`. Without a fixed cost
    B = 2 q / A_0. Both are averaged over the steps at which they are measured, each weighing as many
    examples as its batch has, times those looked at so far.

    The rule is greedy: it removes noise as soon as it costs progress now, although noise of early
    steps is forgotten by the end; :func:`noise_floor` is not.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``, the training loss.
      every: The statistics are computed at the first of so many steps, an integer >= 1, and at each
        of the first 20.
      persistence: k, a number >= 1: how much noise an update holds over that of the newest gradient
        in it; or the optimizer in front of the rule, from whose impulse response it is then measured:
        1 for SGD, 1 / sqrt(1 - momentum^2) with momentum, 1 / sqrt(1 - b1^2) for Adam. Where it is too
        large, A_0 is almost all q / B, and B / B_now tends to 2 whatever the dynamics.
      step_cost: c_0, the fixed cost of a step, in examples, >= 0; "measured": fitted to the time of
        the steps, as in :func:`goodput`.
      max_change: Largest factor between the size in force and the next one, > 1.
      min_batch_size: Smallest batch size, an integer >= 1; 1 is taken for 2, for one example tells
        nothing of noise.
      max_batch_size: Largest batch size, an integer >= min_batch_size.
      initial_batch_size: Size to start from, in [min_batch_size, max_batch_size]; the smallest
        where it is None.

    Returns:
      A transformation that returns the updates unchanged and whose `update` reads `update_noise`,
      `meta_batch` and, if given, `batch_size`, the size in force (and `model_state`,
      and `step_seconds` where the cost of a step is measured). It is the last link of a chain: the
      updates that it sees are those that are applied.

    Raises:
      ValueError: If an argument is out of its range.
      TypeError: If `update` is called without a signal.

    *Guarantees*:
      * Updates unchanged: they are returned as they came.
      * Stays in range: the size is an integer of [min_batch_size, max_batch_size].
      * Skips and counts: a step with a signal that is not finite changes nothing but `num_skipped`.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> loss_fn = lambda w, batch: (w - batch) ** 2 / 2
    >>> rule = aj.schedulers.expected_gain(loss_fn, initial_batch_size=8)
    >>> params, grads = jnp.ones(()), 0.5 * jnp.ones(())
    >>> signals = {"meta_batch": jnp.zeros(4), "update_noise": jnp.array(-0.1)}
    >>> _, state = rule.update(-0.1 * grads, rule.init(params), params, **signals)
    >>> statistics = state.statistics  # A_0 = .05 - .05^2 / 2 + q / 8 and q = 8 * .1^2 / 2
    >>> round(float(statistics.progress), 5), round(float(statistics.noise_cost), 5)
    (0.05375, 0.04)
    """
    fixed_cost = as_step_cost(step_cost)
    objective = gain_objective(loss_fn, persistence=persistence, step_cost=fixed_cost or 0.0)
    return noise_rule(
        ExpectedGainState,
        objective,
        rule="expected_gain",
        limits=(min_batch_size, max_batch_size, initial_batch_size),
        fixed_cost=fixed_cost,
        max_change=max_change,
        every=every,
    )
