"""The numbers of every window for a function of the user's, or for TensorBoard."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable
from typing import Any

import jax

from arbiter_jax import _validate
from arbiter_jax.callbacks._scalars import check_one_run, scalars
from arbiter_jax.training import RunStart, TrainState, WindowRecord

_Write = Callable[[dict[str, float], int], Any]
_Close = Callable[[], Any]


def log(function: Callable[..., Any]) -> Log:
    """Calls a function with the numbers of every window, e.g. ``wandb.log``.

    It is called as ``function(numbers, step=num_examples)`` if it has an argument `step`, otherwise as
    ``function(numbers)``. `numbers` is a flat dict of floats:

    - "loss", "batch_size", "bucket_size", "num_steps", "num_examples", "seconds", "num_compilations",
      "window_index": the fields of the :class:`arbiter_jax.WindowRecord`;
    - "examples_per_second": num_steps * batch_size / seconds, including compilation;
    - each metric that is one number per step, e.g. "shadow/cabs", as its mean over the window;
    - what the callbacks before this one have noted, such as "evaluation/loss".

    If the last window is evaluated when the run has ended, the function is called once more with the
    same step and the new numbers alone. What the function returns is ignored. A run resumed from a
    checkpoint calls it for new windows only, but windows after that checkpoint may come twice.

    Args:
      function: The function; ``mlflow.log_metrics`` and the `log_metrics` of most loggers will do.
        Of several processes, only process 0 calls it.

    Returns:
      A callback for :func:`arbiter_jax.fit`. It refuses several seeds.

    Raises:
      ValueError: If `function` is not a function.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(6))
    >>> show = aj.callbacks.log(lambda numbers, step: print(step, numbers["batch_size"]))
    >>> result = aj.fit(lambda w, batch: (w - batch) ** 2, jnp.zeros(()), tx, aj.Data(jnp.ones(50)),
    ...     num_examples=100, window=10, callbacks=show)
    60 6.0
    96 6.0
    """
    if not callable(function):
        hint = ": pass its method, e.g. wandb.log" if hasattr(function, "log") else ""
        raise ValueError(
            f"function must be a function of a dict of numbers, got {_validate.shown(function)}{hint}."
        )
    takes_step = _takes_step(function)
    write = lambda numbers, step: function(numbers, **({"step": step} if takes_step else {}))
    return Log("log", lambda start: (write, lambda: None))


def _takes_step(function: Callable[..., Any]) -> bool:
    try:
        parameter = inspect.signature(function).parameters.get("step")
    except (TypeError, ValueError):  # some built-in functions have none
        return False
    return parameter is not None and parameter.kind in (
        parameter.POSITIONAL_OR_KEYWORD,
        parameter.KEYWORD_ONLY,
    )


def tensorboard(directory: str | os.PathLike[str]) -> Log:
    """Writes the numbers of every window as scalars for TensorBoard, over the examples seen.

    The scalars are those of :func:`log`. Events of a run that goes on in the same directory, from a
    checkpoint or from ``state=result.state``, continue where it goes on: TensorBoard hides those that
    the stopped run had written after that point.

    Needs tensorboardX, which is in the extra "logging", not TensorFlow.

    Args:
      directory: Where the event files go; it is made if it is not there. Of several processes, only
        process 0 writes.

    Returns:
      A callback for :func:`arbiter_jax.fit`. It refuses several seeds.

    Raises:
      ImportError: If tensorboardX is not installed.
      ValueError: If `directory` is not a path, or cannot be written into.

    >>> import os, tempfile
    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(6))
    >>> folder = tempfile.TemporaryDirectory()
    >>> board = aj.callbacks.tensorboard(folder.name)
    >>> result = aj.fit(lambda w, batch: (w - batch) ** 2, jnp.zeros(()), tx, aj.Data(jnp.ones(50)),
    ...     num_examples=100, window=10, callbacks=board)
    >>> [name.split(".")[2] for name in os.listdir(folder.name)]
    ['tfevents']
    >>> folder.cleanup()
    """
    if not isinstance(directory, str | os.PathLike) or not os.fspath(directory):
        raise ValueError(f"directory must be a path, got {directory!r}.")
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            'callbacks.tensorboard needs tensorboardX: pip install "arbiter-jax[logging]".'
        ) from error
    path = os.fspath(directory)
    if "://" not in path:
        path = os.path.abspath(os.path.expanduser(path))
        try:
            os.makedirs(path, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"directory must be one that can be written into, got {path}: "
                f"{error.strerror or error}."
            ) from error
        if not os.access(path, os.W_OK):
            raise ValueError(f"directory must be one that can be written into, got {path}.")

    def opened(start: RunStart) -> tuple[_Write, _Close]:
        writer = SummaryWriter(
            path,
            # Events of later steps are those of a run that was stopped after it had written them.
            purge_step=start.num_examples + 1,
            flush_secs=10,
            # The rest of the name has whole seconds: a second file would replace the first.
            filename_suffix=f".{time.time_ns()}",
        )

        def write(numbers: dict[str, float], step: int) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        return write, writer.close

    return Log("tensorboard", opened)


class Log:
    """The callback of :func:`log` and :func:`tensorboard`.

    Args:
      name: Of the function that made it, for messages.
      opened: ``opened(start) -> (write(numbers, step), close())``, called by process 0 at the start
        of each run.
    """

    def __init__(self, name: str, opened: Callable[[RunStart], tuple[_Write, _Close]]):
        self._name, self._opened = name, opened
        self._open: tuple[_Write, _Close] | None = None
        self._num_windows = 0
        self._written: set[str] = set()

    def begin(self, start: RunStart) -> None:
        """Opens what it writes to."""
        check_one_run(self._name, start)
        self._num_windows = len(start.history)
        self._written = set(scalars(start.history[-1])) if start.history else set()
        if jax.process_index() == 0:
            self._open = self._opened(start)

    def __call__(self, record: WindowRecord, state: TrainState) -> None:
        """Writes the numbers of a window."""
        del state
        if record.window_index >= self._num_windows:
            self._num_windows = record.window_index + 1
            self._written = set()
            self._write(record)

    def end(self, record: WindowRecord, state: TrainState) -> None:
        """Writes what the last window was given after it had been written."""
        del state
        self._write(record)

    def close(self) -> None:
        """Closes what it writes to."""
        opened, self._open = self._open, None
        if opened is not None:
            opened[1]()

    def _write(self, record: WindowRecord) -> None:
        found = scalars(record)
        new = {name: float(x) for name, x in found.items() if name not in self._written}
        self._written |= set(new)
        if new and self._open is not None:
            self._open[0](new, record.num_examples)
