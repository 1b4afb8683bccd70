"""Sampling without replacement on the device.

A sampler goes through one random permutation of the data per epoch. The permutation is never
stored: a keyed bijection of the indices computes each entry when it is needed (as in
`index_shuffle` of TensorFlow and Grain). This takes a few integer operations per example and 16
bytes of state for data of any size, and works under `vmap`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np
from jax import lax

from arbiter_jax import _validate
from arbiter_jax._numerics import raw_key
from arbiter_jax.base import PyTree
from arbiter_jax.batching._masking import num_rows
from arbiter_jax.batching._rows import (
    DATA_AXIS,
    num_data_devices,
    on_each_device,
    row_order,
    shard_rows,
)

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

    # `lax.div` and `lax.rem`: `//` and `%` also compile what only signed numbers need.
    count_rows, count_columns = jnp.uint32(rows), jnp.uint32(columns)

    def network(x: jax.Array) -> jax.Array:
        left, right = lax.div(x, count_columns), lax.rem(x, count_columns)
        for r in range(_FEISTEL_ROUNDS):
            # The constant first, then the key: XLA would move a sum of both out of all loops, and
            # compile a program of its own for each of these scalars.
            pepper = jnp.uint32((2 * r + 1) * 0x9E3779B9 % 2**32)
            noise = _hash32(((right + pepper) + key[0]) ^ salt)
            left = lax.rem(left + lax.rem(noise, count_rows), count_rows)
            noise = _hash32(((left + ~pepper) - key[0]) ^ salt)
            right = lax.rem(right + lax.rem(noise, count_columns), count_columns)
        return left * count_columns + right

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
    :func:`bit_reversed`), so that each half of the bucket holds half of them; on a mesh, with
    ``jax.set_mesh``, they are split over the devices of the axis "data" (see :func:`interleaved`).

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
    position = jnp.asarray(row_order(bucket_size))
    mask = position < batch_size
    batch = examples_ahead(state, data, jnp.where(mask, position, 0))
    return advance(state, batch_size, num_rows(data)), batch, shard_rows(mask)


def examples_ahead(state: SamplerState, data: PyTree, position: jax.Array) -> PyTree:
    """The examples at int32[M] positions ahead of the sampler, a pytree of arrays [M, ...]."""
    return parts_ahead(state, data, position, (position.shape[0],))[0]


def parts_ahead(
    state: SamplerState, data: PyTree, position: jax.Array, sizes: tuple[int, ...]
) -> tuple[PyTree, ...]:
    """As :func:`examples_ahead`, in parts of the given numbers of examples."""
    size = num_rows(data)

    # Each device numbers its own rows: a loop over all of them would ask all devices at every turn
    # whether it has ended.
    def numbers(state: SamplerState, position: jax.Array) -> jax.Array:
        ahead = state.cursor + position
        return permuted_index(state.key, state.epoch + ahead // size, ahead % size, size)

    if position.shape[0] % num_data_devices():
        return _take_parts(data, numbers(state, position), sizes)
    rows = on_each_device(numbers, 1)(state, position)
    return shard_rows(_take_parts(data, rows, sizes))


def _take_parts(data: PyTree, rows: jax.Array, sizes: tuple[int, ...]) -> tuple[PyTree, ...]:
    ends = list(itertools.accumulate(sizes))
    return tuple(_take(data, rows[end - n : end]) for n, end in zip(sizes, ends, strict=True))


def _take(data: PyTree, rows: jax.Array) -> PyTree:
    def take(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        flat = x
        # XLA's loop for the CPU computes all indices for each number that it copies: more than twice
        # as long for images as for rows of numbers. Elsewhere to flatten may copy all the data.
        is_image = x.ndim > 2 and not any(jax.typeof(x).sharding.spec[1:])
        if is_image and jax.default_backend() == "cpu":
            flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        taken = flat.at[rows].get(mode="promise_in_bounds")
        return taken.reshape(rows.shape + x.shape[1:])

    return jax.tree.map(take, data)


def sample_own_batch(
    state: SamplerState, data: PyTree, batch_size: jax.typing.ArrayLike, bucket_size: int
) -> tuple[SamplerState, PyTree, jax.Array]:
    """As :func:`sample_batch`, but each device of a mesh draws its share from its own rows.

    The data lies on n devices, L rows each. The examples of an epoch are dealt out in turn: number q
    of the epoch is number q // n in a random permutation of the rows of device q % n. Every example
    is drawn once an epoch, a batch is stratified by device, and no example leaves its device. The
    batches depend on the number of devices; with one they are those of :func:`sample_batch`.

    Args:
      state: The sampler of this data, the same one as for :func:`sample_batch`.
      data: Pytree of arrays [n L, ...], whose rows are split over the mesh axis "data".
      batch_size: int32[], number of real examples, in [0, bucket_size].
      bucket_size: Static number of rows, a multiple of n.

    Returns:
      (state, batch, mask), each half of whose even and odd rows holds half of the examples.

    Raises:
      ValueError: If the rows of the data cannot be split evenly over the devices.
    """
    n, size = num_data_devices(), num_rows(data)
    if n == 1:
        return sample_batch(state, data, batch_size, bucket_size)
    if size % n:
        raise ValueError(
            f"data.train must have a multiple of {n} examples, as many on each device, if "
            f"sampling is 'local', got {size}: leave {size % n} out, or use sampling='exact'."
        )
    batch_size = jnp.minimum(jnp.asarray(batch_size, jnp.int32), bucket_size)

    def draw(state: SamplerState, batch_size: jax.Array, data: PyTree) -> tuple[PyTree, jax.Array]:
        device = jax.lax.axis_index(DATA_AXIS)
        # Every other device fills the second of two rows first: the halves stay equal.
        number = jnp.arange(bucket_size // n) ^ (device & int(bucket_size > n))
        first = jnp.mod(device - state.cursor, n)
        mask = first + n * number < batch_size
        ahead = state.cursor + first + n * jnp.where(mask, number, 0)
        key, epoch = jax.random.fold_in(state.key, device), state.epoch + ahead // size
        rows = permuted_index(key, epoch, ahead % size // n, size // n)
        return _take(data, rows), mask

    batch, mask = on_each_device(draw, 2)(state, batch_size, data)
    return advance(state, batch_size, size), batch, mask


def advance(state: SamplerState, used: jax.typing.ArrayLike, dataset_size: int) -> SamplerState:
    """The sampler after `used` more examples, int32[], of a data set of this size."""
    end = state.cursor + jnp.asarray(used, jnp.int32)
    return SamplerState(state.key, end % dataset_size, state.epoch + end // dataset_size)
