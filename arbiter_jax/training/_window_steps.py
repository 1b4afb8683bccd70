"""The plan of a window, and its steps: those that are taken, and those that are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.typing
import optax

from arbiter_jax._count import Count
from arbiter_jax._numerics import cond_in_place
from arbiter_jax.base import (
    MEASURED_SIGNALS,
    LossFn,
    PyTree,
    Requests,
    StepInfo,
    get_batch_size,
    requests,
    with_extra_args,
)
from arbiter_jax.batching import Block, SamplerState
from arbiter_jax.batching._blocks import check_block
from arbiter_jax.batching._shared_buckets import halves_apart
from arbiter_jax.gradients import GradientFn
from arbiter_jax.training._draw import draw
from arbiter_jax.training._extra_args import ExtraArgs, loss_of_batch, with_made_extra_args
from arbiter_jax.training._gradient_fns import (
    gradient_fns,
    gradient_fns_of_groups,
    transformed,
)
from arbiter_jax.training._inner_step import inner_step
from arbiter_jax.training._micro_batches import steps_of_groups
from arbiter_jax.training._signals import (
    check_validation,
    constant_signals,
    moved_leaves,
    validation_signals,
    with_moved_grad,
)
from arbiter_jax.training._state import Data, TrainState


class WindowPlan(NamedTuple):
    """What is the same at every step of a window; the rest is as in :func:`run_window`."""

    data: Data
    batch_size: jax.Array  # shape=(), dtype=int32, examples of each step
    window: int  # steps of the window, whether they are taken or not
    num_steps: jax.typing.ArrayLike | None  # steps that are taken; None for all of them
    signals: frozenset[str]  # what the rules ask for
    constants: dict[str, Any]  # signals that are known before the window
    functions: dict[bool, GradientFn]  # whether a rule is due -> the gradient function of the step
    measures_pieces: bool  # whether gradient noise is measured here, and not by `gradient_fn`
    in_groups: bool  # whether a batch is computed group by group
    own_bucket_size: jax.Array | None
    loss_fn: LossFn | None
    tx: optax.GradientTransformationExtraArgs
    bucket_size: int
    num_agent_inputs: int
    gradient_fn: GradientFn | None
    transform_batch: Callable[[jax.Array, PyTree], PyTree] | None
    inputs_of: Callable[[PyTree], PyTree] | None
    has_aux: bool
    extra_args: ExtraArgs | None
    sampling: str


def begin_window(
    state: TrainState,
    data: Data,
    num_steps: jax.typing.ArrayLike | None,
    step_seconds: jax.typing.ArrayLike,
    budget: Count | jax.typing.ArrayLike | None,
    batch_size: jax.typing.ArrayLike | None,
    own_bucket_size: jax.typing.ArrayLike | None,
    *,
    loss_fn: LossFn | None,
    tx: Any,
    bucket_size: int,
    window: int,
    num_agent_inputs: int,
    gradient_fn: GradientFn | None,
    transform_batch: Callable[[jax.Array, PyTree], PyTree] | None,
    inputs_of: Callable[[PyTree], PyTree] | None,
    has_aux: bool,
    extra_args: ExtraArgs | None,
    micro_batch_size: int | None,
    sampling: str,
) -> tuple[TrainState, WindowPlan]:
    """Decides all that holds for a whole window, from checked arguments of :func:`run_window`.

    Returns:
      (state, plan): the state without an unfinished window.
    """
    in_groups = bucket_size == micro_batch_size
    if isinstance(data.train, Block):
        slots = check_block(data.train, None if in_groups else window, bucket_size)
        window = min(window, slots)  # a large block has fewer steps
        wanted = window if num_steps is None else num_steps
        num_steps = jnp.minimum(wanted, data.train.num_steps)
    requested = requests(state.opt_state)
    check_validation(requested, data.validation)
    decided = _decided(state, requested, bucket_size)
    # Zeros that depend on the state: under vmap they have its leading axis, and take its buffers.
    state = state._replace(unfinished=jax.tree.map(lambda x: 0 * x, state.unfinished))
    taken: Any = decided if batch_size is None else jnp.minimum(decided, batch_size)
    if not in_groups:
        taken = jnp.minimum(taken, bucket_size)
    elif isinstance(data.train, Block):
        taken = data.train.batch_size
        num_steps = steps_of_groups(data.train, num_steps)
    taken = jnp.asarray(taken, jnp.int32)
    if own_bucket_size is not None:
        own_bucket_size = jnp.asarray(own_bucket_size, jnp.int32)
    constants = constant_signals(state.params, requested, tx, step_seconds, budget, own_bucket_size)
    tx = with_extra_args(tx)
    if extra_args is not None:
        tx = with_made_extra_args(tx, extra_args)
    plan = WindowPlan(
        data=data,
        batch_size=taken,
        window=window,
        num_steps=num_steps,
        signals=requested.signals,
        constants=constants,
        functions={},
        measures_pieces=bool(requested.signals & MEASURED_SIGNALS) and gradient_fn is None,
        in_groups=in_groups,
        own_bucket_size=own_bucket_size,
        loss_fn=loss_fn,
        tx=tx,
        bucket_size=bucket_size,
        num_agent_inputs=num_agent_inputs,
        gradient_fn=gradient_fn,
        transform_batch=transform_batch,
        inputs_of=inputs_of,
        has_aux=has_aux,
        extra_args=extra_args,
        sampling=sampling,
    )
    return state, _with_gradient_fns(plan, state, requested)


def _decided(state: TrainState, requested: Requests, bucket_size: int) -> Any:
    """The batch size of the window: that of the rule, or of the window that was left unfinished."""
    if not requested.rules:
        return bucket_size
    unfinished, decided = state.unfinished, get_batch_size(state.opt_state)
    return jnp.where(unfinished.num_steps > 0, unfinished.batch_size, decided)


def _with_gradient_fns(plan: WindowPlan, state: TrainState, requested: Requests) -> WindowPlan:
    """The plan with its gradient functions, which measure the noise of what the chain moves."""
    moved = None  # all parameters
    if plan.measures_pieces:
        given = lambda: (
            plan.constants
            | {"model_state": state.model_state}
            | _validation_signals(plan, state, requested, False)[1]
        )
        moved = moved_leaves(plan.tx, state.opt_state, state.params, given)
        plan = plan if moved is None else plan._replace(tx=with_moved_grad(plan.tx, moved))
    if not plan.in_groups:
        functions = gradient_fns(plan.loss_fn, plan.gradient_fn, plan.signals, moved, plan.has_aux)
        return plan._replace(functions=functions)
    functions = gradient_fns_of_groups(
        plan.data.train,
        plan.bucket_size,
        plan.transform_batch,
        loss_fn=plan.loss_fn,
        gradient_fn=plan.gradient_fn,
        signals=plan.signals,
        trainable=moved,
        has_aux=plan.has_aux,
    )
    return plan._replace(functions=functions)


def _validation_signals(
    plan: WindowPlan, state: TrainState, requested: Requests, due: bool
) -> tuple[SamplerState, dict[str, Any]]:
    return validation_signals(
        state.validation_sampler,
        requested,
        plan.data.validation,
        plan.bucket_size,
        plan.num_agent_inputs,
        due,
        plan.inputs_of,
        plan.own_bucket_size,
    )


def maybe_step(plan: WindowPlan, state: TrainState, t: jax.Array) -> tuple[TrainState, StepInfo]:
    """Step `t` of a window, if it is to be taken; otherwise the state as it is, and zeros."""
    requested = requests(state.opt_state)
    due = requested.due
    # A rule whose flag is the only one need not read it: the branch taken says what it holds.
    made = True if len(requested.flags) < 2 else jnp.array(True)
    # Once for the two branches below; a step not taken drops it.
    drawn = draw(
        state.train_sampler,
        plan.data.train,
        t,
        plan.batch_size,
        plan.bucket_size,
        own_bucket_size=plan.own_bucket_size,
        in_groups=plan.in_groups,
        sampling=plan.sampling,
    )
    if due is None and plan.num_steps is None:
        return _step(plan, state, drawn, made)
    wanted = jnp.array(True) if plan.num_steps is None else t < plan.num_steps
    take = lambda made: lambda carry: _step(plan, carry[0], drawn, made)
    carry = state, _no_step(plan, state, drawn, requested)
    if due is None:
        return cond_in_place(wanted, take(made), carry)
    # One choice for the whole step: a step at which no signal is due is a plain one, and costs
    # what that costs. Conditions further in would have to pass on signals as large as the model.
    carry = cond_in_place(wanted & due, take(made), carry)
    return cond_in_place(wanted & ~due, take(False), carry)


def _step(
    plan: WindowPlan, state: TrainState, drawn: Any, made: Any = True
) -> tuple[TrainState, StepInfo]:
    """A step that is taken, on the batch that was drawn; `made` is the signal `signals_made`."""
    due = made is not False
    sampler, batch, mask = drawn
    state = state._replace(train_sampler=sampler)
    if plan.transform_batch is not None and not plan.in_groups:
        step_key = jax.random.fold_in(state.key, state.num_steps)
        batch = transformed(plan.transform_batch, step_key, batch)
    if plan.own_bucket_size is not None and due and plan.measures_pieces:
        batch, mask = halves_apart((batch, mask), plan.own_bucket_size)
    sampler, signals = _validation_signals(plan, state, requests(state.opt_state), due)
    state = state._replace(validation_sampler=sampler)
    signals |= {**plan.constants, "signals_made": made}
    if not due and "update_noise" in plan.signals:
        signals["update_noise"] = jax.tree.map(jnp.zeros_like, state.params)
    if plan.extra_args is not None:
        key = jax.random.fold_in(state.key, state.num_steps)
        given = {name: getattr(plan, name) for name in ("loss_fn", "gradient_fn", "has_aux")}
        signals["batch_loss"] = loss_of_batch(batch, mask, state.model_state, key, **given)
    state, gradient = inner_step(
        state, batch, mask, gradient_fn=plan.functions[due], tx=plan.tx, signals=signals
    )
    metrics = {name: getattr(gradient, name) for name in getattr(gradient, "metrics", ())}
    metrics |= requests(state.opt_state).metrics
    size = jnp.sum(mask, dtype=jnp.int32)
    aux = getattr(gradient, "aux", None)
    return state, StepInfo(gradient.value.astype(float), size, metrics, aux)


def _no_step(plan: WindowPlan, state: TrainState, drawn: Any, requested: Requests) -> StepInfo:
    """What a step reports that is not taken: zeros."""
    if plan.gradient_fn is not None or plan.has_aux:
        # What it reports is not known before it is traced.
        step = lambda state, drawn: _step(plan, state, drawn)
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(step, state, drawn)[1])
    metrics = jax.tree.map(jnp.zeros_like, requested.metrics)
    return StepInfo(jnp.zeros((), float), jnp.zeros((), jnp.int32), metrics)
