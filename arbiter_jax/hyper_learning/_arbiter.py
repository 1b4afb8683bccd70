"""Arbiter: an agent that proposes batch sizes and learns from a meta-objective's gradient.

At every inner step the agent proposes, the features of the freshly updated network respond to the
mixture of the proposals, and the loss of that response is differentiated with respect to the agent
alone: nothing is unrolled, and no gradient passes through the body of the network. MacLellan and
Dong, "Hyper-Learning for Gradient-Based Batch Size Adaptation", arXiv:2205.08231.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import jax.typing
import optax

from arbiter_jax import _validate
from arbiter_jax._numerics import all_finite, cond_in_place, raw_key, tree_where
from arbiter_jax.base import PyTree, applied_batch_size, measures_now, requests, require
from arbiter_jax.hyper_learning._agents import Agent, mixture_logit, sorted_proposals
from arbiter_jax.hyper_learning._meta_objective import MetaObjective, Range, from_noise
from arbiter_jax.hyper_learning._reparameterization import to_batch_size, to_logit
from arbiter_jax.hyper_learning._response import ResponseLoss, response_objective
from arbiter_jax.hyper_learning._state import ALPHA_SCALE, ArbiterState, redraw_mixture
from arbiter_jax.hyper_learning._warm_up import hyper_optimizer
from arbiter_jax.objectives import NoiseObjective


@dataclasses.dataclass(frozen=True)
class _Config:
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


def arbiter(
    agent: Agent,
    response_loss: ResponseLoss | None = None,
    *,
    num_features: int | None = None,
    min_batch_size: int = 8,
    max_batch_size: int = 512,
    initial_batch_size: int = 64,
    window: int = 100,
    agent_optimizer: optax.GradientTransformation | None = None,
    mixture_optimizer: optax.GradientTransformation | None = None,
    learn_response: bool = True,
    anchor: str = "offset",
    hyper_every: int = 1,
    seed: int | jax.Array = 0,
    objective: NoiseObjective | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains an agent to choose the batch size, while the model trains; the last link of a chain.

    One hyper-step, with w* the parameters after this update, phi the agent, alpha the mixture logits,
    m the response weights and f the features:

    .. math::
      l_1 \le \dots \le l_N &= \text{sort}(\text{mean over the inputs of } agent_\phi), \\
      s &= \sum_n \text{softmax}(\alpha)_n \, l_n, \\
      B_s &= \lfloor (b_{max} - b_{min})\, \sigma(s) + b_{min} \rfloor, \\
      F &= \text{mean over } B_s \text{ examples of } loss(head(f(w^*) \odot (1 + m s))).

    phi, alpha and m descend F. For them f and w* are constants, so that only the forward pass of the
    network's body is computed. After `window` updates the batch size becomes that of proposal number
    argmax alpha, and alpha is drawn again, 1e-6 times standard normal, with a fresh optimizer state.

    The update function takes the parameters, ``agent_inputs`` (a batch of validation inputs),
    ``meta_batch`` (a pytree whose leaves have M leading rows, of which the first min(B_s, M) count), and
    ``model_state`` if the model has one. It returns the updates unchanged.

    Differences from the published code: logits aim at the center of a batch size's interval, so that
    none is lost to floor; the response is computed in inference mode and does not change BatchNorm
    statistics; the network's own gradient of F is not computed; the batch size changes at the end of a
    window, and a window may be one epoch.

    Known behavior: F depends on s only through the perturbation m s of the features. It is smallest at
    s = 0, the middle of the range, and there the batch size goes, whatever the task
    (`experiments.feasibility` measures it). ``objective=aj.noise_response(...)`` replaces F by a
    function J of the batch size that is measured on the noise of the gradient; agent, mixture and
    selection stay the same.

    Args:
      agent: Makes the proposals; see :func:`arbiter_jax.mlp_agent`.
      response_loss: The loss of each meta example under a response; see
        :data:`arbiter_jax.hyper_learning.ResponseLoss`. None if `objective` is given.
      num_features: Width of the head's input, an integer >= 1. None if `objective` is given.
      min_batch_size: :math:`b_{min}`, an integer >= 1.
      max_batch_size: :math:`b_{max}`, an integer > min_batch_size.
      initial_batch_size: Batch size of the first window, within the range.
      window: T, number of updates between two decisions, an integer >= 1.
      agent_optimizer: Trains phi and m; by default weight decay 5e-4, then Adam at 1e-5 (1e-3 with an
        objective, whose minimum moves within a run).
      mixture_optimizer: Trains alpha; by default the same at 1e-4 (1e-2 with an objective).
      learn_response: If False, m stays as drawn, uniform in (-1, 1).
      anchor: "offset" adds one constant to every proposal, chosen at the first hyper-step such that
        the mixture is at the logit of initial_batch_size; "none" leaves the agent as it is (see
        :func:`arbiter_jax.warm_up`).
      hyper_every: Takes a hyper-step at every n-th update, an integer in [1, window]. The other updates
        add no cost; under `vmap`, only those at which no lane is due.
      seed: An int, or a PRNG key.
      objective: From :func:`arbiter_jax.noise_response`, to descend instead of F.

    Returns:
      A ``GradientTransformationExtraArgs`` with an :class:`ArbiterState`.

    Raises:
      ValueError: If an argument is out of its range; at the first trace if the agent's output or the
        width of the head does not fit.
      TypeError: If `update` is called without `params`, `agent_inputs`, `meta_batch` or what the
        objective reads.

    Reference:
      MacLellan and Dong, "Hyper-Learning for Gradient-Based Batch Size Adaptation",
      arXiv:2205.08231.

    *Guarantees*: the updates pass unchanged; batch_size stays within the range; a hyper-step with a
    number that is not finite changes nothing but ``num_skipped``.

    >>> import arbiter_jax as aj
    >>> def response_loss(params, response, meta_batch):  # a linear head on raw inputs
    ...     inputs, labels = meta_batch
    ...     outputs = (inputs * (1 + response[None, :])) @ params
    ...     return (outputs - labels) ** 2
    >>> tx = optax.chain(
    ...     optax.sgd(0.1),
    ...     aj.arbiter(aj.mlp_agent((3,)), response_loss, num_features=3, window=2),
    ... )
    >>> params, inputs, labels = jnp.zeros(3), jnp.ones((512, 3)), jnp.ones(512)
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     updates, state = tx.update(
    ...         jnp.ones(3), state, params, agent_inputs=inputs[:8], meta_batch=(inputs, labels))
    >>> 8 <= int(aj.get_batch_size(state)) <= 512
    True
    """
    if (response_loss is None) == (objective is None):
        raise ValueError(
            "arbiter takes exactly one of response_loss and objective, got "
            f"{response_loss!r} and {objective!r}."
        )
    if response_loss is not None:
        meta_objective = response_objective(response_loss, num_features, learn_response)
    elif isinstance(objective, NoiseObjective):
        meta_objective = from_noise(objective)
    else:
        raise ValueError(f"objective must come from aj.noise_response, got {objective!r}.")
    low, high, start = _validate.batch_size_range(
        min_batch_size, max_batch_size, initial_batch_size
    )
    if high == low:
        raise ValueError(
            f"max_batch_size must be > min_batch_size, got {high} for both: nothing to adapt."
        )
    window = _validate.integer(window=window, minimum=1)
    config = _Config(
        agent=agent,
        objective=meta_objective,
        limits=Range(low, high),
        initial_batch_size=start,
        window=window,
        hyper_every=_validate.integer(hyper_every=hyper_every, minimum=1, maximum=window),
        anchors=_validate.one_of(("offset", "none"), anchor=anchor) == "offset",
        agent_optimizer=agent_optimizer or hyper_optimizer(meta_objective.agent_rate),
        mixture_optimizer=mixture_optimizer or hyper_optimizer(meta_objective.mixture_rate),
    )

    def init_fn(params):
        del params
        return _init(config, raw_key(seed))

    def update_fn(updates, state, params=None, *, probe=None, **signals):
        if probe is not None:
            return updates, state
        return updates, _update(config, state, updates, params, signals)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _init(config: _Config, key: jax.Array) -> ArbiterState:
    key, agent_key, response_key, alpha_key = jax.random.split(key, 4)
    num_features, num_proposals = config.objective.num_features, config.agent.num_proposals
    agent_params = config.agent.init(agent_key)
    mixture_logits = ALPHA_SCALE * jax.random.normal(alpha_key, (num_proposals,))
    response_weights = jax.random.uniform(response_key, (num_features,), minval=-1.0)
    learnable: Any = _learnables(config, agent_params, response_weights)
    start = config.initial_batch_size
    logit = to_logit(start, *config.limits)
    int32 = lambda x: jnp.asarray(x, jnp.int32)
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
        signals_due=None if config.hyper_every == 1 else jnp.array(True),
        num_clipped=int32(0),
        num_skipped=int32(0),
        key=key,
        statistics=config.objective.init(),
    )


