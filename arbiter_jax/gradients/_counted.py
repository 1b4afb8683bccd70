"""The parameters that gradient statistics are about."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arbiter_jax.base import PyTree

Trainable = Any  # a pytree of bools, a function of the parameters that returns one, or None


def counted_leaves(params: PyTree, trainable: Trainable) -> list[bool] | None:
    """Whether the statistics are about each leaf of the parameters; None if about all."""
    given = trainable(params) if callable(trainable) else trainable
    if given is None:
        return None
    spread = lambda counts, part: [counts] * len(jax.tree.leaves(part))
    try:
        counts: Any = jax.tree.leaves(jax.tree.map(spread, given, params))
    except (TypeError, ValueError):  # of another structure
        counts = [None]
    if not all(isinstance(x, (bool, np.bool_)) for x in counts) or not any(counts):
        raise ValueError(
            "trainable must be a pytree of bools like params, or a prefix of it, at least one of "
            f"them True, or a function of params that returns one, got {given!r}."
        )
    return None if all(counts) else counts


def only_counted(tree: PyTree, counts: list[bool] | None) -> PyTree:
    """The leaves that the statistics are about, of a tree like the parameters, or None."""
    if counts is None or tree is None:
        return tree
    return [x for x, counted in zip(jax.tree.leaves(tree), counts, strict=True) if counted]


def zero_others(tree: PyTree, counts: list[bool] | None) -> PyTree:
    """The tree with zeros for the leaves that the statistics are not about."""
    if counts is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    kept = [x if c else jnp.zeros_like(x) for x, c in zip(leaves, counts, strict=True)]
    return jax.tree.unflatten(structure, kept)
