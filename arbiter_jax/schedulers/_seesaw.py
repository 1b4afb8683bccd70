"""Seesaw: what a learning-rate schedule takes off the rate is added to the batch size instead.

Smith, Kindermans, Ying and Le (2018), "Don't Decay the Learning Rate, Increase the Batch Size",
arXiv:1711.00489, for SGD; Meterez et al. (2025), "Seesaw: Accelerating Training by Balancing Learning
Rate and Batch Size Scheduling", arXiv:2510.14717, for Adam.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from arbiter_jax import _schedules, _validate
from arbiter_jax.schedulers import _rule
from arbiter_jax.schedulers._batch_schedule import BatchSchedule
from arbiter_jax.schedulers._gradient_noise_scale import gradient_noise_scale
from arbiter_jax.schedulers._planned import planned

_WINDOWS = 200  # at least, in a run: so closely the plan is followed
_GRID = 2**20  # A run of more examples than this is planned from a grid of as many counts.


def seesaw_schedule(
    schedule: optax.Schedule,
    *,
    num_examples: int,
    batch_size: int,
    max_batch_size: int,
    trade: float = 0.8,
    doubling: bool = False,
) -> BatchSchedule:
    r"""What :func:`seesaw` will do, before the run: its batch sizes and its number of steps.

    .. math:: B(n) = round(clip(B_0 \alpha(n)^{-g}, B_0, B_{max})), \qquad
              \alpha(n) = s(n) / \max_{m \le n} s(m)

    Args:
      schedule: s, a function of the number of examples seen: any optax schedule, in examples.
      num_examples: D, the budget in examples, an integer >= 1.
      batch_size: B_0, the size that the schedule was tuned at, an integer >= 1.
      max_batch_size: B_max, an integer >= batch_size.
      trade: g, in [0, 1].
      doubling: Whether B(n) is rounded down to B_0, 2 B_0, 4 B_0, ...

    Returns:
      A :class:`BatchSchedule`; ``.num_steps(num_examples, window)`` is what `aj.fit` will count. With
      a limit it is a lower bound of it.

    Raises:
      ValueError: If an argument is out of its range, or the schedule is negative, not finite, or 0
        throughout.

    >>> import optax
    >>> cosine = optax.cosine_decay_schedule(0.1, 64_000)
    >>> plan = seesaw_schedule(
    ...     cosine, num_examples=64_000, batch_size=64, max_batch_size=1024, trade=1.0)
    >>> plan.batch_size_at(0), plan.batch_size_at(32_000), plan.num_steps(64_000)  # of 1,000
    (64, 128, 508)
    >>> seesaw_schedule(
    ...     cosine, num_examples=64_000, batch_size=64, max_batch_size=1024, doubling=True
    ... ).unique_batch_sizes()
    (64, 128, 256, 512, 1024)
    """
    _validate.function("of the number of examples seen", schedule=schedule)
    _validate.static(
        num_examples=num_examples,
        batch_size=batch_size,
        max_batch_size=max_batch_size,
        trade=trade,
        doubling=doubling,
    )
    budget = _validate.integer(
        num_examples=num_examples, minimum=1, maximum=_validate.LARGEST_COUNT
    )
    low, high, trade = _checked(batch_size, max_batch_size, trade)
    _validate.boolean(doubling=doubling)
    counts, rates = rates_of(schedule, budget)
    _warn_of_steps(counts, rates, low)
    peak = np.maximum.accumulate(rates)
    share = np.where(peak > 0, rates / np.where(peak > 0, peak, 1), 1)
    with np.errstate(divide="ignore"):
        wanted = low * share**-trade
    sizes = np.rint(np.clip(wanted, low, high)).astype(np.int64)
    if doubling:
        doubled = doublings(low, high)
        sizes = doubled[np.searchsorted(doubled, sizes, side="right") - 1]
    if trade and high >= 2 * low and (sizes == low).all():
        _validate.warn(
            f"schedule falls too little within {budget:,} examples for the batch to grow: it stays at "
            f"{low}; give the schedule its length in examples."
        )
    begins = np.flatnonzero(np.diff(sizes, prepend=-1))
    return BatchSchedule(
        starts=tuple(counts[begins].tolist()),
        batch_sizes=tuple(sizes[begins].tolist()),
        window_examples=min(budget // _WINDOWS, _validate.LARGEST_INT32),
        num_examples=budget,
    )


def seesaw(
    schedule: optax.Schedule,
    *,
    num_examples: int,
    batch_size: int,
    max_batch_size: int,
    trade: float = 0.8,
    doubling: bool = False,
    limit: str | optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The batch size of Seesaw alone, to be composed by hand; :func:`arbiter_jax.seesaw` is whole.

    .. math:: B(n) = round(clip(\min(B_0 \alpha(n)^{-g}, limit), B_0, B_{max}))

    with alpha the rate of the schedule over its peak so far; see :func:`seesaw_schedule`.

    Args:
      schedule: s, a learning rate by the number of examples seen: any optax schedule, in examples.
      num_examples: D, the budget in examples, an integer >= 1.
      batch_size: B_0, the size that the schedule was tuned at, an integer >= 1.
      max_batch_size: B_max, an integer >= batch_size.
      trade: g, how much of the decay becomes batch size, in [0, 1].
      doubling: Whether the size is rounded down to B_0, 2 B_0, 4 B_0, ...
      limit: None; "noise_scale", the gradient noise scale of the run, beyond which a larger batch
        brings little; "noise_scale_l1", the same in the l1 norm, for Adam; or a rule whose size is
        the limit.

    Returns:
      A transformation that returns the updates unchanged and reads `num_examples` if given, and
      what the limit reads.

    Raises:
      ValueError: If an argument is out of its range.

    Reference:
      Meterez et al., arXiv:2510.14717; Smith et al., arXiv:1711.00489.

    *Guarantees*:
      * Updates unchanged: they pass through as they are.
      * Stays in range: the size is an integer of [batch_size, max_batch_size].
      * Counts as predicted: without a limit a run has the steps that `seesaw_schedule` says.
      * Skips and counts: a step with a signal that is not finite changes no limit.

    >>> import arbiter_jax as aj, optax
    >>> cosine = optax.cosine_decay_schedule(0.1, 1_000)
    >>> plan = dict(num_examples=1_000, batch_size=8, max_batch_size=64, trade=1.0)
    >>> rule = aj.schedulers.seesaw(cosine, **plan)
    >>> state = rule.init({"w": 0.0})
    >>> _, half = rule.update({"w": 1.0}, state, num_examples=492, batch_size=8)
    >>> int(aj.get_batch_size(state)), int(aj.get_batch_size(half))
    (8, 16)
    """
    plan = seesaw_schedule(
        schedule,
        num_examples=num_examples,
        batch_size=batch_size,
        max_batch_size=max_batch_size,
        trade=trade,
        doubling=doubling,
    )
    if not (limit is None or isinstance(limit, str | optax.GradientTransformation)):
        raise ValueError(
            'limit must be None, "noise_scale", "noise_scale_l1" or a batch-size rule, got '
            f"{_validate.shown(limit)}: the largest size is max_batch_size."
        )
    if isinstance(limit, str):
        _validate.one_of(("noise_scale", "noise_scale_l1"), limit=limit)
        limit = _measured_noise_scale(limit, batch_size, max_batch_size)
    low, high = int(batch_size), int(max_batch_size)
    return planned(plan, low, high, limit, doublings(low, high) if doubling else None)


