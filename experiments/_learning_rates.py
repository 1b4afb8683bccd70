"""Learning-rate schedules whose kind lies in the optimizer state, so that all share one program."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

KINDS = ("constant", "cosine", "warm-up + cosine")
WARM_UP = 0.1  # share of all steps


class RatesState(NamedTuple):
    """State of :func:`scale_by_rates`."""

    learning_rate: jax.Array  # shape=(), dtype=float32, rate of the last step
    rates: jax.Array  # shape=(num_steps,), dtype=float32, rate of each step
    step: jax.Array  # shape=(), dtype=int32, steps done

    metrics = ("learning_rate",)


def scale_by_rates(kind: str, rate: float, num_steps: int) -> optax.GradientTransformation:
    """Multiplies updates by a rate per step, read from a table in the state.

    Schedules of the same length share one compiled program.

    Args:
      kind: One of :data:`KINDS`; the linear warm-up takes the first tenth of the steps.
      rate: The largest rate.
      num_steps: Steps of the run.
    """
    step, rise = np.arange(num_steps), math.ceil(WARM_UP * num_steps)
    rise = rise if kind == "warm-up + cosine" else 0
    cosine = (1 + np.cos(np.pi * (step - rise) / (num_steps - rise))) / 2
    shape = np.where(step < rise, (step + 1) / max(rise, 1), 1 if kind == "constant" else cosine)

    def init_fn(params):
        del params
        return RatesState(jnp.float32(0), jnp.float32(rate * shape), jnp.int32(0))

    def update_fn(updates, state, params=None):
        del params
        state = state._replace(learning_rate=state.rates[state.step], step=state.step + 1)
        return jax.tree.map(lambda u: state.learning_rate * u, updates), state

    return optax.GradientTransformation(init_fn, update_fn)


DECAYS = ("constant", "cosine", "last fifth")


class DecayState(NamedTuple):
    """State of :func:`scale_by_decay`."""

    kind: jax.Array  # shape=(), dtype=int32, index into DECAYS


def scale_by_decay(kind: str, budget: int) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by a decay over the examples of a run.

    The kind of decay lies in the state, so that all decays share one compiled program.

    Args:
      kind: One of :data:`DECAYS`; "last fifth" falls linearly to 0 over the last fifth of the
        examples.
      budget: Examples of the run.
    """
    last = budget // 5
    shapes = {
        "constant": optax.constant_schedule(1.0),
        "cosine": optax.cosine_decay_schedule(1.0, budget),
        "last fifth": optax.linear_schedule(1.0, 0.0, last, transition_begin=budget - last),
    }

    def init_fn(params):
        del params
        return DecayState(jnp.int32(DECAYS.index(kind)))

    def update_fn(updates, state, params=None, *, num_examples=0, **extra_args):
        del params, extra_args
        factor = jnp.stack([shapes[name](num_examples) for name in DECAYS])[state.kind]
        return jax.tree.map(lambda u: factor.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class TableState(NamedTuple):
    """State of :func:`scale_by_table`."""

    learning_rate: jax.Array  # shape=(), dtype=float32, rate of the last step
    table: jax.Array  # shape=(n,), dtype=float32, rates at n equal distances of the budget
    num_examples: jax.Array  # shape=(), dtype=float32, the budget

    metrics = ("learning_rate",)


def scale_by_table(table: np.ndarray, num_examples: int) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by a rate per example seen, interpolated in a table in the state.

    Tables of the same length share one compiled program, whatever schedule, rate and budget.

    Args:
      table: The rates, from the first example of the budget to the last.
      num_examples: The budget.
    """

    def init_fn(params):
        del params
        rates = jnp.asarray(table, jnp.float32)
        return TableState(rates[0], rates, jnp.asarray(num_examples, jnp.float32))

    def update_fn(updates, state, params=None, *, num_examples=0, probe=None, **extra_args):
        del params, extra_args
        if probe is not None:  # asks for the optimizer alone
            return updates, state
        last = len(state.table) - 1
        at = jnp.clip(num_examples / state.num_examples, 0, 1) * last
        low = jnp.minimum(at.astype(jnp.int32), last - 1)
        rate = state.table[low] + (at - low) * (state.table[low + 1] - state.table[low])
        return jax.tree.map(lambda u: rate.astype(u.dtype) * u, updates), state._replace(
            learning_rate=rate.astype(jnp.float32)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
