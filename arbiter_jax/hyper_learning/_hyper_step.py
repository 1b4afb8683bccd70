"""What one update of Arbiter does: hyper-step, count, and the decision at the end of a window."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from arbiter_jax._count import as_count
from arbiter_jax._numerics import all_finite, cond_in_place, tree_where
from arbiter_jax.base import PyTree, applied_update, measures_now, requests, require
from arbiter_jax.hyper_learning._agents import Agent, mixture_logit, sorted_proposals
from arbiter_jax.hyper_learning._meta_objective import MetaObjective, Range
from arbiter_jax.hyper_learning._reparameterization import to_batch_size, to_logit
from arbiter_jax.hyper_learning._state import ALPHA_SCALE, ArbiterState, redraw_mixture
from arbiter_jax.objectives._objective import of_whole_update


@dataclasses.dataclass(frozen=True)
class Config:
    """The checked arguments of :func:`arbiter`."""

    agent: Agent
    objective: MetaObjective
    limits: Range
    initial_batch_size: int
    window: int
    hyper_every: int
    anchors: bool  # whether an offset moves the mixture to a given batch size
    agent_optimizer: optax.GradientTransformation
    mixture_optimizer: optax.GradientTransformation


class _Learnable(NamedTuple):
    """What the agent's optimizer sees; no response weights if they stay as drawn."""

    agent_params: PyTree
    response_weights: jax.Array | None


class _HyperStep(NamedTuple):
    """What one evaluation of the meta-objective says."""

    proposals: jax.Array  # shape=(N,), dtype=float
    mixture: jax.Array  # shape=(), dtype=float
    offset: jax.Array  # shape=(), dtype=float
    meta_batch_size: jax.Array  # shape=(), dtype=int32
    is_clipped: jax.Array  # shape=(), dtype=bool
    meta_loss: jax.Array  # shape=(), dtype=float


class _WindowEnd(NamedTuple):
    """The fields that the end of a window changes: what passes through a condition is copied."""

    batch_size: jax.Array
    mixture_logits: jax.Array
    mixture_opt_state: PyTree
    window_step: jax.Array
    key: jax.Array


def init_state(config: Config, key: jax.Array) -> ArbiterState:
    """The state before the first update; `key` is uint32[2]."""
    key, agent_key, response_key, alpha_key = jax.random.split(key, 4)
    num_features, num_proposals = config.objective.num_features, config.agent.num_proposals
    agent_params = config.agent.init(agent_key)
    mixture_logits = ALPHA_SCALE * jax.random.normal(alpha_key, (num_proposals,))
    response_weights = jax.random.uniform(response_key, (num_features,), minval=-1.0)
    learnable: Any = _learnables(config, agent_params, response_weights)
    start = config.initial_batch_size
    logit = to_logit(start, *config.limits)
    int32 = lambda x: jnp.array(x, jnp.int32)  # no two fields share a buffer
    return ArbiterState(
        agent_params=agent_params,
        mixture_logits=mixture_logits,
        response_weights=response_weights,
        agent_opt_state=config.agent_optimizer.init(learnable),
        mixture_opt_state=config.mixture_optimizer.init(mixture_logits),
        proposals=jnp.full((num_proposals,), logit),
        mixture_weights=jax.nn.softmax(mixture_logits),
        mixture=logit,
        offset=jnp.zeros_like(logit),
        pending_anchor=int32(start if config.anchors else 0),
        batch_size=int32(start),
        min_batch_size=int32(config.limits.low),
        max_batch_size=int32(config.limits.high),
        meta_batch_size=int32(start),
        meta_loss=jnp.zeros_like(logit),
        window_step=int32(0),
        signals_due=None if _every_step(config) else jnp.array(True),
        num_clipped=int32(0),
        num_skipped=int32(0),
        key=key,
        ledger=as_count(0),
        statistics=config.objective.init(),
    )


def update_state(
    config: Config,
    state: ArbiterState,
    updates: PyTree,
    params: PyTree,
    signals: dict[str, Any],
) -> ArbiterState:
    """The state after an update whose extra arguments are `signals`."""
    required = sorted(requests(state).signals)
    require("arbiter", params=params, **{name: signals.get(name) for name in required})
    # Outside the condition, where XLA merges this with the caller's own `apply_updates`: inside it
    # would have to copy params and updates.
    new_params = optax.apply_updates(cast("optax.Params", params), updates)
    measures = measures_now(state.signals_due, signals.get("signals_made"))
    update = applied_update(state, **signals)
    applied = jnp.clip(update.call_size, *config.limits)
    update_size, signals = of_whole_update(update, applied, signals)
    statistics, usable = config.objective.observe(
        state.statistics, updates, params, update_size, signals, measures
    )
    state = state._replace(statistics=statistics, ledger=update.ledger)
    learn = lambda state: _hyper_step(config, state, new_params, signals, usable)
    if not isinstance(measures, bool):
        state = cond_in_place(measures, learn, state)
    elif measures:
        state = learn(state)
    state = state._replace(window_step=state.window_step + 1)
    ended = jax.lax.cond(
        state.window_step >= config.window,
        lambda state: _end_window(config, state),
        lambda state: _WindowEnd(*(getattr(state, name) for name in _WindowEnd._fields)),
        state,
    )
    state = state._replace(**ended._asdict())
    state = state._replace(
        meta_batch_size=config.objective.meta_batch_size(state.meta_batch_size, state.batch_size)
    )
    if not _every_step(config):
        state = state._replace(signals_due=state.window_step % config.hyper_every == 0)
    return state


