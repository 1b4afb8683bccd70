"""The noise floor: the batch size at which noise costs a fixed share of the loss still to go.

It finds that size within a few short windows from any start, holds it, and grows at the end of the
budget, when noise no longer has time to decay. Derivation: ``experiments/NOISE.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from arbiter_jax.objectives import FloorState, floor_objective
from arbiter_jax.schedulers._from_objective import MeasuredCost, as_step_cost, noise_rule


class NoiseFloorState(NamedTuple):
    """State of :func:`noise_floor`."""

    batch_size: jax.Array  # shape=(), dtype=int32
    window_steps: jax.Array  # shape=(), dtype=int32, apply the decision after at most so many steps
    statistics: FloorState  # what is known of the noise and of the loss
    step_cost: MeasuredCost | None  # the fit of the time of a step, where it is measured
    num_steps: jax.Array  # shape=(), dtype=int32
    num_skipped: jax.Array  # shape=(), dtype=int32, steps whose signals said nothing
    signals_due: jax.Array | None  # shape=(), dtype=bool, is the next one; None: all are


def noise_floor(
    loss_fn: Callable[..., Any] | None = None,
    *,
    num_examples: int | None = None,
    every: int = 4,
    share: float = 0.3,
    hold: float = 0.6,
    growth: float = 32.0,
    persistence: float | optax.GradientTransformation = 1.0,
    step_cost: float | str = 0.0,
    optimal_loss: float = 0.0,
    max_change: float = 4.0,
    min_batch_size: int = 8,
    max_batch_size: int = 512,
    initial_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Holds the noise floor at a share of the loss still to go, and grows at the end.

    .. math::
      B = \frac{k \left(-B_{now} E\langle \xi, du \rangle\right)}{4\, share\, \Delta}, \qquad
      \Delta = -4\, \frac{dF}{d \log t}

    with :math:`\xi` half the difference of the gradients of the two halves of the batch, du the
    response of the optimizer to it (for SGD :math:`-lr\, \xi`, so that the numerator is k lr tr S),
    and k the number of steps for which a gradient goes on acting. In equilibrium noise holds the
    loss :math:`k\, lr\, tr S / (4 B)` above where it would be. It is compared with :math:`\Delta`,
    the excess of the loss F over what is attainable, and not with F. That excess is read off the
    pace at which F falls with the number of steps t; it is 4 times that for a loss that approaches
    its limit as :math:`t^{-1/4}`. So a constant that no training removes (label noise, the entropy
    of a language) plays no part, and where the loss goes to zero and the noise with it, steps are
    bought and not larger batches; but never so small ones that the floor were more than F - F*.

    At large rates there is more noise than that. It shows in the mean gradient G, which noise keeps
    up: the floor is taken :math:`1 + B |G|^2 / ((2 k - 1)\, tr S)` times as high, which is exact for
    SGD and heavy ball on a quadratic, less the part of :math:`|G|^2` that makes progress.

    Given `loss_fn`, the rule looks at validation examples too, wherever it measures noise, and takes
    the pace of F to be at most twice that of their loss: a training loss that falls by memorising
    buys no steps. Do so wherever examples are seen many times.

    With r examples left of the budget, the excess is that of the end of the run, if the size b is
    held until then, and so is the noise, which is taken to fall as :math:`t^{-0.15}`: the b of the
    first equation is multiplied by :math:`(1 + r / (b t))^{1/4 - 0.15}`. Without a budget both are
    those of the moment. At the end the held size B grows as

    .. math:: \frac{g B}{1 + g r / R}, \qquad R = 2\, share\, b\, t, \quad g = growth \sqrt{b / B}

    wherever that is more, from a share `hold` of the budget on. b is what was to be held, less than B
    where that lies at the lower end of the range: there is less noise to remove then, and growth
    begins later. R examples are worth as much in steps as the noise floor holds of the loss.
    Without a budget the size is held.

    The first 20 steps take batches of at least an 800th of the budget, or twice what is asked for where
    that is less: at a large rate a few small batches do harm that stays, and larger ones cost little.
    No window sees more than a 50th of the budget, or has more than one step.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``, the training loss, if the rule is to look at
        validation examples as well; None if not.
      num_examples: The budget of the run in training examples, an integer in [1, 2^31 - 1]; None if
        unknown.
      every: The noise is measured at the first of so many steps, an integer >= 1, and at each of the
        first 20; the training loss at every step. A larger number makes the steps cheaper (what 10
        costs is in `experiments.benchmark`), and the statistic noisier.
      share: The noise floor as a share of the loss still to go, > 0.
      hold: The share of the budget after which the size may grow, in [0, 1].
      growth: The factor by which it has grown at the end, >= 1; what happens before the last R /
        growth examples hardly depends on it.
      persistence: k, a number >= 1, or the optimizer in front of the rule, whose impulse response
        is then measured: 1 / (1 - momentum) for SGD, 1 / (1 - b1) for Adam.
      step_cost: The fixed cost of a step, in examples, >= 0; "measured": fitted to the time of the
        steps, as in :func:`goodput`.
      optimal_loss: F*, the least that the loss can be, a number < infinity; -infinity where there is
        no least, as for the density of a continuous variable. It need not be attainable.
      max_change: Largest factor between the size in force and the next one, > 1.
      min_batch_size: Smallest batch size, an integer >= 1; 1 is taken for 2, for one example tells
        nothing of noise.
      max_batch_size: Largest batch size, an integer >= min_batch_size.
      initial_batch_size: Size to start from, in [min_batch_size, max_batch_size]; the smallest
        where it is None. It is forgotten within a few windows; what is left of it is measured in
        `experiments.feasibility`.

    Returns:
      A transformation that returns the updates unchanged and whose `update` reads `value`,
      `gradient_noise`, `update_noise`, `grad_stats` and, if given, `num_examples` and `batch_size`,
      the examples so far and the size in force (and `meta_batch`, and `model_state` where the model
      has one, where `loss_fn` is given; and `step_seconds`, where the cost of a step is measured).

    Raises:
      ValueError: If an argument is out of its range.
      TypeError: If `update` is called without a signal.

    *Guarantees*:
      * Updates unchanged: they are returned as they came.
      * Stays in range: the size is an integer of [min_batch_size, max_batch_size].
      * Skips and counts: a step with a signal that is not finite changes nothing but `num_skipped`.
      * A constant added to the loss and to `optimal_loss` changes nothing.

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
    fixed_cost = as_step_cost(step_cost)
    objective = floor_objective(
        loss_fn,
        num_examples=num_examples,
        share=share,
        hold=hold,
        growth=growth,
        persistence=persistence,
        step_cost=fixed_cost or 0.0,
        optimal_loss=optimal_loss,
    )
    return noise_rule(
        NoiseFloorState,
        objective,
        rule="noise_floor",
        limits=(min_batch_size, max_batch_size, initial_batch_size),
        fixed_cost=fixed_cost,
        max_change=max_change,
        num_examples=num_examples,
        every=every,
    )
