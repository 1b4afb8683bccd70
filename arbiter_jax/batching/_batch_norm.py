"""Masks for the BatchNorm layers of Flax modules: padding does not enter their statistics.

Single submodules of a copy of the module are given a subclass with one method overridden. What such
a method uses is a variable of the submodule, so that it also passes through Flax's own
transformations (``nnx.jit``, ``nnx.remat``).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Intercepted(nnx.Variable):
    """What an overridden method records or uses; neither a parameter nor model state."""


def mask_batch_norms(module: nnx.Module, mask: jax.Array) -> None:
    """Passes the mask of the examples to every BatchNorm."""
    for _, node in nnx.iter_modules(module):
        if isinstance(node, nnx.BatchNorm):
            batch_norm: Any = node
            batch_norm.arbiter_mask = Intercepted(mask)
            override(node, "__call__", _pass_mask)


def _pass_mask(self, original, args, kwargs):
    return original(*args, **with_row_mask(original, args, kwargs, value_of(self.arbiter_mask)))


def override(node: nnx.Module, method: str, wrapper: Callable[..., Any]) -> None:
    """Makes `node.method(...)` call `wrapper(node, the original method, args, kwargs)`.

    Python looks up `node(...)` in the class, so an attribute of the node would not do. A subclass
    keeps what Flax knows about the class, which a proxy would not.
    """
    cls = type(node)
    original = getattr(cls, method)

    def call(self, *args, **kwargs):
        return wrapper(self, functools.partial(original, self), args, kwargs)

    node.__class__ = type(cls.__name__, (cls,), {method: call})


def value_of(variable: nnx.Variable) -> Any:
    """What a variable holds; `variable[...]`, the usual way, only works for arrays."""
    return variable.get_value()


def first_argument(
    method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]]:
    """What a call passes for the first parameter of a method, by position or by keyword.

    Args:
      method: A bound method; its signature says which of the keywords comes first.
      args: The call's positional arguments.
      kwargs: The call's keyword arguments.

    Returns:
      (value, replace): the argument, and `replace(value) -> (args, kwargs)`, which puts another value
      in the same place.
    """
    if args:
        return args[0], lambda value: ((value, *args[1:]), kwargs)
    if not kwargs:
        raise ValueError("A head or BatchNorm must be called with its input, got no arguments.")
    parameters = inspect.signature(method).parameters
    name = next((name for name in parameters if name in kwargs), next(iter(kwargs)))
    return kwargs[name], lambda value: (args, {**kwargs, name: value})


def with_row_mask(
    method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], mask: jax.Array
) -> dict[str, Any]:
    """The keyword arguments of a call of BatchNorm, with padding left out of its statistics.

    A mask that the network passes itself, of its tokens for example, goes on to count.
    """
    rows = row_mask(mask, first_argument(method, args, kwargs)[0])
    own = kwargs.get("mask")
    return {**kwargs, "mask": rows if own is None else jnp.logical_and(rows, own)}


def row_mask(mask: jax.Array, x: jax.Array) -> jax.Array:
    """A mask of the M examples, in the shape that BatchNorm takes for its input."""
    if x.shape[0] % mask.shape[0]:
        raise ValueError(
            "mask must have a number of rows that divides the number of rows of the input of "
            f"BatchNorm, {x.shape[0]}, got {mask.shape[0]}."
        )
    # More rows than examples: the other axes were folded into the batch, examples first.
    mask = jnp.repeat(mask, x.shape[0] // mask.shape[0], axis=0)
    return jnp.reshape(mask, (x.shape[0],) + (1,) * (x.ndim - 1))
