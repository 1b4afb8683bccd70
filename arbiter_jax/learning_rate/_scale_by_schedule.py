"""Learning-rate schedules that follow the examples or the progress of a run, not its steps.

Where the batch size changes, the number of steps of a run is not known in advance, and a schedule
of the step count ends too early or too late. The engine counts steps, examples and scale-invariant
progress; a schedule may be driven by any of the three.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _validate
from arbiter_jax.base import require


class ScaleByScheduleState(NamedTuple):
    """State of :func:`scale_by_schedule`."""

    learning_rate: jax.Array  # shape=(), dtype=float32, the rate of the last step

    metrics = ("learning_rate",)


def scale_by_schedule(
    schedule: optax.Schedule, count: str = "num_examples"
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the updates by a schedule of what a run has seen, :math:`\eta(n_t)`.

    Put it behind an optimizer of rate 1: ``optax.chain(optax.sgd(1.0), scale_by_schedule(...))``.

    Args:
      schedule: Maps the count, a scalar, to a learning rate: any optax schedule.
      count: Which count: "num_steps", "num_examples", or "progress" (the sum of the gains of
        :func:`arbiter_jax.adascale`; steps where the chain has none). It is the extra argument of
        that name.

    Returns:
      A transformation with a :class:`ScaleByScheduleState`.

    Raises:
      ValueError: If `of` is none of the three, or the schedule is no function.
      TypeError: If `update` is not given the count.

    *Guarantees*: a rate that is not finite leaves the last one in force.

    >>> tx = optax.chain(optax.sgd(1.0), scale_by_schedule(optax.linear_schedule(0.5, 0.0, 100)))
    >>> updates, _ = tx.update({"w": 1.0}, tx.init({"w": 0.0}), num_examples=50)
    >>> float(updates["w"])
    -0.25
    """
    if not callable(schedule):
        raise ValueError(f"schedule must be a function of a count, got {schedule!r}.")
    _validate.one_of(("num_steps", "num_examples", "progress"), count=count)

    def init_fn(params):
        del params
        return ScaleByScheduleState(jnp.asarray(schedule(0), jnp.float32))

    def update_fn(updates, state, params=None, **extra_args):
        del params
        require("scale_by_schedule", **{count: extra_args.get(count)})
        rate = jnp.asarray(schedule(extra_args[count]), jnp.float32)
        rate = jnp.where(jnp.isfinite(rate), rate, state.learning_rate)
        updates = jax.tree.map(lambda u: (rate * u).astype(jnp.result_type(u)), updates)
        return updates, ScaleByScheduleState(rate)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
