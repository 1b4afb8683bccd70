"""Sampling without replacement on the device.

A sampler walks through one random permutation of the data after another. No permutation is ever
stored or sorted: a keyed bijection of the indices computes each entry when it is needed (as in the
`index_shuffle` of TensorFlow and Grain). It costs a few integer operations per example, takes 16
bytes of state for data of any size, and works under `vmap`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from arbiter_jax._numerics import raw_key
from arbiter_jax.base import PyTree
from arbiter_jax.batching._masking import num_rows

_FEISTEL_ROUNDS = 6


class SamplerState(NamedTuple):
    """Position of a sampler; a checkpoint that holds it resumes at the very next example."""

    key: jax.Array  # shape=(2,), dtype=uint32; with `epoch` it determines every permutation
    cursor: jax.Array  # shape=(), dtype=int32, examples of the current epoch already used
    epoch: jax.Array  # shape=(), dtype=int32


def init_sampler(key: jax.Array) -> SamplerState:
    """A sampler at the start of its first epoch.

    Args:
      key: PRNG key, raw (uint32[2]) or typed.

    >>> sampler = init_sampler(jax.random.PRNGKey(0))
    >>> int(sampler.epoch), int(sampler.cursor)
    (0, 0)
    """
    zero = jnp.zeros((), jnp.int32)
    return SamplerState(raw_key(key).reshape(-1)[-2:], zero, zero)


def _hash32(x: jax.Array) -> jax.Array:
    """Scrambles 32 bits: the finaliser of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def permuted_index(
    key: jax.Array, epoch: jax.Array, position: jax.Array, num_examples: int
) -> jax.Array:
    """Entry `position` of the random permutation of one epoch, without the permutation.

    A Feistel network on pairs of residues is a bijection of [0, rows * columns), the smallest
    near-square rectangle that holds the data. What it maps outside of the data is mapped on
    until it is inside, which makes it a bijection of [0, num_examples).

    Args:
      key: uint32[2].
      epoch: int32, of the shape of position.
      position: int32 in [0, num_examples), of any shape.
      num_examples: Static size of the data set.

    Returns:
      int32, of the shape of position, in [0, num_examples).
    """
    columns = math.isqrt(num_examples - 1) + 1
    rows = -(-num_examples // columns)
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
        return index, index >= num_examples

    # At least one turn: the network stands in the program once, not twice.
    start = (position.astype(jnp.uint32), jnp.ones_like(position, bool))
    index, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[1]), walk, start)
    return index.astype(jnp.int32)


def sample_batch(
    state: SamplerState, data: PyTree, batch_size: jax.typing.ArrayLike, bucket_size: int
) -> tuple[SamplerState, PyTree, jax.Array]:
    """Draws `batch_size` examples into a bucket, with the mask that marks them.

    Examples come without replacement within an epoch; a batch that crosses the end of an epoch
    takes the rest from the next permutation. So does a batch larger than the data set, as often as
    it must: no example is used twice before every other one has been used once. Padding repeats
    the first row of the batch, so that it is a real example whatever the rest of the data holds.
    Examples are dealt out to the rows (see :func:`bit_reversed`): half a bucket holds half of them.

    Args:
      state: The sampler of this data.
      data: Pytree of arrays [num_examples, ...].
      batch_size: int32[], number of real examples, at most bucket_size.
      bucket_size: Static number of rows, usually ``next_bucket(batch_size)``.

    Returns:
      (state, batch, mask): the moved sampler, a pytree of arrays [bucket_size, ...] and
      bool[bucket_size].

    >>> sampler = init_sampler(jax.random.PRNGKey(0))
    >>> sampler, batch, mask = sample_batch(sampler, jnp.arange(5), batch_size=3, bucket_size=4)
    >>> int(mask.sum()), int(sampler.cursor)
    (3, 3)
    """
    batch_size = jnp.minimum(jnp.asarray(batch_size, jnp.int32), bucket_size)
    position = jnp.asarray(bit_reversed(bucket_size))
    mask = position < batch_size
    batch = examples_ahead(state, data, jnp.where(mask, position, 0))
    return advance(state, batch_size, num_rows(data)), batch, mask


def examples_ahead(state: SamplerState, data: PyTree, position: jax.Array) -> PyTree:
    """The examples at int32[M] positions ahead of the sampler, a pytree of arrays [M, ...]."""
    n = num_rows(data)
    position = state.cursor + position
    rows = permuted_index(state.key, state.epoch + position // n, position % n, n)
    return jax.tree.map(lambda x: jnp.asarray(x).at[rows].get(mode="promise_in_bounds"), data)


def bit_reversed(bucket_size: int) -> np.ndarray:
    """The example that each row of a bucket gets: its own number with the bits reversed.

    The B examples of a batch are then spread evenly: each half, quarter and so on of the rows holds
    its share of them, so that contiguous pieces of a batch can be compared with one another.

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


def advance(state: SamplerState, used: jax.typing.ArrayLike, num_examples: int) -> SamplerState:
    """The sampler after `used` more examples, int32[], of a data set of num_examples."""
    end = state.cursor + jnp.asarray(used, jnp.int32)
    return SamplerState(state.key, end % num_examples, state.epoch + end // num_examples)
