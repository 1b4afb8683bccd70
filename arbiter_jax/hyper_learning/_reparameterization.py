"""The batch size as a smooth function of one unbounded number.

The agent proposes logits. A sigmoid maps them into the range of batch sizes, and floor makes them
integers; :func:`to_logit` is the inverse.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jax.typing

from arbiter_jax import _validate


def _check_range(min_batch_size: int, max_batch_size: int) -> tuple[int, int]:
    low, high, _ = _validate.batch_size_range(min_batch_size, max_batch_size)
    if not (_validate.is_traced(low) or _validate.is_traced(high)) and high == low:
        raise ValueError(
            f"max_batch_size must be > min_batch_size, got {high} for both: nothing to map."
        )
    return low, high


def _as_floats(**argument: Any) -> jax.Array:
    ((name, value),) = argument.items()
    try:
        if not isinstance(value, str):
            return jnp.asarray(value, float)
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"{name} must be a number or an array of numbers, got {_validate.shown(value)}."
    )


def to_logit(
    batch_size: jax.typing.ArrayLike, min_batch_size: int, max_batch_size: int
) -> jax.Array:
    r"""The logit at the center of the interval that floor maps to a batch size.

    .. math:: l = \log\frac{b + 1/2 - b_{min}}{b_{max} - b - 1/2}

    The published code uses the left edge, without the 1/2, and loses one example in the round trip
    if rounding goes down: 64 becomes 63.

    Args:
      batch_size: b, of any shape, in examples; clipped to [min_batch_size, max_batch_size - 1],
        because max_batch_size itself has an infinite logit.
      min_batch_size: :math:`b_{min}`, an integer >= 1.
      max_batch_size: :math:`b_{max}`, an integer > min_batch_size.

    Returns:
      float, of the shape of batch_size.

    Raises:
      ValueError: If the range is reversed, empty or not made of integers.

    *Guarantees*: ``to_batch_size(to_logit(b)) == b`` for every integer b in [min_batch_size,
    max_batch_size - 1], in float32, for ranges up to 32-65536.

    >>> round(float(to_logit(64, 8, 512)), 4)
    -2.0694
    """
    low, high = _check_range(min_batch_size, max_batch_size)
    b = jnp.clip(_as_floats(batch_size=batch_size), low, high - 1)
    # Numerator and denominator are exact in float32; 1 - p would not be.
    return jnp.log(b + 0.5 - low) - jnp.log(high - b - 0.5)


def to_batch_size(
    logit: jax.typing.ArrayLike, min_batch_size: int, max_batch_size: int
) -> jax.Array:
    r"""The batch size that a logit stands for.

    .. math:: B = \lfloor (b_{max} - b_{min})\,\sigma(l) + b_{min} \rfloor

    Args:
      logit: l, of any shape.
      min_batch_size: :math:`b_{min}`, an integer >= 1.
      max_batch_size: :math:`b_{max}`, an integer > min_batch_size.

    Returns:
      int32, of the shape of logit, within [min_batch_size, max_batch_size]; a NaN gives
      min_batch_size.

    Raises:
      ValueError: If the range is reversed, empty or not made of integers.

    >>> to_batch_size(jnp.array([-jnp.inf, 0.0, jnp.inf]), 8, 512).tolist()
    [8, 260, 512]
    """
    low, high = _check_range(min_batch_size, max_batch_size)
    size = jnp.floor((high - low) * jax.nn.sigmoid(_as_floats(logit=logit)) + low)
    return jnp.clip(jnp.nan_to_num(size, nan=low), low, high).astype(jnp.int32)
