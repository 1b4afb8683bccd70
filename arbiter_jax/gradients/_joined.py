"""What the pieces of a batch return, joined to what the whole batch would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from arbiter_jax._numerics import at_least_float32
from arbiter_jax.base import PyTree
from arbiter_jax.gradients._masked import call_loss


def weighted_mean(trees: Sequence[PyTree], weights: jax.Array) -> PyTree:
    """The mean of several trees; 0 if all weights are."""
    shares = weights / jnp.maximum(jnp.sum(weights), jnp.finfo(weights.dtype).tiny)

    def mean(*xs):
        total: Any = sum(times(x, share) for x, share in zip(xs, shares, strict=True))
        return total.astype(xs[0].dtype)

    return jax.tree.map(mean, *trees)


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """The product, in at least float32."""
    x = at_least_float32(x)
    return x * factor.astype(x.dtype)


def mean_of_devices(tree: PyTree, share: jax.Array, axis_name: str) -> PyTree:
    """The mean over the devices of a mesh axis, each with its share."""
    return jax.tree.map(lambda x: jax.lax.psum(times(x, share), axis_name).astype(x.dtype), tree)


def joined_aux(
    pieces: Sequence[PyTree], weights: jax.Array, with_rows: PyTree, contiguous: bool
) -> PyTree:
    """Joins the auxiliary outputs of pieces: rows in batch order, means of other float leaves.

    What else there is comes from the last piece.
    """

    def join(rows, *xs):
        if rows and contiguous:
            return jnp.concatenate(xs)
        if rows:
            whole = jnp.zeros((sum(len(x) for x in xs), *xs[0].shape[1:]), xs[0].dtype)
            for j, x in enumerate(xs):
                whole = whole.at[j :: len(xs)].set(x)
            return whole
        if jnp.issubdtype(xs[0].dtype, jnp.inexact):
            real = [jnp.where(w > 0, x, 0) for x, w in zip(xs, weights, strict=True)]
            return weighted_mean(real, weights)
        last = xs[0]
        for x, weight in zip(xs[1:], weights[1:], strict=True):
            last = jnp.where(weight > 0, x, last)
        return last

    return jax.tree.map(join, with_rows, *pieces)


def has_rows(
    loss_fn: Any, pieces: Sequence[PyTree], num_rows: Sequence[int], *arguments: Any
) -> PyTree:
    """Which leaves of auxiliary output have a row for each example; a ValueError if it is unclear."""
    whole = jax.eval_shape(lambda *args: call_loss(loss_fn, *args, has_aux=True)[2], *arguments)

    def of_leaf(whole, *xs):
        shapes = [x.shape for x in (*xs, whole)]
        if len(set(shapes)) == 1:
            return False
        rows = [(n, *whole.shape[1:]) for n in (*num_rows, sum(num_rows))]
        if shapes == rows:
            return True
        raise ValueError(
            "aux, which loss_fn returns, must have one row per example or the same shape for any "
            "number of examples if gradients are measured piece by piece, got shape "
            f"{whole.shape} for the whole batch and {shapes[0]} for a piece of it."
        )

    return jax.tree.map(of_leaf, whole, *pieces)


def check_aux(loss_fn: Any, aux: PyTree, *arguments: Any) -> None:
    """Raises a ValueError if the shapes of auxiliary output depend on the number of rows."""
    whole = jax.eval_shape(lambda *args: call_loss(loss_fn, *args, has_aux=True)[2], *arguments)
    shapes = [[x.shape for x in jax.tree.leaves(tree)] for tree in (aux, whole)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "aux, which loss_fn returns, must have the same shapes for any number of rows if "
            f"gradients are measured piece by piece, got shapes {shapes[1]} for the whole batch and "
            f"{shapes[0]} for a piece of it: return means over the rows."
        )


def joined_aux_of_devices(
    aux: PyTree, weight: jax.Array, share: jax.Array, axis_name: str
) -> PyTree:
    """As :func:`joined_aux`, where each device holds a piece."""
    device = jax.lax.axis_index(axis_name)
    last = jax.lax.pmax(jnp.where(weight > 0, device, 0), axis_name)

    def join(x):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return mean_of_devices(jnp.where(weight > 0, x, 0), share, axis_name)
        return jax.lax.psum(jnp.where(device == last, x, 0), axis_name).astype(x.dtype)

    return jax.tree.map(join, aux)
