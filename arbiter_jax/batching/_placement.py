"""Where the rows of a block go: how many steps fit, and which rows a process supplies."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from arbiter_jax.base import PyTree


def steps_that_fit(
    example: PyTree, window: int, bucket_size: int, sharding: Any, max_bytes: int
) -> int:
    """The steps of a block that takes at most `max_bytes` on a device: in [1, window].

    Args:
      example: Shapes and dtypes of one example.
      window: T, the most steps.
      bucket_size: Rows of a step.
      sharding: Of the block [T, bucket_size, ...], or None for one device.
      max_bytes: Limit for a device; one step may be larger.

    Raises:
      ValueError: If the devices cannot share the rows of a step evenly.
    """
    leaves, num_bytes = jax.tree.leaves(example), 0
    for leaf in leaves:
        shape = (window, bucket_size, *leaf.shape)
        if isinstance(sharding, jax.sharding.Sharding):
            try:
                shape = sharding.shard_shape(shape)
            except ValueError as error:
                raise ValueError(
                    f"sharding must split a block of shape {list(shape)} evenly, got {sharding}: "
                    "shard the second axis alone, over at most as many devices as the bucket_size "
                    f"of {bucket_size}."
                ) from error
        num_bytes += math.prod(shape) * leaf.dtype.itemsize
    return window if num_bytes <= max_bytes else max(1, window * max_bytes // num_bytes)


def process_rows(shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> np.ndarray:
    """The rows of a block of shape [T, bucket_size, ...] that this process holds, increasing."""
    held = np.zeros(shape[1], bool)
    for index in sharding.addressable_devices_indices_map(shape).values():
        assert index is not None
        held[index[1]] = True
    return np.flatnonzero(held)


def place(batches: PyTree, bucket_size: int, sharding: Any) -> PyTree:
    """The rows of this process [T, m, ...] as arrays [T, bucket_size, ...], without communication.

    ``jax.device_put`` would compare the rows of all processes, which must not happen in a thread.
    """

    def put(leaf: np.ndarray) -> jax.Array:
        shape = (leaf.shape[0], bucket_size, *leaf.shape[2:])
        return jax.make_array_from_process_local_data(sharding, leaf, shape)

    return jax.tree.map(put, batches)
