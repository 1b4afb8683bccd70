"""The constants of the noise floor, and its sizes in closed form (Eqs. 12 and 16)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.typing

EXPONENT = 0.25  # p of the loss F* + c t^-p, whose excess over F* is its slope over p. Eq. 9
NOISE_EXPONENT = 0.15  # s of the noise, which falls as t^-s. Eq. 16
INFINITE_SIZE = 1e9  # what a state holds for an infinite batch size; 1 / this for 0


@dataclasses.dataclass(frozen=True)
class FloorConfig:
    """The constants of :func:`noise_floor`, which documents them, with their defaults."""

    loss_fn: Callable[..., Any] | None = None
    num_examples: int | None = None
    noise_share: float = 0.3
    hold_until: float = 0.6
    final_growth: float = 32.0
    persistence: float | None = None
    step_cost: float = 0.0
    optimal_loss: float = 0.0


def size_for_end(
    batch_size: jax.typing.ArrayLike,
    num_steps: jax.typing.ArrayLike,
    examples_left: jax.typing.ArrayLike,
) -> jax.Array:
    r"""Extrapolates the size for the current slope and noise to the end of the budget (Eq. 16).

    .. math:: b = B \left(1 + \frac{r}{b\, t}\right)^{1/4 - 0.15}

    Holding b until the end makes r / b more steps, in which the slope of the loss falls as
    :math:`t^{-1/4}` and the noise as :math:`t^{-0.15}`.

    Args:
      batch_size: B, the size for the current slope and noise (Eq. 10), float[], in examples.
      num_steps: t, the steps so far, >= 1.
      examples_left: r, what is left of the budget, >= 0.

    Returns:
      b, float[], in examples.

    >>> round(float(size_for_end(64.0, num_steps=100, examples_left=100_000)), 1)
    82.8
    """
    batch_size = jnp.clip(jnp.asarray(batch_size, float), 1 / INFINITE_SIZE, INFINITE_SIZE)
    b = batch_size
    for _ in range(8):  # an error of log b becomes one of at most a tenth of it
        b = batch_size * (1 + examples_left / (b * num_steps)) ** (EXPONENT - NOISE_EXPONENT)
    return b


def final_size(
    batch_size: Any,
    held_batch_size: Any,
    num_steps: Any,
    examples_left: Any,
    *,
    noise_share: float = FloorConfig.noise_share,
    final_growth: float = FloorConfig.final_growth,
) -> Any:
    r"""The size to which a held size grows at the end of the budget (Eq. 12).

    .. math:: \frac{g B_0}{1 + g r / R}, \qquad R = 2\, share\, b\, t, \qquad g = growth \sqrt{b / B_0}

    R examples are worth as much in steps as the noise floor holds of the loss. The size is held as
    long as this is less than it.

    Args:
      batch_size: b, the size that was to be held, > 0, in examples.
      held_batch_size: B_0, the size that was held, >= b: larger at the lower end of the range.
      num_steps: t, the steps so far, >= 1.
      examples_left: r, what is left of the budget, >= 0.
      noise_share: The noise floor as a share of the loss still to go, > 0.
      final_growth: The factor by which the size has grown when nothing is left, >= 1.

    Returns:
      The size, in examples, a number or array like the arguments.

    >>> final_size(64.0, 64.0, num_steps=1000, examples_left=0)
    2048.0
    >>> round(final_size(64.0, 64.0, num_steps=1000, examples_left=10_000))
    219
    """
    factor = final_growth * (batch_size / held_batch_size) ** 0.5
    worth_the_noise = 0.5 * noise_share / EXPONENT * batch_size * num_steps  # R
    return factor * held_batch_size / (1 + factor * examples_left / worth_the_noise)
