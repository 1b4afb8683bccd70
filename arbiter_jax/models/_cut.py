"""Cuts a network at the input of its head; what is common to every kind of network.

An adapter (NNX, Linen, plain functions) supplies a :class:`Network`: how to run the whole network
while what its head is called with is recorded or replaced. The rest follows from that alone.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from arbiter_jax.models._model import Model

PyTree = Any


class Network(NamedTuple):
    """A network whose head's input can be seen and set."""

    # init(key) -> (params, model_state)
    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    # run(params, model_state, inputs, *, train, mask, key, features)
    #   -> (outputs, inputs that the head was called with, model_state); where `features` is not
    # None the head is called with it instead.
    run: Callable[..., tuple[PyTree, tuple[jax.Array, ...], PyTree]]


def cut(network: Network, head: str, sample_input: PyTree) -> Model:
    """Splits a network into `features` and `head`; see :func:`arbiter_jax.attach`."""
    sample = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), sample_input)
    num_rows = {x.shape[0] if x.shape else None for x in jax.tree.leaves(sample)}
    if len(num_rows) != 1 or None in num_rows or 0 in num_rows:
        raise ValueError(
            "sample_input must have the same number of leading rows, >= 1, in every leaf, got "
            f"{jax.tree.map(lambda x: x.shape, sample)}."
        )
    (num_rows,) = num_rows

    def run(params, model_state, inputs, *, train=False, mask=None, key=None, features=None):
        return network.run(
            params, model_state, inputs, train=train, mask=mask, key=key, features=features
        )

    def features_fn(params, model_state, inputs, *, train=False, mask=None, key=None):
        _, recorded, new_state = run(params, model_state, inputs, train=train, mask=mask, key=key)
        return recorded[0], new_state if train else model_state

    def rest(params, model_state, features, train=False):
        """What follows the head's input: its program, constants, operands, form of the outputs."""
        # The whole network on inputs of zeros, less everything that the outputs do not need.
        rows = features.shape[0] * num_rows // sample_features.shape[0]
        leaves, treedef = jax.tree.flatten(sample)
        dummies = [jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for x in leaves]

        def outputs(dummies, params, model_state, features):
            inputs = treedef.unflatten(dummies)
            return run(params, model_state, inputs, train=train, features=features)[0]

        operands = (dummies, params, model_state, features)
        closed, shapes = jax.make_jaxpr(outputs, return_shape=True)(*operands)
        jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
        if any(used[: len(dummies)]):
            raise ValueError(
                f"head={head!r} must be the only way from the inputs to the outputs, but the "
                "outputs depend on the inputs by another way, too: name a later layer."
            )
        needed = [x for x, n in zip(jax.tree.leaves(operands), used, strict=True) if n]
        return jaxpr, closed.consts, needed, jax.tree.structure(shapes)

    def head_fn(params, model_state, features):
        jaxpr, consts, operands, structure = rest(params, model_state, features)
        return jax.tree.unflatten(structure, jax.core.eval_jaxpr(jaxpr, consts, *operands))

    # Shapes only: whatever is wrong with the head's name shows now, and nothing is computed.
    variables = jax.eval_shape(network.init, jax.random.PRNGKey(0))
    recorded = jax.eval_shape(lambda v, x: run(*v, x)[1], variables, sample)
    if len(recorded) != 1:
        raise ValueError(
            f"head={head!r} must be called exactly once when the model is applied, "
            f"was called {len(recorded)} times."
        )
    (sample_features,) = recorded
    if sample_features.ndim < 2 or sample_features.shape[0] % num_rows:
        raise ValueError(
            f"head={head!r} must be called with float[M, ..., num_features] on a batch of M "
            f"examples, was called with shape {sample_features.shape} on {num_rows} examples."
        )

    def program(train):
        texts = []
        jax.eval_shape(
            lambda *args: texts.append(str(rest(*args, train=train)[0])),
            *variables,
            sample_features,
        )
        # Without the addresses of functions, which are made anew each time.
        return re.sub(r"0x[0-9a-f]+", "", texts[0])

    if program(train=True) != program(train=False):
        raise ValueError(
            f"head={head!r} must be followed by nothing that differs between training and "
            "inference, such as dropout or BatchNorm: name a later layer."
        )
    return Model(network.init, features_fn, head_fn, sample_features.shape[-1])


def mode_arguments(call: Callable[..., Any], train: bool) -> dict[str, Any]:
    """The keyword arguments by which a module's call usually learns whether it is training."""
    names = inspect.signature(call).parameters
    values = {
        **dict.fromkeys(("train", "training", "is_training"), train),
        **dict.fromkeys(("deterministic", "use_running_average"), not train),
    }
    return {name: value for name, value in values.items() if name in names}


def row_mask(mask: jax.Array, x: jax.Array) -> jax.Array:
    """A mask of the M examples, in the shape that BatchNorm takes for its input."""
    if x.shape[0] % mask.shape[0]:
        raise ValueError(
            f"mask has {mask.shape[0]} rows and cannot mark the {x.shape[0]} rows of the input of "
            "BatchNorm."
        )
    # More rows than examples: the other axes were folded into the batch, examples first.
    mask = jnp.repeat(mask, x.shape[0] // mask.shape[0], axis=0)
    return jnp.reshape(mask, (x.shape[0],) + (1,) * (x.ndim - 1))


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


def typed_key(key: jax.Array | None) -> jax.Array:
    """A key of the new style; a fixed one for code that draws nothing."""
    if key is None:
        return jax.random.key(0)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)
