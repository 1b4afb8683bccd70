"""Where a run stands on the host, and what its next window is."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from arbiter_jax.base import PyTree, requests, the_rule
from arbiter_jax.batching import batch_of_the_rest
from arbiter_jax.training._next_window import next_window
from arbiter_jax.training._records import FitResult, WindowRecord
from arbiter_jax.training._state import TrainState


class Plan(NamedTuple):
    """One window before it runs."""

    batch_size: int
    bucket_size: int
    num_steps: int


@dataclasses.dataclass
class Run:
    """Everything that `fit` keeps on the host between two windows."""

    state: TrainState
    num_examples: int  # the budget
    end: int  # examples at which this call ends, at most the budget
    window: int  # T
    seen: int  # examples so far
    history: list[WindowRecord] = dataclasses.field(default_factory=list)
    step_seconds: float = float("nan")  # measured time of a step of the last window
    num_cache_hits: int = 0
    source_ended: bool = False

    def next_plan(self) -> Plan | None:
        """The next window, or None where this call ends."""
        size, bucket_size, num_steps = next_window(self.state.opt_state, self.window)
        num_steps = min(num_steps, (self.end - self.seen) // size)
        if num_steps < 1 and self.end == self.num_examples:
            # The step takes no more examples than its bucket has rows.
            size = bucket_size = _smaller_batch(self.state, self.seen, self.num_examples)
            num_steps = min(size, 1)
        return Plan(size, bucket_size, num_steps) if num_steps > 0 else None

    def result(self, seconds: float) -> FitResult:
        """What :func:`fit` returns."""
        return FitResult(
            state=self.state,
            history=self.history,
            num_compilations=sum(record.num_compilations for record in self.history),
            num_cache_hits=self.num_cache_hits,
            seconds=seconds,
        )


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
    return batch_of_the_rest(size, least, seen, int(state.num_steps), num_examples)
