"""How the rows of a batch lie on the devices of a mesh.

The mesh is that of JAX's own context, ``with jax.set_mesh(mesh):``. Its axis "data" is the one that
the rows of batches are split over; without a mesh, or without that axis, there is one device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from arbiter_jax.base import PyTree

DATA_AXIS = "data"
_ROWS = PartitionSpec(DATA_AXIS)

Function = TypeVar("Function", bound=Callable[..., Any])


def num_data_devices() -> int:
    """The size of the mesh axis "data", 1 where there is none.

    Inside a `shard_map` over this axis it is 1: the rows there are those of one device.

    Raises:
      ValueError: If the size is not a power of two.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if DATA_AXIS not in mesh.axis_names:
        return 1
    if mesh.axis_types[mesh.axis_names.index(DATA_AXIS)] == AxisType.Manual:
        return 1
    return check_data_axis(mesh)


def check_data_axis(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """The size of the axis "data" of a mesh, or a ValueError if it is not a power of two."""
    size = mesh.shape[DATA_AXIS]
    if size & (size - 1):
        raise ValueError(
            f"mesh must have a power of two of devices along its axis {DATA_AXIS!r}, got {size}: a "
            "bucket, a power of two, is split over them evenly."
        )
    return size


def is_split(sharding: Any) -> bool:
    """Whether arrays with this sharding lie on a mesh with several devices along "data"."""
    mesh = getattr(sharding, "mesh", None)
    return mesh is not None and mesh.shape.get(DATA_AXIS, 1) > 1


def shard_rows(tree: PyTree) -> PyTree:
    """The arrays [M, ...] with their rows split over the mesh axis "data".

    Without this, XLA may let every device compute the whole batch. Where M is not a multiple of the
    number of devices, the arrays are returned as they are.
    """
    n = num_data_devices()
    if n == 1:
        return tree

    def shard(x: jax.Array) -> jax.Array:
        if x.shape[0] % n:
            return x
        return jax.lax.with_sharding_constraint(x, _ROWS)

    return jax.tree.map(shard, tree)


def on_each_device(function: Function, num_shared: int) -> Function:
    """Runs a function on the rows of each device along "data", with nothing that moves between them.

    Args:
      function: Of arrays of all devices, then of arrays [M, ...]; returns arrays [M, ...].
      num_shared: How many of its arguments are the same on all devices.
    """
    if num_data_devices() == 1:
        return function

    def call(*args: Any) -> Any:
        specs = (PartitionSpec(),) * num_shared + (_ROWS,) * (len(args) - num_shared)
        # Over all axes: with some left to XLA, its partitioner has crashed on nested loops.
        return jax.shard_map(function, in_specs=specs, out_specs=_ROWS)(*args)

    return call  # pyright: ignore[reportReturnType]


def bit_reversed(bucket_size: int) -> np.ndarray:
    """The number of the example in each row of a bucket: the row number with its bits reversed.

    This spreads the examples of a batch evenly: each half, quarter and so on of the rows holds its
    share of them, so that the gradients of contiguous pieces can be compared.

    Args:
      bucket_size: Number of rows.

    Returns:
      int32[bucket_size], a permutation that starts with 0.

    >>> bit_reversed(8).tolist()
    [0, 4, 2, 6, 1, 5, 3, 7]
    """
    order = np.zeros(1, np.int32)
    while len(order) < bucket_size:
        order = np.concatenate([2 * order, 2 * order + 1])
    return order[order < bucket_size]


def interleaved(bucket_size: int) -> np.ndarray:
    """The number of the example in each row of a bucket that lies on several devices.

    Contiguous halves would lie on half of the devices each. Here row 2i + j holds what row i of half
    j holds in :func:`bit_reversed`: the halves are the same examples in the same order, and every
    device has its share of both.

    >>> interleaved(8).tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    return bit_reversed(bucket_size).reshape(min(2, bucket_size), -1).T.reshape(-1)


def row_order(bucket_size: int) -> np.ndarray:
    """The number of the example in each row of a bucket, int32[bucket_size], in this context."""
    return bit_reversed(bucket_size) if num_data_devices() == 1 else interleaved(bucket_size)
