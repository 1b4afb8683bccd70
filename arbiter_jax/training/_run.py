"""Where a run stands on the host, and what its next window is."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arbiter_jax import _validate
from arbiter_jax.base import PyTree, StepInfo, requests, the_rule
from arbiter_jax.batching import next_bucket
from arbiter_jax.batching._buckets import batch_of_the_rest
from arbiter_jax.batching._rows import num_data_devices
from arbiter_jax.training._auto_micro_batch import MicroBatch
from arbiter_jax.training._compilations import Compilations
from arbiter_jax.training._next_window import next_window
from arbiter_jax.training._records import FitResult, WindowRecord, what_went_wrong
from arbiter_jax.training._state import Data, TrainState, Unfinished, no_unfinished_window


class Plan(NamedTuple):
    """One window before it runs."""

    batch_size: int
    bucket_size: int
    num_steps: int

    def steps_until(self, limit: int, seen: int) -> int:
        """How many of its steps fit into what is left of a number of examples."""
        return min(self.num_steps, (limit - seen) // self.batch_size)


@dataclasses.dataclass
class Run:
    """Everything that `fit` keeps on the host between two windows."""

    state: TrainState
    data: Data
    advance: functools.partial[Any]  # `run_window` with what all windows of the run share
    num_examples: int  # the budget
    end: int  # examples at which this call ends, at most the budget
    window: int  # T
    mesh: jax.sharding.Mesh | None
    micro: MicroBatch  # the most rows that are computed at once, if there is a limit
    clock: Callable[[], float] | None = None  # in place of time.perf_counter
    seen: int = 0  # examples so far
    history: list[WindowRecord] = dataclasses.field(default_factory=list)
    step_seconds: float = float("nan")  # measured time of a step of the last window
    num_cache_hits: int = 0
    seconds: float = 0.0  # of the calls that a resumed run had before
    source_ended: bool = False
    rest: Plan | None = None  # steps of the last window that this call did not take
    is_cut: bool = False  # whether this call ends in the middle of a window
    measures: bool = False  # whether a rule asks for the measured time of a step

    def __post_init__(self) -> None:
        self.go_on_from(self.state)

    def now(self) -> float:
        """Seconds on the clock of the run."""
        return float(time.perf_counter() if self.clock is None else self.clock())

    def go_on_from(self, state: TrainState) -> None:
        """Continues from a state, and from what it stores for the host."""
        carried = jax.device_get((state.num_examples, state.step_seconds, state.unfinished))
        self.state, self.seen = state, int(carried[0])
        self.step_seconds = float(carried[1]) or float("nan")
        self.measures = "step_seconds" in requests(state.opt_state).signals
        rest = Plan(*map(int, carried[2]))
        self.rest = None
        if rest.num_steps > 0:
            # The call before may have had another limit.
            rows = max(rest.bucket_size, next_bucket(rest.batch_size))
            self.rest = rest._replace(bucket_size=self.micro.limited(rows))

    def next_plan(self) -> Plan | None:
        """The next window as a whole, or None where this call ends. It changes nothing.

        A window that an earlier call was stopped in is finished first. One that the budget has cut
        is not: the rule decides on what is left.
        """
        if self.is_cut:
            return None
        whole = self.rest
        if whole is None or whole.steps_until(self.num_examples, self.seen) < 1:
            whole = Plan(*next_window(self.state.opt_state, self.window, self.micro.size))
            whole = whole._replace(bucket_size=self.micro.limited(whole.bucket_size))
            too_large = whole.steps_until(self.end, self.seen) < 1
            if too_large and self.end == self.num_examples:
                # The step takes at most this many examples, and at most the rows of its bucket.
                size = _smaller_batch(self.state, self.seen, self.num_examples)
                whole = Plan(size, self.micro.limited(size), 1)
            if whole.batch_size < 1:
                return None
        return whole if self.limited(whole).num_steps >= 1 else None

    def limited(self, whole: Plan) -> Plan:
        """What this call takes of a window."""
        return whole._replace(num_steps=whole.steps_until(self.end, self.seen))

    def begin(self, whole: Plan) -> Plan:
        """The part of the window from :meth:`next_plan` that this call trains."""
        if self.rest is not None and whole is not self.rest:
            self.state = self.state._replace(unfinished=no_unfinished_window())
        plan = self.limited(whole)
        self.is_cut = plan.num_steps < whole.steps_until(self.num_examples, self.seen)
        self._leave(whole, whole.num_steps - plan.num_steps)
        return plan

    def _leave(self, whole: Plan, num_steps: int) -> None:
        self.rest = whole._replace(num_steps=num_steps) if num_steps else None
        self.is_cut = self.is_cut and num_steps > 0

    def got(self, plan: Plan, num_steps: int, room: int | None = None) -> None:
        """Notes for how many steps of a window there were examples.

        If there were fewer than planned, the rule decides on what is left.

        Args:
          plan: From :meth:`begin`.
          num_steps: Steps that were taken.
          room: Steps that the block had room for, None if the data is not a block: then a window
            has room for all its steps.
        """
        if num_steps < plan.num_steps:
            self._leave(plan, 0)
        elif self.rest is not None and room is not None:
            self._leave(self.rest, min(self.rest.num_steps, room - num_steps))

    def record(
        self, plan: Plan, info: StepInfo, seconds: float, compilations: Compilations
    ) -> None:
        """Adds a window that has run to the history, on the host."""
        self.num_cache_hits += compilations.num_cache_hits
        self.seen += plan.num_steps * plan.batch_size
        self.history.append(
            WindowRecord(
                window_index=len(self.history),
                batch_size=plan.batch_size,
                bucket_size=plan.bucket_size,
                num_steps=plan.num_steps,
                num_examples=self.seen,
                loss=float(np.mean(info.loss)),
                seconds=seconds,
                num_compilations=compilations.num_compilations,
                info=info,
                evaluation={},
            )
        )

    def measured(self, step_seconds: float) -> None:
        """Notes the measured time of a step of the last window."""
        # All steps of a window are given the same time, also those that are left of it.
        if self.measures and not self.is_cut:
            self.step_seconds = step_seconds

    def whole_state(self) -> TrainState:
        """The state, with what only the host knows: a run that continues from it is the same run."""
        state = self.state
        if self.measures:
            seconds = np.nan_to_num(self.step_seconds)
            state = state._replace(step_seconds=jnp.asarray(seconds, jnp.float32))
        if self.rest is not None:
            unfinished = Unfinished(*(jnp.asarray(x, jnp.int32) for x in self.rest))
            state = state._replace(unfinished=unfinished)
        return state

    def what_went_wrong(self) -> list[str]:
        """What a user should know of the run besides its result."""
        return what_went_wrong(
            self.history, self.state, self.source_ended, self.seen, self.end, self.num_examples
        )

    def result(self, seconds: float, ahead: Compilations) -> FitResult:
        """What :func:`fit` returns; `ahead`: what was compiled besides the windows that ran."""
        return FitResult(
            state=self.whole_state(),
            history=self.history,
            num_compilations=sum(record.num_compilations for record in self.history)
            + ahead.num_compilations,
            num_cache_hits=self.num_cache_hits + ahead.num_cache_hits,
            seconds=self.seconds + seconds,
        )


def check_lengths(
    num_examples: Any, stop_at: Any, window: Any, num_agent_inputs: Any
) -> tuple[int, int, int]:
    """(num_examples, end, window) of a call of `fit`, or a ValueError if one is out of its range."""
    num_examples = end = _validate.integer(num_examples=num_examples, minimum=1)
    if num_examples > _validate.LARGEST_COUNT:
        _validate.integer(num_examples=num_examples, maximum=_validate.LARGEST_COUNT)
    if stop_at is not None:
        end = _validate.integer(stop_at=stop_at, minimum=1, maximum=num_examples)
    window = _validate.integer(window=window, minimum=1)
    if window > _validate.LARGEST_INT32:
        _validate.integer(window=window, maximum=_validate.LARGEST_INT32)
    _validate.integer(num_agent_inputs=num_agent_inputs, minimum=1)
    return num_examples, end, window


def check_budget(opt_state: PyTree, num_examples: int) -> None:
    """Raises a ValueError if a rule in the chain was built for another budget than this run's."""
    for budget in jax.device_get(requests(opt_state).budgets):
        known = int(np.max(np.asarray(budget)))
        if known not in (0, num_examples):
            raise ValueError(
                f"num_examples must be {known}, the budget that the rule in tx was built for, got "
                f"{num_examples}: pass the same number to both, or none to the rule."
            )


def _smaller_batch(state: TrainState, seen: int, num_examples: int) -> int:
    """The batch for what is left of the budget where a whole one does not fit; 0 for none."""
    rule = the_rule(requests(state.opt_state))
    least = getattr(rule, "min_batch_size", rule.batch_size)
    size, least = (int(x.max()) for x in jax.device_get((rule.batch_size, least)))
    least = max(least, num_data_devices())  # every device has a row
    return batch_of_the_rest(size, least, seen, int(state.num_steps), num_examples)
