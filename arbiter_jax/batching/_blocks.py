"""Blocks: all batches of one window, arranged on the host for data that does not fit on the device."""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from arbiter_jax.base import PyTree
from arbiter_jax.batching._sampling import bit_reversed


class Block(NamedTuple):
    """The batches of one window, drawn by the host, in the place of the data they come from."""

    batches: PyTree  # leaves [T, bucket_size, ...], rows as `block_rows` lays them out
    batch_size: jax.Array | np.integer  # shape=(), dtype=int32, real examples of each step
    num_steps: jax.Array | np.integer  # shape=(), dtype=int32, steps that there are batches for


def block_rows(window: int, batch_size: int, bucket_size: int, num_steps: int) -> np.ndarray:
    """Which example of a window each row of its block holds: as :func:`sample_batch` deals them.

    Args:
      window: T, steps of a window.
      batch_size: B, real examples of a step, at most bucket_size.
      bucket_size: Rows of a step.
      num_steps: Steps that there are examples for, in [1, T].

    Returns:
      int[T, bucket_size] with entries in [0, num_steps * batch_size).

    >>> block_rows(window=3, batch_size=3, bucket_size=4, num_steps=2).tolist()
    [[0, 2, 1, 0], [3, 5, 4, 3], [0, 0, 0, 0]]
    """
    position = bit_reversed(bucket_size)
    within = np.where(position < batch_size, position, 0)
    step = np.arange(window)[:, None]
    return np.where(step < num_steps, step * batch_size + within[None, :], 0)


def block_batch(block: Block, t: jax.Array, bucket_size: int) -> tuple[PyTree, jax.Array]:
    """The batch of step t of a block, and its mask."""
    take = functools.partial(jax.lax.dynamic_index_in_dim, index=t, keepdims=False)
    return jax.tree.map(take, block.batches), jnp.asarray(
        bit_reversed(bucket_size)
    ) < block.batch_size


def check_block(block: Block, window: int, bucket_size: int) -> None:
    """Raises a ValueError where a block was not made for a window of this shape."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(block.batches)]
    if {shape[:2] for shape in shapes} != {(window, bucket_size)}:
        raise ValueError(
            f"data.train must be a block of shape [window, bucket_size, ...] = [{window}, "
            f"{bucket_size}, ...], got shapes {shapes}: ask for it with the sizes of this window."
        )


@runtime_checkable
class BlockSource(Protocol):
    """Where the batches of one window after the other come from, on the host.

    ``arbiter_jax.datasets.host_blocks`` makes one of any iterator over examples.
    """

    window: int  # T

    def next_block(self, batch_size: int, bucket_size: int, num_steps: int | None = None) -> Block:
        """The next examples, whole batches; StopIteration where there is not even one batch."""
        ...
