"""The response loss of Arbiter: what a user gives, called with one sentence for what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from arbiter_jax.base import WeightedLoss

ResponseLoss = Callable[..., "jax.Array | WeightedLoss"]
"""``response_loss(params, response, meta_batch) -> float[M]``, or with a fourth argument
``model_state`` where the model has one: the loss of each meta example, in inference mode, with the
head's input multiplied by ``1 + response``, response: float[num_features]."""


def call_response_loss(response_loss, num_features, params, response, meta_batch, extra):
    """Calls the response loss, and turns a mismatch of widths into one sentence that names them."""
    state = (extra["model_state"],) if extra.get("model_state") is not None else ()
    call = lambda response: response_loss(params, response, meta_batch, *state)
    advice = (
        f"num_features must be the width of the head's input, got {num_features}, which the "
        "response loss does not accept"
    )
    try:
        losses = call(response)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{advice}: {error}") from error
    if num_features == 1:
        # One number broadcasts over any width. That of the head is the length of some axis of the
        # parameters, and unlike a head without parameters it accepts no other.
        sizes = {2} | {size for leaf in jax.tree.leaves(params) for size in jnp.shape(leaf)}
        accepts = lambda n: _accepts(call, jnp.zeros(n, response.dtype))
        accepted = [n for n in sorted(sizes - {1}) if accepts(n)]
        if accepted and not accepts(max(sizes) + 1):
            raise ValueError(f"{advice}: it broadcasts one number over {accepted[0]} features.")
    return losses


def _accepts(call: Callable[[jax.Array], Any], response: jax.Array) -> bool:
    try:
        jax.eval_shape(call, response)
    except (TypeError, ValueError):
        return False
    return True
