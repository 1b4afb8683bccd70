"""Flax NNX modules as pure functions, with the head's input intercepted.

Each run works on a fresh copy of the module, in which single methods are overridden; see
`batching._batch_norm`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from arbiter_jax._numerics import typed_key
from arbiter_jax.base import PyTree
from arbiter_jax.batching._batch_norm import (
    Intercepted,
    first_argument,
    mask_batch_norms,
    override,
    value_of,
)
from arbiter_jax.models._cut import (
    Network,
    mode_arguments,
    reseeded,
)

# How a module is split: parameters, random state, everything else (the model state).
_KINDS = (nnx.Param, nnx.RngState, ...)


def network(
    module: nnx.Module | Callable[..., nnx.Module],
    head: str,
    call_arguments: Callable[[bool], dict[str, Any]] | None,
) -> Network:
    """The adapter of an NNX module, or of a function that builds one when given ``rngs``."""
    example = module if isinstance(module, nnx.Module) else _abstract(module)
    graphdef, *states = nnx.split(example, *_KINDS)
    templates = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), states)
    params_template, rngs_template, rest_template = templates
    owner, method = _find(example, head)
    call = type(example).__call__
    arguments = call_arguments or functools.partial(mode_arguments, call)
    takes_rngs = "rngs" in inspect.signature(call).parameters
    has_state = takes_rngs or bool(jax.tree.leaves((rngs_template, rest_template)))

    def init(key):
        if isinstance(module, nnx.Module):
            params, _, rest = states  # the module comes with its parameters
        else:
            params, _, rest = nnx.split(module(rngs=nnx.Rngs(typed_key(key))), *_KINDS)[1:]
        return _to_dict(params), _to_dict(rest) if has_state else None

    def run(params, model_state, inputs, *, train, mask, key, features):
        key = typed_key(key)
        nested_params, nested_state = _nested(params, model_state)
        copy = nnx.merge(
            graphdef,
            _from_dict(params_template, nested_params),
            reseeded(rngs_template, key),
            _from_dict(rest_template, nested_state),
        )
        if train:
            copy.train()
        else:
            copy.eval()
        if train and mask is not None:
            mask_batch_norms(copy, mask)
        target = functools.reduce(_child, owner, copy)
        _intercept(target, method, features)
        rngs = {"rngs": nnx.Rngs(key)} if takes_rngs else {}
        outputs = copy(inputs, **{**rngs, **arguments(train)})
        recorded = value_of(target.arbiter_features) if features is None else ()
        if has_state:
            model_state = _like(model_state, _rest_of(copy, rest_template))
        return outputs, recorded, model_state

    return Network(init, run)


def _abstract(build: Any) -> nnx.Module:
    """The module that a function of `rngs` builds, with shapes instead of arrays."""
    example = None
    if callable(build):
        parameters = inspect.signature(build).parameters.values()
        if any(p.name == "rngs" or p.kind is p.VAR_KEYWORD for p in parameters):
            example = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    if not isinstance(example, nnx.Module):
        raise ValueError(
            "model must be an nnx.Module, a linen.Module, a function of `rngs` that returns an "
            f"nnx.Module, or a function of params and inputs together with `init`, got {build!r}."
        )
    return example


def _rest_of(module: nnx.Module, template: nnx.State) -> dict[str, Any]:
    """The model state after a call, without variables that the call added, such as sown ones."""
    *_, rest = nnx.state(module, nnx.Param, nnx.RngState, Intercepted, ...)
    return _to_dict(_from_dict(template, _to_dict(rest)))


def _intercept(target: Any, method: str, features: jax.Array | None) -> None:
    """Makes a method record what it is called with or, unless None, use `features` instead."""
    if features is None:
        target.arbiter_features = Intercepted(())
        override(target, method, _record_input)
    else:
        target.arbiter_features = Intercepted(features)
        override(target, method, _replace_input)


def _record_input(self, original, args, kwargs):
    features, _ = first_argument(original, args, kwargs)
    self.arbiter_features = Intercepted((*value_of(self.arbiter_features), features))
    return original(*args, **kwargs)


def _replace_input(self, original, args, kwargs):
    _, replace = first_argument(original, args, kwargs)
    args, kwargs = replace(value_of(self.arbiter_features))
    return original(*args, **kwargs)


def _child(node: Any, name: str) -> Any:
    """The attribute or item of this name; raises LookupError or AttributeError if it has none."""
    if isinstance(node, Mapping):
        return node[name]
    if isinstance(node, Sequence):
        index: Any = int(name) if name.isdecimal() else name
        return node[index]
    return getattr(node, name)


def _find(module: nnx.Module, head: str) -> tuple[tuple[str, ...], str]:
    """The path of the module that the head is, or is a method of, and the method's name."""
    path = tuple(head.split("."))
    try:
        found = functools.reduce(_child, path, module)
    except (AttributeError, LookupError, TypeError):
        found = None
    if isinstance(found, nnx.Module) and callable(found):
        return path, "__call__"
    if inspect.ismethod(found) and len(path) > 1:
        return path[:-1], path[-1]
    names = [".".join(map(str, p)) for p, m in nnx.iter_modules(module) if p and callable(m)]
    raise ValueError(f"head must be one of {', '.join(names)}, got {head!r}.")


