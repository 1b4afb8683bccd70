"""A data set is arrays: three splits of inputs and labels, checked and normalized once.

Every loader in this package ends here: it reads raw arrays, and :func:`from_arrays` checks them,
holds out the missing splits, and normalizes with the statistics of the training split.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from arbiter_jax import _validate

Split = tuple[np.ndarray, np.ndarray]

_ROWS_PER_CHUNK = 4096  # float64 scratch space of the statistics; bounds memory on large data


class Dataset(NamedTuple):
    """Inputs and labels of the training, validation and test split.

    The arrays are NumPy arrays in host memory; the training loop decides where to put them. The
    meta-objective uses only the validation split; the test split is for reporting.
    """

    # Inputs: shape=(n, *input_shape), dtype=float32, or int32 for tokens.
    # Labels: shape=(n,), dtype=int32; (n, length) for sequences; float32 for regression targets.
    train: Split
    validation: Split  # 20% of the official training set
    test: Split
    num_classes: int  # labels are in [0, num_classes); 0 for regression targets
    input_shape: tuple[int, ...]  # of one example


def permutation(num_examples: int, seed: int) -> np.ndarray:
    """A seeded permutation of range(num_examples), the same in every version of NumPy."""
    # NumPy guarantees the stream of RandomState; that of default_rng may change between releases.
    seed = _validate.integer(seed=seed, minimum=0, maximum=2**32 - 1)
    return np.random.RandomState(seed).permutation(num_examples)


def hold_out(
    inputs: np.ndarray, labels: np.ndarray, fraction: float, seed: int, purpose: str
) -> tuple[Split, Split]:
    """Splits off a seeded random fraction of the examples, rounded, at least one.

    Args:
      inputs: [n, ...].
      labels: [n, ...].
      fraction: Fraction of the examples to hold out, in (0, 1).
      seed: Seed of the permutation.
      purpose: Name of the split to hold out, for the error message.

    Returns:
      (rest, held out), each (inputs, labels).

    Raises:
      ValueError: If there are fewer than two examples.
    """
    count = len(inputs)
    if count < 2:
        raise ValueError(
            f"train must have >= 2 examples to hold out a {purpose} split, got {count}; "
            f"pass {purpose}=(inputs, labels) instead."
        )
    size = min(max(1, round(fraction * count)), count - 1)
    order = permutation(count, seed)
    held, rest = order[:size], order[size:]
    return (inputs[rest], labels[rest]), (inputs[held], labels[held])


def every_fifth_of_each_class(labels: np.ndarray) -> np.ndarray:
    """bool[n]: a fixed, stratified fifth, for data that is published without a test split."""
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        held[np.flatnonzero(labels == label)[::5]] = True
    return held


def _checked_split(split: Any, name: str) -> Split:
    """The pair (inputs, labels) as numeric arrays with the same number of rows, at least one."""
    if not isinstance(split, Sequence) or len(split) != 2:
        raise ValueError(f"{name} must be a pair (inputs, labels), got {type(split).__name__}.")
    inputs, labels = (
        _array(values, f"{name} {part}")
        for part, values in zip(("inputs", "labels"), split, strict=True)
    )
    for part, array in (("inputs", inputs), ("labels", labels)):
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{name} {part} must be real numbers, got dtype {array.dtype}.")
        if array.ndim == 0:
            raise ValueError(f"{name} {part} must have a leading axis of examples, got shape ().")
    if len(inputs) != len(labels):
        raise ValueError(
            f"{name} inputs and labels must have the same number of rows, got {len(inputs)} and "
            f"{len(labels)}."
        )
    if inputs.size == 0 or labels.size == 0:
        raise ValueError(
            f"{name} must not be empty, got inputs of shape {inputs.shape} and labels of shape "
            f"{labels.shape}."
        )
    _check_finite(inputs, f"{name} inputs")
    _check_finite(labels, f"{name} labels")
    return inputs, labels


def _array(values: Any, name: str) -> np.ndarray:
    if np.ma.is_masked(values):
        raise ValueError(f"{name} must have no masked entries, got {np.ma.count_masked(values)}.")
    try:
        return np.asarray(values)
    except (
        ValueError,
        TypeError,
    ) as error:  # nested lists of different lengths, or stranger things
        raise ValueError(
            f"{name} must be an array, or nested lists of equal lengths, got {type(values).__name__}."
        ) from error


def _check_finite(array: np.ndarray, name: str) -> None:
    if array.dtype.kind != "f":
        return
    for start in range(0, len(array), _ROWS_PER_CHUNK):
        chunk = array[start : start + _ROWS_PER_CHUNK]
        # The network computes in float32, where anything larger overflows to infinity.
        finite = np.abs(chunk) <= np.finfo(np.float32).max
        if not finite.all():
            where = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise ValueError(
                f"{name} must be finite in float32, got {chunk[where]} at index "
                f"{(start + where[0], *where[1:])}."
            )


def _statistics(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over all axes but the last (all axes of [n]), in float64."""
    axes = tuple(range(max(1, inputs.ndim - 1)))
    count = inputs.size if inputs.ndim == 1 else inputs.size // inputs.shape[-1]
    chunks = [inputs[i : i + _ROWS_PER_CHUNK] for i in range(0, len(inputs), _ROWS_PER_CHUNK)]
    mean = np.sum([c.sum(axis=axes, dtype=np.float64) for c in chunks], axis=0) / count
    squares = [np.square(c - mean).sum(axis=axes) for c in chunks]
    std = np.sqrt(np.sum(squares, axis=0) / count)
    # The deviation of a constant feature is only rounding error: dividing by it would amplify that.
    return mean, np.where(std > 1e-12 * np.maximum(1.0, np.abs(mean)), std, 1.0)


