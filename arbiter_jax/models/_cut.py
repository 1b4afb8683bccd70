"""Cuts a network at the input of its head: the part that all kinds of networks share.

An adapter (NNX, Linen, plain functions) supplies a :class:`Network`, which runs the whole network
while it records or replaces the head's input. The cut needs nothing else.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from arbiter_jax import _jaxpr
from arbiter_jax.base import PyTree
from arbiter_jax.models._model import Model


class Network(NamedTuple):
    """A network that can record or replace the input of its head."""

    # init(key) -> (params, model_state)
    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    # run(params, model_state, inputs, *, train, mask, key, features)
    #   -> (outputs, inputs that the head was called with, model_state). Unless `features` is None,
    # the head is called with it instead.
    run: Callable[..., tuple[PyTree, tuple[jax.Array, ...], PyTree]]


def check_sample(sample_input: PyTree) -> None:
    """Raises a ValueError if a leaf has no shape and dtype."""
    for leaf in jax.tree.leaves(sample_input):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise ValueError(
                "sample_input must be a pytree of arrays or jax.ShapeDtypeStructs, got a leaf of type "
                f"{type(leaf).__name__}."
            )


def cut(network: Network, head: str, sample_input: PyTree) -> Model:
    """Splits a network into `features` and `head`; see :func:`arbiter_jax.models.attach`."""
    check_sample(sample_input)
    sample = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), sample_input)
    num_rows = _num_rows(sample)
    # Abstract evaluation, which finds a wrong name of the head now and computes nothing.
    variables = jax.eval_shape(network.init, jax.random.PRNGKey(0))
    sample_features = _head_input(network, head, variables, sample, num_rows)

    def features_fn(params, model_state, inputs, *, train=False, mask=None, key=None):
        _, recorded, new_state = network.run(
            params, model_state, inputs, train=train, mask=mask, key=key, features=None
        )
        return recorded[0], new_state if train else model_state

    def outputs(train, inputs, params, model_state, features):
        return network.run(
            params, model_state, inputs, train=train, mask=None, key=None, features=features
        )[0]

    # JAX caches the trace of a function for as long as that function object lives: the head is
    # traced, and trimmed, once per mode and shape.
    trace = {
        train: jax.make_jaxpr(functools.partial(outputs, train), return_shape=True)
        for train in (False, True)
    }

    def tail(params, model_state, features, train):
        """The program that follows the head's input, its operands, and the form of the outputs."""
        # The whole network on inputs of the right shape, without all that the outputs do not need.
        rows = features.shape[0] * num_rows // sample_features.shape[0]
        inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), sample)
        operands = (inputs, params, model_state, features)
        program, shapes = trace[train](*operands)
        program, used = _jaxpr.trim(program)
        if any(used[: len(jax.tree.leaves(inputs))]):
            raise ValueError(
                f"head={head!r} must be the only way from the inputs to the outputs, but the "
                "outputs depend on the inputs in another way, too: name a later layer."
            )
        needed = [x for x, use in zip(jax.tree.leaves(operands), used, strict=True) if use]
        return program, needed, jax.tree.structure(shapes)

    def head_fn(params, model_state, features):
        program, operands, structure = tail(params, model_state, features, train=False)
        return jax.tree.unflatten(structure, _jaxpr.evaluate_closed(program, operands))

    params, model_state = variables
    programs = [tail(params, model_state, sample_features, train)[0] for train in (True, False)]
    if len({_jaxpr.text(program) for program in programs}) > 1:
        raise ValueError(
            f"head={head!r} must be followed by nothing that differs between training and "
            "inference, such as dropout or BatchNorm: name a later layer."
        )
    return Model(network.init, features_fn, head_fn, sample_features.shape[-1])


def _num_rows(sample: PyTree) -> int:
    lengths = {x.shape[0] if x.shape else 0 for x in jax.tree.leaves(sample)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "sample_input must have the same number of leading rows, >= 1, in every leaf, got "
            f"{jax.tree.map(lambda x: x.shape, sample)}."
        )
    return lengths.pop()


def _head_input(
    network: Network, head: str, variables: PyTree, sample: PyTree, num_rows: int
) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the head's input for the sample."""

    def record(variables, inputs):
        return network.run(*variables, inputs, train=False, mask=None, key=None, features=None)[1]

    recorded = jax.eval_shape(record, variables, sample)
    if len(recorded) != 1:
        raise ValueError(
            f"head={head!r} must be called exactly once when the model is applied, but is called "
            f"{len(recorded)} times."
        )
    (features,) = recorded
    if not isinstance(features, jax.ShapeDtypeStruct):
        raise ValueError(
            f"head={head!r} must be called with one array as its first argument, but is called with "
            f"a {type(features).__name__}: name another layer."
        )
    if features.ndim < 2 or features.shape[0] % num_rows:
        raise ValueError(
            f"head={head!r} must be called with float[M, ..., num_features] on a batch of M "
            f"examples, but is called with shape {features.shape} on {num_rows} examples."
        )
    return features


def mode_arguments(call: Callable[..., Any], train: bool) -> dict[str, Any]:
    """The keyword arguments that usually tell a module whether it is training."""
    names = inspect.signature(call).parameters
    values = {
        **dict.fromkeys(("train", "training", "is_training"), train),
        **dict.fromkeys(("deterministic", "use_running_average"), not train),
    }
    return {name: value for name, value in values.items() if name in names}


def reseeded(template: PyTree, key: jax.Array) -> PyTree:
    """Fresh random state: each key of the template from `key`, each counter zero."""
    leaves, treedef = jax.tree.flatten(template)
    fresh = []
    for index, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            keys = jax.random.split(jax.random.fold_in(key, index), math.prod(leaf.shape))
            fresh.append(keys.reshape(leaf.shape))
        else:
            fresh.append(jnp.zeros(leaf.shape, leaf.dtype))
    return treedef.unflatten(fresh)
