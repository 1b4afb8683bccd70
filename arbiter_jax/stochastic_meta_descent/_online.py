"""Online stochastic meta-descent: adjusts learning rate and momentum while a network trains.

Every few steps the hyperparameters descend on the loss a few steps ahead. Started from the best
constant rate, this lowers the rate immediately: within five steps a smaller rate removes noise, and
the progress that it costs does not show yet. Wu et al., "Understanding Short-Horizon Bias in
Stochastic Meta-Optimization", ICLR 2018, https://arxiv.org/abs/1803.02021.
"""

from __future__ import annotations

import dataclasses
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
    MetaState,
    as_hyperparameters,
    check_arguments,
    draw,
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

START = Hyperparameters(learning_rate=0.1, momentum=0.9, decay=0.0)


class OnlineResult(NamedTuple):
    """Result of :func:`online`."""

    state: TrainState  # at the end of training
    history: Hyperparameters  # of each training step, shape=(num_steps,)
    losses: jax.Array  # shape=(num_steps,), dtype=float, batch loss before each step
    num_skipped: jax.Array  # shape=(), dtype=int32, meta steps without a finite hypergradient


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The timetable of a run, in training steps."""

    num_steps: int
    num_learning_steps: int
    num_constant_steps: int  # before the rate decays to its final value
    meta_every: int
    num_meta_steps: int  # per adjustment
    num_evaluation_batches: int
    final_learning_rate: float


def online(
    loss_fn: LossFn,
    params: PyTree,
    data: PyTree,
    key: jax.Array,
    *,
    num_steps: int,
    hyperparameters: Hyperparameters = START,
    learned: Sequence[str] = ("learning_rate", "momentum"),
    inner_optimizer: InnerOptimizer = optax.sgd,
    horizon: int = 5,
    num_evaluation_batches: int = 5,
    meta_every: int = 10,
    num_meta_steps: int = 10,
    meta_optimizer: optax.GradientTransformation | None = None,
    reset_meta_state: bool = False,
    learning_fraction: float = 0.5,
    final_learning_rate: float = 1e-4,
    batch_size: int = 100,
    time_constant: float = 5000.0,
    effective_learning_rate: bool = True,
    model_state: PyTree = None,
) -> OnlineResult:
    r"""Adjusts the hyperparameters of a run while it trains, by a look-ahead of a few steps.

    Every `meta_every` steps of the first part of training, `num_meta_steps` meta steps are taken
    from the current parameters, all on the same look-ahead batches and the same fresh evaluation
    batches. In the remaining part the effective rate decays exponentially to `final_learning_rate`.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``, twice differentiable almost everywhere.
      params: Initial parameters.
      data: Pytree of arrays [num_examples, ...].
      key: PRNG key of the batches.
      num_steps: Steps of the whole run, an integer >= 1.
      hyperparameters: Initial values: learning rate > 0, momentum in [0, 1), decay >= 0.
      learned: Names of the hyperparameters to learn; the others stay fixed. () trains the baseline:
        the initial rate, then the same exponential decay.
      inner_optimizer: As in :func:`offline`.
      horizon: T, the look-ahead in steps, an integer >= 1.
      num_evaluation_batches: Batches over which the loss at the end of a look-ahead is averaged,
        an integer >= 1.
      meta_every: Training steps between two adjustments, an integer >= 1.
      num_meta_steps: Meta steps per adjustment, an integer >= 1.
      meta_optimizer: As in :func:`offline`.
      reset_meta_state: As in :func:`offline`.
      learning_fraction: Fraction of training in which hyperparameters are learned, in [0, 1].
      final_learning_rate: Effective rate at the end of training, > 0.
      batch_size: Examples per batch, an integer >= 1.
      time_constant: As in :func:`offline`.
      effective_learning_rate: As in :func:`offline`.
      model_state: As in :func:`offline`.

    Returns:
      An :class:`OnlineResult`. Warns at the end if a meta step was skipped, or a loss not finite.

    Raises:
      ValueError: If an argument is outside its range.

    Reference:
      Wu et al. 2018, https://arxiv.org/abs/1803.02021, section 4.3.

    *Guarantees*: those of :func:`offline`.

    >>> import arbiter_jax as aj, jax, jax.numpy as jnp
    >>> smd = aj.stochastic_meta_descent
    >>> result = smd.online(
    ...     lambda w, x: (w - x) ** 2 / 2, jnp.zeros(()), jnp.ones(10), jax.random.PRNGKey(0),
    ...     hyperparameters=smd.Hyperparameters(0.01, 0.5, 0.0), num_steps=40, batch_size=2,
    ... )
    >>> rates = result.history.learning_rate
    >>> bool(rates[19] > 1.1 * rates[0]), bool(rates[39] < rates[20])
    (True, True)
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
    fraction = _validate.in_range(0.0, 1.0, learning_fraction=learning_fraction)
    num_steps = _validate.integer(num_steps=num_steps, minimum=1)
    plan = _Plan(
        num_steps=num_steps,
        num_learning_steps=round(fraction * num_steps) if learned else 0,
        num_constant_steps=round(fraction * num_steps),
        num_evaluation_batches=_validate.integer(
            num_evaluation_batches=num_evaluation_batches, minimum=1
        ),
        meta_every=_validate.integer(meta_every=meta_every, minimum=1),
        num_meta_steps=_validate.integer(num_meta_steps=num_meta_steps, minimum=1),
        final_learning_rate=_validate.positive(final_learning_rate=final_learning_rate),
    )
    check_arguments(params, data)
    result = _online(
        params,
        model_state,
        data,
        check_key(key),
        as_hyperparameters(hyperparameters),
        config=config,
        plan=plan,
    )
    num_adjustments = len(range(0, plan.num_learning_steps, plan.meta_every))
    warn_of_steps(result.losses, result.num_skipped, num_adjustments * plan.num_meta_steps)
    return result


