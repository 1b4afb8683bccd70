"""Image classification sets from TensorFlow Datasets, by name and without TensorFlow.

Data prepared in the format array_record is read without TensorFlow, decoded once and cached.
Nothing is downloaded by default.

TensorFlow Datasets, A Collection of Ready-to-Use Datasets, https://www.tensorflow.org/datasets.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from arbiter_jax.datasets import _cache, _limits, _sources, _tfds_prepare
from arbiter_jax.datasets._dataset import Dataset
from arbiter_jax.datasets._errors import not_found
from arbiter_jax.datasets._npz import from_named_arrays

_INFO_FILE = "dataset_info.json"
_NAME = re.compile(r"(?P<set>[a-z]\w*)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?")


class _Name(NamedTuple):
    """A data set's name in the notation of tfds, set[/config][:version]."""

    set: str
    config: str | None
    version: str | None


def is_tfds_name(name: str) -> bool:
    """Whether the name has the form that tfds uses: set[/config][:version]."""
    return _NAME.fullmatch(name) is not None


def _parse(name: str) -> _Name:
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise ValueError(f"name must have the form set[/config][:version], got {name!r}.")
    return _Name(**match.groupdict())


def _default_root() -> pathlib.Path:
    """The folder in which tfds keeps its data by default."""
    root = os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
    return pathlib.Path(root).expanduser()


def _versions(folder: pathlib.Path, version: str | None) -> list[pathlib.Path]:
    """The folders of all prepared versions, oldest first."""
    if not folder.is_dir():
        return []
    found = [
        child
        for child in folder.iterdir()
        if re.fullmatch(r"\d+\.\d+\.\d+", child.name)
        and (version is None or child.name == version)
        and (child / _INFO_FILE).is_file()
    ]
    return sorted(found, key=lambda path: tuple(map(int, path.name.split("."))))


def find_prepared(root: pathlib.Path, name: str) -> pathlib.Path | None:
    """The folder in `root` with the newest prepared version of a data set, or None.

    Raises:
      ValueError: If several configurations are prepared and the name does not choose one.
    """
    parsed = _parse(name)
    folder = root / parsed.set
    if parsed.config is not None:
        found = _versions(folder / parsed.config, parsed.version)
        return found[-1] if found else None
    found = _versions(folder, parsed.version)
    if found or not folder.is_dir():
        return found[-1] if found else None
    configs = {c.name: _versions(c, parsed.version) for c in sorted(folder.iterdir()) if c.is_dir()}
    configs = {config: versions for config, versions in configs.items() if versions}
    if len(configs) > 1:
        options = ", ".join(f"{parsed.set}/{config}" for config in configs)
        raise ValueError(f"name must be one configuration of the set, {options}, got {name!r}.")
    return next(iter(configs.values()))[-1] if configs else None


def _decode(
    source: Any, size: int, keys: tuple[str, str], split: str, allowed: int, remedy: str
) -> tuple[Any, Any]:
    """Decodes all examples of a split, of which there should be `size`, into (inputs, labels).

    The size is what a file promises: it is used only if so many examples of the size of the first
    one do not need more than `allowed` bytes.
    """
    columns, count = None, 0
    for row, example in enumerate(source):
        values = [np.asarray(example[key]) for key in keys]
        if columns is None:
            needed = size * sum(_limits.memory_of(v.size, v.dtype.itemsize) for v in values)
            _limits.check(needed, allowed, f"the split {split} of {size} examples", remedy)
            columns = [np.empty((size, *value.shape), value.dtype) for value in values]
        for key, column, value in zip(keys, columns, values, strict=True):
            if value.shape != column.shape[1:]:
                raise ValueError(
                    f"{split} {key} must all have the same shape, got {column.shape[1:]} and "
                    f"{value.shape}."
                )
            if row < size:
                column[row] = value
        count += 1
    if columns is None:
        raise ValueError(f"{split} must not be empty.")
    if count != size:
        raise ValueError(f"{split} must have the {size} examples that tfds counted, got {count}.")
    return columns[0], columns[1]


