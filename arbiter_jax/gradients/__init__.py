"""From a masked batch to a gradient, and to an estimate of its noise."""

from arbiter_jax.gradients._masked import Gradient, GradientFn, masked_value_and_grad
from arbiter_jax.gradients._statistics import (
    Trainable,
    gradient_stats,
    per_example_grads,
    value_grad_and_stats,
)

__all__ = [
    "Gradient",
    "GradientFn",
    "Trainable",
    "gradient_stats",
    "masked_value_and_grad",
    "per_example_grads",
    "value_grad_and_stats",
]