def _update(
    config: _Config,
    state: ArbiterState,
    updates: PyTree,
    params: PyTree,
    signals: dict[str, Any],
) -> ArbiterState:
    required = sorted(requests(state).signals)
    require("arbiter", params=params, **{name: signals.get(name) for name in required})
    # Outside the condition, where XLA merges this with the caller's own `apply_updates`: inside it
    # would have to copy params and updates.
    new_params = optax.apply_updates(cast("optax.Params", params), updates)
    measures = measures_now(state.signals_due, signals.get("signals_made"))
    applied = jnp.clip(applied_batch_size(signals.get("batch_size"), state), *config.limits)
    statistics, usable = config.objective.observe(
        state.statistics, updates, params, applied, signals, measures
    )
    state = state._replace(statistics=statistics)
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
    if config.hyper_every > 1:
        state = state._replace(signals_due=state.window_step % config.hyper_every == 0)
    return state


def _learnables(config: _Config, agent_params: PyTree, response_weights: jax.Array) -> _Learnable:
    return _Learnable(agent_params, response_weights if config.objective.learn_response else None)


def _meta_loss(
    learnable: _Learnable,
    mixture_logits: jax.Array,
    config: _Config,
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
    config: _Config,
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


def _end_window(config: _Config, state: ArbiterState) -> _WindowEnd:
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
