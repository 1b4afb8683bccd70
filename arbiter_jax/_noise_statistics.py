"""What gradient noise costs, measured on the run: the statistics behind `aj.noise_response`.

Two objectives stand on them, each with a closed form and, for an agent, a function of the batch
size to descend. Equation numbers refer to ``experiments/NOISE.md``, where they are derived.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _validate
from arbiter_jax._gradient_statistics import dot
from arbiter_jax.base import PyTree, all_finite, running_mean, tree_where
from arbiter_jax.batching import masked_mean, num_rows

Persistence = Any  # a number >= 1, or an optax.GradientTransformation


class NoiseObjective(NamedTuple):
    """An objective whose gradient depends on the batch size; from :func:`noise_response`.

    ``init() -> state``; ``measure(updates, params, batch_size, signals) -> sample`` is what costs
    something, a tuple of scalars, nan where the signals say nothing; ``update(state, sample, due,
    batch_size, signals) -> state`` takes in one step, with its sample where `due`, bool[]; see
    :func:`observe`. ``objective(state, b) -> J`` is what an agent descends, a smooth function of a
    real batch size b; ``best(state) -> b`` is where J is least, infinite where noise is all there is
    and nan before anything is known. Both take the cost of a step in examples as a last argument, if
    it is not the one of the factory. ``signals`` names what `measure` and `update` read.
    """

    init: Callable[[], Any]
    measure: Callable[..., tuple[jax.Array, ...]]
    update: Callable[..., Any]
    objective: Callable[..., jax.Array]
    best: Callable[..., jax.Array]
    signals: tuple[str, ...]


def observe(
    objective: NoiseObjective,
    state: Any,
    updates: PyTree,
    params: PyTree,
    batch_size: jax.Array,
    signals: dict[str, Any],
    due: jax.Array | None = None,
) -> tuple[Any, jax.Array]:
    """One step of an objective: its sample, where that is due (None: always), and the new state.

    Returns:
      (state, usable): the state as it was where a number is not finite, or says nothing.
    """
    measure = lambda: objective.measure(updates, params, batch_size, signals)
    if due is None:
        due, sample = jnp.array(True), measure()
    else:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(measure))
        sample = jax.lax.cond(due, measure, lambda: zeros)
    new = objective.update(state, sample, due, batch_size, signals)
    usable = all_finite(sample, new)
    return tree_where(usable, new, state), usable


def within_range(
    objective: NoiseObjective, statistics: PyTree, size: jax.Array, low: int, high: int
) -> jax.Array:
    """J at a real batch size, with the slope that an agent may descend within [low, high].

    Beyond the last half example there is nothing to gain, and a logit that ran away there would
    take long to come back.
    """
    statistics, now = jax.lax.stop_gradient((statistics, size))
    inside = jnp.clip(now, low + 0.5, high - 0.5)
    value, slope = jax.value_and_grad(lambda b: objective.objective(statistics, b))(inside)
    outward = ((now <= low + 0.5) & (slope > 0)) | ((now >= high - 0.5) & (slope < 0))
    slope = jax.lax.stop_gradient(jnp.where(outward, 0, slope))
    return jax.lax.stop_gradient(value) + slope * (size - now)


class GainState(NamedTuple):
    """What a step gains and what its noise costs: averages of A0 and q."""

    progress: jax.Array  # shape=(), dtype=float, average of A0, the decrease of the loss in a step
    noise_cost: jax.Array  # shape=(), dtype=float, average of q, in loss times examples
    weight: jax.Array  # shape=(), dtype=float, of both averages, 0 at the start

    requires = ("update_noise", "meta_batch")
    logged = ("progress", "noise_cost")


class ValidationPace(NamedTuple):
    """The same averages of the loss of validation examples, at the steps at which noise is measured."""

    recent_loss: jax.Array  # shape=(), dtype=float
    older_loss: jax.Array  # shape=(), dtype=float
    last_step: jax.Array  # shape=(), dtype=int32, the last step in them, counted from 1; 0: none

    requires = ("meta_batch",)


class FloorState(NamedTuple):
    """The loss that noise sustains, and the pace at which the loss falls."""

    noise: jax.Array  # shape=(), dtype=float, average of B times the noise floor
    num_looks: jax.Array  # shape=(), dtype=int32, steps in it
    recent_loss: jax.Array  # shape=(), dtype=float, average of the loss, step t weighing t^3
    older_loss: jax.Array  # shape=(), dtype=float, average of the loss, step t weighing t
    num_steps: jax.Array  # shape=(), dtype=int32, steps in these two
    num_examples: jax.Array  # shape=(), dtype=int32, examples seen, of the budget
    held_batch_size: jax.Array  # shape=(), dtype=float, what is held, before it grows; 0: unknown
    validation: ValidationPace | None  # where the objective was given a loss function

    requires = ("value", "gradient_noise", "update_noise")
    logged = ("noise", "recent_loss", "older_loss", "held_batch_size")


def impulse_response(tx: optax.GradientTransformation, num_steps: int = 1000) -> float:
    r"""How much longer than one step the noise of a gradient acts: k of the equations.

    .. math:: k = \frac{\sum_{j \ge 0} \langle \xi, \partial u_{t+j} / \partial g_t \, \xi\rangle}
      {\langle \xi, \partial u_t / \partial g_t \, \xi\rangle}

    measured on gradients that are nothing but noise, from the transformation alone: 1 / (1 -
    momentum) for heavy-ball momentum, 1 / (1 - b1) for Adam.

    Args:
      tx: A differentiable optax chain without a rule in it.
      num_steps: Steps over which the response is summed, an integer >= 1; it should outlast the
        momentum.

    Returns:
      k, a float; 1 where the first response is zero.
    """
    num_steps = _validate.integer(num_steps=num_steps, minimum=1)
    warm = 100  # running second moments have settled by then
    noise = jax.random.rademacher(jax.random.PRNGKey(0), (warm + num_steps, 64), float)
    params, direction = jnp.ones(64), noise[warm]
    tx = optax.with_extra_args_support(tx)

    def step(state, grads):
        updates, state = tx.update(grads, state, params)
        return state, updates

    def response(bump):
        state, _ = jax.lax.scan(step, tx.init(params), noise[:warm])
        grads = noise[warm:].at[0].add(bump)
        return jax.lax.scan(step, state, grads)[1] @ direction

    with jax.ensure_compile_time_eval():
        _, responses = jax.jit(
            lambda: jax.jvp(response, (jnp.zeros_like(direction),), (direction,))
        )()
        first, total = float(responses[0]), float(jnp.sum(responses))
    return total / first if first else 1.0


def as_persistence(persistence: Persistence) -> float:
    """A number >= 1 as it is; of a transformation, the number that it is measured to have."""
    if isinstance(persistence, optax.GradientTransformation):
        return max(1.0, impulse_response(persistence))
    if _validate.positive(persistence=persistence) < 1:
        raise ValueError(f"persistence must be >= 1, or an optimizer, got {persistence!r}.")
    return float(persistence)


def gain_objective(
    loss_fn: Callable[..., Any],
    *,
    decay: float = 0.9,
    persistence: Persistence = 1.0,
    step_cost: float = 0.0,
) -> NoiseObjective:
    """Expected gain a step, per cost: Eqs. 1 to 6. See :func:`arbiter_jax.noise_response`."""
    _validate.in_range(0, 1, closed="left", decay=decay)
    k, cost = as_persistence(persistence), _validate.non_negative(step_cost=step_cost)

    def init():
        zero = jnp.zeros((), float)
        return GainState(zero, jnp.array(zero), jnp.array(zero))  # no two fields share a buffer

    def measure(updates, params, batch_size, signals):
        sample = gain_and_noise_cost(loss_fn, params, updates, batch_size, signals, persistence=k)
        # 0 and 0: gradients without size, which say nothing about any batch size.
        nothing = (sample[0] == 0) & (sample[1] == 0)
        return tuple(jnp.where(nothing, jnp.nan, x) for x in sample)

    def update(state, sample, due, batch_size, signals):
        del batch_size, signals
        mean = (state.progress, state.noise_cost)
        mean, weight = running_mean(mean, state.weight, sample, decay)
        return tree_where(due, GainState(*mean, weight), state)

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
    """One sample of A0 and q, from second derivatives along two directions on validation data.

    Forward over forward: neither the gradient nor a product with the Hessian is ever formed.

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
    mean_loss = _validation_loss(loss_fn, signals)

    def along(direction):
        """Slope and curvature of the loss along a direction."""
        direction = jax.tree.map(lambda p, d: jnp.asarray(d, p.dtype), params, direction)
        slope = lambda params: jax.jvp(mean_loss, (params,), (direction,))[1]
        try:
            return jax.jvp(slope, (params,), (direction,))
        except (TypeError, NotImplementedError):
            # A custom_vjp has no forward derivative. This costs about twice as much.
            gradient, bent = jax.jvp(jax.grad(mean_loss), (params,), (direction,))
            return dot(gradient, direction), dot(direction, bent)

    slope, curvature = along(updates)
    _, noise_curvature = along(signals["update_noise"])
    b = batch_size.astype(float)
    q = 0.5 * persistence**2 * b * noise_curvature  # Eq. 3
    progress = -slope - 0.5 * curvature  # Eq. 2
    return progress + q / b, q  # Eq. 4


