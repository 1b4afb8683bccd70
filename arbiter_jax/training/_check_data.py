"""The data of a run, checked before it starts: one sentence that says what to pass instead.

Like the other checks of a run, these read structures, shapes and types alone, so that they also
work while tracing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from arbiter_jax.base import PyTree
from arbiter_jax.batching import Block, BlockSource
from arbiter_jax.batching._masking import check_integers, num_rows
from arbiter_jax.training._leaves import called, is_array, leaves_of

_FROM_HOST = (
    "data that comes in pieces goes through arbiter_jax.datasets.host_blocks(source, "
    "window=window), as aj.Data(blocks, validation)"
)


def check_data(data: Any) -> None:
    """Raises a ValueError if the data of a run is not :class:`Data`, or holds no examples."""
    if isinstance(data, BlockSource | Block):
        raise ValueError(f"data must be aj.Data(blocks, validation), got {called(data)} alone.")
    if not hasattr(data, "train"):
        hint = "wrap the training arrays as aj.Data((inputs, labels))"
        if isinstance(data, tuple | list) and len(data) == 2:
            hint += ", and with validation examples as aj.Data(train, validation)"
        elif isinstance(data, Mapping):
            hint = "wrap the training arrays as aj.Data(batch), e.g. aj.Data({'x': x, 'y': y})"
        elif not is_array(data):
            hint += f"; {_FROM_HOST}"
        raise ValueError(f"data must be aj.Data(train, validation), got {called(data)}: {hint}.")
    if not isinstance(data.train, BlockSource | Block):
        _check_leaves(data.train, "data.train")
        num_rows(data.train, "data.train")
    _check_leaves(getattr(data, "validation", None), "data.validation")


def _check_leaves(tree: PyTree, name: str) -> None:
    for path, leaf in leaves_of(tree):
        where = name + jax.tree_util.keystr(path)
        if not is_array(leaf):
            if hasattr(leaf, "dtype") and hasattr(leaf, "__array__"):
                raise ValueError(
                    f"{where} must be an array of numbers, got dtype {leaf.dtype}: encode it as "
                    "integers, e.g. the classes with np.unique(labels, return_inverse=True)."
                )
            hint = "leave it out" if isinstance(leaf, str) else _FROM_HOST
            raise ValueError(f"{where} must be an array of numbers, got {called(leaf)}: {hint}.")
        if not isinstance(leaf, jax.Array):
            check_integers(leaf, where)


def check_on_device(data: Any) -> None:
    """Raises a ValueError for arrays of another library, which a compiled program cannot take."""
    for path, leaf in leaves_of(data):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
            raise ValueError(
                f"data{jax.tree_util.keystr(path)} must be an array of JAX, got {called(leaf)}: "
                "convert it with jnp.asarray."
            )
