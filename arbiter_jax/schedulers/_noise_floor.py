"""The noise floor: the batch size at which noise costs a fixed share of the loss still to go.

It finds that size within a few windows from any start, holds it, and grows at the end of the
budget, when noise no longer has time to decay. Derivation:
``experiments/noise_rules/DERIVATION.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from arbiter_jax import objectives
from arbiter_jax._count import Count
from arbiter_jax.objectives import FloorConfig, FloorState
from arbiter_jax.schedulers._from_objective import MeasuredCost, make_rule


class NoiseFloorState(NamedTuple):
    """State of :func:`noise_floor`."""

    batch_size: jax.Array  # shape=(), dtype=int32, in examples
    min_batch_size: jax.Array  # shape=(), dtype=int32
    max_batch_size: jax.Array  # shape=(), dtype=int32
    window_steps: jax.Array  # shape=(), dtype=int32, steps until the decision is applied, at most
    statistics: FloorState  # what is known of the noise and of the loss
    step_cost: MeasuredCost | None  # the fit of the time of a step, if it is measured
    num_steps: jax.Array  # shape=(), dtype=int32
    ledger: Count  # training examples up to the last update, if they are counted; see base
    num_skipped: jax.Array  # shape=(), dtype=int32, steps whose signals carried no information
    signals_due: jax.Array | None  # shape=(), dtype=bool, does the next step measure; None: always


def noise_floor(
    loss_fn: Callable[..., Any] | None = None,
    *,
    num_examples: int | None = None,
    measure_every: int = 4,
    noise_share: float = FloorConfig.noise_share,
    hold_until: float = FloorConfig.hold_until,
    final_growth: float = FloorConfig.final_growth,
    persistence: float | optax.GradientTransformation | None = None,
    step_cost: float | str = FloorConfig.step_cost,
    optimal_loss: float = FloorConfig.optimal_loss,
    max_change: float = 4.0,
    min_batch_size: int = 8,
    max_batch_size: int = 512,
    initial_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Finds the batch size that suits the learning rate, holds it, and grows it at the end.

    .. math::
      B = \frac{k \left(-B_{now} E\langle \xi, du \rangle\right)}{4\, share\, \Delta}, \qquad
      \Delta = -4\, \frac{dF}{d \log t}

    Gradient noise holds the loss F above where it would be, by about :math:`k\, lr\, tr S / (4 B)`
    for SGD. The rule keeps that *noise floor* at a share of :math:`\Delta`, the loss still to go,
    which it reads off the slope at which F falls with the number of steps t. In the last part of
    the budget the size grows, because late noise no longer has time to decay. The derivation, with
    its corrections for large rates, for what is left of the budget and for memorizing, is in
    ``experiments/noise_rules/DERIVATION.md``; the equations are those of
    :func:`arbiter_jax.objectives.noise_floor`.

    With `loss_fn` the rule also measures the loss of validation examples, and lets the training
    loss fall at most twice as fast: progress that is only memorized buys no steps. Pass it if
    examples are seen many times. On a GPU or TPU, where a small batch costs as much time as one
    that fills the device, pass ``step_cost="measured"`` or a `min_batch_size` that fills it. Keep
    the learning rate constant.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``, the training loss, to measure on validation
        examples as well; None if not. In an NNX loop, whose loss takes a module, pass the `loss_fn`
        of :func:`arbiter_jax.models.make_losses`: a rule has the module's states, and no module.
      num_examples: The budget of the run in training examples, an integer >= 1; None
        for that of ``aj.fit``. Without any budget the size is held until the end.
      measure_every: The noise is measured at every n-th step, an integer >= 1, and at each of the
        first 20; the training loss at every step. A larger number makes the steps cheaper (see
        `experiments.benchmark` for 10), and the statistics noisier.
      noise_share: The noise floor as a share of the loss still to go, > 0.
      hold_until: The share of the budget after which the size may grow, in [0, 1].
      final_growth: The factor by which it has grown at the end, >= 1; what happens before the very
        end hardly depends on it.
      persistence: k, for how many steps the optimizer goes on applying a gradient, a number >= 1: 1
        / (1 - momentum) for SGD, 1 / (1 - b1) for Adam; or the optimizer in front of the rule,
        which is then measured; None to measure the chain that the rule is in.
      step_cost: The fixed cost of a step, in examples, >= 0; "measured": fitted to the time of the
        steps, as in :func:`goodput`.
      optimal_loss: F*, the least that the loss can be, a number < infinity; -infinity if there is
        no least, as for the density of a continuous variable. It need not be attainable.
      max_change: Largest factor between the applied size and the next one, > 1.
      min_batch_size: Smallest batch size, an integer >= 1; 1 is taken as 2, because one example
        carries no information about noise.
      max_batch_size: Largest batch size, an integer >= min_batch_size.
      initial_batch_size: Size to start from, in [min_batch_size, max_batch_size]; the smallest if
        None. It is forgotten within a few windows; `experiments.feasibility` measures what is left
        of it.

    Returns:
      A transformation that returns the updates unchanged and whose `update` reads `value`,
      `gradient_noise`, `update_noise`, `grad_stats`; `persistence` if it is not given;
      `meta_batch`, and `model_state` if the model has one, if `loss_fn` is given; `step_seconds` if
      the cost of a step is measured; and, if given, `num_examples`, `batch_size` and `budget`: the
      examples so far, the applied size, and the examples of the run.

    Raises:
      ValueError: If an argument is out of its range.
      TypeError: If `update` is called without a signal.

    *Guarantees*:
      * Updates unchanged: they are returned as they came.
      * Stays in range: the size is an integer of [min_batch_size, max_batch_size].
      * Skips and counts: a step with a signal that is not finite changes nothing but `num_skipped`.
      * Ignores a constant: one added to the loss and to `optimal_loss` changes nothing.

    >>> import arbiter_jax as aj, optax
    >>> tx = optax.chain(
    ...     optax.sgd(0.1, momentum=0.9),
    ...     aj.schedulers.noise_floor(num_examples=100_000, persistence=10.0),
    ... )
    >>> stats = aj.gradient_stats(lambda w, x: (w - x) ** 2 / 2, 0.0, jax.numpy.array([1.0, 3.0]))
    >>> noise = {"gradient_noise": {"w": 1.0}, "update_noise": {"w": -0.1}, "grad_stats": stats}
    >>> state = tx.init({"w": 0.0})
    >>> for loss in (2.0, 1.0, 0.9):
    ...     _, state = tx.update({"w": 1.0}, state, value=loss, **noise)
    >>> 8 <= int(aj.get_batch_size(state)) <= 512
    True
    """
    objective = objectives.noise_floor(
        loss_fn,
        num_examples=num_examples,
        noise_share=noise_share,
        hold_until=hold_until,
        final_growth=final_growth,
        persistence=persistence,
        optimal_loss=optimal_loss,
    )
    return make_rule(
        NoiseFloorState,
        objective,
        "noise_floor",
        measure_every=measure_every,
        step_cost=step_cost,
        max_change=max_change,
        min_batch_size=min_batch_size,
        max_batch_size=max_batch_size,
        initial_batch_size=initial_batch_size,
    )
