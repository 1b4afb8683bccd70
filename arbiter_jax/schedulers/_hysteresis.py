"""A wrapper that steadies any batch-size rule: it waits, ignores small changes, splits large ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _validate, base
from arbiter_jax.schedulers import _rule


class HysteresisState(NamedTuple):
    """State of :func:`hysteresis`."""

    batch_size: jax.Array  # shape=(), dtype=int32
    rule: Any  # state of the rule inside
    last_batch_size: jax.Array  # shape=(), dtype=int32, size in force at the last step
    num_steps: jax.Array  # shape=(), dtype=int32, steps with that size so far


def hysteresis(
    rule: optax.GradientTransformation,
    *,
    dwell: int = 50,
    max_factor: float = 2.0,
    tolerance: float = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""Steadies a rule: it waits, ignores small changes, and takes large ones in parts.

    With b the size in force and p what the rule inside proposes,

    .. math::
      B = \begin{cases}
        b & \text{if b has been in force for less than the dwell time} \\
        b & \text{if } b / (1 + \tau) \le p \le b (1 + \tau) \\
        clip(p, \lceil b / a \rceil, \lfloor a b \rfloor) & \text{else}
      \end{cases}

    Args:
      rule: Any batch-size rule, or a chain that holds one.
      dwell: Steps that a size stays in force at least, an integer >= 1.
      max_factor: a, the largest change at once, > 1; or one example, where that is more.
      tolerance: tau, relative changes up to which are ignored, >= 0.

    Returns:
      A transformation that returns what the rule inside returns and whose `update` takes the same
      signals. The size in force is the extra argument `batch_size`; without it every decision
      counts as applied. The rule inside is told that size.

    Raises:
      ValueError: If an argument is out of its range, or `init` finds no rule inside, or several.

    *Guarantees*:
      * Updates unchanged: they are returned as they came.
      * Stays in range: the size lies between the size in force and what the rule inside proposes.
      * One factor per change: a size is at most a factor (or one example) from the one in force.
      * Dwells: a size stays in force for `dwell` steps at least.

    >>> import arbiter_jax as aj, optax
    >>> rule = aj.schedulers.from_schedule(lambda step: 8 + 92 * (step > 0))
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.hysteresis(rule, dwell=2))
    >>> state, sizes = tx.init({"w": 0.0}), []
    >>> for _ in range(6):
    ...     sizes.append(int(aj.get_batch_size(state)))
    ...     _, state = tx.update({"w": 1.0}, state)
    >>> sizes
    [8, 8, 16, 16, 32, 32]
    """
    inner = _checked(rule)
    least_steps = _validate.integer(dwell=dwell, minimum=1)
    if _validate.positive(max_factor=max_factor) <= 1:
        raise ValueError(f"max_factor must be > 1, got {max_factor!r}.")
    band = 1 + _validate.non_negative(tolerance=tolerance)

    def init_fn(params):
        state = inner.init(params)
        # Copied: two fields that share a buffer cannot both be donated.
        size = jnp.array(base.get_batch_size(state))
        return HysteresisState(
            batch_size=size,
            rule=state,
            last_batch_size=jnp.array(size),
            num_steps=_rule.int32(),
        )

    def update_fn(updates, state, params=None, *, batch_size=None, **extra_args):
        in_force = base.applied_batch_size(batch_size, state)
        updates, inner_state = inner.update(
            updates, state.rule, params, batch_size=in_force, **extra_args
        )
        proposal = base.get_batch_size(inner_state)
        stays = in_force == state.last_batch_size
        num_steps = jnp.where(stays, optax.safe_increment(state.num_steps), 1)
        near = (proposal <= in_force * band) & (proposal * band >= in_force)
        # Rounded toward the size in force, but never so far that a small size could not move.
        lowest = jnp.minimum(jnp.ceil(in_force / max_factor).astype(jnp.int32), in_force - 1)
        highest = jnp.maximum(jnp.floor(in_force * max_factor).astype(jnp.int32), in_force + 1)
        moves = (num_steps >= least_steps) & ~near
        return updates, HysteresisState(
            batch_size=jnp.where(moves, jnp.clip(proposal, lowest, highest), in_force),
            rule=inner_state,
            last_batch_size=in_force,
            num_steps=num_steps,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _checked(rule: Any) -> optax.GradientTransformationExtraArgs:
    if not isinstance(rule, optax.GradientTransformation):
        raise ValueError(f"rule must be an optax gradient transformation, got {rule!r}.")
    return optax.with_extra_args_support(rule)
