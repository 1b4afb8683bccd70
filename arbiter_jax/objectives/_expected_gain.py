"""Expected gain: what a step is expected to gain, and what its noise costs. NOISE.md, Eqs. 1 to 6."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _validate
from arbiter_jax._numerics import tree_dot, tree_where
from arbiter_jax.base import PyTree
from arbiter_jax.objectives._objective import NoiseObjective, power_average, validation_loss
from arbiter_jax.objectives._persistence import Persistence, resolve_persistence


class GainState(NamedTuple):
    """What a step gains and what its noise costs: averages of A0 and q."""

    progress: jax.Array  # shape=(), dtype=float, average of A0, the decrease of the loss in a step
    noise_cost: jax.Array  # shape=(), dtype=float, average of q, in loss times examples
    num_examples: jax.Array  # shape=(), dtype=float, in the batches that were looked at

    requires = ("update_noise", "meta_batch")
    metrics = ("progress", "noise_cost")


def gain_objective(
    loss_fn: Callable[..., Any],
    *,
    persistence: Persistence = 1.0,
    step_cost: float = 0.0,
) -> NoiseObjective:
    """Expected gain a step, per cost: Eqs. 1 to 6. See :func:`arbiter_jax.noise_response`."""
    k, cost = resolve_persistence(persistence, power=2), _validate.non_negative(step_cost=step_cost)

    def init():
        zero = jnp.zeros((), float)
        return GainState(zero, jnp.array(zero), jnp.array(zero))  # no two fields share a buffer

    def measure(updates, params, batch_size, signals):
        sample = gain_and_noise_cost(loss_fn, params, updates, batch_size, signals, persistence=k)
        # 0 and 0: gradients without size, which say nothing about any batch size.
        nothing = (sample[0] == 0) & (sample[1] == 0)
        return tuple(jnp.where(nothing, jnp.nan, x) for x in sample)

    def update(state, sample, due, batch_size, signals):
        del signals
        # A look at a batch of twice the size is worth two: weights by examples, not by steps.
        before, now = state.num_examples, state.num_examples + batch_size
        mean = lambda old, new: power_average(old, new, before, now, 1)
        new = GainState(mean(state.progress, sample[0]), mean(state.noise_cost, sample[1]), now)
        return tree_where(due, new, state)

    def best(state, cost=cost):
        progress, q = state.progress, jnp.maximum(state.noise_cost, 0)
        root = jnp.sqrt(q * q + jnp.maximum(progress, 0) * q * cost)
        beyond = jnp.where(q > 0, jnp.inf, jnp.nan)
        return jnp.where(progress > 0, (q + root) / progress, beyond)  # Eq. 6

    def objective(state, b, cost=cost):
        q = jnp.maximum(state.noise_cost, 0)
        scale = jnp.maximum(jnp.maximum(state.progress, q / b), jnp.finfo(q.dtype).tiny)
        gain = (state.progress - q / b) / jax.lax.stop_gradient(scale)  # Eq. 4, of order one
        # Where a step is expected to lose, the logarithm goes on as a line: more examples.
        edge = 0.05
        log_gain = jnp.where(
            gain > edge,
            jnp.log(jnp.maximum(gain, edge)),
            jnp.log(edge) + (gain - edge) / edge,
        )
        return jnp.log(cost + b) - log_gain  # Eq. 5, as a loss

    return NoiseObjective(init, measure, update, objective, best, GainState.requires)


def gain_and_noise_cost(
    loss_fn: Callable[..., Any],
    params: PyTree,
    updates: PyTree,
    batch_size: jax.Array,
    signals: dict[str, Any],
    persistence: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """One sample of A0 and q, on validation data.

    The progress is what the update changes, the noise cost a second derivative along one direction,
    forward over forward: neither a gradient nor a product with the Hessian is formed.

    Args:
      loss_fn: As for training; with a model state it is called with it, and the state it returns is
        dropped.
      params: Before the update.
      updates: u, like params.
      batch_size: B, examples in the batch that made the update.
      signals: With `update_noise`, `meta_batch`, and `model_state` where the model has one.
      persistence: k.

    Returns:
      (A0, q), floats.
    """
    mean_loss = validation_loss(loss_fn, signals)
    direction = jax.tree.map(lambda p, d: jnp.asarray(d, p.dtype), params, signals["update_noise"])

    def slope(params):
        return jax.jvp(mean_loss, (params,), (direction,))[1]

    try:
        curvature = jax.jvp(slope, (params,), (direction,))[1]
    except (TypeError, NotImplementedError):
        # A custom_vjp has no forward derivative, and JAX raises the first where one is asked for and
        # the second inside of another. Backward costs twice as much; a loss that is wrong raises again.
        bent = jax.jvp(jax.grad(mean_loss), (params,), (direction,))[1]
        curvature = tree_dot(direction, bent)
    b = batch_size.astype(float)
    q = 0.5 * persistence**2 * b * curvature  # Eq. 3
    progress = mean_loss(params) - mean_loss(optax.apply_updates(params, updates))  # Eq. 2
    return progress + q / b, q  # Eq. 4
