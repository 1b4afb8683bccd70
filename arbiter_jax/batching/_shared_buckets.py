"""Batches of several seeds in one bucket, each with its rows where a bucket of its own has them.

What a loss or a transformation draws for a row depends on the number of the row, and the two halves
of a batch are halves of its bucket: with the rows in the same places, no seed sees how large the
bucket is that it shares.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from arbiter_jax.base import PyTree
from arbiter_jax.batching._masking import num_rows
from arbiter_jax.batching._rows import bit_reversed
from arbiter_jax.batching._sampling import SamplerState, advance, examples_ahead


def sample_shared(
    state: SamplerState,
    data: PyTree,
    batch_size: jax.Array,
    own_bucket_size: jax.Array,
    bucket_size: int,
) -> tuple[SamplerState, PyTree, jax.Array]:
    """:func:`sample_batch` into the first rows of a bucket that may be larger than needed.

    Args:
      state: The sampler of this data.
      data: Pytree of arrays [dataset_size, ...].
      batch_size: int32[], number of real examples, in [0, own_bucket_size].
      own_bucket_size: int32[], a power of two, at most `bucket_size`.
      bucket_size: Static number of rows, a power of two.

    Returns:
      (state, batch, mask) whose first `own_bucket_size` rows are those of ``sample_batch(state,
      data, batch_size, own_bucket_size)``; the others are padding.

    >>> from arbiter_jax.batching import init_sampler
    >>> data, sampler = jnp.arange(9), init_sampler(jax.random.PRNGKey(0))
    >>> _, batch, mask = sample_shared(sampler, data, jnp.int32(3), jnp.int32(4), bucket_size=8)
    >>> mask.tolist()
    [True, True, True, False, False, False, False, False]
    """
    row = jnp.arange(bucket_size, dtype=jnp.int32)
    # Row r of a bucket of m rows holds the example of row r M / m of one of M rows.
    own = jnp.asarray(bit_reversed(bucket_size))[row * (bucket_size // own_bucket_size)]
    mask = (row < own_bucket_size) & (own < batch_size)
    batch = examples_ahead(state, data, jnp.where(mask, own, 0))
    return advance(state, batch_size, num_rows(data)), batch, mask


def halves_apart(tree: PyTree, own_bucket_size: jax.Array) -> PyTree:
    """Moves the second half of a seed's own bucket to the second half of the one that it shares.

    Args:
      tree: Pytree of arrays [M, ...], such as a batch and its mask from :func:`sample_shared`.
      own_bucket_size: int32[], m <= M, whose last M - m rows are padding.

    >>> halves_apart(jnp.array([1, 2, 3, 4, 0, 0, 0, 0]), jnp.int32(4)).tolist()
    [1, 2, 0, 0, 3, 4, 0, 0]
    """
    bucket_size = num_rows(tree)
    if bucket_size == 1:
        return tree
    half, own_half = bucket_size // 2, jnp.maximum(own_bucket_size // 2, 1)
    row = jnp.arange(half, dtype=jnp.int32)
    padding = bucket_size - half + row  # never read where the seed fills the bucket
    first = jnp.where(row < own_half, row, padding)
    second = jnp.where(row < own_half, own_half + row, padding)
    rows = jnp.concatenate([first, second])
    return jax.tree.map(lambda x: x.at[rows].get(mode="promise_in_bounds"), tree)
