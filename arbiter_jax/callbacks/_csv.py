"""A row per window in a file of comma-separated values."""

from __future__ import annotations

import csv as _csv
import io
import os
from collections.abc import Iterable
from typing import Any, BinaryIO

import jax

from arbiter_jax.callbacks._scalars import FIELDS, check_one_run, scalars
from arbiter_jax.training import RunStart, TrainState, WindowRecord

_Row = dict[str, Any]


def csv(path: str | os.PathLike[str]) -> Csv:
    """Writes a row per window into a file of comma-separated values, while the run goes on.

    Columns, in this order; an empty cell is a number that the window does not have:

    =====================  ==================================================================
    `window_index`         of the call of ``fit``, from 0
    `num_examples`         training examples seen up to the end of the window
    `num_steps`            steps of the window
    `batch_size`           examples per step
    `bucket_size`          rows of the compiled program
    `loss`                 mean over the steps
    `seconds`              of the window, including compilation
    `examples_per_second`  num_steps * batch_size / seconds
    `num_compilations`     programs compiled for this window
    metrics, evaluations   mean over the steps of each metric that is one number per step, and what
                           callbacks before this one noted in ``record.evaluation``
    =====================  ==================================================================

    Every row is in the file before the next window begins: a run that is killed loses the window that
    was running. A run that continues another, from a checkpoint or from ``state=result.state``,
    continues the same file: rows of examples that it has not seen are removed, and no row is there
    twice. A run that starts from the beginning replaces the file of an earlier one.

    Args:
      path: The file, whose folder is made if it is not there. Of several processes, only process 0
        writes. Each run needs a file of its own.

    Returns:
      A callback for :func:`arbiter_jax.fit`. It refuses several seeds.

    Raises:
      ValueError: If `path` is not a path, cannot be written, or holds something else.

    *Guarantees*:
      * A resumed run has the rows of a whole one.
      * A row is in the file when its window ends.

    >>> import pathlib, tempfile
    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(6))
    >>> folder = tempfile.TemporaryDirectory()
    >>> rows = aj.callbacks.csv(folder.name + "/run.csv")
    >>> result = aj.fit(lambda w, batch: (w - batch) ** 2, jnp.zeros(()), tx, aj.Data(jnp.ones(50)),
    ...     num_examples=100, window=10, callbacks=rows)
    >>> for line in pathlib.Path(folder.name, "run.csv").read_text().splitlines():
    ...     print(line.split(",")[:4])
    ['window_index', 'num_examples', 'num_steps', 'batch_size']
    ['0', '60', '10', '6']
    ['1', '96', '6', '6']
    >>> folder.cleanup()
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"path must be the path of a file, got {path!r}.")
    # The file itself, because a link would be replaced.
    path = os.path.realpath(os.path.expanduser(os.fspath(path)))
    if os.path.exists(path) and not os.path.isfile(path):  # replaced as well, if it is a device
        raise ValueError(
            f"path must be a regular file, got {path}, which is a directory or a device."
        )
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        existed = os.path.exists(path)
        with open(path, "ab"):
            pass
        if not existed:
            os.remove(path)
    except OSError as error:
        raise ValueError(
            f"path must be a file that can be written, got {path}: {error.strerror or error}."
        ) from error
    _read(path)
    return Csv(path)


class Csv:
    """The callback of :func:`csv`."""

    def __init__(self, path: str):
        self.path = path
        self._file: BinaryIO | None = None
        self._columns: list[str] = []
        self._num_windows = 0  # of this run that are in the file
        self._last = 0  # where the last row begins
        self._last_row: _Row = {}

    def begin(self, start: RunStart) -> None:
        """Leaves the rows of what the run has seen, and opens the file."""
        check_one_run("csv", start)
        paths = [one.path for one in start.callbacks if isinstance(one, Csv)]
        if paths.count(self.path) > 1:
            raise ValueError(
                f"path must be another one for each callbacks.csv of a run, got {self.path} "
                f"{paths.count(self.path)} times."
            )
        if jax.process_index() > 0:
            return
        history = start.history
        before = start.num_examples - sum(r.num_steps * r.batch_size for r in history)
        rows = (
            [row for row in _read(self.path) if _seen(row, self.path) <= before] if before else []
        )
        self._num_windows = len(history)
        self._write([*rows, *map(scalars, history)])

    def __call__(self, record: WindowRecord, state: TrainState) -> None:
        """Writes the row of a window."""
        del state
        if self._file is None or record.window_index < self._num_windows:
            return
        self._num_windows = record.window_index + 1
        self._last = self._file.seek(0, os.SEEK_END)
        self._append(scalars(record))

    def end(self, record: WindowRecord, state: TrainState) -> None:
        """Writes the last row again, if it was evaluated after it had been written."""
        del state
        row = scalars(record)
        if self._file is None or row.keys() == self._last_row.keys():
            return
        self._file.truncate(self._last)
        self._append(row)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _append(self, row: _Row) -> None:
        assert self._file is not None
        if not set(row) <= set(self._columns):
            self._file.close()
            self._write([*_read(self.path), row])
            return
        self._last_row = row
        self._file.seek(self._last)
        self._file.write(_line(row.get(name, "") for name in self._columns))
        self._file.flush()

    def _write(self, rows: list[_Row]) -> None:
        """Replaces the whole file, at once, so that a killed process leaves the old or the new."""
        self._columns = list(dict.fromkeys([*FIELDS, *(name for row in rows for name in row)]))
        lines = [_line(row.get(name, "") for name in self._columns) for row in rows]
        new = self.path + ".new"
        with open(new, "wb") as file:
            file.write(b"".join([_line(self._columns), *lines]))
        os.replace(new, self.path)
        self._file = open(self.path, "r+b")  # noqa: SIM115
        self._last = self._file.seek(0, os.SEEK_END) - (len(lines[-1]) if lines else 0)
        self._last_row = rows[-1] if rows else {}


def _seen(row: _Row, path: str) -> int:
    """The examples of a row of an earlier run, or a ValueError if it is damaged."""
    try:
        return int(row["num_examples"])
    except (KeyError, ValueError):
        raise ValueError(
            f"path must be a file that callbacks.csv has written, got {path}, in which the row of "
            f"window_index {row.get('window_index', '(none)')} has no whole number as num_examples, "
            f"{row.get('num_examples', '')!r}: remove that row, or pass another path."
        ) from None


def _line(cells: Iterable[Any]) -> bytes:
    text = io.StringIO(newline="")
    _csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _read(path: str) -> list[_Row]:
    """The whole rows of a file of :func:`csv`, [] if there is none; empty cells are left out."""
    if not os.path.exists(path) or not os.path.getsize(path):
        return []
    with open(path, "rb") as file:
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]  # a killed process may leave half a row
    rows = list(_csv.reader(io.StringIO(whole.decode(errors="replace"), newline="")))
    if not rows or rows[0][: len(FIELDS)] != list(FIELDS):
        raise ValueError(
            f"path must be a new file or one that callbacks.csv has written, got {path}, which holds "
            "something else: pass another path."
        )
    return [
        {name: cell for name, cell in zip(rows[0], row, strict=True) if cell != ""}
        for row in rows[1:]
        if len(row) == len(rows[0])
    ]
