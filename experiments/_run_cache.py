"""A file of finished runs, for experiments that take hours."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments import _runner


class RunCache:
    """A file of JSON lines, to which each run is appended when it ends.

    The files of several processes may be concatenated. A run is identified by its settings alone:
    delete the lines that were made by other code.
    """

    def __init__(self, path: str):
        """Reads the file if it exists. If `path` is empty, nothing is stored."""
        self._path, self._known = path, {}
        if path and Path(path).exists():
            for i, line in enumerate(Path(path).read_text().splitlines(), 1):
                try:
                    settings, run = json.loads(line)
                except ValueError:
                    raise _runner.UsageError(
                        f"--runs: line {i} of {path!r} must be a stored run, got {line[:40]!r}."
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
                with open(self._path, "a") as file:
                    file.write(line + "\n")
        return self._known[key]
