"""The leaves of what a user gives: what they are, and what an error message calls them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arbiter_jax.base import PyTree


def called(value: Any) -> str:
    """What to call a value in an error message: its type, and its length or shape if it has one."""
    name = type(value).__name__
    if callable(value) and hasattr(value, "__name__"):
        return f"the {name} {value.__name__}"
    if isinstance(value, np.ndarray | jax.Array):
        return f"an array {value.dtype}{list(value.shape)}"
    if isinstance(value, tuple | list | dict) and not hasattr(value, "_fields"):
        return f"a {name} of {len(value)}"
    return f"{value!r}" if value is None or isinstance(value, str | int | float) else f"a {name}"


def is_array(value: Any) -> bool:
    """Whether a leaf is an array of numbers, or a number."""
    if isinstance(value, bool | int | float | complex):
        return True
    if not hasattr(value, "__array__"):
        return False  # a jax.ShapeDtypeStruct, an iterator, text
    if isinstance(value, jax.Array):
        return True
    dtype = getattr(value, "dtype", None)  # another library may have dtypes of its own, or several
    kind = getattr(dtype, "kind", None)
    return kind is None or kind in "biufc" or jnp.issubdtype(value.dtype, jnp.number)


def is_deleted(tree: PyTree) -> bool:
    def deleted(leaf: Any) -> bool:
        try:
            return isinstance(leaf, jax.Array) and leaf.is_deleted()
        except jax.errors.ConcretizationTypeError:  # while tracing
            return False

    return any(map(deleted, jax.tree.leaves(tree)))


def leaves_of(tree: PyTree) -> list[tuple[Any, Any]]:
    # JAX does not look into iterators, and warns of them unless it is told that they are leaves.
    return jax.tree.leaves_with_path(tree, is_leaf=lambda node: isinstance(node, Iterator))
