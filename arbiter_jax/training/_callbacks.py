"""What is called while a run goes on: once at its start, after every window, and at its end."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arbiter_jax import _validate
from arbiter_jax.training._check_functions import check_callback
from arbiter_jax.training._records import WindowRecord
from arbiter_jax.training._state import TrainState

Callback = Callable[[Any, TrainState], Any]
"""Called with the :class:`WindowRecord` after every window; a true result ends the run. Of several
seeds it gets a list of records, None for a seed that took no step, and the states of all of them.
What it sets in the state changes nothing. The state's arrays are donated to the next window: copy
what you want to keep.

Numbers that it writes into the dict ``record.evaluation`` stay in the history and in checkpoints; the
callbacks after it see them.

An object may also have any of these methods: ``begin(start)`` with a :class:`RunStart`, before the
first window; ``end(record, state)`` with the last record, after the last window of a call that was
not interrupted; and ``close()``, which is always called, also after an exception."""


class RunStart(NamedTuple):
    """Where a run stands before its first window; what `begin` of a callback gets."""

    history: list[WindowRecord]  # windows before this call, of a run resumed from a checkpoint
    num_examples: int  # training examples seen so far; of several seeds, the sum
    end: int  # examples at which this call ends; of several seeds, the sum
    num_seeds: int | None  # None for one run, whose callbacks get one record
    callbacks: tuple[Callback, ...]  # all of the run, in order


def as_callbacks(callbacks: Any, progress: Any = False) -> tuple[Callback, ...]:
    """One callback or several as a tuple; raises a ValueError for anything else.

    Args:
      callbacks: What the user passed to `fit`.
      progress: Likewise.

    Returns:
      The callbacks, and after them the display of the progress if it is wanted.
    """
    if progress is not None:
        progress = bool(_validate.boolean(progress=progress))
    if callable(callbacks):
        callbacks = (callbacks,)
    callbacks = tuple(callbacks) if isinstance(callbacks, Iterable) else (callbacks,)
    for callback in callbacks:
        check_callback(callback)
    if progress is False:
        return callbacks
    # The one leaf that the loop knows, so that a run shows how far it is.
    from arbiter_jax.callbacks._progress import default_progress

    return (*callbacks, *default_progress(callbacks, required=progress is True))


class Callbacks:
    """The callbacks of one run, in order."""

    def __init__(self, callbacks: tuple[Callback, ...]):
        self._callbacks = callbacks
        self._stack = contextlib.ExitStack()

    def begin(
        self, history: list[Any], num_examples: int, end: int, num_seeds: int | None = None
    ) -> None:
        """Says where the run stands before its first window; see :class:`RunStart`."""
        start = RunStart(history, num_examples, end, num_seeds, self._callbacks)
        for callback in self._callbacks:
            close = _method(callback, "close")
            if close is not None:
                self._stack.callback(close)
            begin = _method(callback, "begin")
            if begin is not None:
                begin(start)

    def after_window(self, record: Any, state: TrainState) -> bool:
        """Calls all of them, each with containers of its own; whether one of them ends the run."""
        stops = []
        for callback in self._callbacks:
            stops.append(_is_true(callback(record, jax.tree.map(lambda x: x, state))))
            _check_evaluations(record)  # before the next one reads them
        return any(stops)

    def end(self, record: Any, state: TrainState) -> None:
        """Tells them that the last window of this call is over."""
        for callback in self._callbacks:
            end = _method(callback, "end")
            if end is not None:
                end(record, jax.tree.map(lambda x: x, state))
                _check_evaluations(record)

    def close(self) -> None:
        """Closes all of them, in reverse order."""
        self._stack.close()


def _method(callback: Any, name: str) -> Any:
    method = getattr(callback, name, None)
    return method if callable(method) else None


def _is_true(returned: Any) -> bool:
    try:
        return bool(returned)
    except ValueError:  # an array
        raise ValueError(
            "callbacks must return True to end the run, or None, got an array of shape "
            f"{np.shape(returned)}."
        ) from None


def _check_evaluations(record: Any) -> None:
    """Converts what the callbacks have noted to floats, or raises a ValueError."""
    for one in record if isinstance(record, list) else [record]:
        evaluation = {} if one is None else one.evaluation
        for name, value in evaluation.items():
            number = np.asarray(value) if isinstance(value, np.generic | jax.Array) else value
            is_number = isinstance(number, numbers.Real)
            if isinstance(number, np.ndarray):
                kinds = jnp.bool_, jnp.integer, jnp.floating
                is_number = not number.ndim and any(jnp.issubdtype(number.dtype, k) for k in kinds)
            if not isinstance(name, str) or not is_number:
                raise ValueError(
                    "record.evaluation must hold text -> one number, got "
                    f"{_validate.shown(name)}: {_validate.shown(value)} from a callback."
                )
            evaluation[name] = float(number)
