"""Decays of the learning rate by the number of examples, as shares of the peak rate."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

WARM_UP = 0.02  # share of the budget in which the rate rises to its peak
NUM_RATES = 4_001  # entries of a table of rates


def half_cosine(num_examples: int) -> optax.Schedule:
    """(1 + cos(pi x)) / 2 at the share x of the budget."""
    return lambda seen: (1 + jnp.cos(jnp.pi * jnp.minimum(seen / num_examples, 1))) / 2


def quarter_cosine(num_examples: int) -> optax.Schedule:
    """cos(pi x / 2)."""
    return lambda seen: jnp.cos(jnp.pi / 2 * jnp.minimum(seen / num_examples, 1))


def linear(num_examples: int) -> optax.Schedule:
    """1 - x."""
    return lambda seen: 1 - jnp.minimum(seen / num_examples, 1)


def wsd(num_examples: int) -> optax.Schedule:
    """Constant, then linear to 0 in the last fifth."""
    return lambda seen: jnp.clip(5 * (1 - seen / num_examples), 0, 1)


DECAYS: dict[str, Callable[[int], optax.Schedule]] = {
    "half cosine": half_cosine,
    "quarter cosine": quarter_cosine,
    "linear": linear,
    "WSD-20": wsd,
}


def with_warm_up(name: str, num_examples: int) -> optax.Schedule:
    """A decay by name after a linear warm-up; the peak is 1."""
    rise = max(1, int(WARM_UP * num_examples))
    decay = DECAYS[name](num_examples - rise)
    # Never 0 at first: a step of rate 0 would be wasted.
    return lambda seen: jnp.where(seen < rise, (seen + 1) / (rise + 1), decay(seen - rise))


def sampled(schedule: optax.Schedule, num_examples: int) -> np.ndarray:
    """A table of a schedule at equal distances, from the first example to the last."""
    counts = jnp.linspace(0, num_examples, NUM_RATES)
    return np.asarray(jax.vmap(schedule)(counts), float)
