"""Expected gain: by how much a step lowers the loss, and how much of that its noise costs.

``experiments/noise_rules/DERIVATION.md``, Eqs. 1 to 6.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _validate
from arbiter_jax._count import Count, as_count
from arbiter_jax._numerics import conjugate, tree_dot, tree_where
from arbiter_jax.base import PyTree
from arbiter_jax.objectives._objective import (
    NoiseObjective,
    check_loss_fn,
    power_average,
    validation_loss,
)
from arbiter_jax.objectives._persistence import PersistenceSignal, check_persistence

_EDGE = 0.05  # gain, relative to its scale, below which the logarithm continues as a line


@dataclasses.dataclass(frozen=True)
class GainConfig:
    """The constants of :func:`expected_gain`, which documents them."""

    loss_fn: Callable[..., Any]
    persistence: float | None = None
    step_cost: float = 0.0


class GainState(NamedTuple):
    """What :func:`expected_gain` has measured: averages of A0 and q."""

    noiseless_gain: jax.Array  # shape=(), dtype=float, average of A0, by how much a step lowers F
    noise_cost: jax.Array  # shape=(), dtype=float, average of q, in loss times examples
    num_examples: Count  # in the batches that were measured
    persistence: PersistenceSignal | None  # if it is not a number that was given

    requires = ("update_noise", "meta_batch")
    metrics = ("noiseless_gain", "noise_cost")


class GainSample(NamedTuple):
    """What one measurement says."""

    noiseless_gain: jax.Array  # shape=(), dtype=float, A0
    noise_cost: jax.Array  # shape=(), dtype=float, q


def expected_gain(
    loss_fn: Callable[..., Any],
    *,
    persistence: float | optax.GradientTransformation | None = None,
    step_cost: float = GainConfig.step_cost,
) -> NoiseObjective:
    r"""An objective that maximizes how much a step is expected to lower the loss, for its cost.

    .. math:: J(b) = \log(c_0 + b) - \log(A_0 - q / b), \qquad
      A_0 = F(w) - F(w + u) + \frac{q}{B}, \qquad q = \tfrac12 k^2 B\, du^\top H\, du

    u are the updates at the applied batch size B, du their response to half the difference of the
    gradients of the two halves of the batch, k the `persistence`; the loss F and its Hessian H are
    taken on validation examples. A step of b examples is expected to gain :math:`A_0 - q / b`. The
    derivation is in ``experiments/noise_rules/DERIVATION.md``, Eqs. 1 to 6;
    :func:`arbiter_jax.schedulers.expected_gain` is the rule that takes the minimum.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``, the training loss.
      persistence: k, a number >= 1: 1 for SGD, 1 / sqrt(1 - momentum^2) with momentum, 1 / sqrt(1 -
        b1^2) for Adam; or an optimizer, whose :func:`impulse_response` is measured here; None to
        measure the chain that the objective is used in. If it is too large, A_0 is almost all q /
        B, and the minimum tends to 2 B whatever the dynamics.
      step_cost: c_0, the fixed cost of a step, in examples, >= 0.

    Returns:
      A :class:`NoiseObjective` that reads `update_noise` and `meta_batch` (and `model_state` if the
      model has one), and `persistence` if it is not given.

    Raises:
      ValueError: If an argument is out of its range.

    >>> import arbiter_jax as aj
    >>> objective = aj.objectives.expected_gain(lambda w, x: (w - x) ** 2 / 2, persistence=1.0)
    >>> measured = {"noiseless_gain": jax.numpy.array(0.25), "noise_cost": jax.numpy.array(8.0)}
    >>> float(objective.best(objective.init()._replace(**measured)))  # 2 q / A_0
    64.0
    """
    check_loss_fn(loss_fn)
    config = GainConfig(
        loss_fn=loss_fn,
        persistence=check_persistence(persistence, power=2),
        step_cost=_validate.non_negative(step_cost=step_cost),
    )
    return NoiseObjective(
        init=functools.partial(_init, config),
        measure=functools.partial(_measure, config),
        empty_sample=lambda: GainSample(jnp.zeros((), float), jnp.zeros((), float)),
        update=_update,
        loss=functools.partial(_loss, config),
        best=functools.partial(_best, config),
    )


def _init(config: GainConfig) -> GainState:
    zero = lambda: jnp.zeros((), float)  # no two fields share a buffer
    asked = PersistenceSignal() if config.persistence is None else None
    return GainState(zero(), zero(), as_count(0), persistence=asked)


def _measure(
    config: GainConfig,
    updates: PyTree,
    params: PyTree,
    batch_size: jax.Array,
    signals: dict[str, Any],
) -> GainSample:
    k = config.persistence
    k = signals["persistence"].deviation if k is None else k
    sample = gain_and_noise_cost(
        config.loss_fn, params, updates, batch_size, signals, persistence=k
    )
    # Both are 0 if the gradients are: no information about any batch size.
    nothing = (sample.noiseless_gain == 0) & (sample.noise_cost == 0)
    return jax.tree.map(lambda x: jnp.where(nothing, jnp.nan, x).astype(float), sample)


def _update(
    state: GainState,
    sample: GainSample,
    measured: bool | jax.Array,
    batch_size: jax.Array,
    signals: dict[str, Any],
) -> GainState:
    del signals
    # A batch of twice the size carries twice the information: weights by examples, not by steps.
    before, now = state.num_examples, state.num_examples + batch_size
    mean = lambda old, new: power_average(old, new, before, now, 1)
    new = state._replace(
        noiseless_gain=mean(state.noiseless_gain, sample.noiseless_gain),
        noise_cost=mean(state.noise_cost, sample.noise_cost),
        num_examples=now,
    )
    return tree_where(measured, new, state)


def _best(config: GainConfig, state: GainState, cost: Any = None) -> jax.Array:
    cost = config.step_cost if cost is None else cost
    gain, q = state.noiseless_gain, jnp.maximum(state.noise_cost, 0)
    root = jnp.sqrt(q * q + jnp.maximum(gain, 0) * q * cost)
    unlimited = jnp.where(q > 0, jnp.inf, jnp.nan)
    return jnp.where(gain > 0, (q + root) / gain, unlimited)  # Eq. 6


def _loss(config: GainConfig, state: GainState, b: jax.Array, cost: Any = None) -> jax.Array:
    cost = config.step_cost if cost is None else cost
    q = jnp.maximum(state.noise_cost, 0)
    scale = jnp.maximum(jnp.maximum(state.noiseless_gain, q / b), jnp.finfo(q.dtype).tiny)
    gain = (state.noiseless_gain - q / b) / jax.lax.stop_gradient(scale)  # Eq. 4, of order one
    # If a step is expected to lose, the line asks for more examples.
    log_gain = jnp.where(
        gain > _EDGE,
        jnp.log(jnp.maximum(gain, _EDGE)),
        jnp.log(_EDGE) + (gain - _EDGE) / _EDGE,
    )
    return jnp.log(cost + b) - log_gain  # Eq. 5, as a loss


def gain_and_noise_cost(
    loss_fn: Callable[..., Any],
    params: PyTree,
    updates: PyTree,
    batch_size: jax.Array,
    signals: dict[str, Any],
    persistence: Any = 1.0,
) -> GainSample:
    """One sample of A0 and q, on validation data.

    The gain is what the update changes. The noise cost is a second derivative in one direction,
    forward over forward: neither a gradient nor a product with the Hessian is formed.

    Args:
      loss_fn: As for training; a model state is passed to it, and the one it returns is dropped.
      params: Before the update.
      updates: u, like params.
      batch_size: B, examples in the batch that made the update.
      signals: With `update_noise`, `meta_batch`, and `model_state` if the model has one.
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
        # A custom_vjp has no forward derivative: JAX raises the first error if one is asked for, the
        # second if it is nested. Backward costs twice as much; a loss that is wrong raises again.
        product = jax.jvp(jax.grad(mean_loss), (params,), (direction,))[1]
        curvature = tree_dot(direction, conjugate(product))
    b = batch_size.astype(float)
    q = 0.5 * persistence**2 * b * curvature  # Eq. 3
    gain = mean_loss(params) - mean_loss(optax.apply_updates(params, updates))  # Eq. 2
    return GainSample(noiseless_gain=gain + q / b, noise_cost=q)  # Eq. 4
