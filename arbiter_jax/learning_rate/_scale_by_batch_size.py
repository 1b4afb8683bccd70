"""A learning rate proportional to a power of the batch size."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _validate
from arbiter_jax._count import Count, as_count
from arbiter_jax._numerics import scale_updates
from arbiter_jax.base import applied_update, require


class ScaleByBatchSizeState(NamedTuple):
    """State of :func:`scale_by_batch_size`."""

    learning_rate: jax.Array  # shape=(), dtype=float32, the factor of the last step
    ledger: Count  # training examples up to the last update, if they are counted; see base


def relative_size(batch_size: Any, reference: int) -> jax.Array:
    """The batch size over the reference, float32[]."""
    # A window may contain steps without examples; their updates are 0 in any case.
    return jnp.maximum(jnp.asarray(batch_size), 1).astype(jnp.float32) / reference


def scale_by_batch_size(
    reference: int, exponent: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the updates with the batch size, :math:`\Delta w \to (B / B_0)^p \Delta w`.

    Args:
      reference: B_0, the batch size at which the updates stay unchanged, an integer >= 1.
      exponent: p, in [-2, 2]; 1 is the linear rule (SGD), 0.5 the square-root rule (Adam).

    Returns:
      A transformation to chain after the optimizer. It reads `batch_size`, int32[], the number of
      examples of the step, which `fit` and `run_window` pass. Inside `optax.MultiSteps` B is the
      number of examples of all calls that an update averages, as far as `num_examples`, the
      training examples before this step, is passed as well.

    Raises:
      ValueError: If an argument is outside its range.
      TypeError: If ``update`` is called without `batch_size`.

    Reference:
      Goyal et al., `Accurate, Large Minibatch SGD <https://arxiv.org/abs/1706.02677>`_, 2017.

    *Guarantees*:
      * The reference is neutral: at B = B_0 the updates are returned unchanged.

    >>> import arbiter_jax as aj, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.scale_by_batch_size(64, exponent=0.5))
    >>> updates, _ = tx.update({"w": 1.0}, tx.init({"w": 0.0}), batch_size=256)
    >>> print(f"{updates['w']:.1f}")
    -0.2
    """
    reference = _validate.int32(reference=reference, minimum=1)
    exponent = _validate.in_range(-2, 2, exponent=exponent)

    def init_fn(params) -> Any:  # optax's own type of a state knows arrays alone
        del params
        return ScaleByBatchSizeState(learning_rate=jnp.ones((), jnp.float32), ledger=as_count(0))

    def update_fn(updates, state, params=None, *, batch_size=None, probe=None, **extra_args) -> Any:
        del params
        if probe is not None:
            return updates, state
        require("scale_by_batch_size", batch_size=batch_size)
        update = applied_update(state, batch_size=batch_size, **extra_args)
        factor = relative_size(update.size, reference) ** exponent
        factor = factor.astype(jnp.float32)
        return scale_updates(updates, factor), ScaleByBatchSizeState(factor, update.ledger)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
