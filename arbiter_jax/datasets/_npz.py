"""A data set from your own ``.npz`` file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from arbiter_jax import _validate
from arbiter_jax.datasets import _archive, _limits
from arbiter_jax.datasets._dataset import Dataset, from_arrays
from arbiter_jax.datasets._errors import DatasetNotFoundError

# The accepted names (inputs, labels) of the arrays of each split.
_ARRAY_NAMES = {
    "train": (("train_inputs", "train_labels"), ("inputs", "labels"), ("x_train", "y_train")),
    "validation": (("validation_inputs", "validation_labels"), ("x_val", "y_val")),
    "test": (("test_inputs", "test_labels"), ("x_test", "y_test")),
}


def _find_names(available: list[str]) -> dict[str, tuple[str, str]]:
    """The array names of each split that is in the file."""
    found = {}
    for split, candidates in _ARRAY_NAMES.items():
        for pair in candidates:
            missing = [name for name in pair if name not in available]
            if len(missing) == 1:
                raise ValueError(f"array {missing[0]!r} of {'/'.join(pair)} is missing")
            if not missing:
                found[split] = pair
                break
    if "train" not in found:
        expected = " or ".join("/".join(pair) for pair in _ARRAY_NAMES["train"])
        raise ValueError(
            f"the training arrays {expected} are missing, found {sorted(available)[:20]}"
        )
    return found


def from_named_arrays(arrays: Mapping[str, np.ndarray], **options: Any) -> Dataset:
    """Makes a data set from named arrays, which may include `num_classes`."""
    names = _find_names(list(arrays))
    splits = {k: tuple(arrays[name] for name in pair) for k, pair in names.items()}
    if "num_classes" in arrays:
        count = _validate.integer(num_classes=arrays["num_classes"], minimum=0)
        options.setdefault("num_classes", count)
    return from_arrays(**splits, **options)


def from_npz(
    path: str | os.PathLike[str], *, max_bytes: int | None = None, **options: Any
) -> Dataset:
    """Loads a data set from a file written by ``numpy.savez``.

    The training arrays are called ``train_inputs`` and ``train_labels``, ``inputs`` and ``labels``,
    or, as in Keras, ``x_train`` and ``y_train``. The other splits are optional:
    ``validation_inputs``, ``validation_labels``, ``test_inputs`` and ``test_labels`` (or ``x_val``,
    ``y_val``, ``x_test`` and ``y_test``); missing ones are held out from the training data. An
    integer ``num_classes`` sets that option. Other arrays are ignored.

    The file need not be trusted: pickled objects are refused, and so are sizes that do not agree with
    the file or exceed ``max_bytes``, before anything of that size is read.

    Args:
      path: Path of the file.
      max_bytes: Largest memory for all arrays together, in bytes, with at least four per number, for
        they become float32. If None, 1 GiB, or 64 times the size of the file if that is more.
      **options: Options of :func:`from_arrays`.

    Returns:
      A :class:`Dataset`.

    Raises:
      DatasetNotFoundError: If there is no such file.
      ValueError: If the file cannot be read or is not an .npz file, lacks the training arrays, holds
        only the inputs or only the labels of a split, needs more memory than allowed, or holds data
        that :func:`from_arrays` refuses.

    *Guarantees*:
      * Nothing is unpickled.
      * No more memory is used than ``max_bytes`` and what :func:`from_arrays` makes of it.

    >>> import os, tempfile
    >>> import numpy as np
    >>> from arbiter_jax import datasets
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "mine.npz")
    ...     np.savez(path, inputs=np.eye(10), labels=np.arange(10) % 2)
    ...     data = datasets.from_npz(path)
    >>> data.train[0].shape
    (6, 10)
    """
    path = _limits.as_path(path, "path")
    if os.path.isdir(path):
        raise ValueError(f"{path!r} must be an .npz file, but is a folder.")
    if not os.path.isfile(path):
        raise DatasetNotFoundError(f"there is no file {path!r}; pass the path of an .npz file.")
    try:
        with open(path, "rb") as file:
            arrays = _archive.read_arrays(file, _wanted, max_bytes)
        return from_named_arrays(arrays, **options)
    except OSError as error:
        raise ValueError(f"{path!r} cannot be read: {_limits.reason(error)}.") from error
    except ValueError as error:
        raise ValueError(f"{path!r}: {str(error).rstrip('.')}.") from error


def _wanted(available: list[str]) -> list[str]:
    """The names of the arrays to read: those of the splits, and the number of classes."""
    pairs = _find_names(available).values()
    return [*itertools.chain(*pairs), *({"num_classes"} & set(available))]
