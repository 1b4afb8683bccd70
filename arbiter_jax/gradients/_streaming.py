"""The gradient of micro-batches that arrive one at a time, in a number that is not known ahead.

The caller's loop holds the micro-batches; in `_accumulation`, one program loops over the groups of
a batch, whose number is known ahead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from arbiter_jax._numerics import at_least_float32, tree_where
from arbiter_jax.base import PyTree
from arbiter_jax.gradients._accumulation import Moments, or_one, with_statistics
from arbiter_jax.gradients._counted import Trainable, counted_leaves, only_counted
from arbiter_jax.gradients._estimators import real_parts
from arbiter_jax.gradients._masked import Gradient


class Accumulated(NamedTuple):
    """Sums over the micro-batches so far; see :func:`arbiter_jax.accumulate`."""

    value: jax.Array  # shape=(), dtype=float, mean loss
    grads: PyTree  # like the parameters, in at least float32, mean gradient
    weight: jax.Array  # shape=(), dtype=float, total weight of the examples
    num_examples: jax.Array  # shape=(), dtype=int32
    num_pieces: jax.Array  # shape=(), dtype=int32, gradients with an example that were added
    model_state: PyTree  # after the last of them
    old_model_state: PyTree  # before the first of them
    spread: Spread | None  # what statistics are made of, None where no rule reads any


class Spread(NamedTuple):
    """How the gradients of the pieces differ."""

    in_first: jax.Array  # shape=(), dtype=float, weight of the first halves
    first: PyTree  # their mean gradient, in at least float32
    squares: PyTree  # for every real number of the gradient, weighted sum of (g_j - mean)^2


def init_accumulated(params: PyTree, model_state: PyTree, statistics: bool) -> Accumulated:
    """The state of an accumulation before its first micro-batch."""
    zeros = jax.tree.map(lambda x: jnp.zeros_like(at_least_float32(x)), params)
    zero, none, spread = jnp.zeros((), float), jnp.zeros((), jnp.int32), None
    if statistics:
        spread = Spread(zero, zeros, real_parts(zeros))
    return Accumulated(zero, zeros, zero, none, none, model_state, model_state, spread)


def add_piece(
    state: Accumulated,
    gradient: Gradient,
    weight: jax.Array,
    num_examples: jax.Array,
    in_first: jax.Array | bool | None,
) -> Accumulated:
    """Adds the gradient of a micro-batch, called a piece, to what was accumulated.

    Args:
      state: The pieces before it.
      gradient: Its mean loss and mean gradient, and the model state after it.
      weight: float[], total weight of its examples.
      num_examples: int32[], their number; one without any changes nothing.
      in_first: Whether it belongs to the first half of the pieces; None if nothing is measured.
    """
    before, real = state.weight, weight > 0
    after = before + weight
    # The gradient of a piece without an example may be 0 / 0, in a BatchNorm.
    grads = jax.tree.map(lambda g: jnp.where(real, at_least_float32(g), 0), gradient.grads)
    share = weight / or_one(after)
    toward = lambda mean, x, share: mean + (x - mean) * share.astype(mean.dtype)
    mean = jax.tree.map(lambda m, g: toward(m, g, share), state.grads, grads)
    value = jnp.where(real, gradient.value, 0)
    spread: Any = state.spread
    if spread is not None and in_first is not None:
        weight_in_first = jnp.where(in_first, weight, 0)
        total = spread.in_first + weight_in_first
        share_of_first = weight_in_first / or_one(total)
        factor = jnp.where(before > 0, weight * after / or_one(before), 0)
        away = real_parts(jax.tree.map(jnp.subtract, grads, mean))
        spread = Spread(
            total,
            jax.tree.map(lambda m, g: toward(m, g, share_of_first), spread.first, grads),
            jax.tree.map(
                lambda s, x: s + factor.astype(s.dtype) * jnp.square(x), spread.squares, away
            ),
        )
    model_state = state.model_state
    if model_state is not None:
        model_state = tree_where(real, gradient.model_state, model_state)
    return state._replace(
        value=toward(state.value, value.astype(state.value.dtype), share),
        grads=mean,
        weight=after.astype(before.dtype),
        num_examples=state.num_examples + num_examples,
        num_pieces=state.num_pieces + real,
        model_state=model_state,
        spread=spread,
    )


def finished(state: Accumulated, params: PyTree, measures: bool, trainable: Trainable) -> Gradient:
    """The gradient of all micro-batches together, with statistics if `measures`.

    Args:
      state: All pieces.
      params: For the types of the gradient.
      measures: Whether statistics were kept and are wanted.
      trainable: As in :func:`value_grad_and_stats`.
    """
    grads = jax.tree.map(lambda g, p: g.astype(jnp.result_type(p)), state.grads, params)
    gradient = Gradient(state.value, grads, state.model_state)
    if not measures or state.spread is None:
        return gradient
    counts = counted_leaves(params, trainable)
    squares = only_counted(state.spread.squares, counts)
    moments = Moments(
        state.num_pieces,
        state.spread.in_first,
        only_counted(state.spread.first, counts),
        sum((jnp.sum(x) for x in jax.tree.leaves(squares)), start=jnp.zeros((), float)),
        squares,
    )
    return with_statistics(gradient, moments, state.grads, state.weight, state.num_examples, counts)
