"""The published meta-objective: the loss of the network's response to the mixture of proposals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from arbiter_jax import _validate
from arbiter_jax.base import WeightedLoss
from arbiter_jax.batching import batch_mask, masked_mean
from arbiter_jax.batching._masking import check_losses, num_rows, replace_padding
from arbiter_jax.hyper_learning._meta_objective import MetaLoss, MetaObjective
from arbiter_jax.hyper_learning._reparameterization import to_batch_size

ResponseLoss = Callable[..., "jax.Array | WeightedLoss"]
"""``response_loss(params, response, meta_batch) -> float[M]``, or with a fourth argument
``model_state`` if the model has one: the loss of each meta example, in inference mode, with the
head's input multiplied by ``1 + response``, response: float[num_features]."""


class ResponseStatistics(NamedTuple):
    """The response keeps no statistics: it needs the meta batch at every hyper-step."""

    requires = ("meta_batch",)


def response_objective(
    response_loss: ResponseLoss, num_features: Any, learn_response: bool
) -> MetaObjective:
    """F, the mean loss over B_s meta examples with features f * (1 + m s).

    Args:
      response_loss: The loss of each meta example under a response.
      num_features: Width of the head's input, an integer >= 1.
      learn_response: Whether m descends F as well.

    Returns:
      A :class:`MetaObjective`.
    """
    _validate.static(num_features=num_features)
    _validate.function("(params, response, meta_batch) -> float[M]", response_loss=response_loss)
    num_features = _validate.integer(num_features=num_features, minimum=1)

    def observe(statistics, updates, params, batch_size, signals, measures):
        del updates, params, batch_size, signals, measures
        return statistics, jnp.array(True)

    def loss(mixture, response_weights, statistics, new_params, signals, limits):
        del statistics
        batch_size, meta_batch = to_batch_size(mixture, *limits), signals["meta_batch"]
        most: Any = num_rows(meta_batch)
        mask = batch_mask(batch_size, most)
        if "num_meta_examples" in signals:  # of a batch that has more rows than this seed uses
            most = signals["num_meta_examples"]
            mask &= batch_mask(most, num_rows(meta_batch))
        # Explicit stop_gradient: F is differentiated with respect to agent, mixture and response only.
        meta_batch = replace_padding(meta_batch, mask, first=0)  # no batch is empty
        constants = jax.lax.stop_gradient((new_params, meta_batch))
        losses = _call(response_loss, num_features, response_weights * mixture, constants, signals)
        check_losses(losses, num_rows(meta_batch), "response_loss")
        return MetaLoss(
            value=masked_mean(losses, mask),
            batch_size=batch_size,
            is_clipped=batch_size > most,
        )

    return MetaObjective(
        init=ResponseStatistics,
        observe=observe,
        loss=loss,
        meta_batch_size=lambda proposed, batch_size: proposed,
        agent_rate=1e-5,
        mixture_rate=1e-4,
        num_features=num_features,
        learn_response=learn_response,
    )


def _call(response_loss, num_features, response, constants, signals):
    """Calls the response loss, and turns a mismatch of widths into one sentence that names them."""
    params, meta_batch = constants
    model_state = signals.get("model_state")
    extra = () if model_state is None else (model_state,)
    call = lambda response: response_loss(params, response, meta_batch, *extra)
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
