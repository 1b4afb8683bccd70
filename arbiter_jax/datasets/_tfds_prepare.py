"""Downloads and prepares a data set with tfds, and explains why if that fails."""

from __future__ import annotations

import difflib
import importlib.util
import os
import pathlib
import re

from arbiter_jax.datasets._errors import DatasetNotFoundError
from arbiter_jax.datasets._reachability import unreachable_host

INSTALL = 'pip install "arbiter-jax[tfds]"'
_INSTALL_TENSORFLOW = 'pip install "arbiter-jax[tensorflow]"'


def command(name: str, root: pathlib.Path | str) -> str:
    """The shell command that prepares a data set in `root`."""
    return f"tfds build {name} --file_format=array_record --data_dir={root}"


def _installed() -> bool:
    return all(map(importlib.util.find_spec, ("tensorflow_datasets", "importlib_resources")))


def _unknown(name: str) -> str | None:
    """A sentence that says so if tfds has no data set of this name, else None."""
    import tensorflow_datasets as tfds

    # Without the community data sets, because listing those opens a connection.
    known = tfds.list_builders(with_community_datasets=False)
    if name in known:
        return None
    close = difflib.get_close_matches(name, known, n=3)
    question = f"; did you mean {' or '.join(close)}?" if close else "."
    return f"tfds has no data set {name!r}{question}"


def remedy(name: str, set_name: str, root: pathlib.Path) -> str:
    """One line on how to get a data set that is not prepared."""
    if not _installed():
        return f"To get it from tfds: {INSTALL}, then load({name!r}, download=True)."
    return _unknown(set_name) or (
        f"With internet access: load({name!r}, download=True), or {command(name, root)}"
    )


def _reason(error: Exception) -> str:
    """Why tfds failed and what to do about it, for the errors that it is known to raise."""
    if isinstance(error, ImportError):
        # tfds decodes the source files of many sets, including MNIST, with TensorFlow. It re-raises
        # the ImportError with the same message, but without the attribute `name`.
        match = re.search(r"No module named '(\w+)", str(error))
        missing = error.name or (match[1] if match else "another package")
        install = _INSTALL_TENSORFLOW if missing.startswith("tensorflow") else INSTALL
        return f"preparing it needs {missing}: {install}."
    if type(error).__name__ == "ExtractError":
        return f"extracting the download needs TensorFlow: {_INSTALL_TENSORFLOW}."
    first_line = next(iter(str(error).splitlines()), "")
    return f"tfds failed with {type(error).__name__}: {first_line}"


def prepare(name: str, root: pathlib.Path) -> pathlib.Path:
    """Downloads a data set and prepares it as array_record.

    Args:
      name: Name of the data set in tfds.
      root: The folder to prepare it in; created if it is missing.

    Returns:
      The folder of the prepared version.

    Raises:
      DatasetNotFoundError: If this fails; the message says why and what to do.
    """

    def failed(reason: str) -> DatasetNotFoundError:
        return DatasetNotFoundError(f"data set {name!r} cannot be prepared in {root}: {reason}")

    if not _installed():
        raise failed(f"tensorflow-datasets is not installed: {INSTALL}.")
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=os.fspath(root), file_format="array_record")
        host = unreachable_host(builder.url_infos or ())
        if host is not None:
            raise failed(f"{host} does not answer. With internet access: {command(name, 'DIR')}")
        builder.download_and_prepare()
    except DatasetNotFoundError:
        raise
    # tfds raises whatever its dependencies do, including AssertionError for an unknown version.
    except Exception as error:
        raise failed(_reason(error)) from error
    return pathlib.Path(builder.data_dir)
