"""One batch size for the whole run: the baseline, and what a loop without a rule would use."""

from __future__ import annotations

from typing import NamedTuple

import jax
import optax

from arbiter_jax import _validate
from arbiter_jax.schedulers import _rule


class ConstantState(NamedTuple):
    """State of :func:`constant`."""

    batch_size: jax.Array  # shape=(), dtype=int32, in examples
    min_batch_size: jax.Array  # shape=(), dtype=int32
    max_batch_size: jax.Array  # shape=(), dtype=int32


def constant(
    batch_size: int | None = None,
    *,
    min_batch_size: int = 1,
    max_batch_size: int = _rule.UNLIMITED,
    initial_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the same batch size at every step, :math:`B_t = B`.

    Args:
      batch_size: B, in examples, an integer of [min_batch_size, max_batch_size].
      min_batch_size: Smallest batch size, an integer >= 1. It and the next only check B.
      max_batch_size: Largest batch size, an integer >= min_batch_size.
      initial_batch_size: B by the name that it has in every other rule, so that rules swap in one
        line. Give one of the two.

    Returns:
      A transformation that returns the updates unchanged.

    Raises:
      ValueError: If B is out of range, or given twice, or not at all.

    *Guarantees*:
      * Updates unchanged: they pass through as they are.
      * Stays in range: the size is an integer of [min_batch_size, max_batch_size].

    >>> import arbiter_jax as aj, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(64))
    >>> int(aj.get_batch_size(tx.init({"w": 0.0})))
    64
    """
    if (batch_size is None) == (initial_batch_size is None):
        raise ValueError(
            "constant needs one of batch_size and initial_batch_size, got "
            f"batch_size={batch_size!r} and initial_batch_size={initial_batch_size!r}."
        )
    low, high, size = _validate.batch_size_range(min_batch_size, max_batch_size, initial_batch_size)
    if batch_size is not None:
        _, _, size = _validate.batch_size_range(low, high, batch_size, name="batch_size")
    changes = any(isinstance(x, jax.Array) for x in (batch_size, initial_batch_size))

    def init_fn(params):
        del params
        return ConstantState(**_rule.sizes(low, high, size))

    def update_state(state, **signals):
        del signals
        # An array may be another one at the next step, in `optax.inject_hyperparams`.
        return state._replace(batch_size=_rule.int32(size)) if changes else state

    return _rule.transformation(init_fn, update_state, (low, high))
