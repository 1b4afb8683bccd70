"""Sampling without replacement on the device.

A sampler goes through one random permutation of the data per epoch. The permutation is never
stored: a keyed bijection of the indices computes each entry when it is needed (as in
`index_shuffle` of TensorFlow and Grain). This takes a few integer operations per example and 16
bytes of state for data of any size, and works under `vmap`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from arbiter_jax import _validate
from arbiter_jax._numerics import raw_key
from arbiter_jax.base import PyTree
from arbiter_jax.batching._masking import num_rows

_FEISTEL_ROUNDS = 6


class SamplerState(NamedTuple):
    """Position of a sampler; restored from a checkpoint, it continues with the next example."""

    key: jax.Array  # shape=(2,), dtype=uint32; determines the permutation together with `epoch`
    cursor: jax.Array  # shape=(), dtype=int32, number of examples used in the current epoch
    epoch: jax.Array  # shape=(), dtype=int32, number of completed epochs


def init_sampler(key: jax.Array) -> SamplerState:
    """A sampler at the start of its first epoch.

    Args:
      key: One PRNG key, raw (uint32[2]) or typed, or an int.

    Raises:
      ValueError: If `key` is not one key.

    >>> sampler = init_sampler(jax.random.PRNGKey(0))
    >>> int(sampler.epoch), int(sampler.cursor)
    (0, 0)
    """
    zero = jnp.zeros((), jnp.int32)
    if not isinstance(key, jax.Array) and np.ndim(key) == 0:
        key = _validate.integer(key=key, minimum=0, maximum=2**32 - 1)
    raw = raw_key(key)
    if raw.ndim != 1 or raw.dtype != jnp.uint32:
        raise ValueError(
            "key must be one PRNG key, e.g. jax.random.key(0), or an integer, got "
            f"{jnp.result_type(key)}{list(jnp.shape(key))}."
        )
    return SamplerState(raw[-2:], zero, zero)


def _hash32(x: jax.Array) -> jax.Array:
    """Hashes uint32 to uint32: the finalizer of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def permuted_index(
    key: jax.Array, epoch: jax.Array, position: jax.Array, dataset_size: int
) -> jax.Array:
    """Entry `position` of the random permutation of one epoch, computed without the permutation.

    A Feistel network on (row, column) is a bijection of [0, rows * columns), the smallest
    near-square rectangle that holds the data. An index that lands outside the data is mapped again
    until it lands inside, which makes this a bijection of [0, dataset_size).

    Args:
      key: uint32[2].
      epoch: int32, same shape as position.
      position: int32 in [0, dataset_size), any shape.
      dataset_size: Static number of examples.

    Returns:
      int32 in [0, dataset_size), same shape as position.
    """
    columns = math.isqrt(dataset_size - 1) + 1
    rows = -(-dataset_size // columns)
    salt = _hash32(key[1] ^ (epoch.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)))

    def network(x: jax.Array) -> jax.Array:
        left, right = x // columns, x % columns
        for r in range(_FEISTEL_ROUNDS):
            pepper = key[0] + jnp.uint32((2 * r + 1) * 0x9E3779B9 % 2**32)
            noise = _hash32((right + pepper) ^ salt)
            left = (left + noise % rows) % rows
            noise = _hash32((left + ~pepper) ^ salt)
            right = (right + noise % columns) % columns
        return left * columns + right

    def walk(carry):
        index, outside = carry
        index = jnp.where(outside, network(index), index)
        return index, index >= dataset_size

    # Start with all indices "outside", so that the program contains the network only once.
    start = (position.astype(jnp.uint32), jnp.ones_like(position, bool))
    index, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[1]), walk, start)
    return index.astype(jnp.int32)


def sample_batch(
    state: SamplerState, data: PyTree, batch_size: jax.typing.ArrayLike, bucket_size: int
) -> tuple[SamplerState, PyTree, jax.Array]:
    """Draws `batch_size` examples without replacement into a bucket, with a mask.

    No example is drawn again before all others of its epoch have been. Padding repeats the first
    row, which is a real example. The examples are spread evenly over the rows (see
    :func:`bit_reversed`), so that each half of the bucket holds half of them.

    =============================  ======================================================
    the batch crosses an epoch     the rest comes from the permutation of the next epoch
    batch_size > dataset size      the batch spans several epochs
    batch_size = bucket_size       all rows are real
    batch_size > bucket_size       as batch_size = bucket_size
    batch_size = 0                 no row is real, and the sampler does not move
    =============================  ======================================================

    Args:
      state: The sampler of this data.
      data: Pytree of arrays [dataset_size, ...].
      batch_size: int32[], number of real examples, in [0, bucket_size].
      bucket_size: Static number of rows, usually ``next_bucket(batch_size)``.

    Returns:
      (state, batch, mask): the advanced sampler, a pytree of arrays [bucket_size, ...] and
      bool[bucket_size].

    Raises:
      ValueError: If there is no example, or the leading axes of the arrays differ; if `batch_size` or
        `bucket_size` is not an integer, or `state` no sampler.

    >>> sampler = init_sampler(jax.random.PRNGKey(0))
    >>> sampler, batch, mask = sample_batch(sampler, jnp.arange(5), batch_size=3, bucket_size=4)
    >>> int(mask.sum()), int(sampler.cursor)
    (3, 3)
    """
    if not isinstance(state, SamplerState):
        raise ValueError(
            "state must be a SamplerState, which aj.init_sampler(key) makes, got a "
            f"{type(state).__name__}."
        )
    bucket_size = _validate.integer(bucket_size=bucket_size, minimum=1)
    if not _validate.is_traced(batch_size):
        batch_size = _validate.integer(batch_size=batch_size, minimum=0)
    batch_size = jnp.minimum(jnp.asarray(batch_size, jnp.int32), bucket_size)
    position = jnp.asarray(bit_reversed(bucket_size))
    mask = position < batch_size
    batch = examples_ahead(state, data, jnp.where(mask, position, 0))
    return advance(state, batch_size, num_rows(data)), batch, mask


def examples_ahead(state: SamplerState, data: PyTree, position: jax.Array) -> PyTree:
    """The examples at int32[M] positions ahead of the sampler, a pytree of arrays [M, ...]."""
    size = num_rows(data)
    position = state.cursor + position
    rows = permuted_index(state.key, state.epoch + position // size, position % size, size)
    return jax.tree.map(lambda x: jnp.asarray(x).at[rows].get(mode="promise_in_bounds"), data)


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


def advance(state: SamplerState, used: jax.typing.ArrayLike, dataset_size: int) -> SamplerState:
    """The sampler after `used` more examples, int32[], of a data set of this size."""
    end = state.cursor + jnp.asarray(used, jnp.int32)
    return SamplerState(state.key, end % dataset_size, state.epoch + end // dataset_size)
