"""The batch of a step of a window: from arrays or a block, whole or group by group."""

from __future__ import annotations

from typing import Any

import jax

from arbiter_jax.base import PyTree
from arbiter_jax.batching import Block, SamplerState, sample_batch
from arbiter_jax.batching._blocks import block_batch
from arbiter_jax.batching._masking import num_rows
from arbiter_jax.batching._sampling import advance, sample_own_batch
from arbiter_jax.batching._shared_buckets import sample_shared


def draw(
    sampler: SamplerState,
    train: PyTree,
    t: jax.Array,
    batch_size: jax.Array,
    bucket_size: int,
    *,
    own_bucket_size: jax.Array | None,
    in_groups: bool,
    sampling: str,
) -> tuple[SamplerState, PyTree, jax.Array]:
    """Draws the batch of step `t` of a window.

    Args:
      sampler: State of the sampler before the step.
      train: Training data, a pytree of arrays or a :class:`Block`.
      t: int32[], the step within the window.
      batch_size: int32[], examples of the batch.
      bucket_size: Rows of the batch, or of one of its groups.
      own_bucket_size: int32[], the bucket that this seed alone would have; None for one run.
      in_groups: Whether its groups are drawn later, where their gradients are computed.
      sampling: "exact" or "local"; see :func:`run_window`.

    Returns:
      (sampler, batch, mask); for a batch in groups what these are drawn of, ``(sampler, (sampler
      before, t), batch_size)``.
    """
    if in_groups:
        drawn = sampler, t
        if not isinstance(train, Block):
            sampler = advance(sampler, batch_size, num_rows(train))
        return sampler, drawn, batch_size
    if isinstance(train, Block):
        return sampler, *block_batch(train, t, bucket_size)
    if own_bucket_size is not None:
        return sample_shared(sampler, train, batch_size, own_bucket_size, bucket_size)
    sample: Any = sample_own_batch if sampling == "local" else sample_batch
    return sample(sampler, train, batch_size, bucket_size)
