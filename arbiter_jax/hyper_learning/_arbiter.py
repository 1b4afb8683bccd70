"""Arbiter: an agent that proposes batch sizes and learns from a meta-objective's gradient.

At every inner step the agent proposes, the features of the freshly updated network respond to the
mixture of the proposals, and the loss of that response is differentiated with respect to the agent
alone: nothing is unrolled, and no gradient passes through the body of the network. MacLellan and
Dong, "Hyper-Learning for Gradient-Based Batch Size Adaptation", arXiv:2205.08231.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _validate
from arbiter_jax._numerics import measurable_range, raw_key
from arbiter_jax.hyper_learning._agents import Agent
from arbiter_jax.hyper_learning._hyper_step import Config, init_state, update_state
from arbiter_jax.hyper_learning._meta_objective import Range, from_noise
from arbiter_jax.hyper_learning._response import ResponseLoss, response_objective
from arbiter_jax.hyper_learning._warm_up import hyper_optimizer
from arbiter_jax.objectives import NoiseObjective


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

    One hyper-step, with w* the parameters after this update, phi the agent, alpha the mixture
    logits, m the response weights and f the features:

    .. math::
      l_1 \le \dots \le l_N &= \text{sort}(\text{mean over the inputs of } agent_\phi), \\
      s &= \sum_n \text{softmax}(\alpha)_n \, l_n, \\
      B_s &= \lfloor (b_{max} - b_{min})\, \sigma(s) + b_{min} \rfloor, \\
      F &= \text{mean over } B_s \text{ examples of } loss(head(f(w^*) \odot (1 + m s))).

    phi, alpha and m descend F. For them f and w* are constants, so that only the forward pass of
    the network's body is computed. After `window` updates the batch size becomes that of proposal
    number argmax alpha, and alpha is drawn again, 1e-6 times standard normal, with a fresh
    optimizer state.

    The update function takes the parameters, ``agent_inputs`` (a batch of validation inputs),
    ``meta_batch`` (a pytree whose leaves have M leading rows, of which the first min(B_s, M)
    count), and ``model_state`` if the model has one. It returns the updates unchanged.

    Differences from the published code: logits aim at the center of a batch size's interval, so
    that none is lost to floor; the response is computed in inference mode and does not change
    BatchNorm statistics; the network's own gradient of F is not computed; the batch size changes at
    the end of a window, and a window may be one epoch.

    Known behavior: F depends on s only through the perturbation m s of the features. It is smallest
    at s = 0, the middle of the range, and there the batch size goes, whatever the task
    (`experiments.feasibility` measures it). ``objective=aj.noise_response(...)`` replaces F by a
    function J of the batch size that is measured on the noise of the gradient; agent, mixture and
    selection stay the same.

    Args:
      agent: Makes the proposals; see :func:`arbiter_jax.mlp_agent`.
      response_loss: The loss of each meta example under a response; see
        :data:`arbiter_jax.hyper_learning.ResponseLoss`. None if `objective` is given.
      num_features: Width of the head's input, an integer >= 1. None if `objective` is given.
      min_batch_size: :math:`b_{min}`, an integer >= 1; with an objective 1 is taken as 2, because
        one example carries no information about noise.
      max_batch_size: :math:`b_{max}`, an integer > min_batch_size.
      initial_batch_size: Batch size of the first window, within the range.
      window: T, number of updates between two decisions, an integer >= 1.
      agent_optimizer: Trains phi and m; by default weight decay 5e-4, then Adam at 1e-5 (1e-3 with
        an objective, whose minimum moves within a run).
      mixture_optimizer: Trains alpha; by default the same at 1e-4 (1e-2 with an objective).
      learn_response: If False, m stays as drawn, uniform in (-1, 1).
      anchor: "offset" adds one constant to every proposal, chosen at the first hyper-step such that
        the mixture is at the logit of initial_batch_size; "none" leaves the agent as it is (see
        :func:`arbiter_jax.warm_up`).
      hyper_every: Takes a hyper-step at every n-th update, an integer in [1, window]. The other
        updates add no cost; under `vmap`, only those at which no lane is due.
      seed: An int, or a PRNG key.
      objective: A :class:`arbiter_jax.objectives.NoiseObjective` to descend instead of F, such as
        that of :func:`arbiter_jax.noise_response`.

    Returns:
      A ``GradientTransformationExtraArgs`` with an :class:`ArbiterState`.

    Raises:
      ValueError: If an argument is out of its range; at the first trace if the agent's output or
        the width of the head does not fit.
      TypeError: If `update` is called without `params`, `agent_inputs`, `meta_batch` or what the
        objective reads.

    Reference:
      MacLellan and Dong, "Hyper-Learning for Gradient-Based Batch Size Adaptation",
      arXiv:2205.08231.

    *Guarantees*: the updates pass unchanged; batch_size stays within the range; a hyper-step with a
    number that is not finite changes nothing but ``num_skipped``.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
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
            f"{'neither' if objective is None else 'both'}."
        )
    if not all(hasattr(agent, field) for field in Agent._fields):
        raise ValueError(f"agent must be an aj.Agent, e.g. of aj.mlp_agent, got {agent!r}.")
    if response_loss is not None:
        meta_objective = response_objective(response_loss, num_features, learn_response)
    elif isinstance(objective, NoiseObjective):
        meta_objective = from_noise(objective)
    else:
        raise ValueError(
            "objective must be an aj.objectives.NoiseObjective, such as aj.noise_response(...) "
            f"returns, got {objective!r}."
        )
    low, high, start = _validate.batch_size_range(
        min_batch_size, max_batch_size, initial_batch_size
    )
    if objective is not None:
        low, high, start = measurable_range(low, high, start)
    if not (_validate.is_traced(low) or _validate.is_traced(high)) and high == low:
        raise ValueError(
            f"max_batch_size must be > min_batch_size, got {high} for both: nothing to adapt."
        )
    for name, optimizer in (
        ("agent_optimizer", agent_optimizer),
        ("mixture_optimizer", mixture_optimizer),
    ):
        if optimizer is not None:
            _validate.transformation(**{name: optimizer})
    _validate.boolean(learn_response=learn_response)
    seed = _validate.seed(seed)
    window = _validate.int32(window=window, minimum=1)
    config = Config(
        agent=agent,
        objective=meta_objective,
        limits=Range(low, high),
        initial_batch_size=start,
        window=window,
        hyper_every=_validate.int32(hyper_every=hyper_every, minimum=1, maximum=window),
        anchors=_validate.one_of(("offset", "none"), anchor=anchor) == "offset",
        agent_optimizer=agent_optimizer or hyper_optimizer(meta_objective.agent_rate),
        mixture_optimizer=mixture_optimizer or hyper_optimizer(meta_objective.mixture_rate),
    )

    def init_fn(params) -> Any:
        _validate.all_parameters("arbiter", params)
        return init_state(config, raw_key(seed))

    def update_fn(updates, state, params=None, *, updates_only=None, probe=None, **signals):
        if updates_only is not None or probe is not None:
            return updates, state
        new_state: Any = update_state(config, state, updates, params, signals)
        if isinstance(low, jax.Array) or isinstance(high, jax.Array):
            # They may differ from those of the last step, in `optax.inject_hyperparams`.
            size = jnp.clip(new_state.batch_size, low, high)
            new_state = new_state._replace(
                batch_size=size,
                min_batch_size=jnp.asarray(low, jnp.int32),
                max_batch_size=jnp.asarray(high, jnp.int32),
            )
        return updates, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
