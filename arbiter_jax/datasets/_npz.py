"""A data set from your own ``.npz`` file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from arbiter_jax import _validate
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
        raise ValueError(f"the training arrays {expected} are missing, found {sorted(available)}")
    return found


def from_named_arrays(arrays: Mapping[str, np.ndarray], **options: Any) -> Dataset:
    """Makes a data set from named arrays, which may include `num_classes`."""
    names = _find_names(list(arrays))
    splits = {k: tuple(arrays[name] for name in pair) for k, pair in names.items()}
    if "num_classes" in arrays:
        count = _validate.integer(num_classes=arrays["num_classes"], minimum=0)
        options.setdefault("num_classes", count)
    return from_arrays(**splits, **options)


def from_npz(path: str | os.PathLike[str], **options: Any) -> Dataset:
    """Loads a data set from a file written by ``numpy.savez``.

    The training arrays are called ``train_inputs`` and ``train_labels``, ``inputs`` and ``labels``,
    or, as in Keras, ``x_train`` and ``y_train``. The other splits are optional:
    ``validation_inputs``, ``validation_labels``, ``test_inputs`` and ``test_labels`` (or ``x_val``,
    ``y_val``, ``x_test`` and ``y_test``); missing ones are held out from the training data. An
    integer ``num_classes`` sets that option. Other arrays are ignored. Pickled objects are refused.

    Args:
      path: Path of the file.
      **options: Options of :func:`from_arrays`.

    Returns:
      A :class:`Dataset`.

    Raises:
      DatasetNotFoundError: If there is no such file.
      ValueError: If the file is not an .npz file, lacks the training arrays, holds only the inputs
        or only the labels of a split, or holds data that :func:`from_arrays` refuses.

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
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise DatasetNotFoundError(f"there is no file {path!r}; pass the path of an .npz file.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path!r} must be an .npz file, as written by numpy.savez.")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return from_named_arrays(archive, **options)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path!r}: {str(error).rstrip('.')}.") from error
