"""Argument checks at construction: one sentence that names the argument, its value and its range.

A traced scalar, which `optax.inject_hyperparams` makes of every number, is a number that cannot be
checked: it passes where a number is expected. What fixes a shape or the structure of a state has to
be known while tracing: :func:`integer` and :func:`static` refuse a traced value.
"""

from __future__ import annotations

import inspect
import math
import numbers
import warnings
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

LARGEST_INT32 = 2**31 - 1
LARGEST_COUNT = 2**63 - 1  # of examples; an int64 of NumPy holds it


def _single(arguments: dict[str, Any]) -> tuple[str, Any]:
    ((name, value),) = arguments.items()
    return name, value


def is_traced(value: Any) -> bool:
    """Whether the value is known only when the compiled program runs."""
    return isinstance(value, jax.core.Tracer)


def _is_number(value: Any, kind: Any, array_kinds: tuple[Any, ...]) -> bool:
    """Whether it is a number of the kind, or a zero-dimensional array of one of the kinds."""
    if isinstance(value, bool):
        return False
    if isinstance(value, kind):
        return True
    # A zero-dimensional array is a number to every user of JAX.
    dtype = getattr(value, "dtype", None)
    return (
        getattr(value, "ndim", None) == 0
        and dtype is not None
        and any(jnp.issubdtype(dtype, array_kind) for array_kind in array_kinds)
    )


def _is_integer(value: Any) -> bool:
    return _is_number(value, numbers.Integral, (jnp.integer,))


def _is_real(value: Any) -> bool:
    return _is_number(value, numbers.Real, (jnp.integer, jnp.floating))


def shown(value: Any) -> str:
    """The value as it is shown in a message: an array by its shape, and nothing longer than a line."""
    if is_traced(value) or getattr(value, "ndim", 0):
        shape = ", ".join(map(str, value.shape))
        return f"{'a traced' if is_traced(value) else 'an array'} {value.dtype}[{shape}]"
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def _not_static(names: str, found: str) -> ValueError:
    listed = ", ".join(f'"{name}"' for name in names.split(", "))
    comma = "" if ", " in names else ","
    return ValueError(
        f"{names} must be known while tracing, got {found}: give Python numbers, and inside "
        f"optax.inject_hyperparams pass static_args=({listed}{comma})."
    )


