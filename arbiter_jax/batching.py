"""Sampling without replacement on the device, and masks for the rows that are only padding.

A sampler walks through one random permutation of the data after the other. No permutation is ever
stored or sorted: each entry is computed when it is needed, by a keyed bijection of the indices (as
the `index_shuffle` of TensorFlow and Grain), which costs a few integer operations an example, takes
16 bytes of state for data of any size, and vmaps.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from arbiter_jax.base import PyTree, WeightedLoss, raw_key

_FEISTEL_ROUNDS = 6


class SamplerState(NamedTuple):
    """Position of a sampler; a checkpoint that holds it resumes at the very next example."""

    key: jax.Array  # shape=(2,), dtype=uint32; with `epoch` it determines every permutation
    cursor: jax.Array  # shape=(), dtype=int32, examples of the current epoch already used
    epoch: jax.Array  # shape=(), dtype=int32


def num_rows(data: PyTree) -> int:
    """The number of examples of a data set: the length of the leading axis of its leaves.

    Args:
      data: Pytree of arrays with one leading axis of equal length, usually ``(inputs, labels)``.

    Raises:
      ValueError: If there is no array, no example, or the lengths differ.

    >>> num_rows((jnp.zeros((5, 3)), jnp.zeros(5)))
    5
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(data)]
    lengths = {shape[0] if shape else None for shape in shapes}
    (length, *others) = lengths or {None}
    if length is None or others:
        raise ValueError(
            "data must be a pytree of arrays with one leading axis of equal length, got shapes "
            f"{shapes}."
        )
    if length < 1:
        raise ValueError(f"data must hold at least 1 example, got shapes {shapes}.")
    return length


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


def _mix(x: jax.Array) -> jax.Array:
    """Scrambles 32 bits: the finaliser of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def shuffled(key: jax.Array, epoch: jax.Array, position: jax.Array, num_examples: int) -> jax.Array:
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
    salt = _mix(key[1] ^ (epoch.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)))

    def network(x: jax.Array) -> jax.Array:
        left, right = x // columns, x % columns
        for r in range(_FEISTEL_ROUNDS):
            pepper = key[0] + jnp.uint32((2 * r + 1) * 0x9E3779B9 % 2**32)
            noise = _mix((right + pepper) ^ salt)
            left = (left + noise % rows) % rows
            noise = _mix((left + ~pepper) ^ salt)
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
    Examples are dealt out to the rows (see :func:`deal`): half a bucket holds half of them.

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
    position = jnp.asarray(deal(bucket_size))
    mask = position < batch_size
    batch = peek(state, data, jnp.where(mask, position, 0))
    return advance(state, batch_size, num_rows(data)), batch, mask


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
    position = deal(bucket_size)
    within = np.where(position < batch_size, position, 0)
    step = np.arange(window)[:, None]
    return np.where(step < num_steps, step * batch_size + within[None, :], 0)


def take_batch(block: Block, t: jax.Array, bucket_size: int) -> tuple[PyTree, jax.Array]:
    """The batch of step t of a block, and its mask."""
    take = functools.partial(jax.lax.dynamic_index_in_dim, index=t, keepdims=False)
    return jax.tree.map(take, block.batches), jnp.asarray(deal(bucket_size)) < block.batch_size


def check_block(block: Block, window: int, bucket_size: int) -> None:
    """Raises a ValueError where a block was not made for a window of this shape."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(block.batches)]
    if {shape[:2] for shape in shapes} != {(window, bucket_size)}:
        raise ValueError(
            f"data.train must be a block of shape [window, bucket_size, ...] = [{window}, "
            f"{bucket_size}, ...], got shapes {shapes}: ask for it with the sizes of this window."
        )


def peek(state: SamplerState, data: PyTree, position: jax.Array) -> PyTree:
    """The examples at int32[M] positions ahead of the sampler, a pytree of arrays [M, ...]."""
    n = num_rows(data)
    position = state.cursor + position
    rows = shuffled(state.key, state.epoch + position // n, position % n, n)
    return jax.tree.map(lambda x: jnp.asarray(x).at[rows].get(mode="promise_in_bounds"), data)


def deal(bucket_size: int) -> np.ndarray:
    """The example that each row of a bucket gets: its own number with the bits reversed.

    The B examples of a batch are then spread evenly: each half, quarter and so on of the rows holds
    its share of them, so that contiguous pieces of a batch can be compared with one another.

    Args:
      bucket_size: Number of rows.

    Returns:
      int32[bucket_size], a permutation that starts with 0.

    >>> deal(8).tolist()
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


def batch_mask(batch_size: jax.typing.ArrayLike, bucket_size: int) -> jax.Array:
    """Marks the first `batch_size` rows of a bucket, bool[bucket_size].

    >>> batch_mask(3, 4).tolist()
    [True, True, True, False]
    """
    return jnp.arange(bucket_size, dtype=jnp.int32) < jnp.asarray(batch_size)


def replace_padding(batch: PyTree, mask: jax.Array) -> PyTree:
    """Overwrites the masked rows with the first row.

    Masking the losses alone does not do: the gradient of ``where`` multiplies by zero, and zero
    times the NaN or infinity that garbage can produce further back is NaN.
    """

    def replace(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 1)), x, x[:1])

    return jax.tree.map(replace, batch)


def masked_mean(losses: jax.Array | WeightedLoss, mask: jax.Array) -> jax.Array:
    r"""The mean over the real examples, weighted where the loss is a :class:`WeightedLoss`.

    .. math:: F = \sum_i m_i w_i l_i \, / \, \sum_i m_i w_i

    Args:
      losses: float[M] or float[M, ...], or a WeightedLoss of two such arrays.
      mask: bool[M], True for a real example.

    Returns:
      float[]; 0 where there is no real example.

    *Guarantees*: a masked loss adds exactly zero, also where it is NaN or infinite.

    >>> float(masked_mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])))
    2.0
    """
    values, weights = _values_and_weights(losses, mask)
    total = jnp.sum(weights)
    # A loss of weight 0 may be anything: 0 * nan would be nan.
    values = jnp.where(weights == 0, 0, values)
    return jnp.sum(values * weights) / jnp.where(total == 0, 1, total)


def total_weight(losses: jax.Array | WeightedLoss, mask: jax.Array) -> jax.Array:
    """The weight of all real examples, which :func:`masked_mean` divides by; float[]."""
    return jnp.sum(_values_and_weights(losses, mask)[1])


def _values_and_weights(
    losses: jax.Array | WeightedLoss, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    values = losses.losses if isinstance(losses, WeightedLoss) else losses
    if values.ndim < 1 or values.shape[0] != mask.shape[0]:
        raise ValueError(
            f"The loss function must return one loss per example, shape ({mask.shape[0]},) or "
            f"({mask.shape[0]}, ...), got {values.shape}: leave the mean to the caller."
        )
    real = jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (values.ndim - 1)), values.shape)
    weights = losses.weights if isinstance(losses, WeightedLoss) else jnp.ones_like(values)
    # A count in bfloat16 is exact up to 256 only, and a sum in float16 overflows at 65504.
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    return values.astype(dtype), jnp.where(real, weights, 0).astype(dtype)
