"""Initializes the library's own networks: all random weights from one draw.

On CPU a random draw costs about half a second of compilation per shape, and several times as much for
a kernel of four axes. So there is one flat draw, and each layer takes its piece of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from arbiter_jax.models._attach import attach
from arbiter_jax.models._model import Model

# Standard deviation of a standard normal variable that is truncated to [-2, 2].
_TRUNCATED_STD = 0.87962566103423978


def build_model(
    build: Callable[..., nnx.Module],
    sample_input: jax.ShapeDtypeStruct,
    gain: float = 1.0,
) -> Model:
    """Builds a module whose kernels share one draw, and attaches to it at its attribute `head`.

    The kernels have the distribution of ``nnx.initializers.variance_scaling(gain, "fan_in",
    "truncated_normal")``.

    Args:
      build: `(*, rngs, kernel_init) -> module`, which passes `kernel_init` to its layers.
      sample_input: Shape and dtype of a batch of one example.
      gain: Variance of a kernel times its fan-in: 1 for LeCun's, 2 for He's initialization.

    Returns:
      The model; its ``init`` is jitted.
    """

    def factory(rngs: nnx.Rngs) -> nnx.Module:
        sizes = []

        def measure(key, shape, dtype=jnp.float32, out_sharding=None):
            del key, out_sharding
            sizes.append(math.prod(shape))
            return jnp.zeros(shape, dtype)

        nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0), kernel_init=measure))
        pool = jax.random.truncated_normal(rngs.params(), -2, 2, (sum(sizes),))
        start = 0

        def take(key, shape, dtype=jnp.float32, out_sharding=None):
            nonlocal start
            del key, out_sharding
            piece = jax.lax.slice(pool, (start,), (start + math.prod(shape),)).reshape(shape)
            start += math.prod(shape)
            fan_in = math.prod(shape[:-1])
            return (piece * (math.sqrt(gain / fan_in) / _TRUNCATED_STD)).astype(dtype)

        return build(rngs=rngs, kernel_init=take)

    model = attach(factory, "head", sample_input)
    return model._replace(init=jax.jit(model.init))
