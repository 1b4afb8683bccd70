"""Where two pytrees differ, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from arbiter_jax.base import PyTree, children


def node_parts(node: PyTree) -> dict[str, PyTree]:
    """The parts of a node of a pytree by how they are written after its name; none of a leaf."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        names: Any = node
        return {f".{name}": getattr(node, name) for name in names._fields}
    if isinstance(node, Mapping):
        return {f"[{name!r}]": part for name, part in node.items()}
    if node is None or _is_leaf(node):
        return {}
    return {f"[{index}]": part for index, part in enumerate(children(node))}


def difference(found: PyTree, expected: PyTree, *, types: bool = True) -> str | None:
    """The first place where two pytrees differ, as "[path] is ..., not ...", or None.

    Args:
      found: What was given.
      expected: What is needed: arrays, or shapes and dtypes.
      types: Whether the dtypes of the arrays are compared as well.
    """
    parts, wanted = node_parts(found), node_parts(expected)
    if jax.tree.structure(found) == jax.tree.structure(expected) and not wanted:
        if not _is_leaf(expected):  # an empty node
            return None
        form = lambda x: (jnp.shape(x), jnp.result_type(x) if types else None)
        if form(found) == form(expected):
            return None
        name = lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}"
        return f" is {name(found)}, not {name(expected)}"
    if bool(parts) != bool(wanted) or (wanted and type(found) is not type(expected)):
        return f" is {_kind(found)}, not {_kind(expected)}"
    if list(parts) != list(wanted) and set(parts) != set(wanted):
        return f" has the parts {_listed(parts)}, not {_listed(wanted)}"
    for name, part in wanted.items():
        different = difference(parts[name], part, types=types)
        if different is not None:
            return name + different
    if jax.tree.structure(found) != jax.tree.structure(expected):  # static data of a node
        return f" is {_kind(found)} that is built otherwise"
    return None


def _is_leaf(node: PyTree) -> bool:
    structure = jax.tree.structure(node)
    return structure.num_leaves == 1 and jax.tree_util.treedef_is_leaf(structure)


def _kind(node: PyTree) -> str:
    if hasattr(node, "shape") and hasattr(node, "dtype"):
        return f"an array {node.dtype}{list(node.shape)}"
    return "None" if node is None else f"a {type(node).__name__}"


def _listed(parts: Iterable[str]) -> str:
    return ", ".join(parts) or "none"
