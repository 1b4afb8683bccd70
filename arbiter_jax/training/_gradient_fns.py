"""The gradient functions of a window: plain ones, and those that measure where a rule is due."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arbiter_jax.base import MEASURED_SIGNALS, LossFn, PyTree
from arbiter_jax.batching._groups import num_groups, take_group
from arbiter_jax.batching._masking import num_rows
from arbiter_jax.gradients import GradientFn, masked_value_and_grad, value_grad_and_stats
from arbiter_jax.gradients._accumulation import (
    Groups,
    accumulated_gradient,
    accumulated_value_and_grad,
)
from arbiter_jax.training._signals import with_zero_statistics


def gradient_fns(
    loss_fn: LossFn | None,
    given: GradientFn | None,
    signals: frozenset[str],
    trainable: PyTree | None,
    has_aux: bool,
    sampled: bool = True,
) -> dict[bool, GradientFn]:
    """Whether a rule is due -> the gradient function of such a step.

    `sampled` batches have their rows dealt out already, and padding that repeats a real example.
    """
    if given is not None:
        # Traced once, for its shapes as well as for the steps.
        traced_once = jax.jit(given)
        return {True: traced_once, False: traced_once}
    function: Any = loss_fn
    plain = masked_value_and_grad(function, sampled=sampled, has_aux=has_aux)
    if has_aux:  # traced once, as above
        plain = jax.jit(plain)
    if not signals & MEASURED_SIGNALS:
        return {True: plain, False: plain}
    full = value_grad_and_stats(function, sampled=sampled, trainable=trainable, has_aux=has_aux)
    full = jax.jit(full) if has_aux else full
    return {True: full, False: with_zero_statistics(plain)}


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


def gradient_fns_of_batch(
    loss_fn: Any,
    micro_batch_size: int | None,
    signals: frozenset[str],
    moved: PyTree | None,
    has_aux: bool,
) -> dict[bool, GradientFn]:
    """As :func:`gradient_fns`, for a user's batches, whole or in groups of at most that many rows."""
    if micro_batch_size is None:
        return gradient_fns(loss_fn, None, signals, moved, has_aux, sampled=False)
    of_groups = functools.partial(_over_groups, micro_batch_size)
    plain = of_groups(accumulated_value_and_grad(loss_fn, has_aux=has_aux), 1)
    if not signals & MEASURED_SIGNALS:
        return {True: plain, False: plain}
    full = accumulated_value_and_grad(loss_fn, statistics=True, trainable=moved, has_aux=has_aux)
    # Each group in two halves, so that there are always two pieces.
    return {True: of_groups(full, 2), False: with_zero_statistics(plain)}


def _over_groups(micro_batch_size: int, function: GradientFn, num_parts: int) -> GradientFn:
    """A gradient function of a whole batch, from one of :class:`Groups` of at most so many rows."""

    def fn(params, batch, mask, model_state=None, key=None):
        length = mask.shape[0]
        group_size = min(micro_batch_size, length)
        rows = -(-group_size // num_parts)
        if isinstance(
            mask, np.ndarray
        ):  # no padding: a known number, so that the loop has a gradient
            n = num_parts * -(-length // group_size)
            mask = jnp.asarray(mask)
        else:  # up to the last real row: groups of padding alone would cost as much as others
            end = jnp.max(jnp.where(mask, jnp.arange(1, length + 1, dtype=jnp.int32), 1))
            n = num_parts * num_groups(end, group_size)
        first = jnp.argmax(mask)

        def take(j, key):
            del key
            # Dealt out in turn: where the real examples come first, every group gets its share.
            index = j + n * jnp.arange(rows)
            real = (index < length) & mask[jnp.minimum(index, length - 1)]
            index = jnp.where(real, index, first)
            return jax.tree.map(lambda x: jnp.asarray(x)[index], batch), real

        num_examples = jnp.sum(mask, dtype=jnp.int32)
        return function(params, Groups(take, n), num_examples, model_state, key)

    return fn
