"""Helpers that the rules share: ratios of noisy estimates, rounding into the range, skipping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _numerics, base

State = TypeVar("State", bound=tuple)

UNLIMITED = 2**30  # the largest batch size of a rule that is given none


def transformation(
    init_fn: Callable[..., Any],
    update_state: Callable[..., Any],
    limits: tuple[int | jax.Array, int | jax.Array],
) -> optax.GradientTransformationExtraArgs:
    """A batch-size rule as an optax transformation, which returns the updates unchanged.

    Args:
      init_fn: ``init_fn(params) -> state``.
      update_state: ``update_state(state, *, updates, params, **signals) -> state``. It is not
        called if the caller wants `updates_only`, or probes how the chain responds to a gradient.
      limits: The smallest and the largest batch size. Where they are arrays, as in
        `optax.inject_hyperparams`, they may differ from those of the last step.
    """
    low, high = limits

    def update_fn(updates, state, params=None, *, updates_only=None, probe=None, **signals):
        if updates_only is not None or probe is not None:
            return updates, state
        state = update_state(state, updates=updates, params=params, **signals)
        if isinstance(low, jax.Array) or isinstance(high, jax.Array):
            size = jnp.clip(state.batch_size, low, high)
            state = state._replace(**sizes(low, high, size))
        return updates, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def measured_at_interval(
    state: Any,
    signals: dict[str, Any],
    interval: int | jax.Array,
    measured: Callable[[Any, base.Update], Any],
) -> Any:
    """The state of a rule after a step, of which it measures every n-th; fields as in `base`.

    Args:
      state: Before the step. Its `signals_due` is None if the interval is the Python int 1.
      signals: Those that say what was applied and measured; see
        :func:`arbiter_jax.base.applied_update` and :func:`arbiter_jax.base.measures_now`.
      interval: n.
      measured: ``measured(state, update) -> state`` adds a measurement to the state of a counted step.
    """
    made = signals.get("signals_made")
    update = base.applied_update(state, **signals)
    num_steps: Any = optax.safe_increment(state.num_steps)
    counted = state._replace(ledger=update.ledger, num_steps=num_steps)
    if state.signals_due is None:
        return measured(counted, update)
    counted = counted._replace(signals_due=num_steps % interval == 0)
    now = base.measures_now(state.signals_due, made)
    if now is False:
        return counted
    new = measured(counted, update)
    return new if now is True else _numerics.tree_where(now, new, counted)


def sizes(
    low: int | jax.Array, high: int | jax.Array, start: int | jax.Array
) -> dict[str, jax.Array]:
    """The fields of a rule's state that say its decision and its range."""
    # Copies: two fields that share a buffer cannot both be donated.
    return {
        "batch_size": jnp.array(start, jnp.int32),
        "min_batch_size": jnp.array(low, jnp.int32),
        "max_batch_size": jnp.array(high, jnp.int32),
    }


def zero() -> jax.Array:
    """A zero of the default float type, where an average starts."""
    return jnp.zeros((), float)


def int32(value: int | jax.Array = 0) -> jax.Array:
    """An int32 scalar: a size or a count."""
    return jnp.asarray(value, jnp.int32)


def safe_ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """The quotient; infinite for a denominator <= 0, nan if the numerator is not > 0 either.

    Unbiased estimates of a square can be negative. One that is still negative after averaging means
    that the noise hides the signal, and their ratio cannot be measured.
    """
    unmeasurable = jnp.where(numerator > 0, jnp.inf, jnp.nan)
    return jnp.where(denominator > 0, numerator / denominator, unmeasurable)


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
    high: int | jax.Array,
    rounding: Callable[[jax.Array], jax.Array] = jnp.round,
) -> jax.Array:
    """A real number (infinite allowed, nan not) as an int32 of [low, high]."""
    size = rounding(jnp.clip(value, low, high)).astype(jnp.int32)
    return jnp.clip(size, low, high)  # again: floats cannot hold every integer beyond 2^24


def checked_rule(rule: Any) -> optax.GradientTransformationExtraArgs:
    """The rule inside a wrapper, or a ValueError if it is not a transformation."""
    if not isinstance(rule, optax.GradientTransformation):
        raise ValueError(f"rule must be an optax gradient transformation, got {rule!r}.")
    return optax.with_extra_args_support(rule)
