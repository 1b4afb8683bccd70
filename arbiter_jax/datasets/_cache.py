"""Decoded arrays in the user's cache directory, so that each data set is decoded only once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from arbiter_jax.datasets import _archive

Arrays = dict[str, np.ndarray]


def _cache_folder() -> pathlib.Path | None:
    """This library's folder in the user's cache directory; None if platformdirs is missing."""
    try:
        import platformdirs
    except ImportError:
        return None
    return pathlib.Path(platformdirs.user_cache_dir("arbiter_jax", appauthor=False))


def _cache_file(name: str, source: pathlib.Path) -> pathlib.Path | None:
    """The cache file of a data set; its name changes whenever the file `source` does."""
    folder = _cache_folder()
    if folder is None:
        return None
    stat = source.stat()
    identity = f"{source.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{digest}.npz"


def _save(path: pathlib.Path, arrays: dict[str, Any]) -> None:
    """Writes to a temporary file and renames it, so that readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".incomplete")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def cached(name: str, source: pathlib.Path, read: Callable[[], Arrays]) -> Arrays:
    """Returns `read()`, or its cached result from an earlier call.

    Args:
      name: Name of the data set.
      source: A file that changes whenever the data does.
      read: Reads and decodes the data.

    Returns:
      Arrays by name. If the cache is damaged or cannot be written, the data is simply read again.
    """
    path = _cache_file(name, source)
    if path is not None and path.is_file():
        with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
            return _archive.read_arrays(file)
    arrays = read()
    if path is not None:
        with contextlib.suppress(OSError):
            _save(path, arrays)
    return arrays