def _read(folder: pathlib.Path, name: str, max_bytes: int | None) -> _cache.Arrays:
    """Reads the arrays of all splits of a prepared data set."""
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder_from_directory(folder, file_format="array_record")
    except ValueError as error:
        raise ValueError(
            f"{str(folder)!r} must be prepared as array_record, which can be read without "
            f"TensorFlow; prepare it in another folder: {_tfds_prepare.command(name, 'DIR')}"
        ) from error
    keys, features = builder.info.supervised_keys, dict(builder.info.features or {})
    if keys is None or len(keys) != 2 or not all(key in features for key in keys):
        raise ValueError(
            f"name must be a data set of inputs and labels, got {name!r} with keys {keys}."
        )
    sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
    if "train" not in sizes:
        raise ValueError(
            f"name must be a data set with a training split, got {name!r} with {[*sizes]}."
        )
    # Without a test split, use the validation split for testing and hold out a new one.
    chosen = {"train": "train", "test": "test"}
    if "validation" in sizes:
        chosen["validation" if "test" in sizes else "test"] = "validation"
    allowed = _limits.max_bytes_of(sum(f.stat().st_size for f in folder.iterdir()), max_bytes)
    remedy = f"from_tfds({name!r}, max_bytes=...) reads it."
    arrays = {}
    for role, split in chosen.items():
        if split in sizes:
            source = builder.as_data_source(split=split)
            inputs, labels = _decode(source, sizes[split], keys, split, allowed, remedy)
            arrays |= {f"{role}_inputs": inputs, f"{role}_labels": labels}
    num_classes = getattr(features[keys[1]], "num_classes", None)
    if num_classes is not None:
        arrays["num_classes"] = np.asarray(num_classes)
    return arrays


def from_tfds(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    download: bool = False,
    max_bytes: int | None = None,
) -> Dataset:
    """Loads images (or other arrays of equal shape) and labels from TensorFlow Datasets.

    Data that was prepared in the format array_record is read without TensorFlow; preparing it often
    needs TensorFlow. The splits are those of tfds. If there is no validation split, a seeded
    permutation holds out 20% of the training split. If there is no test split, the validation split
    is used for testing. Decoded arrays are kept in the user's cache directory.

    Args:
      name: ``set``, ``set/config``, ``set:1.2.3`` or ``set/config:1.2.3``, the notation of tfds.
      data_dir: Folder in which tfds prepared the data, the ``data_dir`` of tfds. If None, the
        folders in the environment variables ``ARBITER_JAX_DATA`` and ``TFDS_DATA_DIR``; the latter
        defaults to ``~/tensorflow_datasets``.
      seed: Seed of the validation split, an integer in [0, 2**32).
      download: Whether to download and prepare missing data.
      max_bytes: Largest memory for the arrays of a split, in bytes, with at least four per number. If
        None, 1 GiB, or 64 times the size of the files if that is more.

    Returns:
      A :class:`Dataset`: inputs float32, labels int32, or float32 for regression targets.

    Raises:
      ImportError: If tensorflow-datasets is not installed.
      DatasetNotFoundError: If the data is missing, and downloading is off or fails.
      ValueError: If the name is malformed, the files cannot be read, or the data is not pairs of
        inputs and labels or needs more memory than allowed.

    Reference:
      https://www.tensorflow.org/datasets

    *Guarantees*:
      * Without ``download=True`` no connection is opened.
      * With ``download=True``, hosts that do not answer within 1.5 seconds raise an error.

    >>> from arbiter_jax import datasets
    >>> datasets.from_tfds("cifar10").input_shape  # doctest: +SKIP
    (32, 32, 3)
    >>> datasets.from_tfds("cifar10", data_dir="/no/such/folder")
    Traceback (most recent call last):
    ...
    arbiter_jax.datasets._errors.DatasetNotFoundError: data set 'cifar10' was not found: there is no
    folder /no/such/folder. Correct data_dir, or omit it to search the default folders.
    """
    parsed = _parse(name)
    roots = _sources.root_folders(name, data_dir, create=download)
    if data_dir is None:
        roots.append(_default_root())
    prepared = next(filter(None, (find_prepared(root, name) for root in roots)), None)
    if prepared is None and download:
        prepared = _tfds_prepare.prepare(name, roots[0])
    elif prepared is None:
        raise not_found(
            name,
            f"{name.partition(':')[0]}/<version>/{_INFO_FILE}",
            [str(root) for root in roots],
            _tfds_prepare.remedy(name, parsed.set, roots[0]),
        )
    try:
        arrays = _cache.cached(
            name, prepared / _INFO_FILE, lambda: _read(prepared, name, max_bytes)
        )
    except OSError as error:
        raise ValueError(f"{str(prepared)!r} cannot be read: {_limits.reason(error)}.") from error
    except ImportError as error:  # tfds itself, or Pillow, which decodes images
        raise ImportError(
            f"reading {name} from {prepared} needs {error.name or 'more packages'}: "
            f"{_tfds_prepare.INSTALL}."
        ) from error
    return from_named_arrays(arrays, seed=seed)
