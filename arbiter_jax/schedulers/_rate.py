"""The learning rate that goes with a batch size, as one factor of the updates."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import base
from arbiter_jax._count import as_count
from arbiter_jax._numerics import scale_updates


class RateState(NamedTuple):
    """State of the rate of `seesaw`. It decides no size, and neither does what it measures with."""

    learning_rate: jax.Array  # shape=(), dtype=float32, the factor of the last step
    noise: Any  # state of the rule that measures the noise scale; None without one
    num_skipped: jax.Array  # shape=(), dtype=int32, steps at which the factor was not finite
    decides = False
    metrics = ("learning_rate",)


def scale_by_rate(
    schedule: optax.Schedule | None,
    reference: int,
    exponent: float | None,
    noise_scale: optax.GradientTransformationExtraArgs | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the updates by :math:`s(n) (B / B_0)^p`, with B the size that the step really had.

    Args:
      schedule: s, a learning rate by the number of examples seen; 1 if None.
      reference: B_0.
      exponent: p; None for the measured one, see :func:`arbiter_jax.seesaw`.
      noise_scale: The rule that measures N for it.

    Returns:
      A transformation that reads `batch_size`, and `num_examples` if there is a schedule.
    """

    def init_fn(params):
        first = 1.0 if schedule is None else schedule(0)
        noise = None if noise_scale is None else noise_scale.init(params)
        return RateState(jnp.asarray(first, jnp.float32), noise, jnp.asarray(0, jnp.int32))

    def relative_rate(noise, signals):
        size = jnp.maximum(jnp.asarray(signals["batch_size"]), 1)
        # A window may contain steps without examples; their updates are 0 in any case.
        ratio = size.astype(jnp.float32) / reference
        if exponent is not None:
            return ratio**exponent
        # In examples per call, like both sizes.
        n = base.applied_update(noise, **signals).per_call(noise.noise_scale)
        # Written so that N may be infinite; where it is unknown, noise is taken to dominate.
        coupled = jnp.sqrt((1 / n + 1 / size) / (1 / n + 1 / reference))
        return ratio * jnp.where(n > 0, coupled, ratio**-0.5)

    def update_fn(updates, state, params=None, *, updates_only=None, probe=None, **signals) -> Any:
        if probe is not None:
            return updates, state
        base.require("seesaw", batch_size=signals.get("batch_size"))
        rate = relative_rate(state.noise, signals)
        if schedule is not None:
            base.require("seesaw", num_examples=signals.get("num_examples"))
            seen = as_count(signals["num_examples"]).astype(float)
            rate = rate * jnp.asarray(schedule(seen), jnp.float32)
        finite = jnp.isfinite(rate)
        rate = jnp.where(finite, rate, state.learning_rate).astype(jnp.float32)
        num_skipped = state.num_skipped + (~finite).astype(jnp.int32)
        noise = state.noise
        if noise_scale is not None and updates_only is None:
            _, noise = noise_scale.update(updates, noise, params, **signals)
        return scale_updates(updates, rate), RateState(rate, noise, num_skipped)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
