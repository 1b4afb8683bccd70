"""Learning rate, momentum and decay by descent on the loss some steps ahead."""

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
