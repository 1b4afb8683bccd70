"""Makes the signals that rules ask for: gradient statistics, what noise does, validation examples.

:data:`arbiter_jax.base.SIGNALS` lists them all. Those that cost something are made only at the steps
at which some rule is due; at the others they are zeros, and `signals_made` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.typing
import optax

from arbiter_jax import _jaxpr
from arbiter_jax._count import Count
from arbiter_jax.base import (
    VALIDATION_SIGNALS,
    GradStats,
    PyTree,
    Requests,
    requests,
)
from arbiter_jax.batching import SamplerState
from arbiter_jax.batching._masking import num_rows
from arbiter_jax.batching._rows import num_data_devices
from arbiter_jax.batching._sampling import advance, examples_ahead, parts_ahead
from arbiter_jax.gradients import Gradient, GradientFn
from arbiter_jax.objectives import measure_persistence


def with_zero_statistics(gradient_fn: GradientFn) -> GradientFn:
    """A plain gradient function, with zeros for the statistics that a rule would get if due."""

    def with_zeros(params: PyTree, *args: Any) -> Gradient:
        zero = jnp.zeros((), float)
        return gradient_fn(params, *args)._replace(
            grad_stats=GradStats(*(zero for _ in GradStats._fields)),
            gradient_noise=jax.tree.map(jnp.zeros_like, params),
        )

    return with_zeros


def moved_leaves(
    tx: optax.GradientTransformationExtraArgs,
    opt_state: PyTree,
    params: PyTree,
    signals_of: Callable[[], dict[str, Any]] = dict,
) -> PyTree | None:
    """Which parameters a chain moves by their gradients; None if all of them.

    Frozen parameters also have gradients, and so do parameters that only decay, but the noise of
    these gradients says nothing about the batch size. The trace of ``tx.update`` shows which ones
    they are. All parameters count as moved if it cannot be traced by itself, or if none is moved.

    Args:
      tx: The whole chain.
      opt_state: State of tx.
      params: Parameters.
      signals_of: Makes those of the extra arguments of ``tx.update`` that are not made here.

    Returns:
      A pytree like the parameters of bools, or None.
    """

    def update(grads, opt_state, params, value, count):
        signals = signals_of() | {"value": value, "progress": value, "grad": grads, "probe": True}
        signals |= dict.fromkeys(("batch_size", "num_steps", "num_examples"), count)
        zeros = jax.tree.map(jnp.zeros_like, params)
        measured = {
            "grad_stats": GradStats(*(jnp.zeros((), float) for _ in GradStats._fields)),
            "gradient_noise": zeros,
            "update_noise": zeros,
        }
        asked = requests(opt_state).signals
        signals |= {name: made for name, made in measured.items() if name in asked}
        return tx.update(grads, opt_state, params, **signals)

    structure, num_states = jax.tree.structure(params), len(jax.tree.leaves(opt_state))
    n = structure.num_leaves
    try:
        closed = jax.make_jaxpr(update)(params, opt_state, params, jnp.zeros(()), jnp.int32(0))
        states, reached = None, [False] * num_states
        while states != reached:  # a gradient may reach an update through the state, steps later
            states = reached
            marks = [True] * n + states + [False] * (n + 2)
            found = _jaxpr.dependent_outputs(closed, marks)
            moved, reached = found[:n], [a or b for a, b in zip(states, found[n:], strict=True)]
    except Exception:  # a transformation of somebody else may raise anything
        return None
    if all(moved) or not any(moved):
        return None
    return jax.tree.unflatten(structure, moved)


def with_moved_grad(
    tx: optax.GradientTransformationExtraArgs, moved: PyTree
) -> optax.GradientTransformationExtraArgs:
    """A chain whose signal `grad` is zero where the chain moves no parameter, as in `grad_stats`."""

    def update(updates, state, params=None, *, grad=None, **signals):
        grad = jax.tree.map(lambda g, moves: g if moves else jnp.zeros_like(g), grad, moved)
        return tx.update(updates, state, params, grad=grad, **signals)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def update_noise(
    tx: optax.GradientTransformationExtraArgs,
    grads: PyTree,
    opt_state: PyTree,
    params: PyTree,
    *,
    gradient_noise: PyTree,
    **signals: Any,
) -> PyTree:
    """The linear response of the updates to the noise of the gradient, du = d(update) . xi.

    Args:
      tx: A differentiable optax chain.
      grads: Gradient of the batch.
      opt_state: State of tx.
      params: Parameters.
      gradient_noise: xi, like grads: half the difference of the gradients of two halves.
      **signals: The other extra arguments of ``tx.update``, without `update_noise`.

    Returns:
      du, like grads. For plain SGD it is ``-learning_rate * gradient_noise``.
    """
    zeros = jax.tree.map(jnp.zeros_like, grads)
    # Rules return the updates unchanged: `updates_only` lets them skip everything else.
    signals |= {"gradient_noise": zeros, "update_noise": zeros, "updates_only": True}

    def updates_of(grads):
        return tx.update(grads, opt_state, params, **signals)[0]

    response = jax.jvp(updates_of, (grads,), (gradient_noise,))[1]
    # Adam's square root has no derivative at 0. Where there was never a gradient, there is no noise.
    return jax.tree.map(
        lambda du, xi: jnp.where((xi == 0) & jnp.isnan(du), 0, du), response, gradient_noise
    )


def gradient_signals(gradient: Gradient, signals: frozenset[str]) -> dict[str, Any]:
    """The extra arguments of ``tx.update`` that come with a gradient.

    Args:
      gradient: Of this step.
      signals: What the rules ask for.
    """
    made = {"value": gradient.value, "grad": gradient.grads}  # as the optimizer itself sees it
    if gradient.grad_stats is not None:
        made["grad_stats"] = gradient.grad_stats
    if "gradient_noise" in signals:
        made["gradient_noise"] = gradient.gradient_noise
    if gradient.model_state is not None:
        made["model_state"] = gradient.model_state
    return made


def validation_signals(
    sampler: SamplerState,
    requested: Requests,
    validation: PyTree,
    bucket_size: int,
    num_agent_inputs: int,
    due: bool,
    inputs_of: Callable[[PyTree], PyTree] | None = None,
    num_meta_examples: jax.Array | None = None,
) -> tuple[SamplerState, dict[str, Any]]:
    """Fresh validation examples for the rules that ask for them.

    Args:
      sampler: Where the run stands in the validation data.
      requested: What the rules ask for.
      validation: Pytree of arrays with one leading axis.
      bucket_size: Rows of `meta_batch`.
      num_agent_inputs: Rows of `agent_inputs`.
      due: If False, the examples are zeros and the sampler stays where it is.
      inputs_of: See :func:`run_window`.
      num_meta_examples: int32[], rows of `meta_batch` that rules may use; all if None.

    Returns:
      (sampler, signals): the sampler behind the examples that count as used.
    """
    rows = {"agent_inputs": num_agent_inputs, "meta_batch": bucket_size}
    rows = {name: n for name, n in rows.items() if name in requested.signals}
    if not rows:
        return sampler, {}
    total = sum(rows.values())
    if due:
        used = rows.get("agent_inputs", 0)
        if num_data_devices() == 1:
            # One draw for both: a step is short enough for the number of its operations to matter.
            position = jnp.arange(total, dtype=jnp.int32)
            seen, batch = parts_ahead(sampler, validation, position, (used, total - used))
        else:  # a slice of rows that are split over devices would move between them
            draw = lambda *ends: examples_ahead(
                sampler, validation, jnp.arange(*ends, dtype=jnp.int32)
            )
            seen, batch = draw(used), draw(used, total)
        if "meta_batch" in rows:
            size = requested.meta_batch_size
            most = bucket_size if num_meta_examples is None else num_meta_examples
            used = used + (most if size is None else jnp.minimum(size, most))
        sampler = advance(sampler, used, num_rows(validation))
    else:
        zeros = lambda x: jnp.zeros((total, *x.shape[1:]), x.dtype)
        batch = seen = jax.tree.map(zeros, validation)
    signals: dict[str, Any] = {}
    if "agent_inputs" in rows:
        inputs = (inputs_of or first_entry)(seen)
        signals["agent_inputs"] = jax.tree.map(lambda x: x[:num_agent_inputs], inputs)
    if "meta_batch" in rows:
        signals["meta_batch"] = jax.tree.map(lambda x: x[-bucket_size:], batch)
    return sampler, signals


def first_entry(batch: PyTree) -> PyTree:
    """The inputs of a batch of the usual forms: (inputs, labels), or one array."""
    if isinstance(batch, (tuple, list)) and len(batch):
        return batch[0]
    if isinstance(batch, jax.Array):
        return batch
    keys = f" with the keys {', '.join(map(repr, batch))}" if isinstance(batch, dict) else ""
    raise ValueError(
        f"inputs_of must be given if a batch is a {type(batch).__name__}{keys}: a function "
        "batch -> inputs that returns the part of it that the agent sees."
    )


def check_validation(requested: Requests, validation: PyTree) -> None:
    """Raises a ValueError if a rule needs validation examples and there are none."""
    if not requested.signals & VALIDATION_SIGNALS:
        return
    if validation is None:
        raise ValueError(
            "data.validation must be given, got None: a rule in the chain measures on validation "
            "examples. Use aj.Data(train, validation)."
        )
    num_rows(validation, "data.validation")


def constant_signals(
    params: PyTree,
    requested: Requests,
    tx: optax.GradientTransformation,
    step_seconds: jax.typing.ArrayLike,
    budget: Count | jax.typing.ArrayLike | None,
    own_bucket_size: jax.typing.ArrayLike | None,
) -> dict[str, Any]:
    """The extra arguments of ``tx.update`` that are the same at every step of a window."""
    constants: dict[str, Any] = {}
    if budget is not None:
        is_count = isinstance(budget, Count)
        constants["budget"] = budget if is_count else jnp.asarray(budget, jnp.int32)
    if "step_seconds" in requested.signals:
        constants["step_seconds"] = jnp.asarray(step_seconds, jnp.float32)
    if "persistence" in requested.signals:
        constants["persistence"] = measure_persistence(tx, params)
    if own_bucket_size is not None and "meta_batch" in requested.signals:
        constants["num_meta_examples"] = own_bucket_size
    return constants