def warn(message: str) -> None:
    """Warns of a likely mistake, at the line outside the package that made it."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("arbiter_jax."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def static(**arguments: Any) -> None:
    """Raises if an argument that fixes a shape or a structure is an array of JAX, traced or not.

    `optax.inject_hyperparams` makes an array of every number: one that is refused only in the traced
    update would pass `init`.

    Args:
      **arguments: All such arguments of a factory, so that one message names all of them.
    """
    found = [value for value in arguments.values() if isinstance(value, jax.Array)]
    if found:
        raise _not_static(", ".join(arguments), shown(found[0]))


def integer(*, minimum: int | None = None, maximum: int | None = None, **argument: Any) -> int:
    """Returns the argument as an int, or raises if it is not an integer in [minimum, maximum]."""
    name, value = _single(argument)
    if is_traced(value):
        raise _not_static(name, shown(value))
    low = "" if minimum is None else f" >= {minimum}"
    high = "" if maximum is None else f"{' and' if low else ''} <= {maximum}"
    if (
        not _is_integer(value)
        or (minimum is not None and int(value) < minimum)
        or (maximum is not None and int(value) > maximum)
    ):
        raise ValueError(f"{name} must be an integer{low}{high}, got {shown(value)}.")
    return int(value)


def int32(*, minimum: int | None = None, maximum: Any = None, **argument: Any) -> Any:
    """Returns an integer that enters a program: an int, or int32[] of an array, which may be traced.

    Args:
      minimum: The least that is allowed.
      maximum: The most that is allowed, or a traced number that nothing can be compared with.
      **argument: The one argument to check, by its name. An array of floats will do, because
        `optax.inject_hyperparams` keeps the values of a schedule in floats; a traced one is rounded.

    Returns:
      An int32[] for every array of JAX, so that `init` and a traced `update` do the same.
    """
    name, value = _single(argument)
    if is_traced(value):
        if not _is_real(value):
            raise ValueError(f"{name} must be an integer, got {shown(value)}.")
        return jnp.round(value).astype(jnp.int32)
    checked = value
    if isinstance(value, jax.Array) and _is_real(value) and float(value).is_integer():
        checked = int(value)
    most = None if maximum is None or is_traced(maximum) else int(maximum)
    checked = integer(minimum=minimum, maximum=most, **{name: checked})
    if checked > LARGEST_INT32:
        checked = integer(minimum=minimum, maximum=LARGEST_INT32, **{name: checked})
    return jnp.asarray(checked, jnp.int32) if isinstance(value, jax.Array) else checked


def count(**argument: Any) -> Any:
    """Returns a number of examples >= 1: an int of up to 63 bits, or int32[] of an array."""
    (value,) = argument.values()
    if isinstance(value, jax.Array):
        return int32(minimum=1, **argument)
    return integer(minimum=1, maximum=LARGEST_COUNT, **argument)


def seed(value: Any) -> Any:
    """Returns an int or a PRNG key, or raises if it is neither.

    Args:
      value: The argument `seed`.
    """
    if _is_integer(value):
        if not is_traced(value):
            integer(seed=value, minimum=-(2**63), maximum=2**63 - 1)
        return value
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, value)
    else:
        data = value
    of_default = jax.eval_shape(jax.random.PRNGKey, 0)
    found = getattr(data, "shape", None), getattr(data, "dtype", None)
    if found != (of_default.shape, of_default.dtype):
        raise ValueError(
            "seed must be an integer or one PRNG key of the default implementation, got "
            f"{shown(value)}."
        )
    return value


def _real(value: Any, name: str, holds: Callable[[float], bool], expected: str) -> Any:
    if not _is_real(value):
        raise ValueError(f"{name} must be {expected}, got {shown(value)}.")
    if is_traced(value):  # in at least float32: a size in bfloat16 has three digits
        return value.astype(jnp.promote_types(value.dtype, jnp.float32))
    try:
        number = float(value)
    except OverflowError:  # an int that no float can hold
        number = math.inf
    if not holds(number):
        hint = ""
        if getattr(getattr(value, "dtype", None), "itemsize", 8) < 4:
            hint = (
                "; optax.inject_hyperparams keeps it in the type of the parameters unless it is given "
                "hyperparam_dtype=jnp.float32"
            )
        raise ValueError(f"{name} must be {expected}, got {shown(value)}{hint}.")
    return number


def function(expected: str, hint: str = "", **argument: Any) -> Any:
    """Returns the argument, or raises if it is not callable.

    Args:
      expected: What it is a function of.
      hint: The end of the message.
      **argument: The one argument to check, by its name.
    """
    name, value = _single(argument)
    if callable(value):
        return value
    if isinstance(value, jax.Array):
        hint = (
            "; optax.inject_hyperparams calls every function as a schedule unless it is named: "
            f'pass static_args=("{name}",)'
        )
    raise ValueError(f"{name} must be a function {expected}, got {shown(value)}{hint}.")


def all_parameters(rule: str, params: Any) -> None:
    """Raises if `params` are those that a mask or a group of `optax.multi_transform` lets through.

    Args:
      rule: Name of the rule, which reads parameters, updates or signals that are like them.
      params: The argument of `init`.
    """
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    if any(isinstance(node, optax.MaskedNode) for node in nodes):
        raise ValueError(
            f"{rule} must see all parameters, got only those that optax.masked or a group of "
            "optax.multi_transform lets through: chain it after that transformation, not inside it."
        )


def positive(**argument: Any) -> Any:
    """Returns the argument as a float, or raises if it is not a finite number > 0."""
    name, value = _single(argument)
    return _real(value, name, lambda x: math.isfinite(x) and x > 0, "a finite number > 0")


def non_negative(**argument: Any) -> Any:
    """Returns the argument as a float, or raises if it is not a finite number >= 0."""
    name, value = _single(argument)
    return _real(value, name, lambda x: math.isfinite(x) and x >= 0, "a finite number >= 0")


def greater(than: float, *, closed: bool = False, **argument: Any) -> Any:
    """Returns the argument as a float, or raises if it is not a finite number > `than`.

    Args:
      than: The lower end of what is allowed.
      closed: Whether `than` itself is allowed.
      **argument: The one argument to check, by its name.
    """
    name, value = _single(argument)
    above = (lambda x: x >= than) if closed else (lambda x: x > than)
    expected = f"a finite number {'>=' if closed else '>'} {than:g}"
    return _real(value, name, lambda x: math.isfinite(x) and above(x), expected)


def in_range(minimum: Any, maximum: Any, *, closed: str = "both", **argument: Any) -> Any:
    """Returns the argument as a float, or raises if it is outside the interval.

    Args:
      minimum: Lower end of the interval; a traced one is not compared with.
      maximum: Upper end of the interval, likewise.
      closed: Which ends belong to the interval: "both", "left", "right" or "neither".
      **argument: The one argument to check, by its name.
    """
    name, value = _single(argument)
    minimum = -math.inf if is_traced(minimum) else minimum
    maximum = math.inf if is_traced(maximum) else maximum
    left, right = closed in ("both", "left"), closed in ("both", "right")

    def holds(x: float) -> bool:
        above = x >= minimum if left else x > minimum
        below = x <= maximum if right else x < maximum
        return above and below

    interval = f"{'[' if left else '('}{minimum}, {maximum}{']' if right else ')'}"
    return _real(value, name, holds, f"in {interval}")


def boolean(**argument: Any) -> Any:
    """Returns the argument, or raises if it is not True or False; the text "no" is true in Python."""
    name, value = _single(argument)
    if is_traced(value) and value.ndim == 0:
        return value
    is_number = isinstance(value, numbers.Real | np.bool | jax.Array)
    scalar = is_number and getattr(value, "ndim", 0) == 0
    if not scalar or value not in (True, False):
        raise ValueError(f"{name} must be True or False, got {shown(value)}.")
    return value


def transformation(**argument: Any) -> Any:
    """Returns the argument, or raises if it is not an optax gradient transformation."""
    name, value = _single(argument)
    has_both = callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))
    if has_both and not isinstance(value, type):
        return value
    hint = ": call it first, e.g. optax.sgd(0.1)" if callable(value) else ""
    raise ValueError(f"{name} must be an optax gradient transformation, got {shown(value)}{hint}.")


def one_of(options: Collection[Any], **argument: Any) -> Any:
    """Returns the argument, or raises if it is not one of the options."""
    name, value = _single(argument)
    if is_traced(value):
        raise _not_static(name, shown(value))
    if getattr(value, "ndim", 0) or value not in options:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, options))}, got {shown(value)}."
        )
    return value


def power_of_two(**argument: Any) -> int:
    """Returns the argument as an int, or raises if it is not a positive power of two."""
    name, value = _single(argument)
    if is_traced(value):
        raise _not_static(name, shown(value))
    if not _is_integer(value) or int(value) < 1 or int(value) & (int(value) - 1):
        raise ValueError(f"{name} must be a power of two >= 1, got {shown(value)}.")
    return int(value)


def batch_size_range(
    min_batch_size: Any,
    max_batch_size: Any,
    initial_batch_size: Any = None,
    *,
    name: str = "initial_batch_size",
) -> tuple[Any, Any, Any]:
    """Checks the three batch sizes that every rule takes.

    Args:
      min_batch_size: Smallest batch size, an integer >= 1.
      max_batch_size: Largest batch size, an integer >= min_batch_size.
      initial_batch_size: Size to start from; the smallest one if None.
      name: What the size to start from is called in messages.

    Returns:
      Each as an int, or as int32[] if it was an array: see :func:`int32`.
    """
    low = int32(min_batch_size=min_batch_size, minimum=1)
    high = int32(max_batch_size=max_batch_size, minimum=1)
    traced = is_traced(low) or is_traced(high)
    if not traced and high < low:
        raise ValueError(
            f"max_batch_size must be >= min_batch_size, got max_batch_size={high} and "
            f"min_batch_size={low}."
        )
    if initial_batch_size is None:
        return low, high, low
    limits = {"minimum": 1} if traced else {"minimum": int(low), "maximum": int(high)}
    start = int32(**limits, **{name: initial_batch_size})
    if traced or is_traced(start):
        start = jnp.clip(start, low, high)
    return low, high, start
