"""What a window does in the program of the micro-batch: batches of any size, group by group."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from arbiter_jax import _validate
from arbiter_jax.base import MEASURED_SIGNALS, PyTree
from arbiter_jax.batching import Block, num_groups, num_rows, take_group
from arbiter_jax.gradients import (
    GradientFn,
    Groups,
    accumulated_gradient,
    accumulated_value_and_grad,
)
from arbiter_jax.training._signals import with_zero_statistics


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
            "sampling must be 'exact' where a batch is computed in micro-batches, got 'local': leave "
            "out one of the two."
        )


def steps_of_groups(block: Block, num_steps: Any) -> jax.Array:
    """How many steps to take from a block of groups, at most as many as it has room for."""
    leaf = jax.tree.leaves(block.batches)[0]
    held = leaf.shape[0] // num_groups(block.batch_size, leaf.shape[1])
    return jnp.minimum(num_steps, held)


def transformed(
    transform_batch: Callable[[jax.Array, PyTree], PyTree], step_key: jax.Array, batch: PyTree
) -> PyTree:
    """The batch that a user's function makes of a batch, which must keep its rows."""
    rows = num_rows(batch)
    # `gradients` folds the piece index 0, 1, ... into this key; 2**32 - 1 cannot collide.
    batch = transform_batch(jax.random.fold_in(step_key, 2**32 - 1), batch)
    if num_rows(batch, "the batch that transform_batch returns") != rows:
        raise ValueError(
            f"transform_batch must return a batch of the {rows} rows that it is given, "
            f"got {num_rows(batch)}: the mask marks them one by one."
        )
    return batch


def gradient_fns_of_groups(
    train: PyTree,
    micro_batch_size: int,
    transform_batch: Callable[[jax.Array, PyTree], PyTree] | None,
    *,
    loss_fn: Any,
    gradient_fn: GradientFn | None,
    signals: frozenset[str],
    trainable: PyTree,
    has_aux: bool,
) -> dict[bool, GradientFn]:
    """Whether a rule is due -> the gradient function of such a step.

    They take a sampler and the number of the step for the batch, and its size for the mask. Where
    noise is measured, each group is computed in two halves, so that there are always two pieces.
    """

    def over_groups(function: GradientFn, num_parts: int) -> GradientFn:
        def fn(params, drawn, batch_size, model_state=None, key=None):
            sampler, step = drawn

            def take(j, key):
                batch, mask = take_group(
                    train, sampler, step, batch_size, micro_batch_size, j, num_parts
                )
                if transform_batch is not None:
                    batch = transformed(transform_batch, jax.random.fold_in(key, j), batch)
                return batch, mask

            n = num_parts * num_groups(batch_size, micro_batch_size)
            return function(params, Groups(take, n), batch_size, model_state, key)

        return fn

    if gradient_fn is not None:
        given = over_groups(accumulated_gradient(gradient_fn), 1)
        return {True: given, False: given}
    accumulated: Any = functools.partial(accumulated_value_and_grad, loss_fn, has_aux=has_aux)
    plain = over_groups(accumulated(), 1)
    if not signals & MEASURED_SIGNALS:
        return {True: plain, False: plain}
    full = accumulated(statistics=True, trainable=trainable)
    return {
        True: over_groups(full, min(2, micro_batch_size)),
        False: with_zero_statistics(plain),
    }
