"""Trains an agent to propose a given batch size before hyper-learning begins."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jax.typing
import optax

from arbiter_jax import _validate
from arbiter_jax.base import PyTree
from arbiter_jax.hyper_learning._agents import Agent, mixture_logit, sorted_proposals
from arbiter_jax.hyper_learning._reparameterization import to_batch_size


def hyper_optimizer(learning_rate: float) -> optax.GradientTransformation:
    """The published optimizer of the agent: Adam, with weight decay 5e-4 added to the gradient.

    Args:
      learning_rate: Of Adam, >= 0.

    Returns:
      An optax transformation, for `agent_optimizer` or `mixture_optimizer` of :func:`arbiter`.

    >>> import arbiter_jax as aj
    >>> optimizer = aj.hyper_learning.hyper_optimizer(1e-3)
    >>> tx = aj.arbiter(
    ...     aj.mlp_agent((3,)), lambda *args: None, num_features=3, agent_optimizer=optimizer)
    """
    return optax.chain(optax.add_decayed_weights(5e-4), optax.adam(learning_rate))


def warm_up(
    agent: Agent,
    agent_params: PyTree,
    mixture_logits: jax.Array,
    agent_inputs: jax.Array,
    *,
    batch_size: jax.typing.ArrayLike,
    min_batch_size: int,
    max_batch_size: int,
    learning_rate: float = 1e-4,
    max_steps: int = 10_000,
) -> tuple[PyTree, jax.Array, jax.Array]:
    r"""Trains an agent before a run to propose a given batch size, as published.

    It is a regression on the logit of that size.

    Adam descends the Huber loss between the mixture s and the logit of the target,

    .. math:: h(s - l^*), \quad l^* = \log\frac{b - b_{min}}{b_{max} - b},
       \quad h(d) = d^2/2 \text{ if } |d| \le 1 \text{ else } |d| - 1/2,

    with respect to agent and mixture, until the batch size of the mixture is less than 2 away from
    the target. The target is the published one, at the left edge of the batch size's interval; at
    the very end of the range, where its logit would be infinite, it is moved inward by half an
    example. Every leaf of agent_params is trained, with the coupled weight decay of hyper-learning,
    5e-4. The optimizer state is not returned: hyper-learning starts with a fresh one.

    Args:
      agent: The agent.
      agent_params: Its parameters.
      mixture_logits: alpha, float[N]. It is trained too, and dropped: reset it after the warm-up.
      agent_inputs: A batch of validation inputs, [batch, ...].
      batch_size: b, int32[], the target, in [min_batch_size, max_batch_size].
      min_batch_size: :math:`b_{min}`, an integer >= 1.
      max_batch_size: :math:`b_{max}`, an integer > min_batch_size.
      learning_rate: Adam's, > 0.
      max_steps: Limit on the number of steps, an integer >= 1.

    Returns:
      (agent_params, num_steps, mixture): num_steps int32[], mixture float[], s at the last step.

    Raises:
      ValueError: If an argument is out of its range.

    Reference:
      MacLellan and Dong, "Hyper-Learning for Gradient-Based Batch Size Adaptation",
      arXiv:2205.08231.

    >>> import arbiter_jax as aj
    >>> agent = aj.mlp_agent((3,), hidden_sizes=(8,))
    >>> agent_params, inputs = agent.init(jax.random.PRNGKey(0)), jnp.ones((2, 3))
    >>> agent_params, num_steps, mixture = aj.warm_up(
    ...     agent, agent_params, jnp.zeros(4), inputs,
    ...     batch_size=64, min_batch_size=8, max_batch_size=512, learning_rate=1e-2)
    >>> abs(int(aj.to_batch_size(mixture, 8, 512)) - 64) < 2
    True
    """
    low, high, _ = _validate.batch_size_range(min_batch_size, max_batch_size)
    if high == low:
        raise ValueError(f"max_batch_size must be > min_batch_size, got {high} for both.")
    if not isinstance(batch_size, jax.Array):  # an array may be traced: no value to check
        _validate.integer(batch_size=batch_size, minimum=low, maximum=high)
    learning_rate = _validate.positive(learning_rate=learning_rate)
    _validate.integer(max_steps=max_steps, minimum=1)
    target_size = jnp.asarray(batch_size, float)
    inner = jnp.clip(target_size, low + 0.5, high - 0.5)
    target = jnp.log(inner - low) - jnp.log(high - inner)
    optimizer = hyper_optimizer(learning_rate)

    def loss(learnable: Any):
        agent_params, mixture_logits = learnable
        mixture = mixture_logit(mixture_logits, sorted_proposals(agent, agent_params, agent_inputs))
        return optax.losses.huber_loss(mixture, target), mixture

    def unfinished(carry):
        _, _, num_steps, mixture = carry
        size = to_batch_size(mixture, low, high)
        near = (num_steps > 0) & (jnp.abs(size - target_size) < 2)
        return ~near & (num_steps < max_steps)

    def step(carry):
        learnable, opt_state, num_steps, _ = carry
        grads, mixture = jax.grad(loss, has_aux=True)(learnable)
        updates, opt_state = optimizer.update(grads, opt_state, learnable)
        return optax.apply_updates(learnable, updates), opt_state, num_steps + 1, mixture

    learnable = (agent_params, jnp.asarray(mixture_logits))
    start = (learnable, optimizer.init(learnable), jnp.zeros((), jnp.int32), loss(learnable)[1])
    final: Any = jax.lax.while_loop(unfinished, step, start)
    (agent_params, _), _, num_steps, mixture = final
    return agent_params, num_steps, mixture
