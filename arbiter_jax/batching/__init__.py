"""From a batch size to a masked batch: buckets, masks, samplers and blocks."""

from arbiter_jax.batching._blocks import (
    Block,
    BlockSource,
    block_batch,
    block_rows,
    check_block,
    check_next_block,
    num_real_rows,
)
from arbiter_jax.batching._buckets import all_buckets, batch_of_the_rest, next_bucket
from arbiter_jax.batching._groups import block_shape, group_rows, num_groups, take_group
from arbiter_jax.batching._masking import (
    batch_mask,
    check_losses,
    masked_mean,
    num_rows,
    replace_padding,
    total_weight,
)
from arbiter_jax.batching._sampling import (
    SamplerState,
    advance,
    bit_reversed,
    examples_ahead,
    init_sampler,
    sample_batch,
)

__all__ = [
    "Block",
    "BlockSource",
    "SamplerState",
    "advance",
    "all_buckets",
    "batch_mask",
    "batch_of_the_rest",
    "bit_reversed",
    "block_batch",
    "block_rows",
    "block_shape",
    "check_block",
    "check_losses",
    "check_next_block",
    "examples_ahead",
    "group_rows",
    "init_sampler",
    "masked_mean",
    "next_bucket",
    "num_groups",
    "num_real_rows",
    "num_rows",
    "replace_padding",
    "sample_batch",
    "take_group",
    "total_weight",
]
