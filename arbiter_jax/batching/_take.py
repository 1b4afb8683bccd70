"""The first examples of a loader as arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from arbiter_jax import _validate
from arbiter_jax.base import PyTree
from arbiter_jax.batching._loaders import chunks_of

_MAX_BYTES = 2**30
_OBJECT_BYTES = 256  # what Python and NumPy need for an array besides its numbers


def take(
    source: Any,
    num_examples: int | None = None,
    *,
    batched: bool = True,
    max_bytes: int = _MAX_BYTES,
) -> PyTree:
    """Reads the first examples of a loader into arrays, e.g. the validation examples of a run.

    :func:`arbiter_jax.fit` does so with a loader in ``data.validation``, which must be finite.

    Args:
      source: As in :func:`host_blocks`. An iterator goes on after the last batch that was read;
        what is left of that batch is lost.
      num_examples: How many, an integer >= 1, or None for all.
      batched: Whether an item is a batch, or a single example.
      max_bytes: The most that may be read, an integer >= 1; by default 1 GiB.

    Returns:
      Pytree of NumPy arrays [num_examples, ...], in the order of the source.

    Raises:
      ValueError: If an argument is out of range, the source holds no or too few examples, or they
        need more than `max_bytes`.

    >>> import numpy as np
    >>> from arbiter_jax import datasets
    >>> endless = datasets.epochs((np.arange(6.0), np.arange(6)), chunk_size=4)
    >>> inputs, labels = datasets.take(endless, 6)
    >>> sorted(labels.tolist())
    [0, 1, 2, 3, 4, 5]
    """
    return read_examples(source, "source", num_examples, batched, max_bytes)


def read_examples(
    source: Any,
    name: str,
    num_examples: int | None = None,
    batched: bool = True,
    max_bytes: int = _MAX_BYTES,
) -> PyTree:
    """As :func:`take`; an error calls the source by `name`."""
    if num_examples is not None:
        num_examples = _validate.integer(num_examples=num_examples, minimum=1)
    max_bytes = _validate.integer(max_bytes=max_bytes, minimum=1)
    if num_examples is None and getattr(source, "is_endless", False):
        raise ValueError(
            f"{name} must have an end to be read into arrays, got an endless "
            f"{type(source).__name__}: read a number of them, datasets.take(source, num_examples)."
        )
    parts, count, num_bytes, objects = [], 0, 0, 0
    chunks = chunks_of(source, batched=batched)
    # The caller may go on with an iterator of their own; one that was made here lets go of its workers.
    is_own = isinstance(source, Iterator)
    with contextlib.nullcontext() if is_own else contextlib.closing(chunks):
        for chunk in chunks:
            if num_examples is not None:
                chunk = jax.tree.map(lambda x, n=num_examples - count: x[:n], chunk)
            leaves = jax.tree.leaves(chunk)
            count, num_bytes = count + len(leaves[0]), num_bytes + sum(x.nbytes for x in leaves)
            objects += _OBJECT_BYTES * len(leaves)
            if num_bytes > max_bytes or objects > max(max_bytes, _MAX_BYTES):
                raise ValueError(
                    f"{name} must hold at most {max_bytes} bytes to be read into arrays, got more "
                    f"in the first {count} examples: read fewer with "
                    "datasets.take(source, num_examples), or raise its max_bytes."
                )
            parts.append(chunk)
            if count == num_examples:
                break
    if not count or (num_examples is not None and count < num_examples):
        at_least = "1 example" if num_examples in (None, 1) else f"{num_examples} examples"
        raise ValueError(f"{name} must hold at least {at_least}, got {count}.")
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
