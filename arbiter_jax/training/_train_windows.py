"""The windows of a run, one after the other: train, record, call the callbacks, save."""

from __future__ import annotations

import functools

import jax
import optax

from arbiter_jax._processes import read
from arbiter_jax.training._ahead import CompileAhead
from arbiter_jax.training._call_errors import check_concrete
from arbiter_jax.training._callbacks import Callbacks
from arbiter_jax.training._checkpointing import Keeper
from arbiter_jax.training._compilations import count_compilations
from arbiter_jax.training._interrupts import Interrupts
from arbiter_jax.training._next_plan import next_plan
from arbiter_jax.training._out_of_memory import is_out_of_memory, out_of_memory
from arbiter_jax.training._run import Plan, Run
from arbiter_jax.training._run_data import data_of_window, room_for


def train_windows(
    run: Run,
    tx: optax.GradientTransformation,
    keeper: Keeper,
    ahead: CompileAhead,
    interrupts: Interrupts,
    called: Callbacks,
    shared: bool,
) -> None:
    """Trains until the budget, a source of blocks, a callback or a signal ends the run.

    Args:
      run: Where it starts, or what it was given to go on from.
      tx: The chain, which a checkpoint has to be of.
      keeper: Reads the checkpoint that the run goes on from, and saves it.
      ahead: Compiles the programs of other buckets while a window trains.
      interrupts: Signals that this process has received.
      called: The callbacks.
      shared: Whether several processes train together.
    """
    was_ended = keeper.resume(tx)
    called.begin(run.history, run.seen, run.end)
    # A callback that goes by the clock may decide otherwise now.
    is_ended = was_ended and called.after_window(run.history[-1], run.whole_state())
    plan, is_ended = next_plan(run, is_ended, interrupts, shared)
    while plan is not None:
        if not _train_window(run, run.begin(plan), keeper, ahead):
            break
        is_ended = called.after_window(run.history[-1], run.whole_state())
        # Before the run is saved, because all processes save it at once.
        plan, is_ended = next_plan(run, is_ended, interrupts, shared)
        if plan is None and not interrupts.received:
            called.end(run.history[-1], run.whole_state())
        keeper.after_window(is_ended)
        if interrupts.received and not shared:
            break
    if run.source_ended and run.history:
        called.end(run.history[-1], run.whole_state())
    keeper.finish(interrupts)


def _train_window(run: Run, plan: Plan, keeper: Keeper, ahead: CompileAhead) -> bool:
    """Trains one window and records it; False if there are no examples left for it."""
    size, bucket_size, wanted = plan
    data, advance, micro, given = run.data, run.advance, run.micro, run.state
    try:
        with count_compilations() as searched:
            arguments = functools.partial(
                advance, given, num_steps=wanted, step_seconds=run.step_seconds
            )
            ahead.wait(bucket_size)
            bucket_size = micro.fitting_bucket(size, bucket_size, data, run.window, arguments)
        window_data, num_steps = data_of_window(data, size, bucket_size, wanted, run.mesh)
        if num_steps < 1:
            run.got(plan, 0)
            run.source_ended = True
            return False
        micro.saw(window_data)
        before = run.now()
        with count_compilations() as compilations:
            run.state, info = advance(
                given,
                window_data,
                num_steps=num_steps,
                step_seconds=run.step_seconds,
                bucket_size=bucket_size,
                **micro.options(size, bucket_size),
            )
        arguments = functools.partial(advance, run.state, num_steps=num_steps, step_seconds=0.0)
        lowered = ahead.start(arguments, window_data, bucket_size, micro.options)
        check_concrete(tx=info)
        info = read(info)
        run.got(plan, num_steps, room_for(window_data, size))
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if micro.halve(bucket_size, given, data):
            plan = plan._replace(bucket_size=micro.limited(bucket_size))
            return _train_window(run, plan, keeper, ahead)
        raise out_of_memory(run.history, given, size, bucket_size, keeper.latest()) from error
    info = jax.tree.map(lambda x: x[:num_steps], info)
    seconds = run.now() - before
    plan = plan._replace(bucket_size=bucket_size, num_steps=num_steps)
    run.record(plan, info, seconds, searched + compilations)
    # A time that includes a compilation is not the time of a step. A given clock counts as it is:
    # a repeatable run cannot depend on what was compiled before it.
    compiled = run.clock is None and (compilations.num_programs or lowered)
    run.measured(float("nan") if compiled else seconds / num_steps)
    return True
