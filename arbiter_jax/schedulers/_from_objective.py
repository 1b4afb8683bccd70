"""What the two rules around a noise objective share: the decision, its limits, the cost of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _validate, base
from arbiter_jax.objectives import NoiseObjective
from arbiter_jax.objectives._objective import update_objective
from arbiter_jax.schedulers import _rule, _step_times

WINDOW_SHARE = 50  # no window sees more than this part of the budget, or has more than one step
SHORT_WINDOW = 5  # steps, at the start
SHORT_WINDOWS = 40  # steps in windows as short as that
ALWAYS = 20  # steps at which the statistics are computed, whatever `every` says
FIRST_SHARE = 40  # and which see this part of the budget, for harm done early may last,
FIRST_TIMES = 2  # or batches so many times what is asked for, if that is less


class MeasuredCost(NamedTuple):
    """The running fit of the time of a step against its size, inside of a rule's state."""

    times: _step_times.StepTimes
    requires = ("step_seconds",)


def as_step_cost(step_cost: Any) -> float | None:
    """A number >= 0 as it is; None for "measured"."""
    if isinstance(step_cost, str):
        _validate.one_of(("measured",), step_cost=step_cost)
        return None
    return _validate.non_negative(step_cost=step_cost)


def noise_rule(
    make_state: Callable[..., Any],
    objective: NoiseObjective,
    *,
    rule: str,
    limits: tuple[Any, Any, Any],
    fixed_cost: float | None,
    max_change: float,
    num_examples: int | None = None,
    every: int,
) -> optax.GradientTransformationExtraArgs:
    """A rule that decides for where an objective is least.

    Args:
      make_state: The type of its state.
      objective: What it looks at.
      rule: Its name, for messages.
      limits: Smallest, largest and initial batch size.
      fixed_cost: Of a step, in examples; None: measured.
      max_change: Largest factor between the size in force and the next.
      num_examples: The budget, or None.
      every: The statistics of the noise are computed at the first of so many steps.

    Returns:
      The transformation.
    """
    every = _validate.integer(every=every, minimum=1)
    if _validate.positive(max_change=max_change) <= 1:
        raise ValueError(f"max_change must be > 1, got {max_change!r}.")
    low, high, start = _validate.batch_size_range(*limits)
    least = min(2, high)  # of one example nothing is learnt about noise: it would stay 1 forever
    low, start = max(low, least), max(start, least)
    enough = 0 if num_examples is None else min(high, num_examples // (FIRST_SHARE * ALWAYS))

    def window_steps(num_steps: Any, size: Any) -> jax.Array:
        """Few steps at the start, when little is known; at all times few examples."""
        early = num_steps < SHORT_WINDOWS
        steps = jnp.where(early, SHORT_WINDOW, jnp.iinfo(jnp.int32).max)
        if num_examples is not None:
            steps = jnp.minimum(steps, jnp.maximum(num_examples // (WINDOW_SHARE * size), 1))
            steps = jnp.where(early & (size < enough), 1, steps)
        return steps.astype(jnp.int32)

    def init_fn(params):
        del params
        return make_state(
            batch_size=_rule.int32(start),
            window_steps=window_steps(_rule.int32(), _rule.int32(start)),
            statistics=objective.init(),
            step_cost=None if fixed_cost is not None else MeasuredCost(_step_times.init(start)),
            num_steps=_rule.int32(),
            num_skipped=_rule.int32(),
            signals_due=None if every == 1 else jnp.array(True),
        )

    def update_fn(updates, state, params=None, *, batch_size=None, **extra_args):
        for name in (*objective.signals, *(() if fixed_cost is not None else ("step_seconds",))):
            base.require(rule, **{name: extra_args.get(name)})
        in_force = jnp.clip(base.applied_batch_size(batch_size, state), low, high)
        timed, cost = state.step_cost, fixed_cost
        if timed is not None:
            times = _step_times.measure(timed.times, extra_args["step_seconds"], in_force)
            timed, cost = MeasuredCost(times), _step_times.step_cost(times)

        due = None if every == 1 else state.signals_due
        statistics, usable = update_objective(
            objective, state.statistics, updates, params, in_force, extra_args, due
        )
        num_steps: Any = optax.safe_increment(state.num_steps)
        size = objective.best(statistics, cost)
        first = jnp.fmin(FIRST_TIMES * size, enough)  # the latter, where nothing is known
        size = jnp.where(jnp.isnan(size), in_force.astype(size.dtype), size)
        size = jnp.where(num_steps < ALWAYS, jnp.maximum(size, first), size)
        new = state._replace(
            batch_size=_limited(size, in_force, max_change, low, high), statistics=statistics
        )
        new = _rule.update_or_skip(usable, new, state)
        new = new._replace(
            window_steps=window_steps(num_steps, new.batch_size),
            step_cost=timed,
            num_steps=num_steps,
        )
        if every > 1:
            due = (num_steps < ALWAYS) | (num_steps % every == 0)
            new = new._replace(signals_due=due)
        return updates, new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _limited(
    size: jax.Array, in_force: jax.Array, max_change: float, low: int, high: int
) -> jax.Array:
    """The size as an integer of the range, at most a factor from the one in force."""
    now = in_force.astype(size.dtype)
    size = jnp.clip(size, jnp.floor(now / max_change), jnp.ceil(now * max_change))
    return _rule.to_size(size, low, high)
