"""Attaches to a model that was written without this library in mind.

The model's head is named, and what it is called with is intercepted: that is where hyper-learning
multiplies by its response. The model itself is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax import nnx

from arbiter_jax.models import _cut, _linen, _nnx
from arbiter_jax.models import _plain as _functions
from arbiter_jax.models._model import Model

PyTree = Any


def attach(
    model: nnx.Module | nn.Module | Callable[..., Any],
    head: str,
    sample_input: PyTree,
    *,
    init: Callable[[Any], PyTree] | None = None,
    call_arguments: Callable[[bool], dict[str, Any]] | None = None,
) -> Model:
    r"""Makes pure functions of a model, cut in two at the input of its head.

    .. math:: \mathrm{model}(x) = \mathrm{head}(\mathrm{features}(x))

    The head need not be the last layer: ``Model.head`` is everything that follows its input.

    Args:
      model: One of

        - an ``nnx.Module``, whose parameters are then the initial ones whatever the key, or a
          function that builds one, called as ``model(rngs=nnx.Rngs(key))``;
        - a ``linen.Module``;
        - a plain function ``(params, inputs) -> outputs``, together with ``init``.

      head: Path of the head, with dots between names and indices: ``"head"``,
        ``"decoder.layers.3"``. A submodule of the model, or a method of one
        (``"embedding.attend"``); names that Linen made up are as in its parameters (``"Dense_1"``).
        For a plain function, a path in ``params``, whose first meeting with the data is the head.
      sample_input: A batch of M >= 1 examples, or its shape and type (``jax.ShapeDtypeStruct``), as
        the model takes it: any pytree whose leaves have M leading rows. Nothing is computed.
      init: For a plain function, ``init(key) -> params``; None otherwise.
      call_arguments: What the model is called with besides the inputs, from whether it is training:
        ``lambda train: {"deterministic": not train}``. Where it is None, arguments of the usual
        names are given: ``train``, ``training``, ``is_training``, ``deterministic``,
        ``use_running_average``, and ``rngs`` for NNX.

    Returns:
      A :class:`arbiter_jax.models.Model`. Its parameters are nested dicts, or whatever ``init``
      returns. Its state is None for a model without BatchNorm, dropout or anything else besides
      parameters. In training, the mask is passed on to each ``BatchNorm`` of Flax, and the key to
      each random stream.

    Raises:
      ValueError: If the head does not exist, is called not exactly once, is called with an array
        that has no row for each example, is not the only way from the inputs to the outputs, or is
        followed by dropout, BatchNorm or anything else that differs between training and inference.

    Reference:
      Flax, "NNX basics", https://flax.readthedocs.io/en/latest/nnx_basics.html, on splitting a
      module into a graph definition and states.

    >>> import jax, jax.numpy as jnp
    >>> from arbiter_jax import models
    >>> from flax import nnx
    >>> class Network(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.body = nnx.Linear(64, 32, rngs=rngs)
    ...         self.classifier = nnx.Linear(32, 10, rngs=rngs)
    ...
    ...     def __call__(self, x):
    ...         return nnx.log_softmax(self.classifier(nnx.relu(self.body(x))))
    >>> model = models.attach(lambda rngs: Network(rngs), "classifier", jnp.zeros((1, 64)))
    >>> model.num_features
    32
    >>> params, model_state = model.init(jax.random.PRNGKey(0))
    >>> features, _ = model.features(params, model_state, jnp.ones((4, 64)))
    >>> features.shape, model.head(params, model_state, features).shape
    ((4, 32), (4, 10))

    *Guarantees*
      - features and head together equal the model, for NNX, Linen and plain functions;
      - ``head`` computes nothing of the body, ``features`` under ``jit`` nothing of the head;
      - the mask reaches BatchNorm: its statistics are those of the unpadded batch.
    """
    if isinstance(model, nn.Module):
        network = _linen.network(model, head, sample_input, call_arguments)
    elif init is not None:
        network = _functions.network(model, init, head)
    elif callable(model):
        network = _nnx.network(model, head, call_arguments)
    else:
        raise ValueError(
            f"model must be an nnx.Module, a linen.Module or a function, got {model!r}."
        )
    return _cut.cut(network, head, sample_input)
