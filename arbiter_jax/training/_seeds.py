"""`fit` over a vector of keys: several runs that differ in their seeds, in one program.

Every seed has a budget, a batch size and windows of its own; what they share is the data and the
bucket, that of the largest batch among them. A seed that has used up its budget, or waits, takes no
step in a window.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from arbiter_jax import _validate
from arbiter_jax._count import Count, as_count
from arbiter_jax.base import LossFn, PyTree, StepInfo, requests, the_rule
from arbiter_jax.batching import BlockSource, next_bucket
from arbiter_jax.batching._buckets import batch_of_the_rest
from arbiter_jax.gradients import GradientFn
from arbiter_jax.training._call_errors import check_concrete
from arbiter_jax.training._callbacks import Callback, Callbacks, as_callbacks
from arbiter_jax.training._check_functions import check_functions, check_transformation
from arbiter_jax.training._compilations import count_compilations
from arbiter_jax.training._extra_args import ExtraArgs, check_extra_args
from arbiter_jax.training._out_of_memory import OutOfMemoryError, is_out_of_memory
from arbiter_jax.training._records import FitResult, WindowRecord, what_went_wrong
from arbiter_jax.training._run import check_budget, check_lengths
from arbiter_jax.training._run_data import on_device
from arbiter_jax.training._seed_states import stacked_state
from arbiter_jax.training._state import Data, TrainState, Unfinished
from arbiter_jax.training._window import run_window

_OF_ONE_RUN = {  # arguments of `fit` that several keys do not allow -> what they must be
    "checkpoints": None,
    "clock": None,
    "mesh": None,
    "micro_batch_size": None,
    "resume": False,
    "sampling": "exact",
}


def fit_seeds(
    loss_fn: LossFn | None,
    params: PyTree,
    tx: optax.GradientTransformation,
    data: Any,
    *,
    num_examples: int,
    stop_at: int | None,
    window: int,
    key: Any,
    callbacks: Callback | Iterable[Callback],
    model_state: PyTree,
    state: Any,
    num_agent_inputs: int,
    gradient_fn: GradientFn | None,
    transform_batch: Callable[[jax.Array, PyTree], PyTree] | None,
    inputs_of: Callable[[PyTree], PyTree] | None,
    has_aux: bool,
    extra_args: ExtraArgs | None,
    progress: bool | None,
    **others: Any,
) -> FitResult:
    """Trains several seeds in one program: :func:`fit` with a vector of keys, which see."""
    for name, value in others.items():
        if value != _OF_ONE_RUN.get(name):
            raise ValueError(
                f"{name} must be {_OF_ONE_RUN.get(name)!r} if key holds several keys, got "
                f"{value!r}: run the seeds one after the other."
            )
    num_examples, end, window = check_lengths(num_examples, stop_at, window, num_agent_inputs)
    callbacks = as_callbacks(callbacks, progress)
    check_transformation(tx)
    data = on_device(data, window)
    if isinstance(data.train, BlockSource):
        raise ValueError(
            "data.train must be arrays if key holds several keys, got a source of blocks, which "
            "holds the batches of one run: run the seeds one after the other."
        )
    check_concrete(params=params, key=key, data=data, state=state)
    state = stacked_state(params, tx, key, model_state, state)
    the_rule(requests(state.opt_state), "tx")
    if "step_seconds" in requests(state.opt_state).signals:
        raise ValueError(
            "tx must hold no rule that reads the measured time of a step if key holds several "
            "keys, because they share their steps: give the rule a step_cost that is a number, or "
            "run the seeds one after the other."
        )
    check_functions(loss_fn, gradient_fn, transform_batch, state.model_state, inputs_of)
    check_extra_args(extra_args)
    check_budget(state.opt_state, num_examples)
    options = {
        "loss_fn": loss_fn,
        "tx": tx,
        "window": window,
        "num_agent_inputs": num_agent_inputs,
        "gradient_fn": gradient_fn,
        "transform_batch": transform_batch,
        "inputs_of": inputs_of,
        "has_aux": has_aux,
        "extra_args": extra_args,
    }
    run = _Seeds(state, data, num_examples, end, window, tuple(options.items()))
    del state  # donated to the first window
    start, records = time.perf_counter(), None
    with contextlib.closing(Callbacks(callbacks)) as called:
        called.begin([], sum(run.seen), end * len(run.seen), len(run.seen))
        while (plans := run.next_plans()) is not None:
            records = run.train_window(plans)
            if called.after_window(records, run.whole_state()):
                break
        if records is not None:
            called.end(records, run.whole_state())
    for index, (history, seen) in enumerate(zip(run.histories, run.seen, strict=True)):
        for message in what_went_wrong(
            history, run.whole_state(), False, seen, end, num_examples, seed=index
        ):
            _validate.warn(f"Seed {index}: {message}")
    return FitResult(
        state=run.whole_state(),
        history=cast(Any, run.histories),
        num_compilations=run.num_compilations,
        num_cache_hits=run.num_cache_hits,
        seconds=time.perf_counter() - start,
    )


class _Plan(NamedTuple):
    """The next window of one seed, as its own run would have it."""

    batch_size: int
    bucket_size: int
    num_steps: int
    num_left: int = 0  # steps of the window that are not taken in this call
    is_rest: bool = False  # less than the rule has decided: all that the bucket holds

    def until(self, end: int, seen: int) -> _Plan | None:
        """As much of it as fits into what is left of a number of examples; None if no step does."""
        num_steps = min(self.num_steps, (end - seen) // self.batch_size)
        if num_steps < 1:
            return None
        return self._replace(num_steps=num_steps, num_left=self.num_steps - num_steps)


@dataclasses.dataclass
class _Seeds:
    """Everything that is kept on the host between two windows of several seeds."""

    state: TrainState  # with a leading axis
    data: Data
    num_examples: int  # the budget of each
    end: int  # examples at which each ends, at most the budget
    window: int  # T
    options: tuple[tuple[str, Any], ...]  # static arguments of `run_window`
    seen: list[int] = dataclasses.field(init=False)  # examples so far
    histories: list[list[WindowRecord]] = dataclasses.field(init=False)
    rests: list[_Plan | None] = dataclasses.field(init=False)
    num_compilations: int = 0
    num_cache_hits: int = 0

    def __post_init__(self) -> None:
        counts = np.asarray(jax.device_get(self.state.num_examples))
        self.seen = [int(count) for count in counts]
        self.histories = [[] for _ in self.seen]
        unfinished = np.stack(jax.device_get(self.state.unfinished), axis=-1)
        # Windows that an earlier call was stopped in, to be finished first.
        self.rests = [
            _Plan(int(size), int(rows), int(steps)) if steps > 0 else None
            for size, rows, steps in unfinished
        ]

    def next_plans(self) -> list[_Plan | None] | None:
        """Who trains what in the next window, None for a seed that does not; None at the end."""
        requested = requests(self.state.opt_state)
        rule = the_rule(requested)
        least = getattr(rule, "min_batch_size", rule.batch_size)
        read = (requested.bucket_sizes, requested.window_steps, least, self.state.num_steps)
        read = jax.device_get(read)
        of_seed = lambda i: jax.tree.map(lambda x: int(x[i].max()), read)
        plans = [self._plan(i, *of_seed(i)) for i in range(len(self.seen))]
        if not any(plans):
            return None
        # The batch of the rest is as large as its bucket, so that it may have to wait for a window
        # of another bucket than that of the others. Nobody else is kept waiting.
        whole = [plan for plan in plans if plan is not None and not plan.is_rest]
        bucket_size = max(plan.bucket_size for plan in whole or plans if plan is not None)
        fits = lambda plan: plan and (not plan.is_rest or plan.bucket_size == bucket_size)
        return [plan if fits(plan) else None for plan in plans]

    def _plan(
        self,
        index: int,
        sizes: tuple[int, ...],
        window_steps: tuple[int, ...],
        least: int,
        num_steps_taken: int,
    ) -> _Plan | None:
        """The next window of a seed, or None where it ends."""
        size, seen = sizes[0], self.seen[index]
        if min(sizes) < 1:
            raise ValueError(f"the batch size must be an integer >= 1, got {min(sizes)}.")
        rest = self.rests[index]
        if rest is not None and rest.until(self.num_examples, seen):
            return rest.until(self.end, seen)
        num_steps = min([self.window, *(max(1, n) for n in window_steps)])
        plan = _Plan(size, next_bucket(max(sizes)), num_steps).until(self.end, seen)
        if plan is None and self.end == self.num_examples:
            size = batch_of_the_rest(size, least, seen, num_steps_taken, self.num_examples)
            plan = _Plan(size, size, 1, is_rest=True) if size else None
        if plan is not None:
            self.rests[index] = None  # the budget has cut it: the rule decides on what is left
        return plan

    def train_window(self, plans: list[_Plan | None]) -> list[WindowRecord | None]:
        """Trains one window of all seeds that have a plan, and records it."""
        bucket_size = max(plan.bucket_size for plan in plans if plan is not None)
        idle = _Plan(0, bucket_size, 0)
        taken = [idle if plan is None else plan for plan in plans]
        # A seed that goes on with a window takes its size, the others what their rules say.
        given = self.state = self._with_unfinished(
            [
                rest if plan is not None else None
                for plan, rest in zip(plans, self.rests, strict=True)
            ]
        )
        try:
            before = time.perf_counter()
            with count_compilations() as compilations:
                self.state, info = _run_windows(
                    given,
                    self.data,
                    np.array([plan.num_steps for plan in taken], np.int32),
                    np.array([plan.bucket_size for plan in taken], np.int32),
                    self.num_examples if self.num_examples < 2**31 else as_count(self.num_examples),
                    bucket_size=bucket_size,
                    options=self.options,
                )
            check_concrete(tx=info)
            info = jax.device_get(info)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory(given, bucket_size) from error
        seconds = time.perf_counter() - before
        self.num_compilations += compilations.num_compilations
        self.num_cache_hits += compilations.num_cache_hits
        records: list[WindowRecord | None] = [None] * len(plans)
        for i, plan in enumerate(plans):
            if plan is None:
                continue
            self.seen[i] += plan.num_steps * plan.batch_size
            own = jax.tree.map(lambda x, i=i, n=plan.num_steps: x[i, :n], info)
            record = WindowRecord(
                window_index=len(self.histories[i]),
                batch_size=plan.batch_size,
                bucket_size=plan.bucket_size,
                num_steps=plan.num_steps,
                num_examples=self.seen[i],
                loss=float(np.mean(own.loss)),
                seconds=seconds,
                num_compilations=compilations.num_compilations,
                info=own,
                evaluation={},
            )
            records[i] = record
            self.histories[i].append(record)
            self.rests[i] = plan._replace(num_steps=plan.num_left) if plan.num_left else None
        return records

    def _with_unfinished(self, rests: list[_Plan | None]) -> TrainState:
        rows = [rest[:3] if rest else (0, 0, 0) for rest in rests]
        columns = (jnp.asarray(column, jnp.int32) for column in zip(*rows, strict=True))
        return self.state._replace(unfinished=Unfinished(*columns))

    def whole_state(self) -> TrainState:
        """The state, with the unfinished windows."""
        return self._with_unfinished(self.rests)

    def _out_of_memory(self, given: TrainState, bucket_size: int) -> OutOfMemoryError:
        deleted = any(leaf.is_deleted() for leaf in jax.tree.leaves(given))
        kept = "histories" if deleted else "histories and the last states"
        return OutOfMemoryError(
            f"A window of {len(self.seen)} seeds in a bucket of {bucket_size} rows each does not fit "
            "into the memory of the device. Pass fewer keys at once, or give the rule a smaller "
            f"max_batch_size; this error carries the {kept}.",
            self.histories,
            None if deleted else given,
        )


@functools.partial(jax.jit, static_argnames=("bucket_size", "options"), donate_argnames="state")
def _run_windows(
    state: TrainState,
    data: Data,
    num_steps: Any,
    own_bucket_size: Any,
    budget: Count | jax.typing.ArrayLike,
    *,
    bucket_size: int,
    options: tuple[tuple[str, Any], ...],
) -> tuple[TrainState, StepInfo]:
    """:func:`run_window` of all seeds, whose states, steps and own buckets have a leading axis."""

    def one(state, num_steps, own_bucket_size):
        return run_window(
            state,
            data,
            num_steps,
            budget=budget,
            own_bucket_size=own_bucket_size,
            bucket_size=bucket_size,
            **dict(options),
        )

    return jax.vmap(one)(state, num_steps, own_bucket_size)
