"""What the agent of Arbiter descends: one interface for the response and for measured noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from arbiter_jax.hyper_learning._reparameterization import to_batch_size
from arbiter_jax.objectives import NoiseObjective
from arbiter_jax.objectives._objective import limited_loss, update_objective


class Range(NamedTuple):
    """The range of batch sizes that proposals are mapped into."""

    low: int
    high: int


class MetaLoss(NamedTuple):
    """The meta-objective of one hyper-step."""

    value: jax.Array  # shape=(), dtype=float, F, or J
    batch_size: jax.Array  # shape=(), dtype=int32, B_s, meta examples that the mixture asks for
    is_clipped: jax.Array  # shape=(), dtype=bool, whether the meta batch has fewer


class MetaObjective(NamedTuple):
    """A function of the mixture s whose gradient trains the agent."""

    init: Callable[[], Any]  # () -> statistics, a state that says which signals it `requires`
    # (statistics, updates, params, batch_size, signals, measures) -> (statistics, usable: bool[])
    observe: Callable[..., tuple[Any, jax.Array]]
    # (mixture, response_weights, statistics, new_params, signals, range) -> MetaLoss
    loss: Callable[..., MetaLoss]
    # (B_s of the last hyper-step, batch_size) -> int32[], size of the next meta batch
    meta_batch_size: Callable[[jax.Array, jax.Array], jax.Array]
    agent_rate: float  # default learning rate of the agent and the response weights
    mixture_rate: float  # default learning rate of the mixture logits
    num_features: int = 0  # number of response weights
    learn_response: bool = False


def from_noise(objective: NoiseObjective) -> MetaObjective:
    """The meta-objective of a noise objective: its J at the batch size of the mixture."""

    def observe(statistics, updates, params, batch_size, signals, measures):
        return update_objective(
            objective, statistics, updates, params, batch_size, signals, measures
        )

    def loss(mixture, response_weights, statistics, new_params, signals, limits):
        del response_weights, new_params
        low, high = limits
        size = (high - low) * jax.nn.sigmoid(mixture) + low
        value = limited_loss(objective, statistics, size, low, high, signals.get("num_calls", 1))
        return MetaLoss(value, to_batch_size(mixture, low, high), jnp.array(False))

    return MetaObjective(
        init=objective.init,
        observe=observe,
        loss=loss,
        # The meta batch only measures noise: as large as the batch, it fits into the same bucket.
        meta_batch_size=lambda proposed, batch_size: jnp.array(batch_size),
        agent_rate=1e-3,
        mixture_rate=1e-2,
    )
