"""What a checkpoint of a run holds, when one is written, and which run it belongs to.

The files themselves are the matter of :mod:`arbiter_jax.callbacks`: a run sees only the protocol.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, Protocol

import numpy as np
import optax

from arbiter_jax import _validate
from arbiter_jax._processes import read
from arbiter_jax.base import PyTree
from arbiter_jax.batching import BlockSource
from arbiter_jax.training._difference import node_parts
from arbiter_jax.training._interrupts import Interrupts
from arbiter_jax.training._records import WindowRecord
from arbiter_jax.training._resume import resume_state
from arbiter_jax.training._run import Run
from arbiter_jax.training._state import TrainState


class Checkpoint(NamedTuple):
    """Everything that a run goes on from."""

    state: TrainState  # with the measured step time and an unfinished window
    history: list[WindowRecord]
    position: Any  # of the data source, made of numbers and text; None for arrays
    is_ended: bool  # whether a callback has ended the run here
    num_cache_hits: int


class OpenCheckpoints(Protocol):
    """The checkpoints of one run; numbers are those of its windows."""

    def latest(self) -> str | None:
        """Path of the newest complete checkpoint, or None."""
        ...

    def restore(self, like: TrainState) -> Checkpoint:
        """The newest complete one; a ValueError if it is of another run."""
        ...

    def save(self, checkpoint: Checkpoint) -> None:
        """Begins to write one."""
        ...

    def close(self) -> None:
        """Waits until all are written."""
        ...


class Checkpoints(Protocol):
    """Where and when a run is saved; ``aj.checkpoints`` makes one."""

    every: int  # windows

    def open(self, identity: dict[str, str]) -> OpenCheckpoints:
        """The checkpoints of the run that is described like this."""
        ...


def identity_of(state: TrainState) -> dict[str, str]:
    """What a run is, as far as its state shows: (path in the state) -> its kind, in order.

    Args:
      state: Of the model, the chain and the range that a run was given.

    >>> identity_of({"w": np.zeros(3, np.float32)})
    {'state': 'dict', "state['w']": 'float32[3]'}
    """
    found: dict[str, str] = {}

    def visit(node: PyTree, path: str) -> None:
        if hasattr(node, "dtype"):
            found[path] = f"{node.dtype}{list(node.shape)}"
            if path.endswith((".min_batch_size", ".max_batch_size")):
                found[path] += f" of {np.asarray(node).tolist()}"
            return
        found[path] = type(node).__name__
        for name, part in node_parts(node).items():
            visit(part, path + name)

    visit(state, "state")
    return found


def first_difference(saved: dict[str, str], expected: dict[str, str]) -> str | None:
    """Where two runs differ first, as "state.x is A, not B", or None."""
    for path, kind in expected.items():
        if saved.get(path) != kind:
            found = saved.get(path)
            return f"{path} is {found}, not {kind}" if found else f"has no {path}"
    more = next((path for path in saved if path not in expected), None)
    return None if more is None else f"{more} is more than this run has"


def _check_same_key(saved: TrainState, expected: TrainState, path: str | None) -> None:
    """Raises a ValueError if a run was saved under another key: its draws would be taken silently."""
    # A run never changes this key. On several processes every one has all of it.
    found, key = (read(state.key) for state in (saved, expected))
    if not np.array_equal(found, key):
        raise ValueError(
            f"{path} must be a checkpoint of a run with this key, got one with another: pass the same "
            "key to go on with that run, or another directory to aj.checkpoints for this one."
        )


class Keeper:
    """Saves a run while it goes on, and puts it back; without `checkpoints` it does nothing."""

    def __init__(self, checkpoints: Any, resume: Any, run: Run):
        self._run, source = run, run.data.train
        self._source: Any = source if isinstance(source, BlockSource) else None
        self._every = 1
        self._open: OpenCheckpoints | None = None
        self._saved = -1  # windows in the last checkpoint
        resume = _validate.boolean(resume=resume)
        if checkpoints is None:
            if resume:
                raise ValueError(
                    "resume must be False without checkpoints, got True: pass "
                    "checkpoints=aj.checkpoints(directory) as well."
                )
            return
        if not hasattr(checkpoints, "open") or not hasattr(checkpoints, "every"):
            raise ValueError(f"checkpoints must be aj.checkpoints(directory), got {checkpoints!r}.")
        self._position()  # before any work is done that could not be resumed
        self._every = checkpoints.every
        opened: OpenCheckpoints = checkpoints.open(identity_of(run.state))
        self._open, latest = opened, opened.latest()
        if latest is not None and not resume:
            opened.close()
            raise ValueError(
                f"checkpoints must be in a directory without those of an earlier run, got {latest}: "
                "pass resume=True to go on with that run, or another directory."
            )

    def resume(self, tx: optax.GradientTransformation) -> bool:
        """Puts the run to where it was saved; whether a callback had ended it there."""
        if self._open is None or self._open.latest() is None:
            return False
        run, saved = self._run, self._open.restore(self._run.state)
        _check_same_key(saved.state, run.state, self._open.latest())
        run.go_on_from(resume_state(saved.state, tx))
        run.history = saved.history
        run.num_cache_hits = saved.num_cache_hits
        run.seconds = sum(record.seconds for record in saved.history)
        self._saved = len(saved.history)
        if self._source is not None:
            self._source.set_state(saved.position)
        return saved.is_ended

    def after_window(self, is_ended: bool) -> None:
        """Saves the run if it is time."""
        if is_ended or len(self._run.history) % self._every == 0:
            self._save(is_ended)

    def _save(self, is_ended: bool = False) -> None:
        run = self._run
        if self._open is None or len(run.history) <= max(self._saved, 0):
            return
        self._saved = len(run.history)
        self._open.save(
            Checkpoint(
                state=run.whole_state(),
                history=run.history,
                position=self._position(),
                is_ended=is_ended,
                num_cache_hits=run.num_cache_hits,
            )
        )

    def _position(self) -> Any:
        if self._source is None:
            return None
        if not (hasattr(self._source, "get_state") and hasattr(self._source, "set_state")):
            raise ValueError(
                "data.train must have get_state() and set_state(state) to be saved in checkpoints, "
                f"got a {type(self._source).__name__} without: use arbiter_jax.datasets.host_blocks."
            )
        return self._source.get_state()

    def latest(self) -> str | None:
        """Path of the newest complete checkpoint, or None."""
        return None if self._open is None else self._open.latest()

    def finish(self, interrupts: Interrupts) -> None:
        """The last checkpoint, and the end of the program if a signal has asked for it."""
        if self._open is None:
            return
        self._save()
        if interrupts.received is not None:
            latest = self._open.latest()
            print(
                f"arbiter_jax: {interrupts.received.name} after window {len(self._run.history)} "
                f"({self._run.seen} examples); "
                + (f"the last checkpoint is {latest}." if latest else "nothing was trained yet."),
                file=sys.stderr,
                flush=True,
            )
        interrupts.end()

    def close(self) -> None:
        """Waits until all is written."""
        if self._open is not None:
            self._open.close()
