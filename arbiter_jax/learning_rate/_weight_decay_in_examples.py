"""Weight decay that takes the same off the weights per example at any batch size."""

from __future__ import annotations

from typing import Any

import jax
import optax

from arbiter_jax import _validate
from arbiter_jax.learning_rate._memory_in_examples import batch_size_ratio


def add_decayed_weights_in_examples(
    weight_decay: float, batch_size: int, *, exponent: float = 1.0, mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Decoupled weight decay that takes the same off the weights per example at any batch size.

    .. math:: \Delta w = u + \lambda (B / B_0)^{1 - p} w

    for a rate that goes as :math:`(B / B_0)^p` and is applied after this.

    Args:
      weight_decay: lambda, at B_0, >= 0.
      batch_size: B_0, an integer >= 1.
      exponent: p, the power of the batch size in the rate, in [0, 2].
      mask: Which parameters decay, as in `optax.add_decayed_weights`.

    Returns:
      A transformation that reads `batch_size` and the parameters.

    Raises:
      ValueError: If an argument is out of its range.
      TypeError: If `update` is called without `batch_size`.

    >>> import jax.numpy as jnp
    >>> tx = add_decayed_weights_in_examples(0.1, batch_size=64, exponent=0.5)
    >>> updates, _ = tx.update(jnp.zeros(1), tx.init(jnp.ones(1)), jnp.ones(1), batch_size=256)
    >>> print(f"{updates[0]:.2f}")
    0.20
    """
    decay = _validate.non_negative(weight_decay=weight_decay)
    reference = _validate.int32(batch_size=batch_size, minimum=1)
    exponent = _validate.in_range(0, 2, exponent=exponent)

    def update_fn(updates, state, params=None, *, batch_size=None, probe=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "params must be given to the update of add_decayed_weights_in_examples, got None."
            )
        size = reference if probe is not None and batch_size is None else batch_size
        ratio = batch_size_ratio(size, reference, "add_decayed_weights_in_examples")
        factor = decay * ratio ** (1 - exponent)
        return jax.tree.map(lambda u, w: (u + factor * w).astype(u.dtype), updates, params), state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
    return tx if mask is None else optax.masked(tx, mask)
