"""Expected gain: the batch size at which a step is expected to gain most for what it costs.

What a step gains and what its noise takes away are measured on validation examples. Derivation:
``experiments/noise_rules/DERIVATION.md``, Eqs. 1 to 6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from arbiter_jax import objectives
from arbiter_jax._count import Count
from arbiter_jax.objectives import GainState
from arbiter_jax.schedulers._from_objective import MeasuredCost, make_rule


class ExpectedGainState(NamedTuple):
    """State of :func:`expected_gain`."""

    batch_size: jax.Array  # shape=(), dtype=int32, in examples
    min_batch_size: jax.Array  # shape=(), dtype=int32
    max_batch_size: jax.Array  # shape=(), dtype=int32
    window_steps: jax.Array  # shape=(), dtype=int32, steps until the decision is applied, at most
    statistics: GainState  # what a step gains, and what its noise costs
    step_cost: MeasuredCost | None  # the fit of the time of a step, if it is measured
    num_steps: jax.Array  # shape=(), dtype=int32
    ledger: Count  # training examples up to the last update, if they are counted; see base
    num_skipped: jax.Array  # shape=(), dtype=int32, steps whose signals carried no information
    signals_due: jax.Array | None  # shape=(), dtype=bool, does the next step measure; None: always


def expected_gain(
    loss_fn: Callable[..., Any],
    *,
    measure_every: int = 10,
    persistence: float | optax.GradientTransformation | None = None,
    step_cost: float | str = 0.0,
    max_change: float = 2.0,
    min_batch_size: int = 8,
    max_batch_size: int = 512,
    initial_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Chooses the batch size whose next step lowers the loss most for its cost; needs no budget.

    .. math::
      B = \frac{q + \sqrt{q^2 + A_0\, q\, c_0}}{A_0}, \qquad
      A_0 = F(w) - F(w + u) + \frac{q}{B_{now}}, \qquad
      q = \tfrac12 k^2 B_{now}\, du^\top H\, du

    with u the updates, du their response to half the difference of the gradients of the two halves
    of the batch, and the loss F and its Hessian H taken on validation examples. A step of b
    examples is expected to gain :math:`A_0 - q / b` and costs :math:`c_0 + b`; without a fixed cost
    B = 2 q / A_0. Both are averages over the steps at which they are measured, each weighing as
    many examples as its batch has, times those measured so far.

    The rule is greedy: it removes noise as soon as it costs progress now, although noise of early
    steps is forgotten by the end. :func:`noise_floor` is not greedy. On a GPU or TPU, where a small
    batch costs as much time as one that fills the device, pass ``step_cost="measured"`` or a
    `min_batch_size` that fills it.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``, the training loss.
      measure_every: A_0 and q are measured at every n-th step, an integer >= 1, and at each of the
        first 20.
      persistence: k, how much noise an update holds in units of that of the newest gradient in it,
        a number >= 1: 1 for SGD, 1 / sqrt(1 - momentum^2) with momentum, 1 / sqrt(1 - b1^2) for
        Adam; or the optimizer in front of the rule, which is then measured; None to measure the
        chain that the rule is in. If k is too large, A_0 is almost all q / B, and B / B_now tends
        to 2 whatever the dynamics.
      step_cost: c_0, the fixed cost of a step, in examples, >= 0; "measured": fitted to the time of
        the steps, as in :func:`goodput`.
      max_change: Largest factor between the applied size and the next one, > 1.
      min_batch_size: Smallest batch size, an integer >= 1; 1 is taken as 2, because one example
        carries no information about noise.
      max_batch_size: Largest batch size, an integer >= min_batch_size.
      initial_batch_size: Size to start from, in [min_batch_size, max_batch_size]; the smallest
        if None.

    Returns:
      A transformation that returns the updates unchanged and whose `update` reads `update_noise`
      and `meta_batch`; `model_state` if the model has one; `persistence` if it is not given;
      `step_seconds` if the cost of a step is measured; and, if given, `batch_size`, the applied
      size. It is the last link of a chain: the updates that it sees are those that are applied.

    Raises:
      ValueError: If an argument is out of its range.
      TypeError: If `update` is called without a signal.

    *Guarantees*:
      * Updates unchanged: they are returned as they came.
      * Stays in range: the size is an integer of [min_batch_size, max_batch_size].
      * Skips and counts: a step with a signal that is not finite changes nothing but `num_skipped`.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> loss_fn = lambda w, batch: (w - batch) ** 2 / 2
    >>> rule = aj.schedulers.expected_gain(loss_fn, persistence=1.0, initial_batch_size=8)
    >>> params, grads = jnp.ones(()), 0.5 * jnp.ones(())
    >>> signals = {"meta_batch": jnp.zeros(4), "update_noise": jnp.array(-0.1)}
    >>> _, state = rule.update(-0.1 * grads, rule.init(params), params, **signals)
    >>> statistics = state.statistics  # A_0 = .05 - .05^2 / 2 + q / 8 and q = 8 * .1^2 / 2
    >>> round(float(statistics.noiseless_gain), 5), round(float(statistics.noise_cost), 5)
    (0.05375, 0.04)
    """
    return make_rule(
        ExpectedGainState,
        objectives.expected_gain(loss_fn, persistence=persistence),
        "expected_gain",
        measure_every=measure_every,
        step_cost=step_cost,
        max_change=max_change,
        min_batch_size=min_batch_size,
        max_batch_size=max_batch_size,
        initial_batch_size=initial_batch_size,
    )
