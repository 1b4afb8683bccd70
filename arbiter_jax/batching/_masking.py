"""Masks that mark the real rows of a bucket, and reductions over these rows only."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from arbiter_jax import _validate
from arbiter_jax.base import PyTree, WeightedLoss


def num_rows(data: PyTree, name: str = "data", hint: str = "") -> int:
    """The number of examples in a data set: the length of the leading axis of its leaves.

    Args:
      data: Pytree of arrays with leading axes of equal length, usually ``(inputs, labels)``.
      name: What to call the data in an error message.
      hint: What to add where the arrays have no such axis.

    Raises:
      ValueError: If there is no array, no example, or the lengths differ.

    >>> num_rows((jnp.zeros((5, 3)), jnp.zeros(5)))
    5
    """
    leaves = jax.tree.leaves_with_path(data)
    shapes = [np.shape(leaf) for _, leaf in leaves]  # arrays of other libraries have one as well
    lengths = {shape[0] if shape else None for shape in shapes}
    (length, *others) = lengths or {None}
    for path, leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        if getattr(dtype, "kind", "f") in "USOMm":
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} must be an array of numbers, got dtype {dtype}: "
                "encode it as integers, e.g. with np.unique(x, return_inverse=True)."
            )
    if length is not None and length >= 1 and not others:
        return length
    found = [
        f"{name}{jax.tree_util.keystr(path)}: {shape}"
        for (path, _), shape in zip(leaves, shapes, strict=True)
    ]
    found = ", ".join(found) or "no array"
    if length is None or others:
        raise ValueError(
            f"{name} must be a pytree of arrays with one leading axis of equal length, got shapes "
            f"{found}{hint}."
        )
    raise ValueError(f"{name} must hold at least 1 example, got shapes {found}.")


def check_integers(leaf: Any, where: str) -> None:
    """Raises a ValueError for integers that JAX would wrap silently."""
    leaf = np.asarray(leaf)
    wanted = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if leaf.dtype.kind not in "iu" or leaf.dtype == wanted or not leaf.size:
        return
    limits, low, high = jnp.iinfo(wanted), int(leaf.min()), int(leaf.max())
    if low < limits.min or high > limits.max:
        raise ValueError(
            f"{where} must fit into {wanted}, got numbers from {low} to {high}: renumber them, "
            "e.g. with np.unique(x, return_inverse=True)."
        )


def batch_mask(batch_size: jax.typing.ArrayLike, bucket_size: int) -> jax.Array:
    """Marks the first `batch_size` rows of a bucket as real.

    Args:
      batch_size: int32[], number of real rows: <= 0 marks none, >= bucket_size marks all.
      bucket_size: Number of rows.

    Returns:
      bool[bucket_size], True for a real row.

    >>> batch_mask(3, 4).tolist()
    [True, True, True, False]
    """
    return jnp.arange(bucket_size, dtype=jnp.int32) < jnp.asarray(batch_size)


def replace_padding(batch: PyTree, mask: jax.Array, first: int | None = None) -> PyTree:
    """Overwrites the padding with the first real row of the batch.

    Masking the losses is not enough: the gradient of ``where`` multiplies by zero, and zero times a
    NaN or infinity that the padding causes in an earlier layer is NaN. If no row is real, all rows
    become copies of the first one.

    Args:
      batch: Pytree of arrays [M, ...].
      mask: bool[M], True for a real example.
      first: The number of the first real row, where it is known while tracing: on a mesh, devices
        need not look for it.
    """
    mask = jnp.asarray(mask)
    row: Any = jnp.argmax(mask) if first is None else first  # 0 if no row is real

    def replace(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 1)), x, x[row])

    return jax.tree.map(replace, batch)


def check_losses(losses: Any, num_examples: int, name: str = "loss_fn") -> None:
    """Raises a ValueError if a loss function did not return one loss per example.

    Args:
      losses: What it returned: float[M], or a :class:`WeightedLoss` of float[M, ...].
      num_examples: M, rows of the batch that it was called with.
      name: What to call the function in the message.
    """
    weighted = isinstance(losses, WeightedLoss)
    values = losses.losses if weighted else losses
    shape = f"({num_examples}, ...)" if weighted else f"({num_examples},)"
    must = f"{name} must return one loss per example, shape {shape} and a float type, got "
    if not hasattr(values, "dtype") or not hasattr(values, "shape"):
        is_pair = isinstance(values, tuple) and not weighted
        hint = ": pass has_aux=True if it returns (losses, aux)" if is_pair else ""
        is_tree = isinstance(values, tuple | list | dict)  # whose arrays are traced
        found = (
            f"a {type(values).__name__} of {len(values)}" if is_tree else _validate.shown(values)
        )
        raise ValueError(f"{must}{found}{hint}.")
    shape, dtype = tuple(values.shape), values.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
        hint = "return a real number" if is_complex else "integers and booleans have no gradient"
        raise ValueError(f"{must}{dtype}: {hint}.")
    if not shape or shape[0] != num_examples:
        raise ValueError(f"{must}shape {shape}: return the losses, not their mean.")
    if not weighted:
        if len(shape) > 1:
            raise ValueError(
                f"{must}shape {shape}: squeeze the outputs, because labels of shape [M] minus outputs "
                "of shape [M, 1] broadcast to [M, M]; losses of tokens go in an aj.WeightedLoss."
            )
        return
    weights = getattr(losses.weights, "shape", repr(losses.weights))
    broadcasts = (
        isinstance(weights, tuple)
        and len(weights) == len(shape)
        and all(w in (1, n) for w, n in zip(weights, shape, strict=True))
    )
    if not broadcasts:
        raise ValueError(
            f"{name} must return an aj.WeightedLoss whose weights have the shape of its losses, "
            f"{shape}, got {weights}."
        )


def masked_mean(losses: jax.Array | WeightedLoss, mask: jax.Array) -> jax.Array:
    r"""The mean over the real examples, weighted if the loss is a :class:`WeightedLoss`.

    .. math:: F = \sum_i m_i w_i l_i \, / \, \sum_i m_i w_i

    Args:
      losses: float[M] or float[M, ...], or a WeightedLoss of two such arrays.
      mask: bool[M], True for a real example.

    Returns:
      float[], at least float32:

      ================================  ===========================================
      no real example                   0, and the gradient is 0
      all weights are 0                 0, and the gradient is 0
      padding is NaN or infinite        ignored, also by the gradient
      a loss of weight 0 is NaN         ignored, also by the gradient
      a real loss is NaN or infinite    NaN or infinity
      losses in float16 or bfloat16     summed in float32
      ================================  ===========================================

    Raises:
      ValueError: If there is not one loss (or one row of losses) per example.

    >>> float(masked_mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])))
    2.0
    """
    values, weights = _values_and_weights(losses, mask)
    total = jnp.sum(weights)
    # A loss of weight 0 may be NaN, and 0 * NaN is NaN.
    values = jnp.where(weights == 0, 0, values)
    return jnp.sum(values * weights) / jnp.where(total == 0, 1, total)


def total_weight(losses: jax.Array | WeightedLoss, mask: jax.Array) -> jax.Array:
    """The sum of the weights of the real examples, by which :func:`masked_mean` divides."""
    return jnp.sum(_values_and_weights(losses, mask)[1])


def _values_and_weights(
    losses: jax.Array | WeightedLoss, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    values = losses.losses if isinstance(losses, WeightedLoss) else losses
    if values.ndim < 1 or values.shape[0] != mask.shape[0]:
        raise ValueError(
            f"The loss function must return one loss per example, shape ({mask.shape[0]},) or "
            f"({mask.shape[0]}, ...), got {values.shape}; return the losses, not their mean."
        )
    real = jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (values.ndim - 1)), values.shape)
    weights = losses.weights if isinstance(losses, WeightedLoss) else jnp.ones_like(values)
    # bfloat16 counts exactly only up to 256, and float16 overflows at 65504.
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    return values.astype(dtype), jnp.where(real, weights, 0).astype(dtype)
