"""What a schedule of the user returns, checked: a real scalar, and finite where a run begins."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arbiter_jax import _validate


def schedule_value(count: Any, dtype: Any, **argument: Any) -> jax.Array:
    """The value of a schedule at a count; raises if it cannot be called, or is not a real scalar.

    Args:
      count: A number, traced or not.
      dtype: Type of the result.
      **argument: The schedule, a function of one count, by its name.
    """
    ((name, schedule),) = argument.items()
    try:
        found = schedule(count)
        if found is None or jnp.shape(found) or jnp.iscomplexobj(found):
            raise TypeError(f"it returned {_validate.shown(found)}.")
        return jnp.asarray(found, dtype)
    except (TypeError, ValueError, jax.errors.JAXTypeError) as error:
        reason = f"{error}".partition("\n")[0]  # JAX goes on for a page
        raise ValueError(
            f"{name} must be a function of one count that jax can trace and that returns a scalar, as "
            f"optax schedules are, got {_validate.shown(schedule)}: {reason}"
        ) from error


def first_rate(rate: Any, **argument: Any) -> jax.Array:
    """The learning rate that a run begins with, float32[].

    Args:
      rate: A number, or the value of a schedule at 0. One that is not finite is refused where it is
        known, and is 0 where it is traced.
      **argument: What it was computed from, by its name.
    """
    ((name, value),) = argument.items()
    with np.errstate(over="ignore"):  # of a number that float32 cannot hold
        rate = jnp.asarray(rate, jnp.float32)
    if _validate.is_traced(rate):
        return jnp.where(jnp.isfinite(rate), rate, 0)
    if not np.isfinite(np.asarray(rate)):  # not of JAX, which would trace it inside `jax.jit`
        if callable(value):
            raise ValueError(
                f"{name} must be finite at the count 0, where a run begins, got {rate}: shift it, for "
                f"example lambda n: {name}(n + 1)."
            )
        raise ValueError(f"{name} must be finite in float32, got {_validate.shown(value)}.")
    return rate
