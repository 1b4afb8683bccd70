"""A batch-size rule around an objective: the decision, its limits, and the cost of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _numerics, _validate, base
from arbiter_jax._count import Count, as_count
from arbiter_jax.objectives import NoiseObjective
from arbiter_jax.objectives._objective import of_whole_update, update_objective
from arbiter_jax.schedulers import _rule, _step_times

# The first 20 steps always measure. Each of their batches holds at least an 800th of the budget, but
# at most twice what the rule asks for: damage from tiny first batches persists.
_NUM_INITIAL_STEPS = 20
_INITIAL_BATCHES_PER_BUDGET = 800
_MAX_INITIAL_FACTOR = 2
_WINDOWS_PER_BUDGET = 50  # no window sees more of the budget unless it has one step


class MeasuredCost(NamedTuple):
    """The running fit of the time of a step against its size, inside a rule's state."""

    times: _step_times.StepTimes
    requires = ("step_seconds",)


class ObjectiveState(NamedTuple):
    """State of :func:`from_objective`."""

    batch_size: jax.Array  # shape=(), dtype=int32, in examples
    min_batch_size: jax.Array  # shape=(), dtype=int32
    max_batch_size: jax.Array  # shape=(), dtype=int32
    window_steps: jax.Array  # shape=(), dtype=int32, steps until the decision is applied, at most
    statistics: Any  # the state of the objective
    step_cost: MeasuredCost | None  # the fit of the time of a step, if it is measured
    num_steps: jax.Array  # shape=(), dtype=int32
    ledger: Count  # training examples up to the last update, if they are counted; see base
    num_skipped: jax.Array  # shape=(), dtype=int32, steps whose signals carried no information
    signals_due: jax.Array | None  # shape=(), dtype=bool, does the next step measure; None: always


