"""Learns learning rate, momentum and decay by gradient descent on the loss several steps ahead."""

from arbiter_jax.stochastic_meta_descent._look_ahead import Hyperparameters
from arbiter_jax.stochastic_meta_descent._offline import OfflineResult, offline
from arbiter_jax.stochastic_meta_descent._online import OnlineResult, online
from arbiter_jax.stochastic_meta_descent._train import hypergradient, train

__all__ = [
    "Hyperparameters",
    "OfflineResult",
    "OnlineResult",
    "hypergradient",
    "offline",
    "online",
    "train",
]
