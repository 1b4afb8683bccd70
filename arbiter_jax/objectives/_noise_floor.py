"""The noise floor: the loss that gradient noise sustains, compared with the loss still to go.

``experiments/noise_rules/DERIVATION.md``, Eqs. 7 to 17. Throughout, the slope of a loss F is its
decrease per unit of log time, -dF / d log t, with t the number of steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _validate
from arbiter_jax._count import Count, as_count
from arbiter_jax._numerics import tree_dot, tree_where
from arbiter_jax.base import PyTree
from arbiter_jax.objectives._floor_sizes import (
    EXPONENT,
    INFINITE_SIZE,
    FloorConfig,
    final_size,
    size_for_end,
)
from arbiter_jax.objectives._objective import (
    NoiseObjective,
    check_loss_fn,
    power_average,
    validation_loss,
)
from arbiter_jax.objectives._persistence import PersistenceSignal, check_persistence

_MIN_STEPS = 8  # a slope <= 0, or of validation, is trusted after more losses than this
_MAX_CORRECTION = 8.0  # upper bound on the factor of Eq. 15 in a single measurement
_MAX_SLOPE_RATIO = 2.0  # training loss may fall this much faster than validation loss. Eq. 14


class LogTimeSlope(NamedTuple):
    """The slope of a loss in log time, from two averages of it. Eq. 9."""

    recent: jax.Array  # shape=(), dtype=float, average of the loss, step t weighing t^3
    older: jax.Array  # shape=(), dtype=float, average of the loss, step t weighing t
    last: jax.Array  # shape=(), dtype=int32, the last step in them, counted from 1; 0 if none

    def update(self, loss: jax.Array, step: jax.Array) -> LogTimeSlope:
        """Takes in the loss of a step, which counts for all steps since the last one."""
        return LogTimeSlope(
            recent=power_average(self.recent, loss, self.last, step, 3),
            older=power_average(self.older, loss, self.last, step, 1),
            last=step,
        )

    def value(self) -> jax.Array:
        """-dF / d log t: an average with weights t^a lags by 1 / (a + 1) in log t."""
        return 4 * (self.older - self.recent)  # 1 / (1/2 - 1/4)


class ValidationSlope(NamedTuple):
    """The slope of the loss of validation examples, at the steps at which noise is measured."""

    slope: LogTimeSlope

    requires = ("meta_batch",)


class FloorState(NamedTuple):
    """What :func:`noise_floor` has measured: the loss that noise sustains, the slope of the loss."""

    noise: jax.Array  # shape=(), dtype=float, B times the noise floor, measurement i weighing i^3
    measured_loss: jax.Array  # shape=(), dtype=float, average of the loss at the same steps
    num_measurements: jax.Array  # shape=(), dtype=int32, steps in these two
    training: LogTimeSlope  # of the training loss, at every step
    validation: ValidationSlope | None  # of the validation loss, if there is a loss function
    num_examples: Count  # training examples seen
    budget: Count  # examples of the run it was built for; 0 if not given
    run_budget: Count  # the same from the training loop; 0 if unknown
    held_batch_size: jax.Array  # shape=(), dtype=float, the size to hold; 0 if unknown
    size_when_held: jax.Array  # shape=(), dtype=float, size applied when that was last updated
    persistence: PersistenceSignal | None  # if it is not a number that was given

    requires = ("value", "gradient_noise", "update_noise", "grad_stats")

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """What is reported at every step."""
        return {
            "noise": self.noise,
            "log_time_slope": log_time_slope(self),
            "held_batch_size": self.held_batch_size,
        }


class FloorSample(NamedTuple):
    """What one measurement says."""

    noise: jax.Array  # shape=(), dtype=float, B times the noise floor at small rates. Eq. 8
    correction: jax.Array  # shape=(), dtype=float, >= 0, what large rates add to it. Eq. 15
    validation_loss: jax.Array | None  # shape=(), dtype=float


def noise_floor(
    loss_fn: Callable[..., Any] | None = None,
    *,
    num_examples: int | None = None,
    noise_share: float = FloorConfig.noise_share,
    hold_until: float = FloorConfig.hold_until,
    final_growth: float = FloorConfig.final_growth,
    persistence: float | optax.GradientTransformation | None = None,
    step_cost: float = FloorConfig.step_cost,
    optimal_loss: float = FloorConfig.optimal_loss,
) -> NoiseObjective:
    r"""An objective that keeps what gradient noise costs at a fixed share of the loss still to go.

    .. math:: J(b) = a / b + \log b, \qquad
      a = \frac{k \left(-B\, E\langle \xi, du \rangle\right)}{4\, share\, \Delta}

    B is the applied batch size, :math:`\xi` half the difference of the gradients of the two halves
    of the batch, du the response of the updates to it, k the `persistence`. The numerator over 4 b
    is by how much noise raises the loss at the batch size b, its *floor*; :math:`\Delta` is the
    excess of the loss over its limit, read off the slope at which it falls. At the end of the
    budget a grows. The derivation is in ``experiments/noise_rules/DERIVATION.md``, Eqs. 7 to 17;
    :func:`arbiter_jax.schedulers.noise_floor` is the rule that takes the minimum, b = a.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``, the training loss, to measure on validation
        examples as well; None if not.
      num_examples: The budget of the run in training examples, an integer >= 1. If
        None, that of ``aj.fit``; without any budget the size is held.
      noise_share: The noise floor as a share of the loss still to go, > 0.
      hold_until: The share of the budget after which the size may grow, in [0, 1].
      final_growth: The factor by which it has grown at the end, >= 1.
      persistence: k, a number >= 1: 1 / (1 - momentum) for SGD, 1 / (1 - b1) for Adam; or an
        optimizer, whose :func:`impulse_response` is measured here; None to measure the chain that
        the objective is used in.
      step_cost: The fixed cost of a step, in examples, >= 0.
      optimal_loss: The least that the loss can be, a number < infinity; -infinity if there is no
        least, as for the density of a continuous variable. It need not be attainable.

    Returns:
      A :class:`NoiseObjective` that reads `value`, `gradient_noise`, `update_noise`, `grad_stats`;
      with a loss function `meta_batch` (and `model_state` if the model has one); and `persistence`
      if it is not given.

    Raises:
      ValueError: If an argument is out of its range.

    >>> import arbiter_jax as aj
    >>> objective = aj.objectives.noise_floor(num_examples=100_000, persistence=10.0)
    >>> state = objective.init()._replace(held_batch_size=jax.numpy.array(64.0))
    >>> float(objective.best(state))
    64.0
    """
    if loss_fn is not None:
        number = isinstance(loss_fn, (int, float))
        check_loss_fn(loss_fn, "; a budget is given as num_examples" if number else "")
    if num_examples is not None:
        num_examples = _validate.count(num_examples=num_examples)
    infinity = float("inf")
    config = FloorConfig(
        loss_fn=loss_fn,
        num_examples=num_examples,
        noise_share=_validate.positive(noise_share=noise_share),
        hold_until=_validate.in_range(0, 1, hold_until=hold_until),
        final_growth=_validate.greater(1, closed=True, final_growth=final_growth),
        persistence=check_persistence(persistence),
        step_cost=_validate.non_negative(step_cost=step_cost),
        optimal_loss=_validate.in_range(
            -infinity, infinity, closed="left", optimal_loss=optimal_loss
        ),
    )
    bind = lambda function: functools.partial(function, config)
    return NoiseObjective(
        init=bind(_init),
        measure=bind(_measure),
        empty_sample=bind(_empty_sample),
        update=bind(_update),
        loss=bind(_loss),
        best=bind(_best),
        num_examples=num_examples,
    )


def _init(config: FloorConfig) -> FloorState:
    zero = lambda dtype: jnp.zeros((), dtype)  # no two fields share a buffer
    slope = lambda: LogTimeSlope(zero(float), zero(float), zero(jnp.int32))
    return FloorState(
        noise=zero(float),
        measured_loss=zero(float),
        num_measurements=zero(jnp.int32),
        training=slope(),
        validation=None if config.loss_fn is None else ValidationSlope(slope()),
        num_examples=as_count(0),
        budget=_given_budget(config),
        run_budget=as_count(0),
        held_batch_size=zero(float),
        size_when_held=zero(float),
        persistence=PersistenceSignal() if config.persistence is None else None,
    )


def _given_budget(config: FloorConfig) -> Count:
    return as_count(0 if config.num_examples is None else config.num_examples)


def _persistence(config: FloorConfig, signals: dict[str, Any]) -> Any:
    if config.persistence is None:
        return signals["persistence"].displacement
    return config.persistence


def _measure(
    config: FloorConfig,
    updates: PyTree,
    params: PyTree,
    batch_size: jax.Array,
    signals: dict[str, Any],
) -> FloorSample:
    k = _persistence(config, signals)
    response = -tree_dot(signals["gradient_noise"], signals["update_noise"])
    noise = 0.25 * k * batch_size.astype(float) * response  # Eq. 8
    # All-zero gradients carry no information: NaN, so that the step is skipped.
    noise = jnp.where((response != 0) | (tree_dot(updates, updates) > 0), noise, jnp.nan)
    stats, tiny = signals["grad_stats"], jnp.finfo(noise.dtype).tiny
    signal = stats.mean_sq_norm / jnp.maximum(stats.variance_trace, tiny)
    signal = jnp.where(jnp.isinf(stats.variance_trace), jnp.nan, signal)  # to be skipped
    # Eq. 15, without what makes progress, which is not noise: _update subtracts it.
    correction = noise * batch_size * signal / (2 * k - 1)
    sample = FloorSample(
        noise=noise,
        correction=jnp.where(noise > 0, correction, 0),
        validation_loss=None
        if config.loss_fn is None
        else validation_loss(config.loss_fn, signals)(params),
    )
    return jax.tree.map(lambda x: jnp.asarray(x, float), sample)


def _empty_sample(config: FloorConfig) -> FloorSample:
    zero = jnp.zeros((), float)
    return FloorSample(zero, zero, None if config.loss_fn is None else zero)


def _update(
    config: FloorConfig,
    state: FloorState,
    sample: FloorSample,
    measured: bool | jax.Array,
    batch_size: jax.Array,
    signals: dict[str, Any],
) -> FloorState:
    value = jnp.asarray(signals["value"], float)
    seen = signals.get("num_examples")
    seen = as_count(state.num_examples if seen is None else seen)
    n: Any = optax.safe_increment(state.num_measurements)
    t: Any = optax.safe_increment(state.training.last)
    k = _persistence(config, signals)
    progress = jnp.maximum(state.training.value(), 0) / t  # of a step
    correction = sample.correction - batch_size * progress / (4 * (2 * k - 1))
    limit = (_MAX_CORRECTION - 1) * jnp.maximum(sample.noise, 0)
    noise = sample.noise + jnp.clip(correction, 0, limit)  # Eq. 15
    average = lambda mean, x: jnp.where(measured, power_average(mean, x, n - 1, n, 3), mean)
    new = state._replace(
        noise=average(state.noise, noise),
        measured_loss=average(state.measured_loss, value),
        num_measurements=jnp.where(measured, n, state.num_measurements),
        training=state.training.update(value, t),
        num_examples=seen + batch_size,
    )
    if state.validation is not None:
        assert sample.validation_loss is not None
        validation = ValidationSlope(state.validation.slope.update(sample.validation_loss, t))
        new = new._replace(validation=tree_where(measured, validation, state.validation))
    if config.num_examples is None and signals.get("budget") is not None:
        new = new._replace(run_budget=as_count(signals["budget"]))
    if isinstance(config.num_examples, jax.Array):  # which may differ from that of the last step
        new = new._replace(budget=_given_budget(config))
    # What grows later is the last size before growth began.
    size = jnp.clip(_floor_size(config, new), 1 / INFINITE_SIZE, INFINITE_SIZE)
    settled = _grows(config, state) & (state.held_batch_size > 0)
    keep = jnp.isnan(size) | settled
    return new._replace(
        held_batch_size=jnp.where(keep, state.held_batch_size, size),
        size_when_held=jnp.where(keep, state.size_when_held, batch_size.astype(float)),
    )


def _budget(config: FloorConfig, state: FloorState) -> Count:
    """Examples of the run, 0 if unknown."""
    return as_count(state.run_budget if config.num_examples is None else config.num_examples)


def _examples_left(config: FloorConfig, state: FloorState) -> jax.Array:
    """What is left of the budget, float[]."""
    return _budget(config, state).minus(state.num_examples).astype(float)


def _grows(config: FloorConfig, state: FloorState) -> jax.Array:
    """Whether so much of the budget is used up that the size may grow."""
    budget = _budget(config, state)
    share = as_count(state.num_examples).astype(float) / jnp.maximum(budget.astype(float), 1)
    return jnp.where(budget > 0, share >= config.hold_until, False)


def log_time_slope(state: FloorState) -> jax.Array:
    """The slope of the loss: that of the training loss, at most a multiple of the validation's."""
    slope = state.training.value()
    if state.validation is None:
        return slope
    limit = _MAX_SLOPE_RATIO * state.validation.slope.value()
    known = state.num_measurements > _MIN_STEPS
    return jnp.where(known, jnp.minimum(slope, limit), slope)  # Eq. 14


