"""What JAX refuses, in the words of the arguments; and arguments that must be known before tracing."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from arbiter_jax import _validate
from arbiter_jax.base import PyTree

Function = TypeVar("Function", bound=Callable[..., Any])


def explained(explain: Callable[..., None]) -> Callable[[Function], Function]:
    """A decorator of a jitted function: what JAX refuses is said in the words of its arguments.

    JAX looks at the arguments before the function can. Nothing is added to a call that succeeds.

    Args:
      explain: Called with the arguments of a call that failed; raises a ValueError if they are the
        reason.
    """

    def decorate(function: Function) -> Function:
        jitted: Any = function
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return jitted(*args, **kwargs)
            except (AttributeError, RuntimeError, TypeError, ValueError) as error:
                ran = isinstance(error, jax.errors.JaxRuntimeError)
                if ran and "deleted" not in str(error):  # the device's own, such as out of memory
                    raise
                try:
                    explain(**signature.bind(*args, **kwargs).arguments)
                except ValueError as reason:
                    if str(reason) != str(error):
                        raise reason from error
                except TypeError:  # an argument is missing, which Python has said
                    pass
                raise

        # Also what a jitted function has besides the call.
        for name in ("__wrapped__", "lower", "trace", "eval_shape", "clear_cache", "_cache_size"):
            setattr(call, name, getattr(jitted, name))
        return call  # pyright: ignore[reportReturnType]

    return decorate


def check_concrete(**arguments: PyTree) -> None:
    """Raises a ValueError if a run is started while JAX traces: its loop runs on the host."""
    for name, tree in arguments.items():
        if any(map(_validate.is_traced, jax.tree.leaves(tree))):
            raise ValueError(
                f"{name} must hold arrays with values, got traced ones: fit decides on the host, so "
                "call it outside jit, vmap and grad; inside them, use aj.run_window."
            )


def check_static_integers(**arguments: Any) -> None:
    """Raises a ValueError if an argument that fixes a shape is not a Python integer >= 1."""
    for name, value in arguments.items():
        if isinstance(value, jax.Array):
            raise ValueError(
                f"{name} must be a Python integer, because it fixes a shape, got {value!r}: pass "
                f"int({name})."
            )
        check = _validate.power_of_two if name == "bucket_size" else _validate.integer
        check(**{name: value}, **({} if name == "bucket_size" else {"minimum": 1}))
