"""Arbiter: an agent network that learns which batch size to use while the model trains."""

from arbiter_jax.hyper_learning._agents import Agent, conv_agent, mlp_agent
from arbiter_jax.hyper_learning._arbiter import arbiter
from arbiter_jax.hyper_learning._reparameterization import to_batch_size, to_logit
from arbiter_jax.hyper_learning._response import ResponseLoss
from arbiter_jax.hyper_learning._state import ArbiterState, re_anchor
from arbiter_jax.hyper_learning._warm_up import hyper_optimizer, warm_up

__all__ = [
    "Agent",
    "ArbiterState",
    "ResponseLoss",
    "arbiter",
    "conv_agent",
    "hyper_optimizer",
    "mlp_agent",
    "re_anchor",
    "to_batch_size",
    "to_logit",
    "warm_up",
]
