"""Data sets by name, for a command line."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable
from typing import Any

from arbiter_jax.datasets._dataset import Dataset
from arbiter_jax.datasets._diabetes import diabetes
from arbiter_jax.datasets._digits import digits
from arbiter_jax.datasets._errors import DatasetNotFoundError
from arbiter_jax.datasets._mnist import fashion_mnist, mnist
from arbiter_jax.datasets._mnist10k import mnist10k
from arbiter_jax.datasets._npz import from_npz
from arbiter_jax.datasets._synthetic import synthetic
from arbiter_jax.datasets._text import text
from arbiter_jax.datasets._tfds import from_tfds, is_tfds_name

_LOADERS: dict[str, Callable[..., Dataset]] = {
    "diabetes": diabetes,
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "mnist": mnist,
    "mnist10k": mnist10k,
    "synthetic": synthetic,
    "text": text,
}


def load(
    name: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    download: bool = False,
    **options: Any,
) -> Dataset:
    """Loads a data set by name or from a file.

    If ``data_dir`` is passed, only that folder is searched. Otherwise these are, in this order: the
    folder in the environment variable ``ARBITER_JAX_DATA``, the folder of the system package, the
    folder of tfds.

    Args:
      name: ``digits``, ``diabetes`` (a regression), ``synthetic`` or ``text``, which need no files;
        ``fashion_mnist``, ``mnist`` or ``mnist10k``; any other data set of tfds, such as
        ``cifar10``; or a path that ends in ``.npz``.
      data_dir: Folder to search; see the function called ``name``. Ignored by data sets that need
        no files.
      seed: Seed of the validation split, an integer in [0, 2**32).
      download: Whether tfds may download missing data. Ignored by other data sets.
      **options: Further arguments of the function called ``name``, or of :func:`from_npz`.

    Returns:
      A :class:`Dataset`.

    Raises:
      DatasetNotFoundError: If there is no such data set or its files are missing. The message is
        one line: what is missing, where we looked, and how to get it.
      ValueError: If the name is not a string, the data is damaged, or an option is out of range.

    >>> from arbiter_jax import datasets
    >>> datasets.load("digits", seed=1).input_shape
    (8, 8, 1)
    """
    if isinstance(name, os.PathLike):
        name = str(os.fspath(name))
    if not isinstance(name, str):
        raise ValueError(f"name must be a string, {_names()}, got {name!r}.")
    if name.endswith(".npz"):
        return from_npz(name, seed=seed, **options)
    if name in _LOADERS:
        loader = _LOADERS[name]
        parameters = inspect.signature(loader).parameters
        places = {"data_dir": data_dir, "download": download}
        return loader(seed=seed, **{k: v for k, v in places.items() if k in parameters}, **options)
    close = difflib.get_close_matches(name, _LOADERS, n=1, cutoff=0.75)
    question = f" Did you mean {close[0]!r}?" if close else ""
    if is_tfds_name(name):
        try:
            return from_tfds(name, data_dir, seed=seed, download=download, **options)
        except DatasetNotFoundError as error:
            raise DatasetNotFoundError(f"{error}{question}") from error
    raise DatasetNotFoundError(
        f"data set {name!r} was not found: name must be {_names()}.{question}"
    )


def _names() -> str:
    return (
        f"one of {', '.join(_LOADERS)}, a data set of tfds such as cifar10, or the path of an .npz "
        "file"
    )
