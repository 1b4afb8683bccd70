"""Blocks: all batches of one window, made on the host for data that does not fit on the device."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from arbiter_jax.base import PyTree
from arbiter_jax.batching._sampling import bit_reversed


class Block(NamedTuple):
    """The batches of one window; `run_window` takes it instead of the training data.

    With micro-batches it holds groups of rows, in the order of `group_rows`, instead of steps.
    """

    batches: PyTree  # leaves [at most T, bucket_size, ...], rows in the order of `block_rows`
    batch_size: jax.Array | np.integer  # shape=(), dtype=int32, real examples per step
    num_steps: jax.Array | np.integer  # shape=(), dtype=int32, steps that have a batch, <= T


def block_rows(
    window: int,
    batch_size: int,
    bucket_size: int,
    num_steps: int,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """The number of the example that goes into each row of a block.

    Rows are assigned as in :func:`sample_batch`. Padding repeats the first example of its step, and
    steps after `num_steps` repeat the first example of the window.

    Args:
      window: T, number of steps in the block.
      batch_size: B, number of real examples per step, at most bucket_size.
      bucket_size: Number of rows per step.
      num_steps: Number of steps that have examples, in [1, T].
      rows: int[m], increasing, the rows of a step that one process holds; all if None. Only their
        examples are numbered, ``num_real_rows(batch_size, bucket_size, rows)`` per step.

    Returns:
      int[T, bucket_size] with entries in [0, num_steps * batch_size), or int[T, m].

    >>> block_rows(window=3, batch_size=3, bucket_size=4, num_steps=2).tolist()
    [[0, 2, 1, 0], [3, 5, 4, 3], [0, 0, 0, 0]]
    >>> block_rows(window=2, batch_size=3, bucket_size=4, num_steps=2, rows=np.arange(2)).tolist()
    [[0, 1], [2, 3]]
    """
    position = bit_reversed(bucket_size)
    position = position if rows is None else position[rows]
    real = position < batch_size
    within = np.where(real, ranks(position), 0)
    step = np.arange(window)[:, None]
    return np.where(step < num_steps, step * np.count_nonzero(real) + within[None, :], 0)


def ranks(position: np.ndarray) -> np.ndarray:
    """The rank of each of the positions that a process holds; that of all is the position itself.

    The real examples of a step have the first positions, so it is also the rank among those of them
    that the process holds.
    """
    return np.searchsorted(np.sort(position), position)


def num_real_rows(batch_size: int, bucket_size: int, rows: np.ndarray | None = None) -> int:
    """How many of these rows of a step, int[m] or all if None, hold a real example.

    A step of more examples than the bucket has rows is split into groups; then it is their sum.

    >>> num_real_rows(batch_size=3, bucket_size=4, rows=np.array([2, 3]))
    1
    >>> num_real_rows(batch_size=7, bucket_size=4, rows=np.array([2, 3]))  # of groups of 4 and 3
    3
    """
    position = bit_reversed(bucket_size)
    position = position if rows is None else position[rows]
    num_groups = -(-batch_size // bucket_size)
    each, more = divmod(batch_size, num_groups)
    small, large = (int(np.count_nonzero(position < size)) for size in (each, each + 1))
    return num_groups * small + more * (large - small)


def block_batch(block: Block, t: jax.Array, bucket_size: int) -> tuple[PyTree, jax.Array]:
    """The batch of step t of a block, and its mask, bool[bucket_size]."""
    take = functools.partial(jax.lax.dynamic_index_in_dim, index=t, keepdims=False)
    mask = jnp.asarray(bit_reversed(bucket_size)) < block.batch_size
    return jax.tree.map(take, block.batches), mask


def check_block(block: Block, window: int | None, bucket_size: int) -> int:
    """The slots of a block, or a ValueError if it does not fit into this window; None for any."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(block.batches)]
    forms = {shape[:2] for shape in shapes}
    slots = max((shape[0] for shape in shapes if shape), default=0)
    window = max(slots, 1) if window is None else window
    if forms != {(slots, bucket_size)} or not 1 <= slots <= window:
        raise ValueError(
            f"data.train must be a block of shape [window, bucket_size, ...], at most [{window}, "
            f"{bucket_size}, ...], got shapes {shapes}; request it with the sizes of this window."
        )
    return slots


def check_next_block(block: Any, batch_size: int, num_steps: int) -> None:
    """Raises a ValueError if a source has not made the block that it was asked for."""
    if not isinstance(block, Block):
        raise ValueError(
            "next_block must return an arbiter_jax.batching.Block(batches, batch_size, num_steps), "
            f"got a {type(block).__name__}."
        )
    if int(block.batch_size) != batch_size:
        raise ValueError(
            f"next_block must return a block of batch size {batch_size}, as asked for, got "
            f"{int(block.batch_size)}."
        )
    if not 1 <= int(block.num_steps) <= num_steps:
        raise ValueError(
            f"next_block must return a block of 1 to {num_steps} steps, got {int(block.num_steps)}; "
            "where no whole batch is left, raise StopIteration."
        )


@runtime_checkable
class BlockSource(Protocol):
    """Supplies the block of each window from the host.

    Where a batch is larger than the micro-batch of the run, which then is `bucket_size`, `next_block`
    gets it as the keyword `micro_batch_size` as well, and makes a block of groups.

    ``arbiter_jax.datasets.host_blocks`` makes one from any iterator over examples.
    """

    window: int  # T

    def next_block(self, batch_size: int, bucket_size: int, num_steps: int | None = None) -> Block:
        """The next examples in whole batches; raises StopIteration if less than one is left.

        On several processes, all of them get the same number of steps.
        """
        ...
