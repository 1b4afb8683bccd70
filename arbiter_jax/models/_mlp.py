"""The multilayer perceptron: dense layers with ReLU between them, on flattened inputs.

Reference: Rumelhart, Hinton and Williams, "Learning Representations by Back-Propagating Errors",
Nature 323, 1986.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from arbiter_jax import _validate
from arbiter_jax.models import _layers
from arbiter_jax.models._build import build_model
from arbiter_jax.models._model import Model


class MLP(nnx.Module):
    """Dense layers with ReLU between them; inputs of any rank are flattened."""

    def __init__(
        self, num_inputs: int, hidden_sizes: Sequence[int], num_classes: int, dtype, **layer_args
    ):
        sizes = (num_inputs, *hidden_sizes)
        self.hidden = nnx.List(
            [nnx.Linear(a, b, dtype=dtype, **layer_args) for a, b in itertools.pairwise(sizes)]
        )
        # The head computes in the dtype of its parameters.
        self.head = nnx.Linear(sizes[-1], num_classes, **layer_args)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits, float[M, num_classes]."""
        x = x.reshape(x.shape[0], -1)
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.head(x)


def mlp(
    input_shape: Sequence[int],
    hidden_sizes: Sequence[int] = (128,),
    num_classes: int = 10,
    *,
    dtype: jax.typing.DTypeLike | None = None,
) -> Model:
    r"""A multilayer perceptron, :math:`h_{l+1} = \max(0, h_l W_l + b_l)`, with a linear head.

    Args:
      input_shape: Shape of one example, such as (784,) or (28, 28, 1).
      hidden_sizes: Number of units of each hidden layer, integers >= 1. May be empty: the head
        alone is multinomial logistic regression.
      num_classes: Number of outputs, an integer >= 1.
      dtype: Dtype of the computation in the hidden layers, such as ``jnp.bfloat16``; that of the
        inputs if None. Parameters and outputs are always float32.

    Returns:
      A model without state that maps inputs float[M, \*input_shape], flattened or not, to logits
      float32[M, num_classes]; its features are the last hidden layer.

    Raises:
      ValueError: If a size is not an integer >= 1.

    Reference:
      Rumelhart et al., Nature 323, 1986, https://doi.org/10.1038/323533a0

    >>> import jax
    >>> from arbiter_jax import models
    >>> model = models.mlp((28, 28, 1), hidden_sizes=(256,), num_classes=10)
    >>> params, _ = jax.eval_shape(model.init, jax.random.PRNGKey(0))
    >>> jax.tree.map(lambda x: x.shape, params)
    {'head': {'bias': (10,), 'kernel': (256, 10)},
     'hidden': {'0': {'bias': (256,), 'kernel': (784, 256)}}}
    >>> model.num_features
    256
    """
    shape = _layers.sizes_of(input_shape=input_shape)
    sizes = _layers.sizes_of(hidden_sizes=hidden_sizes)
    _layers.check_dtype(dtype)
    num_outputs = _validate.integer(num_classes=num_classes, minimum=1)
    num_inputs = math.prod(shape)
    return build_model(
        functools.partial(MLP, num_inputs, sizes, num_outputs, dtype),
        jax.ShapeDtypeStruct((1, num_inputs), jnp.float32),
    )
