"""Attaches to a model that was written without this library in mind.

The user names the head, and its input is intercepted: there hyper-learning multiplies by its
response. The model itself does not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax import nnx

from arbiter_jax.base import PyTree
from arbiter_jax.models import _cut, _linen, _nnx, _plain
from arbiter_jax.models._model import Model


def attach(
    model: nnx.Module | nn.Module | Callable[..., Any],
    head: str,
    sample_input: PyTree,
    *,
    init: Callable[[Any], PyTree] | None = None,
    call_arguments: Callable[[bool], dict[str, Any]] | None = None,
) -> Model:
    r"""Turns a model into pure functions, cut in two at the input of its head.

    .. math:: \mathrm{model}(x) = \mathrm{head}(\mathrm{features}(x))

    The head need not be the last layer: ``Model.head`` is everything that follows its input, which is
    what a call passes, by position or by keyword, for the first parameter in its signature.

    Args:
      model: One of

        - an ``nnx.Module``, whose parameters are the initial ones for every key, or a function that
          builds one, called as ``model(rngs=nnx.Rngs(key))``;
        - a ``linen.Module``;
        - a plain function ``(params, inputs) -> outputs``, together with ``init``.

      head: Path of the head, names and indices joined by dots: ``"head"``, ``"decoder.layers.3"``.
        A submodule of the model, or a method of one (``"embedding.attend"``); automatic names of
        Linen are those of its parameters (``"Dense_1"``). For a plain function, a path in
        ``params``: the head is the operation in which these parameters first meet the data.
      sample_input: A batch of M >= 1 examples, or its shape and dtype (``jax.ShapeDtypeStruct``), as
        the model takes it: any pytree whose leaves have M leading rows. Nothing is computed.
      init: For a plain function, ``init(key) -> params``; None otherwise.
      call_arguments: Function of ``train`` that returns the model's other keyword arguments:
        ``lambda train: {"deterministic": not train}``. If None, arguments with the usual names are
        passed: ``train``, ``training``, ``is_training``, ``deterministic``,
        ``use_running_average``, and ``rngs`` for NNX.

    Returns:
      A :class:`arbiter_jax.models.Model`. Its parameters are nested dicts, or what ``init``
      returns. Its state is None for a model that has nothing but parameters (no BatchNorm, no
      dropout). In training, every ``BatchNorm`` of Flax receives the mask, and every random stream
      the key.

    Raises:
      ValueError: If ``model`` is none of the above; if the head does not exist, is not called
        exactly once, is called with anything but one array that has a row for each example, is not
        the only way from the inputs to the outputs, or is followed by dropout, BatchNorm or
        anything else that differs between training and inference.

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
    >>> params, model_state = jax.eval_shape(model.init, jax.random.PRNGKey(0))
    >>> inputs = jax.ShapeDtypeStruct((4, 64), jnp.float32)
    >>> features, _ = jax.eval_shape(model.features, params, model_state, inputs)
    >>> features.shape, jax.eval_shape(model.head, params, model_state, features).shape
    ((4, 32), (4, 10))

    *Guarantees*
      - features and head together equal the model, for NNX, Linen and plain functions;
      - ``head`` computes no part of the body, and ``features`` under ``jit`` no part of the head;
      - the mask reaches BatchNorm: its statistics are those of the unpadded batch.
    """
    if not isinstance(head, str):
        raise ValueError(f"head must be a path, such as 'decoder.layers.3', got {head!r}.")
    if init is not None and not callable(init):
        raise ValueError(f"init must be a function of a key that returns params, got {init!r}.")
    if isinstance(model, nn.Module):
        _cut.check_sample(sample_input)
        network = _linen.network(model, head, sample_input, call_arguments)
    elif init is not None:
        network = _plain.network(model, init, head)
    else:
        network = _nnx.network(model, head, call_arguments)
    return _cut.cut(network, head, sample_input)
