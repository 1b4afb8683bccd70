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

    batch_size: jax.Array  # shape=(), dtype=int32, in examples
    min_batch_size: jax.Array  # shape=(), dtype=int32, of the rule inside
    max_batch_size: jax.Array  # shape=(), dtype=int32, of the rule inside
    rule: Any  # state of the rule inside
    last_batch_size: jax.Array  # shape=(), dtype=int32, applied at the last step
    num_steps: jax.Array  # shape=(), dtype=int32, steps with that size so far


def hysteresis(
    rule: optax.GradientTransformation,
    *,
    dwell: int = 50,
    max_factor: float = 2.0,
    tolerance: float = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""Steadies a rule: waits between changes, ignores small ones, takes large ones in parts.

    With b the applied batch size and p what the rule inside proposes,

    .. math::
      B = \begin{cases}
        b & \text{if b has been applied for less than the dwell time} \\
        b & \text{if } b / (1 + \tau) \le p \le b (1 + \tau) \\
        clip(p, \lceil b / a \rceil, \lfloor a b \rfloor) & \text{otherwise}
      \end{cases}

    Args:
      rule: Any batch-size rule, or a chain that holds one.
      dwell: Least number of steps for which a size is applied, an integer >= 1.
      max_factor: a, the largest change at once, > 1; or one example, where that is more.
      tolerance: tau, relative changes up to which are ignored, >= 0.

    Returns:
      A transformation that returns what the rule inside returns and whose `update` takes the same
      signals. The applied size is the extra argument `batch_size`; without it every decision counts
      as applied. The rule inside gets that size as well.

    Raises:
      ValueError: If an argument is out of its range, or `init` finds no rule inside, or several.

    *Guarantees*:
      * Updates unchanged: they pass through as they are.
      * Stays in range: the size lies between the applied size and what the rule inside proposes.
      * One factor per change: a size is at most a factor (or one example) from the applied one.
      * Dwells: a size is applied for at least `dwell` steps.

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
    inner = _rule.checked_rule(rule)
    least_steps = _validate.int32(dwell=dwell, minimum=1)
    max_factor = _validate.greater(1, max_factor=max_factor)
    band = 1 + _validate.non_negative(tolerance=tolerance)

    def init_fn(params):
        inner_state = inner.init(params)
        decision = base.the_rule(base.requests(inner_state), "rule")
        size = decision.batch_size
        return HysteresisState(
            # Copies: two fields that share a buffer cannot both be donated.
            batch_size=jnp.array(size),
            min_batch_size=jnp.array(getattr(decision, "min_batch_size", 1), jnp.int32),
            max_batch_size=jnp.array(
                getattr(decision, "max_batch_size", _rule.UNLIMITED), jnp.int32
            ),
            rule=inner_state,
            last_batch_size=jnp.array(size),
            num_steps=_rule.int32(),
        )

    def update_fn(updates, state, params=None, *, batch_size=None, **extra_args):
        if not {"updates_only", "probe"}.isdisjoint(extra_args):
            # The chain inside may hold an optimizer.
            updates, inner_state = inner.update(updates, state.rule, params, **extra_args)
            return updates, state._replace(rule=inner_state)
        applied = base.applied_batch_size(batch_size, state)
        updates, inner_state = inner.update(
            updates, state.rule, params, batch_size=applied, **extra_args
        )
        proposal = base.get_batch_size(inner_state)
        stays = applied == state.last_batch_size
        num_steps = jnp.where(stays, optax.safe_increment(state.num_steps), 1)
        near = (proposal <= applied * band) & (proposal * band >= applied)
        # Rounded toward the applied size, but never so far that a small size could not move.
        lowest = jnp.minimum(jnp.ceil(applied / max_factor).astype(jnp.int32), applied - 1)
        highest = jnp.maximum(jnp.floor(applied * max_factor).astype(jnp.int32), applied + 1)
        moves = (num_steps >= least_steps) & ~near
        return updates, state._replace(
            batch_size=jnp.where(moves, jnp.clip(proposal, lowest, highest), applied),
            rule=inner_state,
            last_batch_size=applied,
            num_steps=num_steps,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