def _normalized(mean: np.ndarray, std: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    output = np.empty(inputs.shape, np.float32)
    for start in range(0, len(inputs), _ROWS_PER_CHUNK):
        rows = slice(start, start + _ROWS_PER_CHUNK)
        output[rows] = (inputs[rows] - mean) / std
    return output


def _check_tokens(splits: dict[str, Split]) -> None:
    limits = np.iinfo(np.int32)
    for name, (inputs, _) in splits.items():
        for value in (int(inputs.min()), int(inputs.max())):
            if not limits.min <= value <= limits.max:
                raise ValueError(
                    f"{name} inputs must be in [{limits.min}, {limits.max}], got {value}."
                )


def _check_agreement(splits: dict[str, Split]) -> None:
    train_inputs, train_labels = splits["train"]
    for name, (inputs, labels) in splits.items():
        for part, array, reference in (
            ("inputs", inputs, train_inputs),
            ("labels", labels, train_labels),
        ):
            if array.shape[1:] != reference.shape[1:]:
                raise ValueError(
                    f"{name} {part} must have the same shape as the training {part}, "
                    f"(n, {', '.join(map(str, reference.shape[1:]))}), got {array.shape}."
                )
        if (labels.dtype.kind == "f") != (train_labels.dtype.kind == "f"):
            raise ValueError(
                f"{name} labels must be classes (integers) or regression targets (floats) like the "
                f"training labels, {train_labels.dtype}, got {labels.dtype}."
            )


def _count_classes(splits: dict[str, Split], num_classes: int | None) -> int:
    """The number of classes, passed or inferred; 0 for regression targets."""
    if splits["train"][1].dtype.kind == "f":
        if num_classes:
            raise ValueError(
                f"num_classes must be None or 0 for regression targets, got {num_classes}; pass "
                "integer labels for classes."
            )
        return 0
    highest = max(int(labels.max()) for _, labels in splits.values())
    count = highest + 1 if num_classes is None else num_classes
    count = _validate.integer(num_classes=count, minimum=1, maximum=2**31 - 1)
    for name, (_, labels) in splits.items():
        for label in (int(labels.min()), int(labels.max())):
            if not 0 <= label < count:
                raise ValueError(f"{name} labels must be in [0, {count}), got {label}.")
    return count


def from_arrays(
    train: tuple[Any, Any],
    validation: tuple[Any, Any] | None = None,
    test: tuple[Any, Any] | None = None,
    *,
    num_classes: int | None = None,
    normalize: bool = True,
    normalize_targets: bool = False,
    validation_fraction: float = 0.2,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Dataset:
    r"""Makes a data set from your own arrays: checks, splits and normalizes them.

    .. math:: x' = (x - \mu) / \sigma

    The mean and the standard deviation are those of the training split, after the other splits have
    been held out, for each entry of the last axis: the channel of an image or the feature of a
    table. Constant entries have :math:`\sigma = 1`.

    Args:
      train: (inputs, labels). Inputs have shape [n, ...] and any real dtype; gray images need a
        channel axis, [n, height, width, 1]. Labels are integer classes of shape [n] (or
        [n, length] for sequences), or regression targets, which are floats.
      validation: (inputs, labels). If None, a random part of the training examples is held out.
      test: (inputs, labels). If None, held out likewise, before the validation split.
      num_classes: Labels are in [0, num_classes). If None, the highest label plus one.
      normalize: If False, integer inputs (tokens) become int32 and all others float32, unscaled.
      normalize_targets: Whether to normalize regression targets like the inputs.
      validation_fraction: Fraction of the training examples to hold out for validation, in (0, 1).
      test_fraction: Fraction of all examples to hold out for testing, in (0, 1).
      seed: Seed of the permutations that choose the held-out examples, an integer in [0, 2**32).

    Returns:
      A :class:`Dataset` of NumPy arrays.

    Raises:
      ValueError: If arrays are empty, not numeric, not finite in float32, or of shapes that do not
        match; if a label is outside [0, num_classes); or if there are too few examples to hold
        out a split (two for one split, three for both).

    *Guarantees*:
      * Every example is in exactly one of the three splits.
      * Validation and test data do not influence the statistics.
      * The arrays passed in are not modified.

    >>> import numpy as np
    >>> from arbiter_jax import datasets
    >>> data = datasets.from_arrays((np.arange(20.0).reshape(10, 2), np.arange(10) % 2))
    >>> [len(labels) for _, labels in (data.train, data.validation, data.test)]
    [6, 2, 2]
    >>> data.input_shape, data.num_classes
    ((2,), 2)
    """
    _validate.boolean(normalize=normalize)
    _validate.boolean(normalize_targets=normalize_targets)
    _validate.in_range(0, 1, closed="neither", validation_fraction=validation_fraction)
    _validate.in_range(0, 1, closed="neither", test_fraction=test_fraction)
    passed = {"train": train, "validation": validation, "test": test}
    splits = {k: _checked_split(v, k) for k, v in passed.items() if v is not None or k == "train"}
    _check_agreement(splits)
    if "test" not in splits:
        splits["train"], splits["test"] = hold_out(*splits["train"], test_fraction, seed, "test")
    if "validation" not in splits:
        splits["train"], splits["validation"] = hold_out(
            *splits["train"], validation_fraction, seed, "validation"
        )
    count = _count_classes(splits, num_classes)
    inputs = splits["train"][0]
    if normalize:
        convert = functools.partial(_normalized, *_statistics(inputs))
    elif all(x.dtype.kind in "iu" for x, _ in splits.values()):
        _check_tokens(splits)
        convert = functools.partial(np.asarray, dtype=np.int32)
    else:
        convert = functools.partial(np.asarray, dtype=np.float32)
    if normalize_targets and not count:
        convert_labels = functools.partial(_normalized, *_statistics(splits["train"][1]))
    else:
        convert_labels = functools.partial(np.asarray, dtype=np.int32 if count else np.float32)
    ready = {k: (convert(x), convert_labels(y)) for k, (x, y) in splits.items()}
    return Dataset(**ready, num_classes=count, input_shape=inputs.shape[1:])
