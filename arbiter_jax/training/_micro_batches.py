"""What a window does in the program of the micro-batch: batches of any size, group by group."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from arbiter_jax import _validate
from arbiter_jax.batching import Block
from arbiter_jax.batching._groups import num_groups


def check_micro_batch_size(micro_batch_size: Any, bucket_size: int) -> None:
    """Raises a ValueError if a window of this bucket cannot have these micro-batches."""
    if micro_batch_size is None:
        return
    if isinstance(micro_batch_size, str):
        raise ValueError(
            "micro_batch_size must be a power of two >= 1 or None for one window, got "
            f"{micro_batch_size!r}: aj.fit finds the size that 'auto' stands for."
        )
    micro_batch_size = _validate.power_of_two(micro_batch_size=micro_batch_size)
    if bucket_size > micro_batch_size:
        raise ValueError(
            f"bucket_size must be at most micro_batch_size = {micro_batch_size}, got {bucket_size}: "
            "pass the micro_batch_size to next_window as well."
        )


def check_sampling(sampling: Any, micro_batch_size: Any) -> None:
    """Raises a ValueError if batches cannot be drawn like this."""
    _validate.one_of(("exact", "local"), sampling=sampling)
    if sampling == "local" and micro_batch_size is not None:
        raise ValueError(
            "sampling must be 'exact' if a batch is computed in micro-batches, got 'local': leave "
            "out one of the two."
        )


def steps_of_groups(block: Block, num_steps: Any) -> jax.Array:
    """How many steps to take from a block of groups, at most as many as it has room for."""
    leaf = jax.tree.leaves(block.batches)[0]
    held = leaf.shape[0] // num_groups(block.batch_size, leaf.shape[1])
    return jnp.minimum(num_steps, held)
