"""Flax Linen modules as pure functions, with the head's input intercepted.

What an intercepted call records or uses is kept in a separate collection of variables, so that it
also passes through Flax's own transformations (``nn.jit``, ``nn.remat``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
from flax import linen as nn

from arbiter_jax._numerics import typed_key
from arbiter_jax.base import PyTree
from arbiter_jax.batching._batch_norm import first_argument, with_row_mask
from arbiter_jax.models._cut import Network, mode_arguments

_COLLECTION = "arbiter_intercepted"


def network(
    module: nn.Module,
    head: str,
    sample_input: PyTree,
    call_arguments: Callable[[bool], dict[str, Any]] | None,
) -> Network:
    """The adapter of a Linen module."""
    arguments = call_arguments or functools.partial(mode_arguments, type(module).__call__)

    def variables_of(key):
        inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sample_input)
        return module.init({"params": typed_key(key)}, inputs, **arguments(False))

    calls: dict[tuple[tuple[str, ...], str], nn.Module] = {}

    def note(next_function, args, kwargs, context):
        calls[context.module.path, context.method_name] = context.module
        return next_function(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes = jax.eval_shape(variables_of, jax.random.PRNGKey(0))
    owner, method = _find(calls, head)
    batch_norms = [path for (path, _), m in calls.items() if isinstance(m, nn.BatchNorm)]
    # What `init` sowed is not part of the state.
    collections = [c for c in shapes if c not in ("params", "intermediates", "perturbations")]
    has_state = bool(collections) or _draws(module, shapes, sample_input, arguments(True))

    def init(key):
        variables = variables_of(key)
        state = {name: variables[name] for name in collections}
        return variables.get("params", {}), state if has_state else None

    def intercept(next_function, args, kwargs, context):
        node = context.module
        if isinstance(node, nn.BatchNorm) and node.has_variable(_COLLECTION, "mask"):
            mask = node.get_variable(_COLLECTION, "mask")
            kwargs = with_row_mask(context.orig_method, args, kwargs, mask)
        if (node.path, context.method_name) == (owner, method):
            value, replace = first_argument(context.orig_method, args, kwargs)
            if node.has_variable(_COLLECTION, "replacement"):
                args, kwargs = replace(node.get_variable(_COLLECTION, "replacement"))
            else:
                node.sow(_COLLECTION, "features", value)
        return next_function(*args, **kwargs)

    def run(params, model_state, inputs, *, train, mask, key, features):
        intercepted: dict[str, Any] = {}
        if features is not None:
            _insert(intercepted, (*owner, "replacement"), features)
        if train and mask is not None:
            for path in batch_norms:
                _insert(intercepted, (*path, "mask"), mask)
        key = typed_key(key)
        with nn.intercept_methods(intercept):
            outputs, changed = module.apply(
                {"params": params, **(model_state or {}), _COLLECTION: intercepted},
                inputs,
                **arguments(train),
                # Linen draws any other stream that a module asks for from "params".
                rngs={"params": key, "dropout": jax.random.fold_in(key, 1)},
                mutable=[_COLLECTION, *(collections if train else ())],
            )
        recorded: Any = ()
        if features is None:
            found = functools.reduce(lambda n, k: n.get(k, {}), owner, changed[_COLLECTION])
            recorded = found.get("features", ())
        if train and has_state:
            model_state = {name: changed.get(name, model_state[name]) for name in collections}
        return outputs, recorded, model_state

    return Network(init, run)


def _find(calls: Any, head: str) -> tuple[tuple[str, ...], str]:
    """The path of the module that the head is, or is a method of, and the method's name."""
    path = tuple(head.split("."))
    if (path, "__call__") in calls:
        return path, "__call__"
    if (path[:-1], path[-1]) in calls and len(path) > 1:
        return path[:-1], path[-1]
    names = [".".join(p) + ("" if m == "__call__" else "." + m) for p, m in calls if p]
    raise ValueError(f"head must be one of {', '.join(names)}, got {head!r}.")


def _draws(module: nn.Module, variables: PyTree, inputs: PyTree, arguments: dict[str, Any]) -> bool:
    """Whether the module asks for random numbers in training."""

    def apply(variables, inputs):
        return module.apply(variables, inputs, **arguments, mutable=True)

    try:
        jax.eval_shape(apply, variables, inputs)
    except flax.errors.InvalidRngError:
        return True
    return False


def _insert(nested: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    node = functools.reduce(lambda node, name: node.setdefault(name, {}), path[:-1], nested)
    node[path[-1]] = value
