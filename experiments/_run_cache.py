"""A file of finished runs, for experiments that take hours."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from experiments import _runner

_MAX_SIZE = 2**30  # bytes; a run takes some thousand


class RunCache:
    """A file of JSON lines, to which each run is appended when it ends.

    The files of several processes may be concatenated. A run is identified by its settings alone:
    delete the lines that were made by other code.
    """

    def __init__(self, path: str):
        """Reads the file, or makes it if it does not exist. If `path` is empty, nothing is stored."""
        self._path, self._known = path, {}
        if path:
            try:
                self._read()
            except OSError as error:
                raise _runner.UsageError(
                    f"--runs must be a file that can be read and written, got {path!r}: "
                    f"{error.strerror}."
                ) from None

    def _read(self) -> None:
        # Opened for appending, so that a file that cannot be written to is noticed before training.
        with open(self._path, "a+b") as file:
            if os.fstat(file.fileno()).st_size > _MAX_SIZE:
                raise _runner.UsageError(
                    f"--runs must be a file of at most {_MAX_SIZE:,} bytes, got {self._path!r}."
                )
            file.seek(0)
            for i, line in enumerate(file, 1):
                try:
                    settings, run = json.loads(line)
                except (ValueError, TypeError, RecursionError):
                    start = line[:40].decode(errors="replace").rstrip("\n")
                    raise _runner.UsageError(
                        f"--runs: line {i} of {self._path!r} must be a stored run, got {start!r}."
                    ) from None
                self._known[json.dumps(settings)] = run

    def get_or_make(self, settings: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """Returns the stored run with these settings, or makes and stores it."""
        key = json.dumps(settings)
        if key not in self._known:
            self._known[key] = make()
            if self._path:
                line = json.dumps(
                    [settings, self._known[key]], default=lambda number: number.item()
                )
                self._append(line + "\n")
        return self._known[key]

    def _append(self, line: str) -> None:
        """Appends a line, all of it or nothing; a full disk does not end the experiment."""
        try:
            with open(self._path, "ab", buffering=0) as file:
                end = os.fstat(file.fileno()).st_size
                content = line.encode()
                if file.write(content) != len(content):
                    file.truncate(end)
                    raise OSError(None, "not enough space")
        except OSError as error:
            print(f"--runs: {self._path!r} misses a run: {error.strerror}.", file=sys.stderr)
