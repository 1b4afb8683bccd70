"""Learning-rate schedules in examples or progress instead of steps.

If the batch size changes, the number of steps of a run is not known in advance, and a schedule in
steps ends too early or too late. `fit` and `run_window` count steps, examples and scale-invariant
progress; a schedule can use any of the three.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _schedules, _validate
from arbiter_jax._count import as_count
from arbiter_jax._numerics import scale_updates, update_or_skip
from arbiter_jax.base import require


class ScaleByScheduleState(NamedTuple):
    """State of :func:`scale_by_schedule`."""

    learning_rate: jax.Array  # shape=(), dtype=float32, the rate of the last step
    num_skipped: jax.Array  # shape=(), dtype=int32, steps at which the schedule was not finite

    metrics = ("learning_rate",)


def scale_by_schedule(
    schedule: optax.Schedule, count: str = "num_examples"
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the updates by a schedule of the examples or progress so far, :math:`\eta(n_t)`.

    Chain it after an optimizer of rate 1: ``optax.chain(optax.sgd(1.0), scale_by_schedule(...))``.

    Args:
      schedule: Maps the count, a scalar, to a learning rate: any optax schedule. A count of examples
        is a float of the default type, exact up to 2^24: an int32 could not hold it beyond 2^31.
      count: Name of the count and of the extra argument that it is read from: "num_steps",
        "num_examples", or "progress" (the sum of the gains of :func:`arbiter_jax.adascale`; the
        number of steps if the chain has none).

    Returns:
      A transformation with a :class:`ScaleByScheduleState`.

    Raises:
      ValueError: If `count` is not one of the three, or `schedule` is not a function; in `init`, if it
        does not return a scalar, or one that is not finite at 0 (inside `jax.jit` the rate is then 0).
      TypeError: If ``update`` is called without the count.

    *Guarantees*:
      * Keeps the last rate: a step at which the schedule is not finite uses the rate of the step
        before; `num_skipped` counts such steps.

    >>> tx = optax.chain(optax.sgd(1.0), scale_by_schedule(optax.linear_schedule(0.5, 0.0, 100)))
    >>> updates, _ = tx.update({"w": 1.0}, tx.init({"w": 0.0}), num_examples=50)
    >>> float(updates["w"])
    -0.25
    """
    _validate.function("of a count", schedule=schedule)
    _validate.one_of(("num_steps", "num_examples", "progress"), count=count)

    def position(counted):
        return as_count(counted).astype(float) if count == "num_examples" else counted

    def init_fn(params):
        del params
        first = _schedules.schedule_value(position(0), jnp.float32, schedule=schedule)
        rate = _schedules.first_rate(first, schedule=schedule)
        return ScaleByScheduleState(rate, num_skipped=jnp.asarray(0, jnp.int32))

    def update_fn(updates, state, params=None, *, probe=None, **extra_args):
        del params
        if probe is not None:
            return updates, state
        require("scale_by_schedule", **{count: extra_args.get(count)})
        seen = position(extra_args[count])
        rate = _schedules.schedule_value(seen, jnp.float32, schedule=schedule)
        state = update_or_skip(jnp.isfinite(rate), state._replace(learning_rate=rate), state)
        return scale_updates(updates, state.learning_rate), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
