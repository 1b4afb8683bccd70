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
from arbiter_jax.batching._blocks import (
    Block,
    BlockSource,
    block_batch,
    block_rows,
    check_block,
    check_next_block,
    interleave_block,
    num_real_rows,
)
from arbiter_jax.batching._buckets import all_buckets, batch_of_the_rest, next_bucket
from arbiter_jax.batching._groups import block_shape, group_rows, num_groups, take_group
from arbiter_jax.batching._host_blocks import HostBlocks, host_blocks
from arbiter_jax.batching._loaders import is_loader
from arbiter_jax.batching._masking import (
    batch_mask,
    check_integers,
    check_losses,
    masked_mean,
    num_rows,
    replace_padding,
    total_weight,
)
from arbiter_jax.batching._rows import (
    DATA_AXIS,
    bit_reversed,
    check_data_axis,
    interleaved,
    is_split,
    num_data_devices,
    shard_rows,
)
from arbiter_jax.batching._sampling import (
    SamplerState,
    advance,
    examples_ahead,
    init_sampler,
    parts_ahead,
    sample_batch,
    sample_own_batch,
)
from arbiter_jax.batching._shared_buckets import halves_apart, sample_shared
from arbiter_jax.batching._take import read_examples, take

__all__ = [
    "DATA_AXIS",
    "Batches",
    "Block",
    "BlockSource",
    "HostBlocks",
    "MaskedBatch",
    "SamplerState",
    "advance",
    "all_buckets",
    "batch_mask",
    "batch_of_the_rest",
    "batches",
    "bit_reversed",
    "block_batch",
    "block_rows",
    "block_shape",
    "check_block",
    "check_data_axis",
    "check_integers",
    "check_losses",
    "check_next_block",
    "examples_ahead",
    "group_rows",
    "halves_apart",
    "host_blocks",
    "init_sampler",
    "interleave_block",
    "interleaved",
    "is_loader",
    "is_split",
    "masked_mean",
    "next_bucket",
    "num_data_devices",
    "num_groups",
    "num_real_rows",
    "num_rows",
    "parts_ahead",
    "read_examples",
    "replace_padding",
    "sample_batch",
    "sample_own_batch",
    "sample_shared",
    "shard_rows",
    "take",
    "take_group",
    "total_weight",
]