def _every_step(config: Config) -> bool:
    """Whether every update takes a hyper-step, as far as is known while tracing."""
    return not isinstance(config.hyper_every, jax.Array) and config.hyper_every == 1


def _learnables(config: Config, agent_params: PyTree, response_weights: jax.Array) -> _Learnable:
    return _Learnable(agent_params, response_weights if config.objective.learn_response else None)


def _meta_loss(
    learnable: _Learnable,
    mixture_logits: jax.Array,
    config: Config,
    state: ArbiterState,
    new_params: PyTree,
    signals: dict[str, Any],
) -> tuple[jax.Array, _HyperStep]:
    """F as a function of phi, m and alpha; everything else is a constant."""
    low, high = config.limits
    raw = sorted_proposals(config.agent, learnable.agent_params, signals["agent_inputs"])
    raw_mixture = mixture_logit(mixture_logits, raw)
    offset = state.offset
    if config.anchors:
        target = to_logit(jnp.maximum(state.pending_anchor, low), low, high)
        anchored = jax.lax.stop_gradient(target - raw_mixture)
        offset = jnp.where(state.pending_anchor > 0, anchored, offset)
    mixture = raw_mixture + offset
    response_weights = learnable.response_weights
    if response_weights is None:
        response_weights = state.response_weights
    loss = config.objective.loss(
        mixture, response_weights, state.statistics, new_params, signals, config.limits
    )
    return loss.value, _HyperStep(
        proposals=raw + offset,
        mixture=mixture,
        offset=offset,
        meta_batch_size=loss.batch_size,
        is_clipped=loss.is_clipped,
        meta_loss=loss.value,
    )


def _hyper_step(
    config: Config,
    state: ArbiterState,
    new_params: PyTree,
    signals: dict[str, Any],
    usable: jax.Array,
) -> ArbiterState:
    learnable: Any = _learnables(config, state.agent_params, state.response_weights)
    grads, step = jax.grad(_meta_loss, argnums=(0, 1), has_aux=True)(
        learnable, state.mixture_logits, config, state, new_params, signals
    )
    agent_updates, agent_opt_state = config.agent_optimizer.update(
        grads[0], state.agent_opt_state, learnable
    )
    # A new anchor starts alpha over; only here is it known what a fresh optimizer state is.
    mixture_opt_state = tree_where(
        state.pending_anchor > 0,
        config.mixture_optimizer.init(state.mixture_logits),
        state.mixture_opt_state,
    )
    alpha_updates, mixture_opt_state = config.mixture_optimizer.update(
        grads[1], mixture_opt_state, state.mixture_logits
    )
    learnable = optax.apply_updates(learnable, agent_updates)
    mixture_logits: Any = optax.apply_updates(state.mixture_logits, alpha_updates)
    response_weights = learnable.response_weights
    new_state = state._replace(
        agent_params=learnable.agent_params,
        mixture_logits=mixture_logits,
        response_weights=state.response_weights if response_weights is None else response_weights,
        agent_opt_state=agent_opt_state,
        mixture_opt_state=mixture_opt_state,
        proposals=step.proposals,
        mixture_weights=jax.nn.softmax(mixture_logits),
        mixture=step.mixture,
        offset=step.offset,
        pending_anchor=jnp.zeros_like(state.pending_anchor),
        meta_batch_size=step.meta_batch_size,
        meta_loss=step.meta_loss,
        num_clipped=state.num_clipped + step.is_clipped,
    )
    skipped = state._replace(num_skipped=state.num_skipped + 1)
    return tree_where(usable & all_finite(grads, step, mixture_logits), new_state, skipped)


def _end_window(config: Config, state: ArbiterState) -> _WindowEnd:
    """The decision is taken, and alpha starts over."""
    chosen = state.proposals[jnp.argmax(state.mixture_logits)]
    key, mixture_logits = redraw_mixture(state.key, state.mixture_logits)
    fresh = config.mixture_optimizer.init(mixture_logits)
    return _WindowEnd(
        # An anchor that is still pending means that no hyper-step has been possible: stay there.
        batch_size=jnp.where(
            state.pending_anchor > 0, state.batch_size, to_batch_size(chosen, *config.limits)
        ),
        mixture_logits=mixture_logits,
        mixture_opt_state=jax.tree.map(
            lambda x, old: x.astype(old.dtype), fresh, state.mixture_opt_state
        ),
        window_step=jnp.zeros_like(state.window_step),
        key=key,
    )
