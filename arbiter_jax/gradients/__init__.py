"""From a masked batch to a gradient, and to an estimate of its noise."""

from arbiter_jax.gradients._accumulation import (
    Groups,
    accumulated_gradient,
    accumulated_value_and_grad,
)
from arbiter_jax.gradients._counted import Trainable, counted_leaves
from arbiter_jax.gradients._estimators import stats_from_gram
from arbiter_jax.gradients._joined import has_rows, joined_aux
from arbiter_jax.gradients._masked import (
    Gradient,
    GradientFn,
    call_loss,
    masked_value_and_grad,
    value_grad_and_weight,
)
from arbiter_jax.gradients._per_example import per_example_grads
from arbiter_jax.gradients._statistics import gradient_stats, value_grad_and_stats
from arbiter_jax.gradients._streaming import Accumulated, add_piece, finished, init_accumulated

__all__ = [
    "Accumulated",
    "Gradient",
    "GradientFn",
    "Groups",
    "Trainable",
    "accumulated_gradient",
    "accumulated_value_and_grad",
    "add_piece",
    "call_loss",
    "counted_leaves",
    "finished",
    "gradient_stats",
    "has_rows",
    "init_accumulated",
    "joined_aux",
    "masked_value_and_grad",
    "per_example_grads",
    "stats_from_gram",
    "value_grad_and_stats",
    "value_grad_and_weight",
]
