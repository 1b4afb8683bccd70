"""AutoWU: an exponential warm-up that stops when the loss starts to rise, then a cosine decay.

At the end of each epoch a Gaussian process regresses the losses so far on the step. Once several
consecutive epochs agree with confidence that the loss was lower before, the learning rate returns
to where the loss was lowest and decays from there.

Reference: Kim et al., `Automated Learning Rate Scheduler for Large-batch Training
<https://arxiv.org/abs/2107.05855>`_, 2021.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _schedules, _validate
from arbiter_jax._numerics import loop_if, raw_key, scale_updates
from arbiter_jax.base import require
from arbiter_jax.learning_rate import _gaussian_process as gp
from arbiter_jax.learning_rate._turning_point import draw_subsets, find_turning_point

WARM_UP, CONSTANT, COOL_DOWN = 0, 1, 2

_MAX_LOSS = 1e12  # a larger loss counts as divergence: sums of its squares overflow float32


class AutoWUState(NamedTuple):
    """State of :func:`autowu`; W is the length of the longest warm-up in steps."""

    learning_rate: jax.Array  # shape=(), dtype=float32, the rate that the next step will use
    phase: jax.Array  # shape=(), dtype=int32, 0 warm-up, 1 constant, 2 cool-down
    num_steps: jax.Array  # shape=(), dtype=int32, steps done
    peak_learning_rate: jax.Array  # shape=(), dtype=float32, rate that the decay starts from
    cooldown_start: jax.Array  # shape=(), dtype=int32, number of steps before the cool-down
    num_positives: jax.Array  # shape=(), dtype=int32, consecutive positive tests
    losses: jax.Array  # shape=(W,), dtype=float, nan if still to come or not finite
    process: gp.GaussianProcess  # its parameters and their Adam state
    key: jax.Array  # shape=(2,), dtype=uint32
    num_skipped: jax.Array  # shape=(), dtype=int32, losses that were not finite

    requires = ("value",)
    metrics = ("learning_rate", "phase")


@dataclasses.dataclass(frozen=True)
class _Config:
    """The constants of one run; lengths and positions are in steps."""

    steps_per_epoch: int
    total_steps: int  # of the whole training
    max_warmup: int
    min_learning_rate: float
    growth: float | jax.Array  # d log(learning rate) / d step in the warm-up
    phase_after_warmup: int
    latest_cooldown: int  # a constant phase ends here
    patience: int
    num_tests: int
    confidence: float


class _Decision(NamedTuple):
    """Whether the tests so far end the warm-up, with what the next test starts from."""

    process: gp.GaussianProcess
    key: jax.Array  # shape=(2,), dtype=uint32
    num_positives: jax.Array  # shape=(), dtype=int32
    ends_warmup: jax.Array  # shape=(), dtype=bool
    learning_rate: jax.Array  # shape=(), dtype=float32, where the decay starts if it ends


def _decide(
    config: _Config, losses: jax.Array, num_steps: jax.Array, rate: jax.Array, before: _Decision
) -> _Decision:
    """Runs the test at the end of an epoch, whose last step had the rate `rate`."""
    key, draw_key = jax.random.split(before.key)
    test = find_turning_point(
        before.process,
        losses,
        num_steps,
        rate,
        *draw_subsets(draw_key, losses, config.num_tests),
        steps_per_epoch=config.steps_per_epoch,
        min_learning_rate=config.min_learning_rate,
    )
    positive = 2 * jnp.sum(test.probabilities > config.confidence) > config.num_tests
    num_positives = jnp.where(positive, before.num_positives + 1, 0).astype(jnp.int32)
    ends_warmup = (num_positives >= config.patience) | test.collapsed
    return _Decision(test.process, key, num_positives, ends_warmup, test.learning_rate)


def _cosine(config: _Config, peak: jax.Array, start: jax.Array, num_steps: jax.Array) -> jax.Array:
    """The rate after `num_steps` steps of a decay from `peak` that began at `start`."""
    duration = jnp.maximum(config.total_steps - start, 1)
    left = duration - jnp.minimum(num_steps - start + 1, duration)
    # (1 + cos(pi t)) / 2 = sin^2(pi (1 - t) / 2), which keeps its digits as t nears 1.
    return peak * jnp.sin(0.5 * jnp.pi * left / duration) ** 2


def _advance(config: _Config, state: AutoWUState, value: jax.Array) -> AutoWUState:
    """The state after one more step, whose loss was `value`."""
    usable = jnp.abs(value) <= _MAX_LOSS  # False for nan
    losses = state.losses.at[state.num_steps].set(jnp.where(usable, value, jnp.nan), mode="drop")
    num_steps = jnp.asarray(optax.safe_increment(state.num_steps))

    warming = state.phase == WARM_UP
    due = warming & (num_steps % config.steps_per_epoch == 0) & (num_steps < config.max_warmup)
    decision = _Decision(
        process=state.process,
        key=state.key,
        num_positives=state.num_positives,
        ends_warmup=jnp.zeros_like(due),
        learning_rate=state.learning_rate,
    )
    if config.steps_per_epoch < config.max_warmup:  # otherwise no epoch ends in the warm-up
        decide = lambda before: _decide(config, losses, num_steps, state.learning_rate, before)
        decision = loop_if(due, decide, decision)

    ended = warming & (decision.ends_warmup | (num_steps >= config.max_warmup))
    # No test is due at the last step of the longest warm-up: the decay starts at its rate.
    peak = jnp.where(ended, decision.learning_rate, state.peak_learning_rate)
    phase = jnp.where(ended, config.phase_after_warmup, state.phase)
    phase = jnp.where((phase == CONSTANT) & (num_steps >= config.latest_cooldown), COOL_DOWN, phase)
    starts_cooldown = (phase == COOL_DOWN) & (state.phase != COOL_DOWN)
    cooldown_start = jnp.where(starts_cooldown, num_steps, state.cooldown_start)

    learning_rate = jnp.select(
        [phase == WARM_UP, phase == CONSTANT],
        [config.min_learning_rate * jnp.exp(config.growth * num_steps), peak],
        _cosine(config, peak, cooldown_start, num_steps),
    )
    return AutoWUState(
        learning_rate=learning_rate.astype(jnp.float32),
        phase=phase.astype(jnp.int32),
        num_steps=num_steps,
        peak_learning_rate=peak,
        cooldown_start=cooldown_start,
        num_positives=decision.num_positives,
        losses=losses,
        process=decision.process,
        key=decision.key,
        num_skipped=state.num_skipped + (~usable).astype(jnp.int32),
    )


def autowu(
    steps_per_epoch: int,
    num_epochs: int,
    *,
    min_learning_rate: float = 1e-5,
    max_learning_rate: float = 1.0,
    max_warmup_fraction: float = 0.5,
    immediate_cooldown: bool = True,
    cooldown_fraction: float = 0.2,
    patience: int = 3,
    num_tests: int = 5,
    confidence: float = 0.95,
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Finds the peak learning rate during the warm-up, then decays it.

    With N steps in all and W = max_warmup_fraction N, the rate of step k is
    :math:`\eta_k = \eta_{min} (\eta_{max} / \eta_{min})^{k / W}`. At the end of each epoch, after K
    losses, a Gaussian process f on (k / K, loss) is fitted and conditioned on ``num_tests`` random
    subsets. A subset votes that the loss has started to rise if
    :math:`\max_i P(f_i < f_{last})` exceeds the confidence. A majority makes the test positive, and
    ``patience`` consecutive positive tests end the warm-up. The decay starts from the mean over
    the subsets of :math:`\eta_{min} (\eta / \eta_{min})^{\arg\min f}`, with :math:`\eta` the rate of
    the last step. After step :math:`k \ge s`, where s is the step at which the decay starts, the
    rate is

    .. math::
      \frac{\eta}{2} \left(1 + \cos\frac{\pi \min(k - s + 1, N - s)}{N - s}\right).

    If no test ends the warm-up, it stops after W steps and the decay starts from the rate reached.
    The updates are multiplied by the rate, so the optimizer before it should have a rate of 1:
    ``optax.chain(optax.lamb(1.0), autowu(...))``, or with :func:`adamp`.

    Two additions to the paper: an epoch without a finite loss also ends the warm-up, at the best
    rate so far (the smallest rate if no loss was ever finite); and the cosine stays at zero after
    step N, where the published one rises again.

    Args:
      steps_per_epoch: Optimizer steps between two tests, an integer >= 1.
      num_epochs: Epochs of the whole training, an integer >= 1.
      min_learning_rate: Rate of the first step, > 0.
      max_learning_rate: Rate that a warm-up of W steps would reach, >= min_learning_rate.
      max_warmup_fraction: Longest warm-up as a fraction of all steps, in (0, 1].
      immediate_cooldown: If True, the cosine follows the warm-up immediately; otherwise the rate
        is constant until the last ``cooldown_fraction`` of all steps.
      cooldown_fraction: Fraction of all steps that the cosine takes if it does not follow
        immediately, in [0, 1].
      patience: Consecutive positive tests that end the warm-up, an integer >= 1.
      num_tests: Subsets that vote in a test, an integer >= 1.
      confidence: Probability above which a subset votes, in (0, 1).
      seed: An int, or a PRNG key, of the random subsets.

    Returns:
      A transformation that multiplies the updates by the rate and reads ``value``, the loss
      before the step. Its state is an :class:`AutoWUState`: ``learning_rate`` is the rate that
      the next step will use, ``phase`` is 0 in the warm-up, 1 while constant, 2 in the cool-down.

    Raises:
      ValueError: If an argument is outside its range.
      TypeError: If ``update`` is called without ``value``.

    Reference:
      Kim et al., `Automated Learning Rate Scheduler for Large-batch Training
      <https://arxiv.org/abs/2107.05855>`_, 2021.

    *Guarantees*:
      * Finite: the rate is in [0, max_learning_rate] for any losses.
      * Skips and counts: a loss that is not finite enters no regression; `num_skipped` counts it.
      * Idle between tests: the regression runs at epoch ends only, under ``vmap`` as well.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.lamb(1.0), aj.autowu(steps_per_epoch=10, num_epochs=4))
    >>> params = {"w": jnp.ones(3)}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": jnp.ones(3)}, state, params, value=2.3)
    >>> print(f"{state[1].learning_rate:.2e}")  # 1e-5 (1 / 1e-5)^(1 / 20)
    1.78e-05
    """
    _validate.static(
        steps_per_epoch=steps_per_epoch,
        num_epochs=num_epochs,
        max_warmup_fraction=max_warmup_fraction,
        cooldown_fraction=cooldown_fraction,
        num_tests=num_tests,
    )
    steps_per_epoch = _validate.integer(steps_per_epoch=steps_per_epoch, minimum=1)
    num_epochs = _validate.integer(num_epochs=num_epochs, minimum=1)
    low = _validate.positive(min_learning_rate=min_learning_rate)
    high = _validate.positive(max_learning_rate=max_learning_rate)
    _schedules.first_rate(high, max_learning_rate=high)
    traced = _validate.is_traced(low) or _validate.is_traced(high)
    if not traced and high < low:
        raise ValueError(
            "max_learning_rate must be >= min_learning_rate, got "
            f"max_learning_rate={high} and min_learning_rate={low}."
        )
    max_warmup_fraction = _validate.in_range(
        0, 1, closed="right", max_warmup_fraction=max_warmup_fraction
    )
    cooldown_fraction = _validate.in_range(0, 1, cooldown_fraction=cooldown_fraction)
    _validate.boolean(immediate_cooldown=immediate_cooldown)
    seed = _validate.seed(seed)

    total_steps = steps_per_epoch * num_epochs
    if total_steps > _validate.LARGEST_INT32:
        raise ValueError(
            f"steps_per_epoch * num_epochs must be <= {_validate.LARGEST_INT32}, got "
            f"{_validate.shown(total_steps)}."
        )
    longest = max(1, int(max_warmup_fraction * total_steps))
    phase_after_warmup, latest_cooldown, max_warmup = COOL_DOWN, total_steps, longest
    if not immediate_cooldown:
        phase_after_warmup = CONSTANT
        latest_cooldown = math.ceil((1 - cooldown_fraction) * total_steps)
        max_warmup = max(1, min(longest, latest_cooldown))  # the cool-down ends a warm-up
    config = _Config(
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        max_warmup=max_warmup,
        min_learning_rate=low,
        growth=(jnp.log(high / low) if traced else math.log(high / low)) / longest,
        phase_after_warmup=phase_after_warmup,
        latest_cooldown=latest_cooldown,
        patience=_validate.int32(patience=patience, minimum=1),
        num_tests=_validate.integer(num_tests=num_tests, minimum=1),
        confidence=_validate.in_range(0, 1, closed="neither", confidence=confidence),
    )

    def init_fn(params):
        del params
        return AutoWUState(
            learning_rate=jnp.asarray(low, jnp.float32),
            phase=jnp.asarray(WARM_UP, jnp.int32),
            num_steps=jnp.asarray(0, jnp.int32),
            peak_learning_rate=jnp.asarray(low, jnp.float32),
            cooldown_start=jnp.asarray(total_steps, jnp.int32),
            num_positives=jnp.asarray(0, jnp.int32),
            losses=jnp.full((max_warmup,), jnp.nan, float),
            process=gp.init(),
            key=jnp.array(raw_key(seed)),  # a copy: the state may be donated
            num_skipped=jnp.asarray(0, jnp.int32),
        )

    def update_fn(updates, state, params=None, *, value=None, probe=None, **extra_args):
        del params, extra_args
        if probe is not None:
            return updates, state
        require("autowu", value=value)
        value = jax.lax.stop_gradient(jnp.asarray(value, state.losses.dtype))
        return scale_updates(updates, state.learning_rate), _advance(config, state, value)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
