"""The signals that rules ask for beside the loss: validation examples, and what noise does.

Each is computed only where a state in the chain asks for it, and at the steps at which it is due.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from arbiter_jax.base import PyTree, meta_batch_sizes, required_signals
from arbiter_jax.batching import SamplerState, advance, examples_ahead, num_rows
from arbiter_jax.gradients import GradientFn, masked_value_and_grad, value_grad_and_stats

VALIDATION_SIGNALS = frozenset({"agent_inputs", "meta_batch"})
NOISE_SIGNALS = frozenset({"grad_stats", "gradient_noise", "update_noise"})


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
    signals |= {"gradient_noise": gradient_noise, "update_noise": zeros}

    def updates_of(grads):
        return tx.update(grads, opt_state, params, **signals)[0]

    response = jax.jvp(updates_of, (grads,), (gradient_noise,))[1]
    # Adam's square root has no derivative at 0. Where there was never a gradient, there is no noise.
    return jax.tree.map(
        lambda du, xi: jnp.where((xi == 0) & jnp.isnan(du), 0, du), response, gradient_noise
    )


def gradient_fn_for(loss_fn: Any, needed: frozenset[str]) -> GradientFn:
    """The gradient of a loss, with its statistics where a rule asks for them."""
    if needed & NOISE_SIGNALS:
        return value_grad_and_stats(loss_fn, sampled=True)
    return masked_value_and_grad(loss_fn, sampled=True)


def without_statistics(full: GradientFn, loss_fn: Any) -> GradientFn:
    """The plain gradient, with zeros in the place of the statistics that another one returns."""
    plain = masked_value_and_grad(loss_fn, sampled=True)

    def gradient_fn(*args):
        shapes = jax.eval_shape(full, *args)
        stats, noise = jax.tree.map(jnp.zeros_like, (shapes.grad_stats, shapes.gradient_noise))
        return plain(*args)._replace(grad_stats=stats, gradient_noise=noise)

    return gradient_fn


def validation_signals(
    sampler: SamplerState,
    opt_state: PyTree,
    validation: PyTree,
    needed: frozenset[str],
    bucket_size: int,
    num_agent_inputs: int,
    due: bool,
) -> tuple[SamplerState, dict[str, Any]]:
    """Fresh validation examples for the rules that ask, and where the sampler stands after them.

    Where they are not due, zeros; the sampler stays.
    """
    signals: dict[str, Any] = {}
    wanted = {"agent_inputs": num_agent_inputs, "meta_batch": bucket_size}
    num_rows_of = {name: n for name, n in wanted.items() if name in needed}
    if not num_rows_of:
        return sampler, signals
    total = sum(num_rows_of.values())
    # Only the examples that a rule looks at count as used.
    sizes = meta_batch_sizes(opt_state)
    used = num_rows_of.get("agent_inputs", 0)
    if "meta_batch" in needed:
        used = used + (jnp.minimum(sizes[0], bucket_size) if sizes else bucket_size)

    def draw(sampler):
        # One draw for both: a step is short enough for the number of its operations to count.
        batch = examples_ahead(sampler, validation, jnp.arange(total, dtype=jnp.int32))
        return advance(sampler, used, num_rows(validation)), batch

    if due:
        sampler, batch = draw(sampler)
    else:
        batch = jax.tree.map(jnp.zeros_like, jax.eval_shape(draw, sampler)[1])
    if "agent_inputs" in needed:
        inputs = batch[0] if isinstance(batch, tuple) else batch
        signals["agent_inputs"] = jax.tree.map(lambda x: x[:num_agent_inputs], inputs)
    if "meta_batch" in needed:
        signals["meta_batch"] = jax.tree.map(lambda x: x[total - bucket_size :], batch)
    return sampler, signals


def _flags(node: PyTree) -> list[jax.Array | None]:
    """Of each state that looks at signals that cost something, the flag that governs it, if any.

    A state's `signals_due`, bool[], speaks for all that is inside of it.
    """
    asking = required_signals(node) & (VALIDATION_SIGNALS | NOISE_SIGNALS)
    if not asking:
        return []
    if getattr(node, "signals_due", None) is not None:
        return [node.signals_due]
    if asking & set(getattr(node, "requires", ())):
        return [None]
    children = jax.tree_util.default_registry.flatten_one_level(node)
    return [flag for child in (children[0] if children else ()) for flag in _flags(child)]


def signals_due(opt_state: PyTree) -> jax.Array | None:
    """Whether any rule looks at its signals at the next step; None where always, or never."""
    flags = _flags(opt_state)
    known = [flag for flag in flags if flag is not None]
    if not flags or len(known) < len(flags):
        return None
    return functools.reduce(jnp.logical_or, known)


def with_signals_due(opt_state: PyTree, due: bool) -> PyTree:
    """What is known of `signals_due` in one branch of a condition, as a constant.

    So that the compiler sees which conditions of the rules do not arise there. Of several rules, it
    is not known which one it was.
    """
    flagged = lambda node: getattr(node, "signals_due", None) is not None
    if due and len(_flags(opt_state)) > 1:
        return opt_state
    return jax.tree.map(
        lambda node: node._replace(signals_due=jnp.full((), due)) if flagged(node) else node,
        opt_state,
        is_leaf=flagged,
    )
