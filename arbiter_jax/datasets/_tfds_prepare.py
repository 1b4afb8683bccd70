"""Preparing a data set with tfds where that is possible, and saying why where it is not."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import os
import pathlib
import re
from typing import Any

from arbiter_jax.datasets._errors import DatasetNotFoundError
from arbiter_jax.datasets._reachability import unreachable_host

_INSTALL = 'pip install "arbiter-jax[data]"'
_INSTALL_TENSORFLOW = 'pip install "arbiter-jax[tensorflow]"'


def command(name: str, root: pathlib.Path | str) -> str:
    """The shell command that prepares a data set below `root`."""
    return f"tfds build {name} --file_format=array_record --data_dir={root}"


def _installed() -> bool:
    return all(map(importlib.util.find_spec, ("tensorflow_datasets", "importlib_resources")))


def _suggestion(name: str) -> str | None:
    """What to say of a name that tfds does not know; None where it knows it."""
    import tensorflow_datasets as tfds

    # The communities' data sets are left out: listing those opens a connection.
    known = tfds.list_builders(with_community_datasets=False)
    if name in known:
        return None
    close = difflib.get_close_matches(name, known, n=3)
    return "no such set is known" + (f"; did you mean {' or '.join(close)}?" if close else ".")


def remedy(name: str, set_name: str, root: pathlib.Path) -> str:
    """What provides a data set that is not prepared, in one line."""
    if not _installed():
        return f"To get it from tfds: {_INSTALL}, then load({name!r}, download=True)."
    unknown = _suggestion(set_name)
    if unknown is not None:
        return f"In tfds {unknown}"
    return f"With internet: load({name!r}, download=True), or {command(name, root)}"


def _reason(error: Exception) -> str:
    """Why tfds failed, and what helps, from the errors it is known to fail with."""
    if isinstance(error, ImportError):
        # tfds decodes the originals of many sets, MNIST's among them, with TensorFlow. It wraps the
        # error in one of the same type that has lost its name and kept its message.
        named = re.search(r"No module named '(\w+)", str(error))
        missing = error.name or (named[1] if named else "another package")
        extra = _INSTALL_TENSORFLOW if missing.startswith("tensorflow") else _INSTALL
        return f"preparing it needs {missing}: {extra}."
    if type(error).__name__ == "ExtractError":
        return f"extracting what was downloaded needs TensorFlow: {_INSTALL_TENSORFLOW}."
    first_line = next(iter(str(error).splitlines()), "")
    return f"tfds failed with {type(error).__name__}: {first_line}"


def prepare(name: str, root: pathlib.Path, *, builder: Any = None) -> pathlib.Path:
    """Downloads, where there is something to download, and prepares a data set.

    Args:
      name: As tfds has it.
      root: The folder to prepare it in, which is made if it is missing.
      builder: A builder class whose data needs no network, in place of tfds' own of that name.

    Returns:
      The folder of the version that was prepared.

    Raises:
      DatasetNotFoundError: If it cannot be prepared; the message says why and what helps.
    """

    def failed(reason: str) -> DatasetNotFoundError:
        return DatasetNotFoundError(f"data set {name!r} cannot be prepared in {root}: {reason}")

    if not _installed():
        raise failed(f"tensorflow-datasets is not installed: {_INSTALL}.")
    import tensorflow_datasets as tfds

    options: dict[str, Any] = {"data_dir": os.fspath(root), "file_format": "array_record"}
    with contextlib.ExitStack() as stack:
        if builder is not None:  # 0.6 seconds of work; the progress of a download is worth showing
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            instance = tfds.builder(name, **options) if builder is None else builder(**options)
            host = unreachable_host(instance.url_infos or ())
            if host is not None:
                elsewhere = command(name, "DIR")
                raise failed(f"{host} does not answer. Where there is internet: {elsewhere}")
            instance.download_and_prepare()
        except DatasetNotFoundError:
            raise
        # tfds raises whatever its own dependencies do, up to AssertionError for a wrong version.
        except Exception as error:
            raise failed(_reason(error)) from error
    return pathlib.Path(instance.data_dir)
