"""MNIST and Fashion-MNIST: 70,000 gray images of 28x28 pixels and ten classes each.

LeCun, Cortes and Burges, The MNIST database, http://yann.lecun.com/exdb/mnist/.
Xiao, Rasul and Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms, 2017, https://arxiv.org/abs/1708.07747.
"""

from __future__ import annotations

import os

from arbiter_jax.datasets import _idx, _sources
from arbiter_jax.datasets._dataset import Dataset, from_arrays
from arbiter_jax.datasets._errors import DatasetNotFoundError, not_found
from arbiter_jax.datasets._tfds import from_tfds


def _idx_files_or_tfds(
    name: str, data_dir: str | os.PathLike[str] | None, seed: int, download: bool, remedy: str
) -> Dataset:
    searched = _sources.folders(name, data_dir, create=download)
    for folder in searched:
        if _idx.has_idx(folder):
            train, test = _idx.read_idx_dataset(folder)
            return from_arrays(train, test=test, num_classes=10, seed=seed)
    try:
        return from_tfds(name, data_dir, seed=seed, download=download)
    except DatasetNotFoundError as error:
        if not searched:
            raise
        raise not_found(name, _idx.DESCRIPTION, searched, f"{remedy}With tfds: {error}") from error


def mnist(
    data_dir: str | os.PathLike[str] | None = None, *, seed: int = 0, download: bool = False
) -> Dataset:
    """MNIST: 28x28 gray images of handwritten digits, with the official test split.

    Args:
      data_dir: Folder that holds the four IDX files, a subfolder ``mnist`` with them, or data that
        tfds prepared. If None, the folder in the environment variable ``ARBITER_JAX_DATA``, then
        the default folder of tfds.
      seed: Seed of the validation split, an integer in [0, 2**32).
      download: Whether tfds may download and prepare missing data.

    Returns:
      A :class:`Dataset`: inputs float32 [n, 28, 28, 1], labels int32 [n] in [0, 10);
      48,000 training, 12,000 validation and 10,000 test examples.

    Raises:
      DatasetNotFoundError: If the data is missing; the message says how to get it.
      ValueError: If a file is damaged or the seed is out of range.

    Reference:
      LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/

    >>> from arbiter_jax import datasets
    >>> datasets.mnist(data_dir="/no/such/folder")
    Traceback (most recent call last):
    ...
    arbiter_jax.datasets._errors.DatasetNotFoundError: data set 'mnist' was not found: there is no
    folder /no/such/folder. Correct data_dir, or omit it to search the default folders.
    """
    return _idx_files_or_tfds("mnist", data_dir, seed, download, "")


def fashion_mnist(
    data_dir: str | os.PathLike[str] | None = None, *, seed: int = 0, download: bool = False
) -> Dataset:
    """Fashion-MNIST: 28x28 gray images of clothing, with the official test split.

    Args:
      data_dir: Folder that holds the four IDX files, a subfolder ``fashion_mnist`` with them, or
        data that tfds prepared. If None, the folder in the environment variable
        ``ARBITER_JAX_DATA``, then that of the Debian package ``dataset-fashion-mnist``, then the
        default folder of tfds.
      seed: Seed of the validation split, an integer in [0, 2**32).
      download: Whether tfds may download and prepare missing data.

    Returns:
      A :class:`Dataset`: inputs float32 [n, 28, 28, 1], labels int32 [n] in [0, 10);
      48,000 training, 12,000 validation and 10,000 test examples.

    Raises:
      DatasetNotFoundError: If the data is missing; the message says how to get it.
      ValueError: If a file is damaged or the seed is out of range.

    Reference:
      Xiao, Rasul and Vollgraf, 2017, https://arxiv.org/abs/1708.07747

    >>> from arbiter_jax import datasets
    >>> data = datasets.fashion_mnist()  # doctest: +SKIP
    >>> data.train[0].shape  # doctest: +SKIP
    (48000, 28, 28, 1)
    """
    remedy = "On Debian and Ubuntu: apt-get install dataset-fashion-mnist. "
    return _idx_files_or_tfds("fashion_mnist", data_dir, seed, download, remedy)
