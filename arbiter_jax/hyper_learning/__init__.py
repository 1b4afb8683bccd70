"""Arbiter: an agent network that learns which batch size to use while the model trains."""

from arbiter_jax.hyper_learning._agents import Agent, conv_agent, mlp_agent
from arbiter_jax.hyper_learning._arbiter import arbiter
from arbiter_jax.hyper_learning._reparameterization import to_batch_size, to_logit
from arbiter_jax.hyper_learning._response import ResponseLoss
from arbiter_jax.hyper_learning._state import ArbiterState, anchor_batch_size
from arbiter_jax.hyper_learning._warm_up import warm_up

__all__ = [
    "Agent",
    "ArbiterState",
    "ResponseLoss",
    "anchor_batch_size",
    "arbiter",
    "conv_agent",
    "mlp_agent",
    "to_batch_size",
    "to_logit",
    "warm_up",
]
