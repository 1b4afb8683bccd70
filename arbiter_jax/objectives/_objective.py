"""What every noise objective shares: its form, one step of it, and its averages.

Each objective has a closed form for its minimum and, for an agent, a function of the batch size to
descend. Equation numbers refer to ``experiments/noise_rules/DERIVATION.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from arbiter_jax._numerics import all_finite, tree_where
from arbiter_jax.base import PyTree
from arbiter_jax.batching import masked_mean, num_rows


class NoiseObjective(NamedTuple):
    """An objective whose gradient depends on the batch size; from :func:`noise_response`.

    ``init() -> state``; ``measure(updates, params, batch_size, signals) -> sample`` is what costs
    something, a tuple of scalars, nan where the signals say nothing; ``update(state, sample, due,
    batch_size, signals) -> state`` takes in one step, with its sample where `due`, bool[]; see
    :func:`update_objective`. ``objective(state, b) -> J`` is what an agent descends, a smooth
    function of a real batch size b; ``best(state) -> b`` is where J is least, infinite where noise
    is all there is and nan before anything is known. Both take the cost of a step in examples as a
    last argument, if it is not the one of the factory. ``signals`` names what `measure` and `update`
    read.
    """

    init: Callable[[], Any]
    measure: Callable[..., tuple[jax.Array, ...]]
    update: Callable[..., Any]
    objective: Callable[..., jax.Array]
    best: Callable[..., jax.Array]
    signals: tuple[str, ...]


def update_objective(
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
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(measure))
        sample = jax.lax.cond(due, measure, lambda: zeros)
    new = objective.update(state, sample, due, batch_size, signals)
    usable = all_finite(sample, new)
    return tree_where(usable, new, state), usable


def limited_loss(
    objective: NoiseObjective, statistics: PyTree, size: jax.Array, low: int, high: int
) -> jax.Array:
    """J at a real batch size, with the slope that an agent may descend within [low, high].

    With size = low + (high - low) sigmoid(s) that is dJ/ds = dJ/d log(size), at most 1 either way: far
    off on one side J is a thousand times as steep as on the other, and near an end of the range the
    sigmoid lets through a thousandth of it: an agent would overshoot from below and be slow from above.
    Beyond the last half example there is nothing to gain, and a logit that ran away there would
    take long to come back.
    """
    statistics, now = jax.lax.stop_gradient((statistics, size))
    inside = jnp.clip(now, low + 0.5, high - 0.5)
    value, slope = jax.value_and_grad(lambda b: objective.objective(statistics, b))(inside)
    outward = ((now <= low + 0.5) & (slope > 0)) | ((now >= high - 0.5) & (slope < 0))
    sigmoid_slope = (inside - low) * (high - inside) / (high - low)  # d size / ds
    slope = jnp.clip(inside * slope, -1, 1) / sigmoid_slope
    slope = jax.lax.stop_gradient(jnp.where(outward, 0, slope))
    return jax.lax.stop_gradient(value) + slope * (size - now)


def power_average(
    mean: jax.Array, sample: jax.Array, last: jax.Array, now: jax.Array, a: int
) -> jax.Array:
    """An average up to the time `now` in which time s weighs s^a: it forgets, at any time scale.

    The sample stands for all times after `last`, where the average so far ends.
    """
    # 1 - (last / now)^(a + 1), to the precision of a float also where the two hardly differ.
    since = (now - last).astype(float) / now.astype(float)
    return mean - jnp.expm1((a + 1) * jnp.log1p(-since)) * (sample - mean)


def validation_loss(
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
