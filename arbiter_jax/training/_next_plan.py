"""The next window of a run, which several processes that train together agree on."""

from __future__ import annotations

import signal

from arbiter_jax._processes import agree
from arbiter_jax.training._interrupts import Interrupts
from arbiter_jax.training._run import Plan, Run

_ENDED = 1  # by a callback; a signal is 1 << its number, which is at least 2


def next_plan(
    run: Run, is_ended: bool, interrupts: Interrupts, shared: bool
) -> tuple[Plan | None, bool]:
    """The next window, or None where this call of `fit` ends, and whether a callback has ended it.

    Args:
      run: Where it stands. The measured time of a step becomes that of process 0.
      is_ended: Whether a callback of this process has ended the run. One that does ends it for all.
      interrupts: Signals that this process has received; those of the other processes are added.
      shared: Whether several processes train together; all of them then call this.

    Raises:
      RuntimeError: On every process, if they have not decided alike.
    """
    plan, received = run.next_plan(), interrupts.received
    if shared:
        stop = _ENDED * is_ended | (1 << received if received else 0)
        seconds, stop = agree(
            run.step_seconds,
            stop,
            **(Plan(0, 0, 0) if plan is None else run.limited(plan))._asdict(),
            num_examples=run.seen,
        )
        run.step_seconds, is_ended = seconds, bool(stop & _ENDED)
        received = None
        if stop > _ENDED:
            # Of two signals, that of the larger number: SIGTERM rather than Ctrl-C.
            received = signal.Signals(stop.bit_length() - 1)
            interrupts.take_over(received)
    return None if is_ended or received else plan, is_ended