@partial(jax.jit, static_argnames=("config", "plan"))
def _online(
    params,
    model_state,
    data,
    key,
    start: Hyperparameters,
    *,
    config: LookAheadConfig,
    plan: _Plan,
) -> OnlineResult:
    decode = partial(from_log_values, config, fixed=start)

    def adjust(meta: MetaState, state: TrainState) -> tuple[MetaState, TrainState]:
        # Every look-ahead draws its batches from here and the evaluation those after them. Training
        # continues with examples that neither has used in this epoch.
        after = skip_examples(state, data, config.horizon * config.batch_size)
        num_examples = plan.num_evaluation_batches * config.batch_size
        after, (evaluation, _) = draw(after, data, num_examples)

        def body(meta, _):
            _, gradient = look_ahead_gradient(
                config, meta.log_values, decode, state, data, evaluation
            )
            return meta_step(config, meta, gradient), None

        meta, _ = jax.lax.scan(body, meta, None, length=plan.num_meta_steps)
        return meta, state._replace(train_sampler=after.train_sampler)

    def cool(hyperparameters: Hyperparameters, step: jax.Array) -> Hyperparameters:
        rate, momentum, _ = hyperparameters
        effective = rate / (1 - momentum) if config.effective_learning_rate else rate
        done = (step - plan.num_constant_steps) / max(plan.num_steps - plan.num_constant_steps, 1)
        ratio = jnp.minimum(plan.final_learning_rate / effective, 1.0)
        return hyperparameters._replace(learning_rate=rate * ratio ** jnp.maximum(done, 0.0))

    def body(carry, step):
        meta, state = carry
        if plan.num_learning_steps:
            due = (step % plan.meta_every == 0) & (step < plan.num_learning_steps)
            meta, state = jax.lax.cond(due, adjust, lambda *carry: carry, meta, state)
        now = cool(decode(meta.log_values), step)
        state, losses = train_steps(config, state, data, now, 1)
        return (meta, state), (now, losses[0])

    state = init_state(params, config.transformation(start), key, model_state)
    meta = init_meta_state(config, start)
    steps = jnp.arange(plan.num_steps)
    (meta, state), (history, losses) = jax.lax.scan(body, (meta, state), steps)
    return OnlineResult(state, history, losses, meta.num_skipped)
