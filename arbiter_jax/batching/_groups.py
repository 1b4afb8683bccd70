"""Groups: a batch of any size as a traced number of groups of a fixed number of rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from arbiter_jax.base import PyTree
from arbiter_jax.batching._blocks import Block, num_real_rows, ranks
from arbiter_jax.batching._buckets import next_bucket
from arbiter_jax.batching._rows import bit_reversed, shard_rows
from arbiter_jax.batching._sampling import SamplerState, examples_ahead


def num_groups(batch_size: jax.typing.ArrayLike, micro_batch_size: int) -> jax.Array:
    """How many groups a batch has, rounded up, int32[]; one for an empty batch.

    >>> [int(num_groups(n, 4)) for n in (1, 4, 5, 8)]
    [1, 1, 2, 2]
    """
    return jnp.maximum(jnp.asarray(batch_size, jnp.int32) - 1, 0) // micro_batch_size + 1


def _group(batch_size: jax.Array, micro_batch_size: int, j: jax.Array) -> tuple[jax.Array, ...]:
    """The first example of a group, and their number; numbers differ by at most 1."""
    n = num_groups(batch_size, micro_batch_size)
    # Not j * batch_size // n, which an int32 does not hold.
    each, more = batch_size // n, batch_size % n
    return j * each + jnp.minimum(j, more), each + (j < more)


def _in_rows(micro_batch_size: int, part: jax.Array, num_parts: int) -> jax.Array:
    """The number within its group of the example in each row of one part of a group."""
    rows = micro_batch_size // num_parts
    order = jnp.asarray(bit_reversed(micro_batch_size))  # each half holds half of the examples
    return jax.lax.dynamic_slice_in_dim(order, part * rows, rows)


def take_group(
    train: PyTree,
    sampler: SamplerState,
    step: jax.Array,
    batch_size: jax.Array,
    micro_batch_size: int,
    j: jax.Array,
    num_parts: int = 1,
) -> tuple[PyTree, jax.Array]:
    """The rows of one group of a batch, or of one part of it, and which of them are real.

    The batch holds the examples that one large bucket would hold. They are spread evenly over the
    groups and over the parts of each. Padding repeats a real example.

    Args:
      train: Pytree of arrays [dataset_size, ...], or a :class:`Block` of groups.
      sampler: Before this batch.
      step: int32[], number of the step within the window, which a block needs.
      batch_size: int32[], B.
      micro_batch_size: Rows of a group, a power of two.
      j: int32[], number of the group, or of the part of a group.
      num_parts: Parts of a group, 1 or 2.

    Returns:
      (batch, mask): a pytree of arrays [micro_batch_size / num_parts, ...], and bool of that length.

    >>> from arbiter_jax.batching import init_sampler
    >>> sampler, data = init_sampler(0), jnp.arange(10)
    >>> real = [take_group(data, sampler, 0, jnp.int32(7), 4, j)[1] for j in range(2)]
    >>> [mask.tolist() for mask in real]
    [[True, True, True, True], [True, True, True, False]]
    """
    group, part = (j, jnp.int32(0)) if num_parts == 1 else (j // num_parts, j % num_parts)
    start, size = _group(batch_size, micro_batch_size, group)
    position = _in_rows(micro_batch_size, part, num_parts)
    mask = position < size
    if isinstance(train, Block):
        slot = step * num_groups(batch_size, micro_batch_size) + group
        rows = micro_batch_size // num_parts
        is_interleaved = train.position is not None and micro_batch_size > 1

        def take(x):
            x = jax.lax.dynamic_index_in_dim(x, slot, keepdims=False)
            if not is_interleaved:
                return jax.lax.dynamic_slice_in_dim(x, part * rows, rows)
            halves = x.reshape(-1, 2, *x.shape[1:])  # row 2i + j is row i of half j
            if num_parts == 1:
                return jnp.swapaxes(halves, 0, 1).reshape(x.shape)
            return jax.lax.dynamic_index_in_dim(halves, part, axis=1, keepdims=False)

        return shard_rows((jax.tree.map(take, train.batches), mask))
    return examples_ahead(sampler, train, jnp.where(mask, start + position, 0)), mask


def block_shape(window: int, batch_size: int, bucket_size: int) -> tuple[int, int]:
    """(slots of `bucket_size` rows, steps) of the block of a window; a step may take several slots.

    >>> [block_shape(8, batch_size, 16) for batch_size in (7, 16, 33, 1000)]
    [(8, 8), (8, 8), (8, 2), (64, 1)]
    """
    n = -(-batch_size // bucket_size)
    num_slots = window if n <= window else next_bucket(n)
    return num_slots, num_slots // n


def group_rows(
    num_slots: int,
    batch_size: int,
    micro_batch_size: int,
    num_steps: int,
    position: np.ndarray | None = None,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """The number of the example that goes into each row of a block of groups.

    As :func:`block_rows`, where a batch is split into n groups: group j of step t is in slot t n + j.
    Padding repeats the first example of its step, and slots without a group repeat the first example
    of the window.

    Args:
      num_slots: Number of groups that the block has room for.
      batch_size: B, number of real examples per step.
      micro_batch_size: Number of rows per group.
      num_steps: Number of steps that have examples.
      position: Of the block, see :class:`Block`.
      rows: int[m], increasing, the rows of a group that one process holds, the same in every slot;
        all if None.

    Returns:
      int[num_slots, micro_batch_size] with entries in [0, num_steps * batch_size), or
      int[num_slots, m].

    >>> group_rows(num_slots=4, batch_size=3, micro_batch_size=2, num_steps=1).tolist()
    [[0, 1], [2, 0], [0, 0], [0, 0]]
    >>> group_rows(num_slots=2, batch_size=7, micro_batch_size=4, num_steps=1, rows=np.arange(2))
    array([[0, 1],
           [2, 3]])
    """
    n = -(-batch_size // micro_batch_size)
    step, j = np.divmod(np.arange(num_slots), n)
    each, more = divmod(batch_size, n)
    share = num_real_rows(batch_size, micro_batch_size, rows, position)  # of a step
    position = bit_reversed(micro_batch_size) if position is None else position
    position = position if rows is None else position[rows]
    real = position < (each + (j < more))[:, None]
    small, large = (np.count_nonzero(position < size) for size in (each, each + 1))
    start = j * small + np.minimum(j, more) * (large - small)
    within = np.where(real, start[:, None] + ranks(position), 0)
    return np.where(step[:, None] < num_steps, step[:, None] * share + within, 0)
