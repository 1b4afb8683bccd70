"""The agent: a small network that reads a batch of inputs and proposes batch sizes.

An agent is a pair of pure functions. Its proposals are logits, one row per example; `arbiter`
averages them over the batch, sorts them and maps them into the range of batch sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.typing

from arbiter_jax import _validate
from arbiter_jax.base import PyTree


class Agent(NamedTuple):
    """An agent network as pure functions, with the number of batch sizes that it proposes.

    ``init(key) -> agent_params``; ``apply(agent_params, inputs) -> float[batch, num_proposals]``.
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[[PyTree, jax.Array], jax.Array]
    num_proposals: int = 4


def _dense(key: jax.Array, fan_in: int, shape: tuple[int, ...]) -> dict[str, jax.Array]:
    weight_key, bias_key = jax.random.split(key)
    bound = 1 / math.sqrt(fan_in)
    return {
        "weight": jax.random.uniform(weight_key, shape, minval=-bound, maxval=bound),
        # Random biases keep the proposals apart if the inputs carry no information.
        "bias": jax.random.uniform(bias_key, shape[-1:], minval=-bound, maxval=bound),
    }


def _sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    if isinstance(sizes, str) or not isinstance(sizes, Iterable):
        raise ValueError(f"{name} must be a tuple of integers >= 1, got {_validate.shown(sizes)}.")
    return tuple(_validate.integer(**{name: size}, minimum=1) for size in sizes)


def _check_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    shape = _sizes("input_shape", input_shape)
    if not shape:
        raise ValueError("input_shape must have at least one axis, got ().")
    return shape


def _check_inputs(inputs: jax.Array, shape: tuple[int, ...]) -> None:
    if math.prod(inputs.shape[1:]) != math.prod(shape):
        raise ValueError(
            f"input_shape of the agent must be the shape of one input, {inputs.shape[1:]}, got {shape}."
        )


def mlp_agent(
    input_shape: Sequence[int], num_proposals: int = 4, hidden_sizes: Sequence[int] = (64,)
) -> Agent:
    """An agent of dense layers with ReLU between them.

    Args:
      input_shape: Shape of one input; flattened.
      num_proposals: N, number of batch sizes to propose, an integer >= 1.
      hidden_sizes: Width of each hidden layer, integers >= 1.

    Returns:
      An :class:`Agent`.

    Raises:
      ValueError: If a size is not an integer >= 1.

    >>> agent = mlp_agent((8, 8, 1))
    >>> agent.apply(agent.init(jax.random.PRNGKey(0)), jnp.zeros((5, 8, 8, 1))).shape
    (5, 4)
    """
    shape = _check_shape(input_shape)
    num_proposals = _validate.integer(num_proposals=num_proposals, minimum=1)
    hidden = _sizes("hidden_sizes", hidden_sizes)
    sizes = [math.prod(shape), *hidden, num_proposals]

    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
        return [_dense(k, fan_in, (fan_in, fan_out)) for k, fan_in, fan_out in pairs]

    def apply(agent_params, inputs):
        _check_inputs(inputs, shape)
        x = inputs.reshape(inputs.shape[0], -1)
        for i, layer in enumerate(agent_params):
            x = jax.nn.relu(x) if i else x
            x = x @ layer["weight"] + layer["bias"][None, :]
        return x

    return Agent(init, apply, num_proposals)


def conv_agent(
    input_shape: Sequence[int],
    num_proposals: int = 4,
    channels: int = 16,
    num_layers: int = 4,
) -> Agent:
    """An agent of 3x3 convolutions of stride 3 with ReLU, a mean over space and a dense layer.

    The published agent has four convolutional layers of 64 channels without a nonlinearity between
    them, which makes it linear; this one has ReLU. Stride and width are equal, so that a
    convolution is a reshape and a dot product on every platform. With 16 channels it costs a tenth
    as much.

    Args:
      input_shape: Shape of one input, (height, width, channels).
      num_proposals: N, number of batch sizes to propose, an integer >= 1.
      channels: Channels of each layer, an integer >= 1.
      num_layers: Number of convolutional layers, an integer >= 1.

    Returns:
      An :class:`Agent`.

    Raises:
      ValueError: If input_shape does not have three axes, or a size is not an integer >= 1.

    >>> agent = conv_agent((28, 28, 1))
    >>> agent.apply(agent.init(jax.random.PRNGKey(0)), jnp.zeros((5, 28, 28, 1))).shape
    (5, 4)
    """
    shape = _check_shape(input_shape)
    if len(shape) != 3:
        raise ValueError(f"input_shape must be (height, width, channels), got {shape}.")
    num_proposals = _validate.integer(num_proposals=num_proposals, minimum=1)
    channels = _validate.integer(channels=channels, minimum=1)
    num_layers = _validate.integer(num_layers=num_layers, minimum=1)

    def init(key):
        keys = jax.random.split(key, num_layers + 1)
        widths = [shape[-1]] + [channels] * num_layers
        layers = [
            _dense(k, 9 * c_in, (9 * c_in, c_out))
            for k, c_in, c_out in zip(keys[:-1], widths[:-1], widths[1:], strict=True)
        ]
        return [*layers, _dense(keys[-1], channels, (channels, num_proposals))]

    def apply(agent_params, inputs):
        _check_inputs(inputs, shape)
        *layers, last = agent_params
        x = inputs.reshape((inputs.shape[0], *shape))
        for layer in layers:
            x = jax.nn.relu(_patches(x) @ layer["weight"] + layer["bias"][None, None, None, :])
        return jnp.mean(x, axis=(1, 2)) @ last["weight"] + last["bias"][None, :]

    return Agent(init, apply, num_proposals)


def _patches(x: jax.Array, width: int = 3) -> jax.Array:
    """Cuts images into tiles, [n, h, w, c] -> [n, ceil(h / 3), ceil(w / 3), 9 c]."""
    n, h, w, c = x.shape
    rows, columns = -(-h // width), -(-w // width)
    edge = ((0, 0), (0, rows * width - h), (0, columns * width - w), (0, 0))
    tiles = jnp.pad(x, edge).reshape(n, rows, width, columns, width, c)
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows, columns, width * width * c)


def sorted_proposals(agent: Agent, agent_params: PyTree, agent_inputs: jax.Array) -> jax.Array:
    """The agent's proposals for one batch of inputs: its mean logits, ascending, float[N].

    Raises:
      ValueError: If the shape of the agent's output is not (batch, num_proposals).
    """
    logits = agent.apply(agent_params, agent_inputs)
    expected = (jnp.shape(jax.tree.leaves(agent_inputs)[0])[0], agent.num_proposals)
    if jnp.shape(logits) != expected:
        raise ValueError(
            f"agent.apply must return logits of shape (batch, num_proposals) = {expected}, got "
            f"{jnp.shape(logits)}."
        )
    return jnp.sort(jnp.mean(logits, axis=0))


def mixture_logit(mixture_logits: jax.Array, proposals: jax.Array) -> jax.Array:
    """The mixture of the proposals, s = sum_n softmax(alpha)_n l_n, float[]."""
    return jnp.dot(jax.nn.softmax(mixture_logits), proposals)
