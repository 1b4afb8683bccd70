"""Offline stochastic meta-descent: learns a schedule by repeating the same segment of training.

Every meta step trains T steps from the same parameters and moves learning rate and decay against
the derivative of the final loss. If T is much shorter than the run that the schedule is for, the
learned rate decays far too early. Wu et al., "Understanding Short-Horizon Bias in Stochastic
Meta-Optimization", ICLR 2018, https://arxiv.org/abs/1803.02021.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _validate
from arbiter_jax.base import LossFn, PyTree
from arbiter_jax.stochastic_meta_descent._look_ahead import (
    Hyperparameters,
    InnerOptimizer,
    LookAheadConfig,
    as_hyperparameters,
    check_arguments,
    from_log_values,
    init_meta_state,
    look_ahead_config,
    look_ahead_gradient,
    meta_step,
    skip_examples,
    train_steps,
    warn_of_steps,
)
from arbiter_jax.training import TrainState, init_state
from arbiter_jax.training._check_state import check_key

START = Hyperparameters(learning_rate=0.01, momentum=0.9, decay=0.1)
PRETRAINING = Hyperparameters(learning_rate=0.1, momentum=0.9, decay=0.0)


class OfflineResult(NamedTuple):
    """Result of :func:`offline`."""

    hyperparameters: Hyperparameters  # after the last meta step, scalars
    history: Hyperparameters  # of each look-ahead, shape=(num_meta_steps,)
    losses: jax.Array  # shape=(num_meta_steps,), dtype=float, at the end of each look-ahead
    state: TrainState  # after pretraining, where every look-ahead starts
    num_skipped: jax.Array  # shape=(), dtype=int32, meta steps without a finite hypergradient


def offline(
    loss_fn: LossFn,
    params: PyTree,
    data: PyTree,
    key: jax.Array,
    *,
    horizon: int,
    hyperparameters: Hyperparameters = START,
    learned: Sequence[str] = ("learning_rate", "decay"),
    inner_optimizer: InnerOptimizer = optax.sgd,
    num_meta_steps: int = 5000,
    meta_optimizer: optax.GradientTransformation | None = None,
    reset_meta_state: bool = False,
    batch_size: int = 100,
    time_constant: float = 5000.0,
    effective_learning_rate: bool = True,
    num_pretraining_steps: int = 50,
    pretraining: Hyperparameters = PRETRAINING,
    model_state: PyTree = None,
) -> OfflineResult:
    r"""Learns a schedule by repeating the same T steps of training from the same parameters.

    After a short pretraining, whose velocity is discarded, every meta step trains T steps from
    those parameters on fresh batches, computes the mean loss over all data, and moves the
    logarithms of the hyperparameters against its derivative.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``, twice differentiable almost everywhere.
      params: Parameters before pretraining.
      data: Pytree of arrays [num_examples, ...]; the meta-objective is the mean loss over it.
      key: PRNG key of the batches.
      horizon: T, the look-ahead in steps, an integer >= 1.
      hyperparameters: Initial values: learning rate > 0, momentum in [0, 1), decay >= 0.
      learned: Names of the hyperparameters to learn; the others stay fixed.
      inner_optimizer: ``inner_optimizer(learning_rate, momentum) -> transformation``, such as
        `optax.sgd` and `optax.adam`.
      num_meta_steps: Number of meta steps, an integer >= 1.
      meta_optimizer: Optimizer of the logarithms; `optax.adam(0.01)` if None.
      reset_meta_state: Whether every meta step starts from a fresh state of the meta optimizer, as
        in the published code. Every step of Adam then has the size of its learning rate.
      batch_size: Examples per batch, an integer >= 1.
      time_constant: K of the rate :math:`\alpha_0 (1 + t / K)^{-\beta}`, in steps, > 0.
      effective_learning_rate: Whether to learn, and limit the range of, the effective rate
        learning_rate / (1 - momentum) instead of the learning rate. Use False for optimizers whose
        momentum is an average (Adam).
      num_pretraining_steps: Steps before the first look-ahead, an integer >= 0.
      pretraining: Hyperparameters of those steps.
      model_state: State of the model that is not trained by gradients, or None.

    Returns:
      An :class:`OfflineResult`. Warns at the end if a meta step was skipped.

    Raises:
      ValueError: If an argument is outside its range.

    Reference:
      Wu et al. 2018, https://arxiv.org/abs/1803.02021, section 4.2.

    *Guarantees*: hyperparameters stay in their ranges (effective learning rate [1e-4, 10], 1 -
    momentum [1e-4, 1], decay [1e-4, 1e3]); derivatives are limited to 10, and skipped and counted if
    they are not finite; memory does not depend on the horizon.

    >>> import arbiter_jax as aj, jax, jax.numpy as jnp, optax
    >>> result = aj.stochastic_meta_descent.offline(
    ...     lambda w, x: (w - x) ** 2 / 2, jnp.zeros(()), jnp.ones(10), jax.random.PRNGKey(0),
    ...     horizon=5, num_meta_steps=20, num_pretraining_steps=0, batch_size=2,
    ...     meta_optimizer=optax.adam(0.1),
    ... )
    >>> bool(result.losses[-1] < 0.5 * result.losses[0])
    True
    """
    config = look_ahead_config(
        loss_fn=loss_fn,
        inner_optimizer=inner_optimizer,
        batch_size=batch_size,
        time_constant=time_constant,
        horizon=horizon,
        learned=learned,
        effective_learning_rate=effective_learning_rate,
        meta_optimizer=meta_optimizer,
        reset_meta_state=reset_meta_state,
    )
    if not config.learned:
        raise ValueError("learned must name at least one hyperparameter, got ().")
    check_arguments(params, data)
    num_meta_steps = _validate.integer(num_meta_steps=num_meta_steps, minimum=1)
    result = _offline(
        params,
        model_state,
        data,
        check_key(key),
        as_hyperparameters(hyperparameters),
        as_hyperparameters(pretraining),
        config=config,
        num_meta_steps=num_meta_steps,
        num_pretraining_steps=_validate.integer(
            num_pretraining_steps=num_pretraining_steps, minimum=0
        ),
    )
    warn_of_steps(result.losses, result.num_skipped, num_meta_steps)
    return result


@partial(jax.jit, static_argnames=("config", "num_meta_steps", "num_pretraining_steps"))
def _offline(
    params,
    model_state,
    data,
    key,
    start: Hyperparameters,
    pretraining: Hyperparameters,
    *,
    config: LookAheadConfig,
    num_meta_steps: int,
    num_pretraining_steps: int,
) -> OfflineResult:
    state = init_state(params, config.transformation(pretraining), key, model_state)
    state, _ = train_steps(config, state, data, pretraining, num_pretraining_steps)
    # Discard the velocity; the schedule counts its steps from here.
    opt_state = config.transformation(start).init(state.params)
    state = state._replace(opt_state=opt_state, num_steps=jnp.zeros_like(state.num_steps))
    decode = partial(from_log_values, config, fixed=start)

    def body(carry, _):
        meta, state = carry
        now = decode(meta.log_values)
        value, gradient = look_ahead_gradient(config, meta.log_values, decode, state, data, data)
        meta = meta_step(config, meta, gradient)
        # The next look-ahead continues with fresh batches.
        state = skip_examples(state, data, config.horizon * config.batch_size)
        return (meta, state), (now, value)

    meta = init_meta_state(config, start)
    (meta, _), (history, losses) = jax.lax.scan(body, (meta, state), None, length=num_meta_steps)
    return OfflineResult(decode(meta.log_values), history, losses, state, meta.num_skipped)
