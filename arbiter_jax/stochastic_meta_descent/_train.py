"""Stochastic meta-descent: the loss T steps ahead, and its derivative, as functions.

:func:`train` is the training loop of the look-ahead, :func:`hypergradient` the derivative of the
final loss with respect to learning rate, momentum and decay. Wu et al., "Understanding
Short-Horizon Bias in Stochastic Meta-Optimization", ICLR 2018, https://arxiv.org/abs/1803.02021.
"""

from __future__ import annotations

from functools import partial

import jax
import optax

from arbiter_jax import _validate
from arbiter_jax.base import LossFn, PyTree
from arbiter_jax.stochastic_meta_descent._look_ahead import (
    Hyperparameters,
    InnerOptimizer,
    LookAheadConfig,
    as_hyperparameters,
    check_arguments,
    look_ahead_gradient,
    train_steps,
    warn_of_steps,
)
from arbiter_jax.training import TrainState


def train(
    loss_fn: LossFn,
    state: TrainState,
    data: PyTree,
    hyperparameters: Hyperparameters,
    *,
    num_steps: int,
    inner_optimizer: InnerOptimizer = optax.sgd,
    batch_size: int = 100,
    time_constant: float = 5000.0,
) -> tuple[TrainState, jax.Array]:
    r"""Trains with fixed hyperparameters, at the rate :math:`\alpha_0 (1 + t / K)^{-\beta}`.

    This is the look-ahead loop of :func:`offline`. It is a pure function: under `jax.vmap` over the
    hyperparameters it computes a whole surface of the meta-objective.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``.
      state: From ``aj.init_state(params, inner_optimizer(...), key)``; t is its `num_steps`.
      data: Pytree of arrays [num_examples, ...].
      hyperparameters: Learning rate > 0, momentum in [0, 1), decay >= 0.
      num_steps: Number of steps, an integer >= 1.
      inner_optimizer: ``inner_optimizer(learning_rate, momentum) -> transformation``.
      batch_size: Examples per batch, an integer >= 1.
      time_constant: K, in steps, > 0.

    Returns:
      (state, losses): the state after the last step and the batch losses float[num_steps]. Warns if
      one of them is not finite.

    Raises:
      ValueError: If an argument is outside its range.

    >>> import arbiter_jax as aj, jax, jax.numpy as jnp, optax
    >>> smd = aj.stochastic_meta_descent
    >>> state = aj.init_state(jnp.zeros(()), optax.sgd(0.1, 0.9), jax.random.PRNGKey(0))
    >>> state, losses = smd.train(
    ...     lambda w, x: (w - x) ** 2 / 2, state, jnp.ones(10), smd.Hyperparameters(0.1, 0.9, 1.0),
    ...     num_steps=3, batch_size=2,
    ... )
    >>> [round(float(loss), 4) for loss in losses]
    [0.5, 0.405, 0.2592]
    """
    num_steps = _validate.integer(num_steps=num_steps, minimum=1)
    config = LookAheadConfig(loss_fn, inner_optimizer, batch_size, time_constant)
    check_arguments(state.params, data)
    state, losses = _train(state, data, as_hyperparameters(hyperparameters), config, num_steps)
    warn_of_steps(losses)
    return state, losses


@partial(jax.jit, static_argnames=("config", "num_steps"))
def _train(state, data, hyperparameters, config: LookAheadConfig, num_steps: int):
    return train_steps(config, state, data, hyperparameters, num_steps)


def hypergradient(
    loss_fn: LossFn,
    state: TrainState,
    data: PyTree,
    evaluation: PyTree,
    hyperparameters: Hyperparameters,
    *,
    horizon: int,
    inner_optimizer: InnerOptimizer = optax.sgd,
    batch_size: int = 100,
    time_constant: float = 5000.0,
) -> tuple[jax.Array, Hyperparameters]:
    r"""The loss T training steps ahead, and its derivative with respect to the hyperparameters.

    .. math:: \Big\langle \nabla L(\theta_T), \frac{d \theta_T}{d \eta} \Big\rangle, \qquad
      \frac{d \theta_T}{d \eta}\ \text{carried forward with}\ \theta_t\ \text{by}\ \texttt{jax.jvp}

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``, twice differentiable almost everywhere.
      state: Where the look-ahead starts; it draws the next batches of its sampler.
      data: Pytree of arrays [num_examples, ...].
      evaluation: Batch whose mean loss is evaluated at the end, a pytree like `data`.
      hyperparameters: Learning rate > 0, momentum in [0, 1), decay >= 0.
      horizon: T, the look-ahead in steps, an integer >= 1.
      inner_optimizer: ``inner_optimizer(learning_rate, momentum) -> transformation``.
      batch_size: Examples per batch, an integer >= 1.
      time_constant: K, in steps, > 0.

    Returns:
      (value, gradient): float[], and a :class:`Hyperparameters` of scalars, the derivatives with
      respect to learning rate, momentum and decay (not their logarithms).

    Raises:
      ValueError: If an argument is outside its range.

    *Guarantees*: equals reverse mode and finite differences; its memory does not depend on T.

    >>> import arbiter_jax as aj, jax, jax.numpy as jnp, optax
    >>> smd = aj.stochastic_meta_descent
    >>> loss_fn = lambda w, x: (w - x) ** 2 / 2
    >>> state = aj.init_state(jnp.zeros(()), optax.sgd(0.1, 0.0), jax.random.PRNGKey(0))
    >>> value, gradient = smd.hypergradient(
    ...     loss_fn, state, jnp.ones(10), jnp.ones(10), smd.Hyperparameters(0.5, 0.0, 0.0),
    ...     horizon=1, batch_size=2,
    ... )
    >>> float(value), round(float(gradient.learning_rate), 4)  # (1 - lr)^2 / 2 at lr = .5
    (0.125, -0.5)
    """
    config = LookAheadConfig(loss_fn, inner_optimizer, batch_size, time_constant, horizon)
    check_arguments(state.params, data, evaluation)
    return _hypergradient(state, data, evaluation, as_hyperparameters(hyperparameters), config)


@partial(jax.jit, static_argnames="config")
def _hypergradient(state, data, evaluation, hyperparameters, config: LookAheadConfig):
    return look_ahead_gradient(
        config, hyperparameters, lambda coordinates: coordinates, state, data, evaluation
    )
