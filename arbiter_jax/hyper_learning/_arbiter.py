"""Arbiter: an agent that proposes batch sizes and learns from a meta-objective's gradient.

At every inner step the agent proposes, the features of the freshly updated network respond to the
mixture of the proposals, and the loss of that response is differentiated with respect to the agent
alone: nothing is unrolled, and nothing flows back through the body of the network. MacLellan and
Dong, "Hyper-Learning for Gradient-Based Batch Size Adaptation", arXiv:2205.08231.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import jax.typing
import optax

from arbiter_jax import _validate
from arbiter_jax._numerics import all_finite, cond_in_place, raw_key, tree_where
from arbiter_jax.base import PyTree, applied_batch_size, require
from arbiter_jax.batching import batch_mask, masked_mean, num_rows, replace_padding
from arbiter_jax.hyper_learning._agents import Agent, mixture_logit, sorted_proposals
from arbiter_jax.hyper_learning._reparameterization import to_batch_size, to_logit
from arbiter_jax.hyper_learning._response import ResponseLoss, call_response_loss
from arbiter_jax.hyper_learning._state import (
    ALPHA_SCALE,
    ArbiterState,
    NoiseArbiterState,
    redraw_mixture,
)
from arbiter_jax.hyper_learning._warm_up import hyper_optimizer
from arbiter_jax.objectives import NoiseObjective
from arbiter_jax.objectives._objective import limited_loss, update_objective


class _Learnable(NamedTuple):
    """What the agent's optimizer sees; without the response weights where those stay as drawn."""

    agent_params: PyTree
    response_weights: jax.Array | None


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
    r"""Chooses the batch size by hyper-learning; the last link of a chain.

    One hyper-step, with w* the parameters after this update, phi the agent, alpha the mixture logits
    and m the response weights:

    .. math::
      l_1 \le \dots \le l_N &= \text{sort}(\text{mean over the inputs of } agent_\phi), \\
      s &= \sum_n \text{softmax}(\alpha)_n \, l_n, \\
      B_s &= \lfloor (b_{max} - b_{min})\, \sigma(s) + b_{min} \rfloor, \\
      F &= \text{mean over } B_s \text{ examples of } loss(head(f(w^*) \odot (1 + m s))).

    phi, alpha and m descend F; the features f and w* are constants to them, so that only the forward
    pass of the network's body is computed. After `window` updates the batch size becomes that of
    proposal number argmax alpha, and alpha is drawn anew, 1e-6 times standard normal, with fresh
    optimizer state.

    The update function takes, besides the parameters, ``agent_inputs`` (a batch of validation
    inputs) and ``meta_batch`` (a pytree whose leaves have M leading rows, of which the first
    min(B_s, M) count), and ``model_state`` where the model has one. It returns the updates
    unchanged.

    Where this departs from the published code: logits aim at the centre of a batch size's interval,
    so that none is lost to floor; the response is computed in inference mode and changes no
    BatchNorm statistics; the network's own gradient of F is never computed; the batch size changes
    at window ends, and a window may be set to one epoch.

    Known behaviour: F depends on s only through the perturbation m s of the features. The mixture is
    drawn to s = 0, where there is none, and the batch size to the middle of its range, whatever the
    task. ``experiments/feasibility.py`` measures it. ``objective=aj.noise_response(...)`` puts a
    function J of the batch size in the place of F, measured on the noise of the gradient; agent,
    mixture and selection stay as they are.

    Args:
      agent: Proposes; see :func:`arbiter_jax.mlp_agent`.
      response_loss: The loss of each meta example under a response; see :data:`ResponseLoss`. None
        where `objective` is given.
      num_features: Width of the head's input. None where `objective` is given.
      min_batch_size: :math:`b_{min}`, an integer >= 1.
      max_batch_size: :math:`b_{max}`, an integer > min_batch_size.
      initial_batch_size: Batch size of the first window, within the range.
      window: T, number of updates between two decisions, an integer >= 1.
      agent_optimizer: Of phi and m; by default weight decay 5e-4, then Adam at 1e-5 (1e-3 with an
        objective, which is to be followed within a run).
      mixture_optimizer: Of alpha; by default the same at 1e-4 (1e-2).
      learn_response: If False, m stays as drawn, uniform in (-1, 1).
      anchor: "offset" adds one constant to every proposal, chosen at the first hyper-step such that
        the mixture stands at the logit of initial_batch_size; "none" leaves the agent as it is
        (see :func:`arbiter_jax.warm_up`).
      hyper_every: A hyper-step at the first of so many updates, in [1, window]. The updates between
        cost nothing; vmapped, those at which none is due in any lane.
      seed: An int, or a PRNG key.
      objective: From :func:`arbiter_jax.noise_response`, in the place of F.

    Returns:
      A ``GradientTransformationExtraArgs`` with an :class:`ArbiterState`.

    Raises:
      ValueError: If an argument is out of its range; at the first trace if the agent's output or the
        width of the head does not fit.
      TypeError: If `update` is not given `params`, `agent_inputs`, `meta_batch` or what the
        objective reads.

    Reference:
      MacLellan and Dong, "Hyper-Learning for Gradient-Based Batch Size Adaptation",
      arXiv:2205.08231.

    *Guarantees*: the updates pass unchanged; batch_size stays within the range; a hyper-step that
    meets a number that is not finite changes nothing but ``num_skipped``.

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
    if objective is None:
        num_features = _validate.integer(num_features=num_features, minimum=1)
        make_state, rates = ArbiterState, (1e-5, 1e-4)
    else:
        num_features, learn_response = 0, False  # nothing responds
        make_state, rates = NoiseArbiterState, (1e-3, 1e-2)
    signals = ("meta_batch",) if objective is None else objective.signals
    low, high, start = _validate.batch_size_range(
        min_batch_size, max_batch_size, initial_batch_size
    )
    if high == low:
        raise ValueError(
            f"max_batch_size must be > min_batch_size, got {high} for both: nothing to adapt."
        )
    window = _validate.integer(window=window, minimum=1)
    hyper_every = _validate.integer(hyper_every=hyper_every, minimum=1, maximum=window)
    _validate.one_of(("offset", "none"), anchor=anchor)
    num_proposals = agent.num_proposals
    agent_optimizer = agent_optimizer or hyper_optimizer(rates[0])
    mixture_optimizer = mixture_optimizer or hyper_optimizer(rates[1])

    def learnable_of(state: ArbiterState) -> _Learnable:
        response_weights = state.response_weights if learn_response else None
        return _Learnable(state.agent_params, response_weights)

    def init_fn(params):
        del params
        key, agent_key, response_key, alpha_key = jax.random.split(raw_key(seed), 4)
        agent_params = agent.init(agent_key)
        mixture_logits = ALPHA_SCALE * jax.random.normal(alpha_key, (num_proposals,))
        response_weights = jax.random.uniform(response_key, (num_features,), minval=-1.0)
        learnable: Any = _Learnable(agent_params, response_weights if learn_response else None)
        logit = to_logit(start, low, high)
        int32 = lambda x: jnp.asarray(x, jnp.int32)
        return make_state(
            agent_params=agent_params,
            mixture_logits=mixture_logits,
            response_weights=response_weights,
            agent_opt_state=agent_optimizer.init(learnable),
            mixture_opt_state=mixture_optimizer.init(mixture_logits),
            proposals=jnp.full((num_proposals,), logit),
            mixture_weights=jax.nn.softmax(mixture_logits),
            mixture=logit,
            offset=jnp.zeros_like(logit),
            pending_anchor=int32(start if anchor == "offset" else 0),
            batch_size=int32(start),
            meta_batch_size=int32(start),
            meta_loss=jnp.zeros_like(logit),
            window_step=int32(0),
            signals_due=None if hyper_every == 1 else jnp.array(True),
            num_clipped=int32(0),
            num_skipped=int32(0),
            key=key,
            statistics=None if objective is None else objective.init(),
        )

    def meta_loss_of(learnable, mixture_logits, state, params, agent_inputs, extra):
        """F as a function of phi, m and alpha; everything else is a constant."""
        raw = sorted_proposals(agent, learnable.agent_params, agent_inputs)
        raw_mixture = mixture_logit(mixture_logits, raw)
        if anchor == "offset":
            target = to_logit(jnp.maximum(state.pending_anchor, low), low, high)
            anchored = jax.lax.stop_gradient(target - raw_mixture)
            offset = jnp.where(state.pending_anchor > 0, anchored, state.offset)
        else:
            offset = state.offset
        mixture = raw_mixture + offset
        if objective is None:
            meta_loss, meta_batch_size = response_to(mixture, learnable, state, params, extra)
        else:
            size = (high - low) * jax.nn.sigmoid(mixture) + low
            meta_loss = limited_loss(objective, state.statistics, size, low, high)
            meta_batch_size = state.meta_batch_size
        return meta_loss, (raw + offset, mixture, offset, meta_batch_size, meta_loss)

    def response_to(mixture, learnable, state, params, extra):
        meta_batch_size = to_batch_size(mixture, low, high)
        meta_batch = extra["meta_batch"]
        mask = batch_mask(meta_batch_size, num_rows(meta_batch))
        response_weights = learnable.response_weights
        if response_weights is None:
            response_weights = state.response_weights
        # Constants to the objective, said outright: the batch decides nothing it can feel.
        params, meta_batch = jax.lax.stop_gradient((params, replace_padding(meta_batch, mask)))
        losses = call_response_loss(
            response_loss, num_features, params, response_weights * mixture, meta_batch, extra
        )
        return masked_mean(losses, mask), meta_batch_size

    def hyper_step(state, params, agent_inputs, extra, usable):
        learnable: Any = learnable_of(state)
        grads, aux = jax.grad(meta_loss_of, argnums=(0, 1), has_aux=True)(
            learnable, state.mixture_logits, state, params, agent_inputs, extra
        )
        proposals, mixture, offset, meta_batch_size, meta_loss = aux
        agent_updates, agent_opt_state = agent_optimizer.update(
            grads[0], state.agent_opt_state, learnable
        )
        # A new anchor starts alpha over; only here is it known what a fresh optimizer state is.
        mixture_opt_state = tree_where(
            state.pending_anchor > 0,
            mixture_optimizer.init(state.mixture_logits),
            state.mixture_opt_state,
        )
        alpha_updates, mixture_opt_state = mixture_optimizer.update(
            grads[1], mixture_opt_state, state.mixture_logits
        )
        learnable = optax.apply_updates(learnable, agent_updates)
        mixture_logits: Any = optax.apply_updates(state.mixture_logits, alpha_updates)
        response_weights = learnable.response_weights
        new_state = state._replace(
            agent_params=learnable.agent_params,
            mixture_logits=mixture_logits,
            response_weights=(
                state.response_weights if response_weights is None else response_weights
            ),
            agent_opt_state=agent_opt_state,
            mixture_opt_state=mixture_opt_state,
            proposals=proposals,
            mixture_weights=jax.nn.softmax(mixture_logits),
            mixture=mixture,
            offset=offset,
            pending_anchor=jnp.zeros_like(state.pending_anchor),
            meta_batch_size=meta_batch_size,
            meta_loss=meta_loss,
        )
        if objective is None:
            clipped = meta_batch_size > num_rows(extra["meta_batch"])
            new_state = new_state._replace(num_clipped=state.num_clipped + clipped)
        skipped = state._replace(num_skipped=state.num_skipped + 1)
        return tree_where(usable & all_finite(grads, aux, mixture_logits), new_state, skipped)

    def end_window(state):
        """The fields that a window's end changes: the decision is taken and alpha starts over."""
        chosen = state.proposals[jnp.argmax(state.mixture_logits)]
        # An anchor not yet dropped means that no hyper-step has been possible: stay there.
        batch_size = jnp.where(
            state.pending_anchor > 0, state.batch_size, to_batch_size(chosen, low, high)
        )
        key, mixture_logits = redraw_mixture(state.key, state.mixture_logits)
        fresh = mixture_optimizer.init(mixture_logits)
        fresh = jax.tree.map(lambda x, old: x.astype(old.dtype), fresh, state.mixture_opt_state)
        return batch_size, mixture_logits, fresh, jnp.zeros_like(state.window_step), key

    def update_fn(updates, state, params=None, *, agent_inputs=None, **extra_args):
        require(
            "arbiter",
            params=params,
            agent_inputs=agent_inputs,
            **{name: extra_args.get(name) for name in signals},
        )
        # Computed out here, where it is one with the step that the caller takes: old parameters and
        # updates kept alive for later would both have to be copied.
        new_params = optax.apply_updates(cast("optax.Params", params), updates)
        usable = jnp.array(True)
        if objective is not None:
            in_force = jnp.clip(applied_batch_size(extra_args.get("batch_size"), state), low, high)
            statistics, usable = update_objective(
                objective,
                state.statistics,
                updates,
                params,
                in_force,
                extra_args,
                state.signals_due,
            )
            state = state._replace(statistics=statistics)
        learn = lambda state: hyper_step(state, new_params, agent_inputs, extra_args, usable)
        if hyper_every == 1:
            state = learn(state)
        else:
            state = cond_in_place(state.signals_due, learn, state)
        state = state._replace(window_step=state.window_step + 1)
        # Only the few small fields that change: whatever passes through a condition is copied.
        fields = ("batch_size", "mixture_logits", "mixture_opt_state", "window_step", "key")
        values = jax.lax.cond(
            state.window_step >= window,
            end_window,
            lambda state: tuple(getattr(state, field) for field in fields),
            state,
        )
        state = state._replace(**dict(zip(fields, values, strict=True)))
        if objective is not None:  # its meta batch is as large as the batch, in a bucket with it
            state = state._replace(meta_batch_size=jnp.array(state.batch_size))
        if hyper_every > 1:
            state = state._replace(signals_due=state.window_step % hyper_every == 0)
        return updates, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