def _validation_loss(
    loss_fn: Callable[..., Any], signals: dict[str, Any]
) -> Callable[[PyTree], jax.Array]:
    """The mean loss of the validation examples in the signals, a function of the parameters."""
    meta_batch, model_state = signals["meta_batch"], signals.get("model_state")
    rows = jnp.ones(num_rows(meta_batch), bool)

    def mean_loss(params):
        if model_state is None:
            return masked_mean(loss_fn(params, meta_batch), rows)
        key = jax.random.PRNGKey(0)
        return masked_mean(loss_fn(params, meta_batch, model_state, rows, key)[0], rows)

    return mean_loss


def floor_objective(
    loss_fn: Callable[..., Any] | None = None,
    *,
    num_examples: int | None = None,
    share: float = 0.1,
    hold: float = 0.8,
    growth: float = 8.0,
    persistence: Persistence = 1.0,
    step_cost: float = 0.0,
) -> NoiseObjective:
    """The noise floor as a share of the loss still to go: Eqs. 7 to 14."""
    budget = (
        None if num_examples is None else _validate.integer(num_examples=num_examples, minimum=1)
    )
    share = _validate.positive(share=share)
    hold = _validate.in_range(0, 1, hold=hold)
    if _validate.positive(growth=growth) < 1:
        raise ValueError(f"growth must be >= 1, got {growth!r}.")
    k, cost = as_persistence(persistence), _validate.non_negative(step_cost=step_cost)

    def init():
        zero = lambda dtype: jnp.zeros((), dtype)
        return FloorState(
            noise=zero(float),
            num_looks=zero(jnp.int32),
            recent_loss=zero(float),
            older_loss=zero(float),
            num_steps=zero(jnp.int32),
            num_examples=zero(jnp.int32),
            held_batch_size=zero(float),
            validation=None
            if loss_fn is None
            else ValidationPace(zero(float), zero(float), zero(jnp.int32)),
        )

    def share_of_budget(state):
        return state.num_examples.astype(float) / (budget or 1)

    def measure(updates, params, batch_size, signals):
        response = -dot(signals["gradient_noise"], signals["update_noise"])
        noise = 0.25 * k * batch_size.astype(float) * response  # Eq. 8
        # No noise in an update that is none: gradients without size say nothing.
        noise = jnp.where((response != 0) | (dot(updates, updates) > 0), noise, jnp.nan)
        return (noise,) if loss_fn is None else (noise, _validation_loss(loss_fn, signals)(params))

    def update(state, sample, due, batch_size, signals):
        noise, *validation_loss = sample
        value = jnp.asarray(signals["value"], float)
        seen = signals.get("num_examples")
        seen = state.num_examples if seen is None else jnp.asarray(seen, jnp.int32)
        n, t = optax.safe_increment(state.num_looks), optax.safe_increment(state.num_steps)
        new = state._replace(
            noise=jnp.where(due, _average(state.noise, noise, n - 1, n, 9), state.noise),
            num_looks=jnp.where(due, n, state.num_looks),
            recent_loss=_average(state.recent_loss, value, t - 1, t, 3),
            older_loss=_average(state.older_loss, value, t - 1, t, 1),
            num_steps=t,
            num_examples=seen + batch_size,
        )
        if loss_fn is not None:
            old = state.validation
            looked = ValidationPace(
                recent_loss=_average(old.recent_loss, validation_loss[0], old.last_step, t, 3),
                older_loss=_average(old.older_loss, validation_loss[0], old.last_step, t, 1),
                last_step=t,
            )
            new = new._replace(validation=tree_where(due, looked, old))
        # What growth multiplies is the last size before it began.
        size = jnp.clip(size_of_floor(new), 1 / _LARGEST, _LARGEST)
        settled = (share_of_budget(state) >= hold) & (state.held_batch_size > 0)
        keep = jnp.isnan(size) | (settled if budget is not None else False)
        return new._replace(held_batch_size=jnp.where(keep, state.held_batch_size, size))

    def size_of_floor(state):
        noise, pace = jnp.maximum(state.noise, 0), pace_of_loss(state)
        # Noise, and nothing to gain from steps; but a few losses do not tell.
        beyond = jnp.where((noise > 0) & (state.num_steps > _FEW), jnp.inf, jnp.nan)
        return jnp.where(pace > 0, noise * _EXPONENT / (share * pace), beyond)  # Eq. 10

    def best(state, cost=cost):
        b = jnp.where(state.held_batch_size > 0, state.held_batch_size, jnp.nan)
        b = 0.5 * (b + jnp.sqrt(b * b + 4 * b * cost))  # Eq. 11
        if budget is None:
            return b
        past = (share_of_budget(state) - hold) / max(1 - hold, 1e-6)
        stages = max(1, math.ceil(math.log2(growth)))
        stage = jnp.clip(jnp.floor(past * stages) + 1, 0, stages)
        return b * jnp.asarray(growth, float) ** (stage / stages)  # Eq. 12

    def objective(state, b, cost=cost):
        target = best(state, cost)
        target = jnp.where(target > 0, jnp.minimum(target, _LARGEST), b)  # unknown: stay
        return jax.lax.stop_gradient(target) / b + jnp.log(b)  # Eq. 13

    signals = FloorState.requires + (() if loss_fn is None else ValidationPace.requires)
    return NoiseObjective(init, measure, update, objective, best, signals)


