"""Online stochastic meta-descent: adjust learning rate and momentum while a network trains.

Every few steps the hyperparameters descend on the loss a few steps ahead of where training stands.
Started from the best rate of a run, it lowers that rate at once: a look-ahead of five steps sees
the noise that a smaller rate removes, and not the progress that it costs. Wu et al., "Understanding
Short-Horizon Bias in Stochastic Meta-Optimization", ICLR 2018, https://arxiv.org/abs/1803.02021.
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
    DEFAULT_META_OPTIMIZER,
    Hyperparameters,
    InnerOptimizer,
    LookAheadConfig,
    MetaState,
    as_hyperparameters,
    draw,
    from_log_values,
    init_meta_state,
    look_ahead_gradient,
    meta_step,
    skip_examples,
    train_steps,
)
from arbiter_jax.training import TrainState, init_state

START = Hyperparameters(learning_rate=0.1, momentum=0.9, decay=0.0)


class OnlineResult(NamedTuple):
    """What :func:`online` returns."""

    state: TrainState  # at the end of training
    history: Hyperparameters  # those of each training step, shape=(num_steps,)
    losses: jax.Array  # shape=(num_steps,), dtype=float, of the batch, before each step
    num_skipped: jax.Array  # shape=(), dtype=int32, meta steps without a finite hypergradient


@dataclasses.dataclass(frozen=True)
class _Plan:
    """When what happens, in training steps."""

    num_steps: int
    num_learning_steps: int
    num_constant_steps: int  # before the rate decays to its final value
    meta_every: int
    num_meta_steps: int  # of one adjustment
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
    r"""Adjusts the hyperparameters of one run while it trains, by a look-ahead of a few steps.

    Every `meta_every` steps of the first part of training it takes `num_meta_steps` meta steps, all
    on the same look-ahead batches and the same fresh evaluation batches, from where training
    stands. In the remaining part the effective rate decays exponentially to `final_learning_rate`.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``, twice differentiable almost everywhere.
      params: Parameters at the start.
      data: Pytree of arrays [num_examples, ...].
      key: PRNG key of the batches.
      num_steps: Steps of the whole run, an integer >= 1.
      hyperparameters: Where to start: learning rate > 0, momentum in [0, 1), decay >= 0.
      learned: Names of those that descend; the others stay. () trains the baseline: the starting
        rate, then the same exponential decay.
      inner_optimizer: ``inner_optimizer(learning_rate, momentum) -> transformation``, such as
        `optax.sgd` and `optax.adam`.
      horizon: T, steps of look-ahead, an integer >= 1.
      num_evaluation_batches: Batches that the loss at the end of a look-ahead is the mean of, >= 1.
      meta_every: Training steps between two adjustments, an integer >= 1.
      num_meta_steps: Meta steps of one adjustment, an integer >= 1.
      meta_optimizer: Optimizer of the logarithms; `optax.adam(0.01)` where it is None.
      reset_meta_state: Whether every meta step starts from a fresh state of the meta optimizer, as
        in the published code; steps of Adam are then of its rate times the sign.
      learning_fraction: Part of training in which hyperparameters descend, in [0, 1].
      final_learning_rate: Effective rate at the end of training, > 0.
      batch_size: Examples of one batch, an integer >= 1.
      time_constant: K of the rate :math:`\alpha_0 (1 + t / K)^{-\beta}`, in steps, > 0.
      effective_learning_rate: Whether it is learning_rate / (1 - momentum) whose logarithm descends
        and whose range is limited. False suits optimizers whose momentum is an average (Adam).
      model_state: State of the model that is not trained by gradients, or None.

    Returns:
      An :class:`OnlineResult`.

    Raises:
      ValueError: If an argument is outside of its range.

    Reference:
      Wu et al. 2018, https://arxiv.org/abs/1803.02021, section 4.3.

    *Guarantees*: hyperparameters stay in their ranges (effective learning rate [1e-4, 10], 1 -
    momentum [1e-4, 1], decay [1e-4, 1e3]); derivatives are limited to 10, and skipped and counted
    where they are not finite; memory does not depend on the horizon.

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
    setting = LookAheadConfig(
        loss_fn,
        inner_optimizer,
        tuple(learned),
        horizon,
        batch_size,
        time_constant,
        effective_learning_rate,
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
    return _online(
        params,
        model_state,
        data,
        key,
        as_hyperparameters(hyperparameters),
        setting=setting,
        plan=plan,
        meta_optimizer=meta_optimizer or DEFAULT_META_OPTIMIZER,
        reset_meta_state=bool(reset_meta_state),
    )


@partial(jax.jit, static_argnames=("setting", "plan", "meta_optimizer", "reset_meta_state"))
def _online(
    params,
    model_state,
    data,
    key,
    start: Hyperparameters,
    *,
    setting: LookAheadConfig,
    plan: _Plan,
    meta_optimizer: optax.GradientTransformation,
    reset_meta_state: bool,
) -> OnlineResult:
    decode = partial(from_log_values, setting, fixed=start)

    def adjust(meta: MetaState, state: TrainState) -> tuple[MetaState, TrainState]:
        # The look-ahead draws its batches from here every time, the evaluation those after them,
        # and training goes on with examples that neither has seen in this epoch.
        after = skip_examples(state, data, setting.horizon * setting.batch_size)
        num_examples = plan.num_evaluation_batches * setting.batch_size
        after, (evaluation, _) = draw(after, data, num_examples)

        def body(meta, _):
            _, gradient = look_ahead_gradient(
                setting, meta.log_values, decode, state, data, evaluation
            )
            return meta_step(meta, gradient, meta_optimizer, reset_meta_state), None

        meta, _ = jax.lax.scan(body, meta, None, length=plan.num_meta_steps)
        return meta, state._replace(train_sampler=after.train_sampler)

    def cool(hyperparameters: Hyperparameters, step: jax.Array) -> Hyperparameters:
        rate, momentum, _ = hyperparameters
        effective = rate / (1 - momentum) if setting.effective else rate
        done = (step - plan.num_constant_steps) / max(plan.num_steps - plan.num_constant_steps, 1)
        ratio = jnp.minimum(plan.final_learning_rate / effective, 1.0)
        return hyperparameters._replace(learning_rate=rate * ratio ** jnp.maximum(done, 0.0))

    def body(carry, step):
        meta, state = carry
        if plan.num_learning_steps:
            due = (step % plan.meta_every == 0) & (step < plan.num_learning_steps)
            meta, state = jax.lax.cond(due, adjust, lambda *carry: carry, meta, state)
        now = cool(decode(meta.log_values), step)
        state, losses = train_steps(setting, state, data, now, 1)
        return (meta, state), (now, losses[0])

    state = init_state(params, setting.transformation(start), key, model_state)
    meta = init_meta_state(setting, start, meta_optimizer)
    steps = jnp.arange(plan.num_steps)
    (meta, state), (history, losses) = jax.lax.scan(body, (meta, state), steps)
    return OnlineResult(state, history, losses, meta.num_skipped)
