"""What every noise objective shares: its form, one step of it, and its averages.

Each objective has a closed form for its minimum and, for an agent, a function of the batch size to
descend. Equation numbers refer to ``experiments/noise_rules/DERIVATION.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from arbiter_jax import _validate
from arbiter_jax._count import Count
from arbiter_jax._numerics import all_finite, scale_updates, tree_where
from arbiter_jax.base import PyTree, Update
from arbiter_jax.batching import batch_mask, masked_mean
from arbiter_jax.batching._masking import num_rows, replace_padding
from arbiter_jax.gradients._masked import call_loss


class NoiseObjective(NamedTuple):
    """A function J of the batch size that is measured during the run; from :func:`noise_response`.

    Its minimum makes a batch-size rule (:func:`arbiter_jax.schedulers.from_objective`), and an
    agent descends it (:func:`arbiter_jax.arbiter`). Both keep its state in theirs; the state says
    which signals it ``requires``. Costs are those of one step, in examples.
    """

    init: Callable[[], Any]  # () -> state
    # (updates, params, batch_size, signals) -> sample, a pytree of float[]: the part that costs
    # something; NaN if the signals carry no information.
    measure: Callable[..., Any]
    empty_sample: Callable[[], Any]  # () -> zeros like a sample, for steps without a measurement
    # (state, sample, measured, batch_size, signals) -> state after one step; the sample counts only
    # if measured, bool[].
    update: Callable[..., Any]
    loss: Callable[..., jax.Array]  # (state, b, cost=None) -> J at a real batch size b, smooth
    # (state, cost=None) -> the b at which J is least; infinite if only noise is left, NaN if unknown.
    best: Callable[..., jax.Array]
    # The budget of the run that it plans for: an int, 0 if it does not plan, None for the budget of
    # the training loop.
    num_examples: int | None = 0


def update_objective(
    objective: NoiseObjective,
    state: Any,
    updates: PyTree,
    params: PyTree,
    batch_size: jax.Array,
    signals: dict[str, Any],
    measures: bool | jax.Array = True,
) -> tuple[Any, jax.Array]:
    """One step of an objective.

    Args:
      objective: The objective.
      state: Its state.
      updates: The updates about to be applied, like params.
      params: Before them.
      batch_size: int32[], examples in the batch of this step.
      signals: The extra arguments of ``tx.update``.
      measures: Whether to measure at this step, a bool if it is known while tracing.

    Returns:
      (state, usable): the old state if a number is not finite or carries no information.

    Raises:
      ValueError: If signals that are like the parameters do not have the structure of the updates.
    """
    for name in ("gradient_noise", "update_noise"):
        found, expected = jax.tree.structure(signals.get(name)), jax.tree.structure(updates)
        if signals.get(name) is not None and found != expected:
            raise ValueError(
                f"{name} must have the structure of the updates that the rule sees, {expected}, got "
                f"{found}: a transformation around the rule, such as optax.flatten, changes the "
                "structure; chain the rule after it."
            )
    measure = lambda: objective.measure(updates, params, batch_size, signals)
    if isinstance(measures, bool):
        sample = measure() if measures else objective.empty_sample()
    else:
        sample = jax.lax.cond(measures, measure, objective.empty_sample)
    new = objective.update(state, sample, measures, batch_size, signals)
    usable = all_finite(sample, new)
    return tree_where(usable, new, state), usable


def of_whole_update(
    update: Update, batch_size: jax.Array, signals: dict[str, Any]
) -> tuple[jax.Array, dict[str, Any]]:
    """The batch size and the signals of the last call of an update as those of all of its calls.

    The noise of the gradient of k calls is that of one over sqrt(k). The updates respond to the
    gradient of one call with a k-th of what they are, and so to the noise of all with sqrt(k) times
    what was measured.

    Args:
      update: Which one.
      batch_size: int32[], examples per call.
      signals: The extra arguments of the last call.

    Returns:
      (batch_size, signals), the same if the update is one call; otherwise with `num_calls` added.
    """
    k = update.num_calls
    if isinstance(k, int):
        return batch_size, signals
    size = jnp.round(update.per_update(batch_size)).astype(jnp.int32)
    signals = signals | {"num_calls": k}
    for name, factor in (("gradient_noise", 1 / jnp.sqrt(k)), ("update_noise", jnp.sqrt(k))):
        if signals.get(name) is not None:
            signals[name] = scale_updates(signals[name], factor)
    if signals.get("num_examples") is not None:
        signals["num_examples"] = update.ledger.minus(size)
    return size, signals


def limited_loss(
    objective: NoiseObjective,
    statistics: PyTree,
    size: jax.Array,
    low: int,
    high: int,
    num_calls: Any = 1,
) -> jax.Array:
    """J at a real batch size, with a slope that an agent can descend within [low, high].

    The slope is dJ/d log(size), at most 1 either way, for the agent's logit s with size = low +
    (high - low) sigmoid(s). J itself is a thousand times as steep on one side as on the other, and
    the sigmoid passes on a thousandth of a slope near the ends of the range: an agent would
    overshoot from below and be slow from above. Within half an example of an end the slope outward
    is 0, because a logit that ran away there would take long to come back. The size is that of a
    call; J is taken at that of an update, which has `num_calls` of them.
    """
    statistics, now = jax.lax.stop_gradient((statistics, size))
    of_update = lambda b: b if isinstance(num_calls, int) else num_calls * b
    inside = jnp.clip(now, low + 0.5, high - 0.5)
    value, slope = jax.value_and_grad(lambda b: objective.loss(statistics, of_update(b)))(inside)
    outward = ((now <= low + 0.5) & (slope > 0)) | ((now >= high - 0.5) & (slope < 0))
    sigmoid_slope = (inside - low) * (high - inside) / (high - low)  # d size / ds
    slope = jnp.clip(inside * slope, -1, 1) / sigmoid_slope
    slope = jax.lax.stop_gradient(jnp.where(outward, 0, slope))
    return jax.lax.stop_gradient(value) + slope * (size - now)


def power_average(
    mean: jax.Array,
    sample: jax.Array,
    last: jax.Array | Count,
    now: jax.Array | Count,
    a: int,
) -> jax.Array:
    """An average up to the time `now` in which time s weighs s^a: it forgets, at any time scale.

    The sample counts for all times since `last`, up to which `mean` is the average.
    """
    # 1 - (last / now)^(a + 1), precise in floats even if last and now hardly differ.
    since = (now - last).astype(float) / now.astype(float)
    return mean - jnp.expm1((a + 1) * jnp.log1p(-since)) * (sample - mean)


def validation_loss(
    loss_fn: Callable[..., Any], signals: dict[str, Any]
) -> Callable[[PyTree], jax.Array]:
    """The mean loss of the validation examples in the signals, as a function of the parameters."""
    meta_batch, model_state = signals["meta_batch"], signals.get("model_state")
    rows = jnp.ones(num_rows(meta_batch), bool)
    if "num_meta_examples" in signals:  # of a batch that has more rows than this seed uses
        rows = batch_mask(signals["num_meta_examples"], num_rows(meta_batch))
        meta_batch = replace_padding(meta_batch, rows, first=0)

    key = None if model_state is None else jax.random.PRNGKey(0)

    @jax.jit  # its values and derivatives then share one trace
    def mean_loss(params):
        losses, *_ = call_loss(loss_fn, params, meta_batch, rows, model_state, key, has_aux=None)
        return masked_mean(losses, rows)

    return mean_loss


def check_loss_fn(loss_fn: Any, hint: str = "") -> None:
    """Raises a ValueError for anything that cannot be called where a loss function belongs."""
    _validate.function("(params, batch) -> float[M]", hint, loss_fn=loss_fn)
