"""AutoWU: an exponential warm-up that ends itself where the loss turns, then a cosine decay.

At each epoch's end a Gaussian process regresses the losses so far on the step; once it is
confident, several epochs in a row, that the loss has been lower before, the rate goes back to
where the loss was lowest, and decays from there.

Reference: Kim et al., `Automated Learning Rate Scheduler for Large-batch Training
<https://arxiv.org/abs/2107.05855>`_, 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _validate
from arbiter_jax.base import require
from arbiter_jax.learning_rate import _gaussian_process as gp

WARM_UP, CONSTANT, COOL_DOWN = 0, 1, 2

_GRID_SIZE = 500
_FIT_SIZE = 100
_POSTERIOR_SIZE = 500
_VARIANCE_FLOOR = 1e-4
_MAX_LOSS = 1e12  # a larger loss counts as diverged: sums of its squares overflow float32


class AutoWUState(NamedTuple):
    """State of :func:`autowu`; W is the length of the longest warm-up in steps."""

    learning_rate: jax.Array  # shape=(), dtype=float32, the rate that the next step will use
    phase: jax.Array  # shape=(), dtype=int32, 0 warm-up, 1 constant, 2 cool-down
    step: jax.Array  # shape=(), dtype=int32, steps done
    peak_learning_rate: jax.Array  # shape=(), dtype=float32, rate that the decay starts from
    cooldown_start: jax.Array  # shape=(), dtype=int32, step after which the cool-down began
    num_positives: jax.Array  # shape=(), dtype=int32, positive tests in a row
    losses: jax.Array  # shape=(W,), dtype=float, nan where not seen or not finite
    process: gp.GaussianProcess  # its parameters and their Adam state
    key: jax.Array  # shape=(2,), dtype=uint32
    num_skipped: jax.Array  # shape=(), dtype=int32, losses that were not finite

    requires = ("value",)
    metrics = ("learning_rate", "phase")


class _Test(NamedTuple):
    """What one test at the end of an epoch finds."""

    process: gp.GaussianProcess
    probabilities: jax.Array  # shape=(num_tests,), dtype=float, that the loss has been lower before
    positions: jax.Array  # shape=(num_tests,), dtype=float, in [0, 1], where it was lowest
    learning_rate: jax.Array  # shape=(), dtype=float32, mean of the rates at these positions
    collapsed: jax.Array  # shape=(), dtype=bool, no loss of the last epoch was finite


def _draw(key: jax.Array, losses: jax.Array, num_tests: int) -> tuple[jax.Array, jax.Array]:
    """Indices of finite losses, without replacement: int32[n] to fit to, int32[num_tests, m]."""
    num_losses = losses.shape[0]
    scores = jax.random.uniform(key, (1 + num_tests, num_losses))
    scores = jnp.where(jnp.isfinite(losses)[None, :], scores, -1.0)
    _, fit_indices = jax.lax.top_k(scores[0], min(_FIT_SIZE, num_losses))
    _, posterior_indices = jax.lax.top_k(scores[1:], min(_POSTERIOR_SIZE, num_losses))
    return fit_indices, posterior_indices


def _sample(losses: jax.Array, num_losses: jax.Array, indices: jax.Array) -> gp.Sample:
    """The losses at the indices; those that are not finite, or out of range, are masked out."""
    y = losses.at[indices].get(mode="fill", fill_value=jnp.nan)
    mask = jnp.isfinite(y)
    x = jnp.where(mask, indices / num_losses, 0.0).astype(losses.dtype)
    return gp.Sample(x, jnp.where(mask, y, 0.0), mask)


def _test(
    process: gp.GaussianProcess,
    losses: jax.Array,
    num_losses: jax.Array,
    learning_rate: jax.Array,
    fit_indices: jax.Array,
    posterior_indices: jax.Array,
    *,
    steps_per_epoch: int,
    min_learning_rate: float,
) -> _Test:
    """Fits the process and asks whether the loss has been lower before.

    Args:
      process: The process after the test before this one.
      losses: float[W], nan where not seen or not finite.
      num_losses: int32[], K, the steps done.
      learning_rate: float32[], the rate of the last of them.
      fit_indices: int32[n], the losses to fit to; an index >= W is padding.
      posterior_indices: int32[num_tests, m], those that each posterior is given.
      steps_per_epoch: Steps of an epoch.
      min_learning_rate: The rate that the warm-up started from.
    """
    finite = jnp.isfinite(losses)
    mean_loss = jnp.sum(jnp.where(finite, losses, 0.0)) / jnp.maximum(jnp.sum(finite), 1)
    process = gp.fit(process, _sample(losses, num_losses, fit_indices), mean_loss)

    last_epoch = (num_losses - steps_per_epoch,)
    collapsed = ~jnp.any(jax.lax.dynamic_slice(finite, last_epoch, (steps_per_epoch,)))
    last_finite = jnp.max(jnp.where(finite, jnp.arange(losses.shape[0]), 0)) / num_losses
    grid = jnp.linspace(0.0, 1.0, _GRID_SIZE, dtype=losses.dtype)

    def regress(indices):
        sample = _sample(losses, num_losses, indices)
        mean, variance = gp.posterior(process.hyperparameters, sample, grid)
        deviation = jnp.sqrt(variance + _VARIANCE_FLOOR)
        lower = jax.scipy.stats.norm.cdf((mean[-1] - mean) / deviation)  # P(f_i < f_last)
        # After a collapse the process extrapolates where no loss was seen: look before it only.
        mean = jnp.where(collapsed & (grid > last_finite), jnp.inf, mean)
        return jnp.max(lower[:-1]), grid[jnp.argmin(mean)]

    probabilities, positions = jax.vmap(regress)(posterior_indices)
    rates = min_learning_rate * (learning_rate / min_learning_rate) ** positions
    # With no finite loss at all, no rate is known to work but perhaps the smallest.
    best = jnp.where(jnp.any(finite), jnp.mean(rates), min_learning_rate)
    return _Test(process, probabilities, positions, best.astype(jnp.float32), collapsed)


def _apply_if(condition: jax.Array, fn: Callable[[Any], Any], operand: Any) -> Any:
    """`fn(operand)` where the condition holds, else the operand.

    ``lax.cond`` becomes a select under ``vmap``, which runs the test at every step. A loop of at
    most one turn stays a branch: its body runs only at the steps where some member of the batch
    needs it.
    """
    _, result = jax.lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.zeros_like(carry[0]), fn(carry[1])),
        (condition, operand),
    )
    return result


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
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Finds the peak learning rate during the warm-up, then decays it.

    With N all steps and W = max_warmup_fraction N, the rate of step k is
    :math:`\eta_k = \eta_{min} (\eta_{max} / \eta_{min})^{k / W}`. At each epoch's end, after K
    losses, a Gaussian process f on (k / K, loss) is fitted and conditioned on ``num_tests``
    random subsets; each votes that the loss has turned where :math:`\max_i P(f_i < f_{last})`
    exceeds the confidence. A majority is a positive test, and ``patience`` positive tests in a
    row end the warm-up. It ends at the mean over the subsets of
    :math:`\eta_{min} (\eta / \eta_{min})^{\arg\min f}`, with :math:`\eta` the rate of the last
    step. After step :math:`k \ge s`, where s is the step at which the decay starts, the rate is

    .. math::
      \frac{\eta}{2} \left(1 + \cos\frac{\pi \min(k - s + 1, N - s)}{N - s}\right).

    A warm-up that no test ends stops after W steps, and the decay starts from the rate reached. The
    updates that come in are multiplied by the rate, so they should be those of a rate of 1:
    ``optax.chain(optax.lamb(1.0), autowu(...))``, or with :func:`adamp`.

    Beyond the paper, a loss that is finite at no step of an epoch ends the warm-up too, at the best
    rate so far (the smallest one where no loss was ever finite), and the cosine stays at zero
    once it is there, where the published one turns up again after step N.

    Args:
      steps_per_epoch: Optimizer steps from one test to the next, an integer >= 1.
      num_epochs: Epochs of the whole training, an integer >= 1.
      min_learning_rate: Rate of the first step, > 0.
      max_learning_rate: Rate that a warm-up of W steps would reach, >= min_learning_rate.
      max_warmup_fraction: Longest warm-up as a share of all steps, in (0, 1].
      immediate_cooldown: Whether the cosine follows the warm-up at once; otherwise the rate is
        constant until the last ``cooldown_fraction`` of all steps.
      cooldown_fraction: Share of all steps that the cosine takes where it does not follow at
        once, in [0, 1].
      patience: Positive tests in a row that end the warm-up, an integer >= 1.
      num_tests: Subsets that vote in a test, an integer >= 1.
      confidence: Probability above which a subset votes, in (0, 1).
      seed: Seed of the random subsets.

    Returns:
      A transformation that multiplies the updates by the rate and reads ``value``, the loss
      before the step. Its state is an :class:`AutoWUState`: ``learning_rate`` is the rate that
      the next step will use, ``phase`` is 0 in the warm-up, 1 while constant, 2 in the cool-down.

    Raises:
      ValueError: If an argument is outside of its range.
      TypeError: If ``update`` is called without ``value``.

    Reference:
      Kim et al., `Automated Learning Rate Scheduler for Large-batch Training
      <https://arxiv.org/abs/2107.05855>`_, 2021.

    *Guarantees*:
      * Finite: the rate is in [0, max_learning_rate] whatever the losses are.
      * Skips and counts: a loss that is not finite enters no regression, `num_skipped` counts it.
      * Idle between tests: the regression runs at epoch ends only, under ``vmap`` as well.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.lamb(1.0), aj.autowu(steps_per_epoch=10, num_epochs=4))
    >>> params = {"w": jnp.ones(3)}
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": jnp.ones(3)}, state, params, value=2.3)
    >>> print(f"{state[1].learning_rate:.2e}")  # 1e-5 (1 / 1e-5)^(1 / 20)
    1.78e-05
    """
    steps_per_epoch = _validate.integer(steps_per_epoch=steps_per_epoch, minimum=1)
    num_epochs = _validate.integer(num_epochs=num_epochs, minimum=1)
    low = _validate.positive(min_learning_rate=min_learning_rate)
    high = _validate.positive(max_learning_rate=max_learning_rate)
    if high < low:
        raise ValueError(
            "max_learning_rate must be >= min_learning_rate, got "
            f"max_learning_rate={high} and min_learning_rate={low}."
        )
    max_warmup_fraction = _validate.in_range(
        0, 1, closed="right", max_warmup_fraction=max_warmup_fraction
    )
    cooldown_fraction = _validate.in_range(0, 1, cooldown_fraction=cooldown_fraction)
    patience = _validate.integer(patience=patience, minimum=1)
    num_tests = _validate.integer(num_tests=num_tests, minimum=1)
    confidence = _validate.in_range(0, 1, closed="neither", confidence=confidence)
    seed = _validate.integer(seed=seed)

    num_steps = steps_per_epoch * num_epochs
    max_warmup = max(1, int(max_warmup_fraction * num_steps))
    growth = math.log(high / low) / max_warmup
    after_warmup, cooldown_at = COOL_DOWN, num_steps
    if not immediate_cooldown:
        after_warmup, cooldown_at = CONSTANT, math.ceil((1 - cooldown_fraction) * num_steps)
        max_warmup = max(1, min(max_warmup, cooldown_at))  # the cool-down waits for no warm-up

    def init_fn(params):
        del params
        return AutoWUState(
            learning_rate=jnp.asarray(low, jnp.float32),
            phase=jnp.asarray(WARM_UP, jnp.int32),
            step=jnp.asarray(0, jnp.int32),
            peak_learning_rate=jnp.asarray(low, jnp.float32),
            cooldown_start=jnp.asarray(num_steps, jnp.int32),
            num_positives=jnp.asarray(0, jnp.int32),
            losses=jnp.full((max_warmup,), jnp.nan, float),
            process=gp.init(),
            key=jax.random.PRNGKey(seed),
            num_skipped=jnp.asarray(0, jnp.int32),
        )

    def cosine(peak, start, step):
        remaining = jnp.maximum(num_steps - start, 1)
        left = remaining - jnp.minimum(step - start + 1, remaining)
        # (1 + cos(pi t)) / 2 = sin^2(pi (1 - t) / 2), which keeps its digits as t nears 1.
        return peak * jnp.sin(0.5 * jnp.pi * left / remaining) ** 2

    def test_fn(losses, step, learning_rate):
        def run(carry):
            process, key, num_positives, _, _ = carry
            key, draw_key = jax.random.split(key)
            test = _test(
                process,
                losses,
                step,
                learning_rate,
                *_draw(draw_key, losses, num_tests),
                steps_per_epoch=steps_per_epoch,
                min_learning_rate=low,
            )
            positive = 2 * jnp.sum(test.probabilities > confidence) > num_tests
            num_positives = jnp.where(positive, num_positives + 1, 0).astype(jnp.int32)
            switch = (num_positives >= patience) | test.collapsed
            return test.process, key, num_positives, switch, test.learning_rate

        return run

    def update_fn(updates, state, params=None, *, value=None, **extra_args):
        del params, extra_args
        require("autowu", value=value)
        value = jax.lax.stop_gradient(jnp.asarray(value, state.losses.dtype))
        updates = jax.tree.map(
            lambda u: (state.learning_rate * u).astype(jnp.result_type(u)), updates
        )

        usable = jnp.abs(value) <= _MAX_LOSS  # False for nan
        losses = state.losses.at[state.step].set(jnp.where(usable, value, jnp.nan), mode="drop")
        step = jnp.asarray(optax.safe_increment(state.step))

        warming = state.phase == WARM_UP
        due = warming & (step % steps_per_epoch == 0) & (step < max_warmup)
        outcome = (
            state.process,
            state.key,
            state.num_positives,
            jnp.zeros_like(due),
            state.learning_rate,
        )
        if steps_per_epoch < max_warmup:  # else no epoch ends within the warm-up
            outcome = _apply_if(due, test_fn(losses, step, state.learning_rate), outcome)
        process, key, num_positives, switched, candidate = outcome

        ended = warming & (switched | (step >= max_warmup))
        # Where the warm-up ran its course no test was due, and the rate stays as it is.
        peak = jnp.where(ended, candidate, state.peak_learning_rate)
        phase = jnp.where(ended, after_warmup, state.phase)
        phase = jnp.where((phase == CONSTANT) & (step >= cooldown_at), COOL_DOWN, phase)
        cools = (phase == COOL_DOWN) & (state.phase != COOL_DOWN)
        start = jnp.where(cools, step, state.cooldown_start)

        learning_rate = jnp.select(
            [phase == WARM_UP, phase == CONSTANT],
            [low * jnp.exp(growth * step), peak],
            cosine(peak, start, step),
        )
        return updates, AutoWUState(
            learning_rate=learning_rate.astype(jnp.float32),
            phase=phase.astype(jnp.int32),
            step=step,
            peak_learning_rate=peak,
            cooldown_start=start,
            num_positives=num_positives,
            losses=losses,
            process=process,
            key=key,
            num_skipped=state.num_skipped + (~usable).astype(jnp.int32),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
