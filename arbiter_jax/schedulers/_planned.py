"""The rule that follows a `BatchSchedule`, as far as a limit lets it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from arbiter_jax import base
from arbiter_jax._count import Count, as_count
from arbiter_jax.schedulers import _rule
from arbiter_jax.schedulers._batch_schedule import BatchSchedule


class PlannedState(NamedTuple):
    """State of :func:`seesaw`, and of :func:`from_schedule` of a :class:`BatchSchedule`."""

    batch_size: jax.Array  # shape=(), dtype=int32, in examples
    min_batch_size: jax.Array  # shape=(), dtype=int32
    max_batch_size: jax.Array  # shape=(), dtype=int32
    window_steps: jax.Array  # shape=(), dtype=int32
    budget: Count  # examples of the run it was planned for, 0 if it does not matter
    count: Count  # training examples so far
    limit: Any  # state of the rule whose size is the limit; None without one


def planned(
    schedule: BatchSchedule,
    low: int,
    high: int,
    limit: optax.GradientTransformation | None = None,
    sizes: np.ndarray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A rule that takes its sizes from a plan, within [low, high] and below the size of a limit.

    If `sizes` are given, increasing from `low`, the limit is rounded down to one of them.
    """
    limiter = None if limit is None else _rule.checked_rule(limit)

    def window_steps(size):
        return jnp.maximum(schedule.window_examples // size, 1).astype(jnp.int32)

    def size_at(count, limit_state):
        size = jnp.clip(_look_up(schedule, count), low, high)
        if limit_state is None:
            return size
        size = jnp.clip(size, low, jnp.maximum(base.get_batch_size(limit_state), low))
        if sizes is None:
            return size
        allowed = jnp.asarray(sizes, jnp.int32)
        return allowed[jnp.searchsorted(allowed, size, side="right") - 1]

    def init_fn(params):
        limit_state = None if limiter is None else limiter.init(params)
        size = size_at(as_count(0), limit_state)
        return PlannedState(
            **_rule.sizes(low, high, size),
            window_steps=window_steps(size),
            budget=as_count(schedule.num_examples or 0),
            count=as_count(0),
            limit=limit_state,
        )

    def update_state(state, *, updates, params, **signals):
        count = base.examples_after(state.count, state, **signals)
        limit_state = state.limit
        if limiter is not None:
            signals = {
                **signals,
                "batch_size": base.applied_batch_size(signals.get("batch_size"), state),
            }
            _, limit_state = limiter.update(updates, limit_state, params, **signals)
        size = size_at(count, limit_state)
        return state._replace(
            batch_size=size, window_steps=window_steps(size), count=count, limit=limit_state
        )

    return _rule.transformation(init_fn, update_state, (low, high))


def _look_up(schedule: BatchSchedule, count: Count) -> jax.Array:
    """The size of the plan after so many examples, int32[]."""
    starts = np.asarray(schedule.starts[1:], np.int64)
    if not starts.size or starts[-1] < 2**31:
        seen = count.astype(jnp.int32)  # stops at 2^31 - 1, behind all starts
        piece = jnp.searchsorted(jnp.asarray(starts, jnp.int32), seen, side="right")
    else:
        high, low = (jnp.asarray(word, jnp.uint32) for word in (starts >> 32, starts % 2**32))
        begun = (count.high > high) | ((count.high == high) & (count.low >= low))
        piece = jnp.sum(begun)
    return jnp.asarray(schedule.batch_sizes, jnp.int32)[piece]