_FEW = 8  # steps from which no pace can be told
_EXPONENT = 0.25  # p of the loss F* + c t^-p, whose excess over F* is its pace over p. Eq. 9
_MEMORY = 2.0  # how many times faster the training loss may fall than that of other examples
_LARGEST = 1e9  # in place of an infinite batch size, where a state holds it; 1 / this for none


def pace_of_loss(state: FloorState) -> jax.Array:
    """How much the loss falls while the number of steps grows by a factor of e: -dF / d log t.

    An average with weights t^a lags by 1 / (a + 1) in log t, so two of them give the slope. Where
    the pace on validation examples is known, at most a multiple of that.
    """
    pace = 4 * (state.older_loss - state.recent_loss)  # Eq. 9: 1 / (1/2 - 1/4)
    if state.validation is None:
        return pace
    other = 4 * (state.validation.older_loss - state.validation.recent_loss)
    return jnp.where(state.num_looks > _FEW, jnp.minimum(pace, _MEMORY * other), pace)  # Eq. 14


def _average(
    mean: jax.Array, sample: jax.Array, last: jax.Array, now: jax.Array, a: int
) -> jax.Array:
    """An average up to step `now` in which step i weighs i^a: it forgets, at any time scale.

    The sample stands for all steps after `last`, where the average so far ends.
    """
    kept = (last.astype(float) / now.astype(float)) ** (a + 1)
    return kept * mean + (1 - kept) * sample
