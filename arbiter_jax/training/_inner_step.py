"""One descent step on one batch: gradient, update, new parameters and counters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from arbiter_jax._count import compensated_sum
from arbiter_jax._numerics import all_finite, tree_where
from arbiter_jax.base import PyTree, requests
from arbiter_jax.gradients import Gradient, GradientFn
from arbiter_jax.training._check_functions import check_gradient
from arbiter_jax.training._signals import gradient_signals, update_noise
from arbiter_jax.training._state import TrainState


def inner_step(
    state: TrainState,
    batch: PyTree,
    mask: jax.Array,
    *,
    gradient_fn: GradientFn,
    tx: optax.GradientTransformationExtraArgs,
    signals: dict[str, Any] | None = None,
) -> tuple[TrainState, Gradient]:
    """One descent step on one masked batch: gradient, `tx.update`, new parameters, counters.

    Args:
      state: Where to start from.
      batch: Pytree of arrays [M, ...], or what else `gradient_fn` takes for a batch.
      mask: bool[M], True for a real example; or their number, int32[], for a batch in groups.
      gradient_fn: See :mod:`arbiter_jax.gradients`.
      tx: The transformation; it gets `value`, `grad`, `batch_size`, the counters before the step
        (`num_steps`, `num_examples`, `num_accumulated`, `progress`), and `signals`.
      signals: More extra arguments of ``tx.update``. `update_noise` is computed if a rule asks for it
        and it is not among them.

    Returns:
      (state, gradient). The model state of a batch whose loss, gradient or new model state is not
      finite is the one before it: running averages never forget a NaN.
    """
    requested = requests(state.opt_state)
    batch_size = jnp.sum(mask, dtype=jnp.int32)
    key = jax.random.fold_in(state.key, state.num_steps)
    gradient = gradient_fn(state.params, batch, mask, state.model_state, key)
    check_gradient(gradient, state.params, state.model_state)
    if state.model_state is not None:
        gradient = with_usable_model_state(gradient, state.model_state)
    signals = {
        **(signals or {}),
        **gradient_signals(gradient, requested.signals),
        "batch_size": batch_size,
        "num_steps": state.num_steps,
        "num_examples": state.num_examples,
        "num_accumulated": requested.num_accumulated(state.num_accumulated),
        "progress": state.progress,
    }
    if "update_noise" in requested.signals and "update_noise" not in signals:
        signals["update_noise"] = update_noise(
            tx,
            gradient.grads,
            state.opt_state,
            state.params,
            **signals | {"gradient_noise": gradient.gradient_noise},
        )
    try:
        updates, opt_state = tx.update(gradient.grads, state.opt_state, state.params, **signals)
    except TypeError as error:
        if "argument" in str(error):
            passed = ", ".join(sorted(signals))
            error.add_note(
                f"tx.update was called with the extra arguments {passed}; what else a transformation "
                "needs, such as value_fn, is passed by extra_args=."
            )
        raise
    after = requests(opt_state)
    progress, progress_error = compensated_sum(
        state.progress, state.progress_error, after.progress_since(requested)
    )
    state = state._replace(
        params=optax.apply_updates(state.params, updates),
        model_state=gradient.model_state,
        opt_state=opt_state,
        num_steps=optax.safe_increment(state.num_steps),
        num_examples=state.num_examples + batch_size,
        num_accumulated=after.accumulated_after(requested, state.num_accumulated, batch_size),
        progress=progress,
        progress_error=progress_error,
        num_nonfinite=state.num_nonfinite + ~jnp.isfinite(gradient.value),
    )
    return state, gradient


def with_usable_model_state(gradient: Any, model_state: PyTree) -> Any:
    """The gradient, with the model state before the step if this batch would poison it."""
    new = gradient.model_state
    # A model state may hold infinities from its start; then loss and gradient alone decide.
    usable = all_finite(gradient.value, gradient.grads) & (
        all_finite(new) | ~all_finite(model_state)
    )
    return gradient._replace(model_state=tree_where(usable, new, model_state))
