"""The gradient of the real examples of a padded batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from arbiter_jax.base import GradStats, LossFn, PyTree
from arbiter_jax.batching import masked_mean, replace_padding, total_weight


class Gradient(NamedTuple):
    """What a gradient function returns: the gradient of one batch, and what came with it."""

    value: jax.Array  # shape=(), dtype=float, mean loss of the real examples
    grads: PyTree  # like the parameters
    model_state: PyTree = None  # like the model state that went in
    grad_stats: GradStats | None = None
    gradient_noise: PyTree = None  # like the parameters, half the difference of two half batches


GradientFn = Callable[..., Any]
"""``gradient_fn(params, batch, mask, model_state=None, key=None) -> Gradient``."""


def _value_grad_and_weight(loss_fn: Any) -> Callable[..., tuple[Gradient, jax.Array]]:
    """The masked gradient, with the total weight of the examples that it is a mean over."""

    def mean_loss(params, batch, mask, model_state, key):
        if model_state is None:
            losses = loss_fn(params, batch)
        else:
            losses, model_state = loss_fn(params, batch, model_state, mask, key)
        return masked_mean(losses, mask), (model_state, total_weight(losses, mask))

    def gradient_fn(params, batch, mask, model_state=None, key=None):
        (value, (model_state, weight)), grads = jax.value_and_grad(mean_loss, has_aux=True)(
            params, batch, mask, model_state, key
        )
        return Gradient(value, grads, model_state), weight

    return gradient_fn


def masked_value_and_grad(loss_fn: LossFn, *, sampled: bool = False) -> GradientFn:
    """The mean loss of the real examples of a batch, and its gradient.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``; for a model with state (BatchNorm, dropout)
        ``loss_fn(params, batch, model_state, mask, key) -> (float[M], model_state)``, which is what
        is called where a model state is given.
      sampled: True for the batches of `sample_batch`, whose masked rows repeat a real example: it
        saves the pass over the batch that makes any other padding harmless.

    Returns:
      ``gradient_fn(params, batch, mask, model_state=None, key=None) -> Gradient``.

    *Guarantees*: a masked row changes no bit of the result, whatever it holds.

    >>> import jax.numpy as jnp
    >>> gradient_fn = masked_value_and_grad(lambda w, x: (w - x) ** 2)
    >>> out = gradient_fn(0.0, jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False]))
    >>> float(out.value), float(out.grads)
    (5.0, -4.0)
    """
    weighted = _value_grad_and_weight(loss_fn)

    def gradient_fn(params, batch, mask, model_state=None, key=None):
        if not sampled:
            batch = replace_padding(batch, mask)
        return weighted(params, batch, mask, model_state, key)[0]

    return gradient_fn
