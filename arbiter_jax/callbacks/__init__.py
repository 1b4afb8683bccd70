"""What a run does besides training: it is saved, so that it can be killed and resumed."""

from arbiter_jax.callbacks._checkpoints import Checkpoints, checkpoints

__all__ = ["Checkpoints", "checkpoints"]