def _path(path: Sequence[Any]) -> tuple[str, ...]:
    """The names on the way to a leaf of a state.

    JAX has a key type per kind of node (dict, list, attribute); only the name or index counts here.
    """
    keys = [getattr(k, "key", getattr(k, "idx", getattr(k, "name", None))) for k in path]
    # A variable is a node whose one child is the array: that attribute is dropped.
    is_variable = isinstance(path[-1], jax.tree_util.GetAttrKey)
    return tuple(map(str, keys[:-1] if is_variable else keys))


def _paths(state: nnx.State) -> list[tuple[str, ...]]:
    """The path of each leaf of a state, in the order of its leaves."""
    return [_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]


def _to_dict(*states: nnx.State) -> dict[str, Any]:
    """States as one tree of nested dicts, which every library that takes pytrees understands."""
    nested: dict[str, Any] = {}
    for state in states:
        for path, leaf in zip(_paths(state), jax.tree.leaves(state), strict=True):
            node = functools.reduce(lambda node, name: node.setdefault(name, {}), path[:-1], nested)
            node[path[-1]] = leaf
    return nested


def _from_dict(template: nnx.State, nested: PyTree) -> nnx.State:
    """The inverse of :func:`_to_dict`, for a state of the form of the template."""
    try:
        leaves = [_at(nested, path) for path in _paths(template)]
    except (LookupError, TypeError) as error:
        raise ValueError(
            f"params and model_state must be those of the module that attach was given, got "
            f"something without {error}."
        ) from error
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _at(nested: PyTree, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda node, name: node[name], path, nested)


def _nested(params: PyTree, model_state: PyTree) -> tuple[PyTree, PyTree]:
    """Parameters and model state, either of them an ``nnx.State`` or nested dicts, as the latter.

    What an optimizer trains need not be what ``attach`` calls parameters: each of two states is
    searched for what the other one lacks.
    """
    states = [x for x in (params, model_state) if isinstance(x, nnx.State)]
    found = _to_dict(*states)
    is_whole = isinstance(params, nnx.State) and model_state is None
    return (
        found if isinstance(params, nnx.State) else params,
        found if isinstance(model_state, nnx.State) or is_whole else model_state,
    )


def _like(model_state: PyTree, new: dict[str, Any]) -> PyTree:
    """The new model state in the form of the old one, which may be an ``nnx.State``."""
    if not isinstance(model_state, nnx.State):
        return new

    def renewed(path, old):
        try:
            return _at(new, _path(path))
        except LookupError:  # random streams, which are seeded at each call
            return old

    return jax.tree_util.tree_map_with_path(renewed, model_state)
