"""A batch size that is known in advance: a function of the steps or examples so far, or a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _numerics, _schedules, _validate, base
from arbiter_jax._count import Count, as_count
from arbiter_jax.schedulers import _rule
from arbiter_jax.schedulers._batch_schedule import Pairs, parse_schedule
from arbiter_jax.schedulers._planned import planned


class ScheduleState(NamedTuple):
    """State of :func:`from_schedule` of a function, `adabatch` and `smith`."""

    batch_size: jax.Array  # shape=(), dtype=int32, in examples
    min_batch_size: jax.Array  # shape=(), dtype=int32
    max_batch_size: jax.Array  # shape=(), dtype=int32
    # What a run has seen: of examples a Count, else an int32 that stops at its largest value.
    count: jax.Array | Count  # shape=(), dtype=int32
    num_skipped: jax.Array  # shape=(), dtype=int32, steps at which the schedule was not a number


def from_schedule(
    schedule: Callable[[jax.Array], jax.Array] | Pairs,
    *,
    count: str | None = None,
    min_batch_size: int = 1,
    max_batch_size: int = _rule.UNLIMITED,
    initial_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sets the batch size by a function of the steps, the examples or the progress of a run.

    .. math:: B_t = clip(round(schedule(n_t)), b_{min}, b_{max})

    Any optax schedule will do: `optax.piecewise_constant_schedule` grows in steps,
    `optax.exponential_decay` with a rate above 1 geometrically, `optax.join_schedules` joins them.

    Args:
      schedule: Maps a count to a batch size in examples. A count of steps or progress is int32[].
        One of examples is float[] of the default type, exact up to 2^24, because a run may see more
        than an int32 holds: a schedule that looks up a table has to round it,
        ``table[(n // 1000).astype(int)]``. A value that is not a number keeps the last size.
        Or what people write in place of a function: a list of pairs ``[(0, 64), (100_000, 128)]`` of
        a number of examples and the size from there on, the same as a string,
        ``"0:64 100K:128"``, or a :class:`BatchSchedule`. Sizes outside the range are clipped.
      count: What a function is given: "num_steps", the updates of this rule, the default;
        "num_examples", which makes a schedule in epochs independent of the sizes it passes through;
        or "progress" (scale-invariant steps, rounded down). Pairs always count examples. `aj.fit`
        and `aj.run_window` count the last two. In your own loop `update` needs the extra
        argument `progress`; it sums the applied sizes if it is not given `num_examples`, which
        under `optax.MultiSteps` it must be, because the rule then sees only one call of every k.
      min_batch_size: Smallest batch size, an integer >= 1.
      max_batch_size: Largest batch size, an integer >= min_batch_size.
      initial_batch_size: Size before the first step, in [min_batch_size, max_batch_size];
        schedule(0), clipped, if None.

    Returns:
      A transformation that returns the updates unchanged.

    Raises:
      ValueError: If an argument is out of its range, or the schedule is neither a function nor pairs;
        in `init`, if the function does not return a scalar.
      TypeError: If `update` is not given the `progress` that a schedule of it needs.

    *Guarantees*:
      * Updates unchanged: they pass through as they are.
      * Stays in range: the size is an integer of [min_batch_size, max_batch_size].
      * Skips and counts: a step at which the schedule is not a number changes no size.

    >>> import arbiter_jax as aj, optax
    >>> doubling = optax.exponential_decay(8, transition_steps=2, decay_rate=2, staircase=True)
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.from_schedule(doubling))
    >>> state, sizes = tx.init({"w": 0.0}), []
    >>> for _ in range(5):
    ...     sizes.append(int(aj.get_batch_size(state)))
    ...     _, state = tx.update({"w": 1.0}, state)
    >>> sizes
    [8, 8, 16, 16, 32]
    >>> rule = aj.schedulers.from_schedule("0:64 100K:128 1.5M:512")
    >>> _, state = rule.update({"w": 1.0}, rule.init({"w": 0.0}), num_examples=2e6, batch_size=64)
    >>> int(aj.get_batch_size(state))
    512
    """
    if isinstance(schedule, Sequence):
        if count not in (None, "num_examples") or initial_batch_size is not None:
            raise ValueError(
                "count and initial_batch_size belong to a schedule that is a function; pairs count "
                f"examples and say the first size, got count={count!r} and "
                f"initial_batch_size={initial_batch_size!r}."
            )
        plan = parse_schedule(schedule)
        _validate.static(min_batch_size=min_batch_size, max_batch_size=max_batch_size)
        low, high, _ = _validate.batch_size_range(min_batch_size, max_batch_size)
        # The sizes that the plan can take; they lie within the range, which may hold none of it.
        sizes = [min(max(size, low), high) for size in plan.batch_sizes]
        return planned(plan, min(sizes), max(sizes))
    _validate.function("of a count", schedule=schedule)
    count = "num_steps" if count is None else count
    _validate.one_of(("num_steps", "num_examples", "progress"), count=count)
    if count == "num_examples":
        of_examples, schedule = schedule, lambda seen: of_examples(seen.astype(float))
    return scheduled(
        schedule,
        count=count,
        min_batch_size=min_batch_size,
        max_batch_size=max_batch_size,
        initial_batch_size=initial_batch_size,
    )


def scheduled(
    schedule: Callable[[Any], jax.Array],
    *,
    count: str,
    min_batch_size: int,
    max_batch_size: int,
    initial_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """As :func:`from_schedule`, of a schedule that takes a count of examples as a Count: exactly."""
    low, high, start = _validate.batch_size_range(
        min_batch_size, max_batch_size, initial_batch_size
    )

    def size_at(position, fallback):
        value = _schedules.schedule_value(position, float, schedule=schedule)
        size = _rule.to_size(jnp.where(jnp.isnan(value), low, value), low, high)
        return jnp.where(jnp.isnan(value), fallback, size), ~jnp.isnan(value)

    def init_fn(params):
        del params
        seen = as_count(0) if count == "num_examples" else _rule.int32()
        size, _ = size_at(seen, _rule.int32(low))  # also where another one is given: it checks
        if initial_batch_size is not None:
            size = _rule.int32(start)
        return ScheduleState(**_rule.sizes(low, high, size), count=seen, num_skipped=_rule.int32())

    def count_after(state, progress, signals):
        if count == "progress":
            base.require("from_schedule", progress=progress)
            return jnp.floor(progress).astype(jnp.int32)
        if count == "num_steps":
            return optax.safe_increment(state.count)
        return base.examples_after(state.count, state, **signals)

    def update_state(state, *, progress=None, **signals):
        counted = state._replace(count=count_after(state, progress, signals))
        size, usable = size_at(counted.count, state.batch_size)
        return _numerics.update_or_skip(usable, counted._replace(batch_size=size), counted)

    return _rule.transformation(init_fn, update_state, (low, high))
