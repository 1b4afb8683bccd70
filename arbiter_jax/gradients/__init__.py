"""From a masked batch to a gradient, and to an estimate of its noise.

A gradient function takes the parameters, a batch and its mask, and returns a :class:`Gradient`:
the mean loss of the real examples and its gradient. :func:`masked_value_and_grad` makes a plain one.
:func:`value_grad_and_stats` makes one that also estimates two numbers of the per-example gradients:
tr S, the trace of their covariance, and :math:`|G|^2`, the squared norm of their mean. It compares
the gradients of two half batches, which costs little more than the gradient itself. Rules read these
numbers as the signal `grad_stats`; their ratio is the noise scale. For a batch in micro-batches,
:func:`arbiter_jax.accumulate` does both.

>>> import jax.numpy as jnp
>>> from arbiter_jax import gradients
>>> gradient_fn = gradients.value_grad_and_stats(lambda w, x: (w - x) ** 2 / 2)
>>> batch, mask = jnp.array([1.0, 3.0, 1.0, 1.0]), jnp.array([True, True, False, False])
>>> out = gradient_fn(jnp.zeros(()), batch, mask)  # gradients of -1 and -3
>>> float(out.value), float(out.grads)
(2.5, -2.0)
>>> float(out.grad_stats.variance_trace), float(out.grad_stats.mean_sq_norm)
(2.0, 3.0)
"""

from arbiter_jax.gradients._counted import Trainable
from arbiter_jax.gradients._masked import Gradient, GradientFn, masked_value_and_grad
from arbiter_jax.gradients._per_example import per_example_grads
from arbiter_jax.gradients._statistics import gradient_stats, value_grad_and_stats

__all__ = [
    "Gradient",
    "GradientFn",
    "Trainable",
    "gradient_stats",
    "masked_value_and_grad",
    "per_example_grads",
    "value_grad_and_stats",
]