def from_objective(
    objective: NoiseObjective,
    *,
    measure_every: int = 4,
    step_cost: float | str | None = None,
    max_change: float = 4.0,
    min_batch_size: int = 8,
    max_batch_size: int = 512,
    initial_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes a rule that moves the batch size to the minimum of an objective, a factor at a time.

    Around :func:`arbiter_jax.objectives.noise_floor` it is :func:`noise_floor`, around
    :func:`arbiter_jax.objectives.expected_gain` it is :func:`expected_gain`; build one with other
    statistics from ``objective._replace(...)``.

    Args:
      objective: A :class:`arbiter_jax.objectives.NoiseObjective`.
      measure_every: The costly signals are measured at every n-th step, an integer >= 1, and at
        each of the first 20.
      step_cost: The fixed cost of a step, in examples, >= 0; "measured": fitted to the time of the
        steps, as in :func:`goodput`; None: that of the objective.
      max_change: Largest factor between the applied size and the next one, > 1.
      min_batch_size: Smallest batch size, an integer >= 1; 1 is taken as 2, because one example
        carries no information about noise.
      max_batch_size: Largest batch size, an integer >= min_batch_size.
      initial_batch_size: Size to start from, in [min_batch_size, max_batch_size]; the smallest
        if None.

    Returns:
      A transformation that returns the updates unchanged and whose `update` reads the signals of
      the objective and, if given, `batch_size`, the applied size, and `budget`, the examples of the
      run (and `step_seconds` if the cost of a step is measured).

    Raises:
      ValueError: If an argument is out of its range.
      TypeError: If `update` is called without a signal.

    *Guarantees*:
      * Updates unchanged: they are returned as they came.
      * Stays in range: the size is an integer of [min_batch_size, max_batch_size].
      * Skips and counts: a step with a signal that is not finite changes nothing but `num_skipped`.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> objective = aj.objectives.expected_gain(lambda w, x: (w - x) ** 2 / 2, persistence=1.0)
    >>> rule = aj.schedulers.from_objective(objective, initial_batch_size=8, max_change=1.5)
    >>> signals = {"meta_batch": jnp.zeros(4), "update_noise": jnp.array(-0.4)}
    >>> params = jnp.ones(())
    >>> _, state = rule.update(-0.05 * params, rule.init(params), params, **signals)
    >>> int(aj.get_batch_size(state))  # 2 q / A_0 is 9.9
    10
    """
    if not isinstance(objective, NoiseObjective):
        raise ValueError(
            "objective must be a NoiseObjective, for example aj.objectives.noise_floor(), got "
            f"{objective!r}."
        )
    return make_rule(
        ObjectiveState,
        objective,
        "from_objective",
        measure_every=measure_every,
        step_cost=step_cost,
        max_change=max_change,
        min_batch_size=min_batch_size,
        max_batch_size=max_batch_size,
        initial_batch_size=initial_batch_size,
    )


def make_rule(
    make_state: Callable[..., Any],
    objective: NoiseObjective,
    name: str,
    *,
    measure_every: int,
    step_cost: float | str | None,
    max_change: float,
    **limits: Any,
) -> optax.GradientTransformationExtraArgs:
    """As :func:`from_objective`, with the type of the state and the name for messages."""
    interval = _validate.int32(measure_every=measure_every, minimum=1)
    max_change = _validate.greater(1, max_change=max_change)
    measures_cost = isinstance(step_cost, str)
    if measures_cost:
        _validate.one_of(("measured",), step_cost=step_cost)
    elif step_cost is not None:
        step_cost = _validate.non_negative(step_cost=step_cost)
    low, high, start = _numerics.measurable_range(*_validate.batch_size_range(**limits))
    always = not isinstance(interval, jax.Array) and interval == 1

    def init_fn(params):
        _validate.all_parameters(name, params)
        if objective.num_examples is None:  # one step, until the budget of the loop is known
            window_steps = _rule.int32(1)
        else:
            budget = _as_budget(objective.num_examples)
            window_steps = _window_steps(
                _rule.int32(), _rule.int32(start), budget, _initial_size(budget, high)
            )
        return make_state(
            **_rule.sizes(low, high, start),
            window_steps=window_steps,
            statistics=objective.init(),
            step_cost=MeasuredCost(_step_times.init(start)) if measures_cost else None,
            num_steps=_rule.int32(),
            ledger=as_count(0),
            num_skipped=_rule.int32(),
            signals_due=None if always else jnp.array(True),
        )

    def update_state(state, *, updates, params, signals_made=None, **signals):
        required = sorted(base.requests(state).signals)
        base.require(name, **{signal: signals.get(signal) for signal in required})
        update = base.applied_update(state, **signals)
        applied = jnp.clip(update.call_size, low, high)
        timed, cost = state.step_cost, step_cost
        if measures_cost:
            times = _step_times.measure(timed.times, signals["step_seconds"], applied)
            timed, cost = MeasuredCost(times), _step_times.step_cost(times)

        if cost is not None:
            cost = update.per_update(cost)
        # What is measured and what is best are matters of the whole update, the decision of a call.
        update_size, update_signals = of_whole_update(update, applied, signals)
        statistics, usable = update_objective(
            objective,
            state.statistics,
            updates,
            params,
            update_size,
            update_signals,
            base.measures_now(state.signals_due, signals_made),
        )
        num_steps: Any = optax.safe_increment(state.num_steps)
        budget = objective.num_examples
        if budget is None:
            budget = 0 if signals.get("budget") is None else signals["budget"]
        budget = _as_budget(budget)
        initial = _initial_size(budget, high, update)
        size = update.per_call(objective.best(statistics, cost))
        # The latter if nothing is known.
        first = jnp.fmin(_MAX_INITIAL_FACTOR * size, initial)
        size = jnp.where(jnp.isnan(size), applied.astype(size.dtype), size)
        size = jnp.where(num_steps < _NUM_INITIAL_STEPS, jnp.maximum(size, first), size)
        size = _limited_change(size, applied, max_change, low, high)
        size = jnp.where(usable, size, state.batch_size)
        skipped = optax.safe_increment(state.num_skipped)
        new = state._replace(
            batch_size=size,
            statistics=statistics,  # the old ones if they are not usable
            num_skipped=jnp.where(usable, state.num_skipped, skipped),
            window_steps=_window_steps(num_steps, size, budget, initial),
            ledger=update.ledger,
            step_cost=timed,
            num_steps=num_steps,
        )
        if not always:
            due = (num_steps < _NUM_INITIAL_STEPS) | (num_steps % interval == 0)
            new = new._replace(signals_due=due)
        return new

    return _rule.transformation(init_fn, update_state, (low, high))


def _as_budget(number: Any) -> jax.Array | Count:
    """An int32 where that is known to hold it: the quotients of a Count take long to compile."""
    if isinstance(number, int) and number < 2**31:
        return _rule.int32(max(number, 0))
    if getattr(number, "dtype", None) == jnp.int32:
        return jnp.maximum(number, 0)
    return as_count(number)


def _quotient(budget: jax.Array | Count, size: Any) -> jax.Array:
    """The whole part of a quotient of numbers >= 0 and > 0, int32[]."""
    if isinstance(budget, Count):
        return budget // size
    return jax.lax.div(*jnp.broadcast_arrays(budget, jnp.asarray(size, jnp.int32)))


def _initial_size(
    budget: jax.Array | Count, high: Any, update: base.Update | None = None
) -> jax.Array:
    """The size that the first batches have at least; 0 without a budget."""
    size = _quotient(budget, _INITIAL_BATCHES_PER_BUDGET)
    return jnp.minimum(high, size if update is None else update.per_call(size))


def _window_steps(
    num_steps: jax.Array, size: jax.Array, budget: jax.Array | Count, initial: jax.Array
) -> jax.Array:
    """Few examples at all times, and one step until the first batches are large enough."""
    examples = size
    if not isinstance(budget, Count):  # 50 times the size is to fit, too
        examples = jnp.minimum(size, jnp.iinfo(jnp.int32).max // _WINDOWS_PER_BUDGET)
    limit = jnp.maximum(_quotient(budget, _WINDOWS_PER_BUDGET * examples), 1)
    steps = jnp.where(budget > 0, limit, jnp.iinfo(jnp.int32).max)
    early = num_steps < _NUM_INITIAL_STEPS
    return jnp.where(early & (size < initial), 1, steps).astype(jnp.int32)


def _limited_change(
    size: jax.Array, applied: jax.Array, max_change: Any, low: Any, high: Any
) -> jax.Array:
    """The size as an integer of the range, at most a factor from the applied one."""
    now = applied.astype(size.dtype)
    size = jnp.clip(size, jnp.floor(now / max_change), jnp.ceil(now * max_change))
    return _rule.to_size(size, low, high)
