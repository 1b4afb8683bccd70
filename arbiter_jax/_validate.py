"""Argument checks at construction: one sentence that names the argument, its value and its range."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection
from typing import Any


def _single(arguments: dict[str, Any]) -> tuple[str, Any]:
    ((name, value),) = arguments.items()
    return name, value


def _is_integer(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, numbers.Integral):
        return True
    # A zero-dimensional integer array is an integer to every user of JAX.
    return getattr(value, "ndim", None) == 0 and getattr(value.dtype, "kind", "") in "iu"


def _is_real(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, numbers.Real):
        return True
    return getattr(value, "ndim", None) == 0 and getattr(value.dtype, "kind", "") in "iuf"


def integer(*, minimum: int | None = None, maximum: int | None = None, **argument: Any) -> int:
    """Returns the argument as an int, or raises if it is not an integer in [minimum, maximum]."""
    name, value = _single(argument)
    low = "" if minimum is None else f" >= {minimum}"
    high = "" if maximum is None else f"{' and' if low else ''} <= {maximum}"
    if (
        not _is_integer(value)
        or (minimum is not None and value < minimum)
        or (maximum is not None and value > maximum)
    ):
        raise ValueError(f"{name} must be an integer{low}{high}, got {value!r}.")
    return int(value)


def _real(value: Any, name: str, holds: Callable[[float], bool], expected: str) -> float:
    if not _is_real(value) or not holds(float(value)):
        raise ValueError(f"{name} must be {expected}, got {value!r}.")
    return float(value)


def positive(**argument: Any) -> float:
    """Returns the argument as a float, or raises if it is not a finite number > 0."""
    name, value = _single(argument)
    return _real(value, name, lambda x: math.isfinite(x) and x > 0, "a finite number > 0")


def non_negative(**argument: Any) -> float:
    """Returns the argument as a float, or raises if it is not a finite number >= 0."""
    name, value = _single(argument)
    return _real(value, name, lambda x: math.isfinite(x) and x >= 0, "a finite number >= 0")


def greater(than: float, *, closed: bool = False, **argument: Any) -> float:
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


def in_range(minimum: float, maximum: float, *, closed: str = "both", **argument: Any) -> float:
    """Returns the argument as a float, or raises if it is outside the interval.

    Args:
      minimum: Lower end of the interval.
      maximum: Upper end of the interval.
      closed: Which ends belong to the interval: "both", "left", "right" or "neither".
      **argument: The one argument to check, by its name.
    """
    name, value = _single(argument)
    left, right = closed in ("both", "left"), closed in ("both", "right")

    def holds(x: float) -> bool:
        above = x >= minimum if left else x > minimum
        below = x <= maximum if right else x < maximum
        return above and below

    interval = f"{'[' if left else '('}{minimum}, {maximum}{']' if right else ')'}"
    return _real(value, name, holds, f"in {interval}")


def one_of(options: Collection[Any], **argument: Any) -> Any:
    """Returns the argument, or raises if it is not one of the options."""
    name, value = _single(argument)
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}.")
    return value


def power_of_two(**argument: Any) -> int:
    """Returns the argument as an int, or raises if it is not a positive power of two."""
    name, value = _single(argument)
    if not _is_integer(value) or value < 1 or int(value) & (int(value) - 1):
        raise ValueError(f"{name} must be a power of two >= 1, got {value!r}.")
    return int(value)


def batch_size_range(
    min_batch_size: Any, max_batch_size: Any, initial_batch_size: Any = None
) -> tuple[int, int, int]:
    """Checks the three batch sizes that every rule takes and returns them as ints.

    Args:
      min_batch_size: Smallest batch size, an integer >= 1.
      max_batch_size: Largest batch size, an integer >= min_batch_size.
      initial_batch_size: Size to start from; the smallest one if None.
    """
    low = integer(min_batch_size=min_batch_size, minimum=1)
    high = integer(max_batch_size=max_batch_size, minimum=1)
    if high < low:
        raise ValueError(
            f"max_batch_size must be >= min_batch_size, got max_batch_size={high} and "
            f"min_batch_size={low}."
        )
    if initial_batch_size is None:
        return low, high, low
    start = integer(initial_batch_size=initial_batch_size, minimum=low, maximum=high)
    return low, high, start
