"""A model as pure functions, cut in two at the input of its head, and its losses.

Training needs a loss per example; hyper-learning needs the loss of the meta examples after the head's
input was multiplied by ``1 + response``. Both are made here from one model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from arbiter_jax.base import PyTree, WeightedLoss, as_pure


class FeaturesFn(Protocol):
    """The part of a model below its head."""

    def __call__(
        self,
        params: PyTree,
        model_state: PyTree,
        inputs: PyTree,
        *,
        train: bool = False,
        mask: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, PyTree]:
        """Returns the head's input, float[M, ..., num_features], and the new model state."""
        ...


class Model(NamedTuple):
    """A network as pure functions.

    ``init(key) -> (params, model_state)``. ``model_state`` is None for a model without state, and
    otherwise a pytree: the statistics of BatchNorm, or empty if dropout is all there is.

    ``features(params, model_state, inputs, *, train=False, mask=None, key=None)`` ``->``
    ``(features, model_state)`` is the input of the head, float[M, ..., num_features]. ``train``
    switches BatchNorm and dropout to training: ``mask``, bool[M], then selects the examples that
    enter the statistics, and ``key`` is the source of randomness of dropout.

    ``head(params, model_state, features) -> outputs`` is the rest of the model, in inference mode.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    features: FeaturesFn
    head: Callable[[PyTree, PyTree, jax.Array], PyTree]
    num_features: int


class Losses(NamedTuple):
    """The functions that training needs from a model; see :func:`make_losses`.

    For a model without state, ``loss_fn(params, batch) -> float[M]``,
    ``response_loss(params, response, meta_batch) -> float[M]`` and
    ``predict(params, inputs) -> outputs``. For a model with state,
    ``loss_fn(params, batch, model_state, mask, key) -> (float[M], model_state)``,
    ``response_loss(params, response, meta_batch, model_state) -> float[M]`` and
    ``predict(params, inputs, model_state) -> outputs``.

    Of a model attached to an NNX module, ``params`` and ``model_state`` may also be an ``nnx.State``,
    which is what a rule inside an ``nnx.Optimizer`` gets, or ``params`` the module itself, whose
    state counts where ``model_state`` is None. A new model state then has the form of the old one.
    """

    loss_fn: Callable[..., Any]
    response_loss: Callable[..., jax.Array | WeightedLoss]
    predict: Callable[..., PyTree]


def make_losses(
    model: Model,
    per_example_loss: Callable[[PyTree, PyTree], jax.Array | WeightedLoss],
) -> Losses:
    r"""Makes the losses of a model in the form that training and hyper-learning take.

    With features :math:`h(x)`, head :math:`f`, and response :math:`r`,

    .. math:: \ell(x, y) = L(f(h(x)), y), \qquad
              \ell_r(x, y) = L\big(f(\mathrm{stopgrad}(h(x)) \odot (1 + r)), y\big)

    Args:
      model: The model.
      per_example_loss: ``(outputs, labels) -> float[M]``, such as
        ``optax.softmax_cross_entropy_with_integer_labels``, or
        :class:`arbiter_jax.base.WeightedLoss` (a loss per token, with weight 0 for padding).

    Returns:
      :class:`Losses`. ``response`` is float[num_features]; batches are ``(inputs, labels)``. The
      loss is computed in training mode (batch statistics, dropout), the response loss and the
      predictions in inference mode, which does not change the model state.

    Raises:
      ValueError: If `model` is not a `Model` or `per_example_loss` is not a function.

    Reference:
      Only the head sees the response, so that its gradient costs one forward pass of the body and no
      backward pass: see :func:`arbiter_jax.arbiter`.

    >>> import jax, jax.numpy as jnp, optax
    >>> from arbiter_jax import models
    >>> model = models.mlp((8, 8, 1), hidden_sizes=(32,), num_classes=10)
    >>> loss_fn, response_loss, predict = models.make_losses(
    ...     model, optax.softmax_cross_entropy_with_integer_labels
    ... )
    >>> params, model_state = model.init(jax.random.PRNGKey(0))
    >>> batch = (jnp.ones((4, 8, 8, 1)), jnp.array([0, 1, 2, 3]))
    >>> jax.eval_shape(loss_fn, params, batch).shape
    (4,)
    >>> response = jnp.zeros(model.num_features)
    >>> bool(jnp.allclose(response_loss(params, response, batch), loss_fn(params, batch)))
    True

    *Guarantees*
      - a response of zero changes nothing: the response loss is the loss in inference mode;
      - the response loss has a gradient only with respect to the response;
      - the mask reaches BatchNorm: its statistics are those of the unpadded batch.
    """
    if not isinstance(model, Model):
        raise ValueError(
            f"model must be an arbiter_jax.models.Model, got {type(model).__name__}; "
            "arbiter_jax.models.attach makes one of a network."
        )
    if not callable(per_example_loss):
        raise ValueError(
            f"per_example_loss must be a function (outputs, labels) -> float[M], got "
            f"{per_example_loss!r}."
        )

    def outputs(params, model_state, inputs, response=None, **mode):
        params, model_state = _without_variables(params), _without_variables(model_state)
        features, model_state = model.features(params, model_state, inputs, **mode)
        if response is not None:
            scale = (1 + response).reshape((1,) * (features.ndim - 1) + (-1,))
            features = lax.stop_gradient(features) * scale
        return model.head(params, model_state, features), model_state

    # Abstract evaluation: nothing is computed to find out whether there is a state.
    _, model_state_shape = jax.eval_shape(model.init, jax.random.PRNGKey(0))

    def response_loss(params, response, meta_batch, model_state=None):
        inputs, labels = meta_batch
        params, model_state = _without_variables(params), _without_variables(model_state)
        params, model_state = lax.stop_gradient((params, model_state))
        return per_example_loss(outputs(params, model_state, inputs, response)[0], labels)

    def predict(params, inputs, model_state=None):
        return outputs(params, model_state, inputs)[0]

    def loss_of_params(params, batch):
        inputs, labels = batch
        return per_example_loss(outputs(params, None, inputs, train=True)[0], labels)

    def loss_with_state(params, batch, model_state, mask, key):
        inputs, labels = batch
        y, model_state = outputs(params, model_state, inputs, train=True, mask=mask, key=key)
        return per_example_loss(y, labels), model_state

    loss_fn = loss_of_params if model_state_shape is None else loss_with_state
    return Losses(loss_fn, response_loss, predict)


def _without_variables(tree: PyTree) -> PyTree:
    """An NNX module or state as a state of arrays; any other pytree as it is."""
    if isinstance(tree, nnx.Pytree):
        tree = nnx.state(tree)
    return as_pure(tree) if isinstance(tree, nnx.State) else tree


def count_params(params: PyTree) -> int:
    """Counts the parameters of a model.

    Args:
      params: Parameters, or their shapes, from ``jax.eval_shape``.

    Returns:
      The number of elements of all leaves.

    >>> import jax
    >>> from arbiter_jax import models
    >>> model = models.lenet((28, 28, 1), num_classes=10)
    >>> models.count_params(jax.eval_shape(model.init, jax.random.PRNGKey(0))[0])
    61706
    """
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(params))
