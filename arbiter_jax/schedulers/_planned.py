"""The rule that follows a `BatchSchedule`, as far as a limit lets it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import base
from arbiter_jax.schedulers import _rule
from arbiter_jax.schedulers._batch_schedule import BatchSchedule


class PlannedState(NamedTuple):
    """State of :func:`seesaw`, and of :func:`from_schedule` of a :class:`BatchSchedule`."""

    batch_size: jax.Array  # shape=(), dtype=int32, in examples
    min_batch_size: jax.Array  # shape=(), dtype=int32
    max_batch_size: jax.Array  # shape=(), dtype=int32
    window_steps: jax.Array  # shape=(), dtype=int32
    budget: jax.Array  # shape=(), examples of the run it was planned for, 0 if it does not matter
    count: Any  # examples seen
    limit: Any  # state of the rule whose size is the limit; None without one


def planned(
    schedule: BatchSchedule,
    low: int,
    high: int,
    limit: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A rule that takes its sizes from a plan, within [low, high] and below the size of a limit."""
    limiter = None if limit is None else _rule.checked_rule(limit)

    def window_steps(size):
        if schedule.window_share is None or schedule.num_examples is None:
            return _rule.int32(2**31 - 1)
        examples = int(schedule.window_share * schedule.num_examples)
        steps = jnp.maximum(min(examples, 2**31 - 1) // size, 1)
        return steps.astype(jnp.int32)

    def size_at(count, limit_state):
        size = jnp.clip(_look_up(schedule, count), low, high)
        if limit_state is None:
            return size
        return jnp.clip(size, low, jnp.maximum(base.get_batch_size(limit_state), low))

    def init_fn(params):
        limit_state = None if limiter is None else limiter.init(params)
        size = size_at(_rule.int32(), limit_state)
        return PlannedState(
            **_rule.sizes(low, high, size),
            window_steps=window_steps(size),
            budget=_rule.int32(schedule.num_examples or 0),
            count=_rule.int32(),
            limit=limit_state,
        )

    def update_state(state, *, updates, params, batch_size=None, num_examples=None, **signals):
        applied = base.applied_batch_size(batch_size, state)
        count = (state.count if num_examples is None else num_examples) + applied
        limit_state = state.limit
        if limiter is not None:
            signals |= {"batch_size": applied, "num_examples": num_examples}
            _, limit_state = limiter.update(updates, limit_state, params, **signals)
        size = size_at(count, limit_state)
        return state._replace(
            batch_size=size, window_steps=window_steps(size), count=count, limit=limit_state
        )

    return _rule.transformation(init_fn, update_state)


def _look_up(schedule: BatchSchedule, count: Any) -> jax.Array:
    """The size of the plan after so many examples, int32[]."""
    piece = jnp.sum(count >= jnp.asarray(schedule.starts[1:], jnp.int32))
    return jnp.asarray(schedule.batch_sizes, jnp.int32)[piece]