def doublings(low: int, high: int) -> np.ndarray:
    """low, 2 low, 4 low, ..., at most high."""
    return low * 2 ** np.arange((high // low).bit_length())


def rates_of(schedule: optax.Schedule, num_examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts of examples of a run, increasing from 0, and the rates of the schedule there."""
    counts = np.unique(
        np.linspace(0, num_examples - 1, min(num_examples, _GRID)).round().astype(np.int64)
    )
    rate_at = lambda count: _schedules.schedule_value(count, float, schedule=schedule)
    with jax.ensure_compile_time_eval():  # also where a caller traces
        rates = np.asarray(jax.vmap(rate_at)(jnp.asarray(counts, float)), np.float64)
    bad = ~np.isfinite(rates) | (rates < 0)
    if bad.any() or not rates.any():
        found = (
            f"{rates[bad][0]} after {counts[bad][0]:,} examples" if bad.any() else "0 throughout"
        )
        raise ValueError(f"schedule must be finite, >= 0 and not always 0, got {found}.")
    return counts, rates


def _warn_of_steps(counts: np.ndarray, rates: np.ndarray, batch_size: int) -> None:
    """Warns if the decay is over after as many examples as the run has steps of this size."""
    num_examples = int(counts[-1]) + 1
    num_steps = num_examples // batch_size
    rest = rates[counts >= num_steps]
    if batch_size >= 4 and rest.size and (rest == rest[0]).all() and rest[0] < rates.max():
        _validate.warn(
            f"schedule has ended its decay after {num_steps:,} of {num_examples:,} examples, as one "
            "that counts steps does: if it does, pass lambda num_examples: "
            f"schedule(num_examples / {batch_size})."
        )


def _measured_noise_scale(
    limit: str, batch_size: int, max_batch_size: int
) -> optax.GradientTransformationExtraArgs:
    """The noise scale of the run, with the constants of arXiv:2602.03001, every 10th step."""
    return gradient_noise_scale(
        norm="l1" if limit == "noise_scale_l1" else "l2",
        scale=1 / 0.36,
        decay=0.9,
        measure_every=10,
        min_batch_size=batch_size,
        max_batch_size=max_batch_size,
    )


def _checked(batch_size: Any, max_batch_size: Any, trade: Any) -> tuple[int, int, float]:
    low = _validate.integer(batch_size=batch_size, minimum=1)
    high = _validate.integer(max_batch_size=max_batch_size, minimum=low, maximum=_rule.UNLIMITED)
    return low, high, _validate.in_range(0, 1, trade=trade)
