"""From a batch size to a masked batch: buckets, masks, samplers and blocks.

A compiled program needs arrays of a fixed shape, but the batch size may change at every step. A
batch is therefore stored in a *bucket*, whose number of rows is the next power of two, and a *mask*
is True for the rows that are real examples. The other rows are padding: they repeat a real example
and change no bit of a loss or gradient. So sizes from 8 to 512 compile at most seven programs.

A sampler draws batches from arrays on the device; a *block* holds the batches of a whole window and
comes from the host; *groups* are the micro-batches of a batch that is larger than one bucket.

>>> import jax, jax.numpy as jnp
>>> from arbiter_jax import batching
>>> bucket_size = batching.next_bucket(5)
>>> sampler = batching.init_sampler(jax.random.key(0))
>>> sampler, batch, mask = batching.sample_batch(sampler, jnp.arange(6.0), 5, bucket_size)
>>> batch.shape, int(mask.sum()), float(batching.masked_mean(jnp.ones(8), mask))
((8,), 5, 1.0)
"""

from arbiter_jax.batching._batches import Batches, MaskedBatch, batches
from arbiter_jax.batching._blocks import Block, BlockSource, block_rows
from arbiter_jax.batching._buckets import all_buckets, next_bucket
from arbiter_jax.batching._groups import group_rows
from arbiter_jax.batching._host_blocks import HostBlocks, host_blocks
from arbiter_jax.batching._masking import batch_mask, masked_mean

# Each `as` below marks a helper that other packages of the library import from here.
from arbiter_jax.batching._rows import bit_reversed, interleaved
from arbiter_jax.batching._sampling import SamplerState, init_sampler, sample_batch
from arbiter_jax.batching._take import take

__all__ = [
    "Batches",
    "Block",
    "BlockSource",
    "HostBlocks",
    "MaskedBatch",
    "SamplerState",
    "all_buckets",
    "batch_mask",
    "batches",
    "bit_reversed",
    "block_rows",
    "group_rows",
    "host_blocks",
    "init_sampler",
    "interleaved",
    "masked_mean",
    "next_bucket",
    "sample_batch",
    "take",
]
