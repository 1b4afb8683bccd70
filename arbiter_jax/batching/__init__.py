"""From a batch size to a masked batch: buckets, masks, samplers and blocks."""

from arbiter_jax.batching._batches import Batches, MaskedBatch, batches
from arbiter_jax.batching._blocks import Block, BlockSource, block_rows
from arbiter_jax.batching._buckets import all_buckets, next_bucket
from arbiter_jax.batching._groups import group_rows
from arbiter_jax.batching._host_blocks import HostBlocks, host_blocks
from arbiter_jax.batching._masking import batch_mask, masked_mean

# Each `as` below marks a helper that other packages of the library import from here.
from arbiter_jax.batching._masking import check_integers as check_integers
from arbiter_jax.batching._masking import num_rows as num_rows
from arbiter_jax.batching._masking import replace_padding as replace_padding
from arbiter_jax.batching._masking import total_weight as total_weight
from arbiter_jax.batching._rows import bit_reversed, interleaved
from arbiter_jax.batching._rows import num_data_devices as num_data_devices
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