def _floor_size(config: FloorConfig, state: FloorState) -> jax.Array:
    """The size at which noise costs its share of the loss still to go; NaN if unknown."""
    noise, slope = jnp.maximum(state.noise, 0), log_time_slope(state)
    # There is noise, and steps gain nothing; but a few losses are too few to say so.
    unlimited = jnp.where((noise > 0) & (state.training.last > _MIN_STEPS), jnp.inf, jnp.nan)
    size = noise * EXPONENT / (config.noise_share * jnp.where(slope > 0, slope, 1))  # Eq. 10
    budget = _budget(config, state)
    left = _examples_left(config, state)
    at_the_end = size_for_end(size, jnp.maximum(state.training.last, 1), left)
    size = jnp.where(budget > 0, at_the_end, size)
    excess = state.measured_loss - config.optimal_loss  # the most that noise can sustain
    size = jnp.maximum(size, jnp.where(excess > 0, noise / excess, 0))  # Eq. 17
    return jnp.where(slope > 0, size, unlimited)


def _best(config: FloorConfig, state: FloorState, cost: Any = None) -> jax.Array:
    cost = config.step_cost if cost is None else cost
    b = jnp.where(state.held_batch_size > 0, state.held_batch_size, jnp.nan)
    held = 0.5 * (b + jnp.sqrt(b * b + 4 * b * cost))  # Eq. 11
    grown = final_size(
        b,
        jnp.maximum(b, state.size_when_held),  # above b at the lower end of the range
        jnp.maximum(state.training.last, 1),
        _examples_left(config, state),
        noise_share=config.noise_share,
        final_growth=config.final_growth,
    )
    return jnp.where(_grows(config, state), jnp.maximum(held, grown), held)


def _loss(config: FloorConfig, state: FloorState, b: jax.Array, cost: Any = None) -> jax.Array:
    target = _best(config, state, cost)
    target = jnp.where(target > 0, jnp.minimum(target, INFINITE_SIZE), b)  # unknown: stay
    return jax.lax.stop_gradient(target) / b + jnp.log(b)  # Eq. 13
