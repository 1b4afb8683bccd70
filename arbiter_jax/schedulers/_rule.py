"""What every rule shares: beyond measure or not, rounding into the range, skipping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _numerics

State = TypeVar("State", bound=tuple)

GRAD_STATS = "The engine supplies it; in a loop of your own, use arbiter_jax.gradient_stats."
VALUE = "It is the mean loss of the batch, a scalar."


def zero() -> jax.Array:
    """A zero of the default float type, where an average starts."""
    return jnp.zeros((), float)


def int32(value: int = 0) -> jax.Array:
    """An int32 scalar: a size or a count."""
    return jnp.asarray(value, jnp.int32)


def safe_ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """The quotient; infinite for a denominator <= 0, nan if the numerator is not > 0 either.

    Unbiased estimates of a square can be negative. One that is still negative after averaging means
    that the noise hides the signal, and the ratio of the two is beyond measure.
    """
    beyond = jnp.where(numerator > 0, jnp.inf, jnp.nan)
    return jnp.where(denominator > 0, numerator / denominator, beyond)


def is_informative(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Whether a sample may enter an average: finite, and not 0 / 0."""
    return (
        jnp.isfinite(numerator)
        & jnp.isfinite(denominator)
        & ((numerator != 0) | (denominator != 0))
    )


def to_size(
    value: jax.Array,
    low: int | jax.Array,
    high: int,
    rounding: Callable[[jax.Array], jax.Array] = jnp.round,
) -> jax.Array:
    """A real number (infinite allowed, nan not) as an int32 of [low, high]."""
    size = rounding(jnp.clip(value, low, high)).astype(jnp.int32)
    return jnp.clip(size, low, high)  # again: floats cannot hold every integer beyond 2^24


def update_or_skip(usable: jax.Array, new: State, state: Any) -> State:
    """The new state, or the old one with one more skipped step.

    Args:
      usable: bool[], whether this step's signals say anything.
      new: State after this step; taken only if every number in it is finite.
      state: State before it, with a field `num_skipped`.
    """
    skipped = state._replace(num_skipped=optax.safe_increment(state.num_skipped))
    return _numerics.tree_where(usable & _numerics.all_finite(new), new, skipped)
