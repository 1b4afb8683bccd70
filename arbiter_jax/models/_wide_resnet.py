"""Wide residual networks: a few wide residual blocks with pre-activation.

Reference: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from arbiter_jax import _validate
from arbiter_jax.models._build import build_model
from arbiter_jax.models._layers import BatchNorm, Conv, check_dtype, image_shape
from arbiter_jax.models._model import Model


class Block(nnx.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, added to a shortcut."""

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        stride: int,
        dropout_rate: float,
        dtype,
        *,
        rngs: nnx.Rngs,
        kernel_init,
    ):
        conv = functools.partial(
            Conv, use_bias=False, dtype=dtype, rngs=rngs, kernel_init=kernel_init
        )
        self.norm1 = BatchNorm(num_inputs, dtype=dtype, rngs=rngs)
        self.conv1 = conv(num_inputs, num_outputs, (3, 3), strides=stride, padding=1)
        self.norm2 = BatchNorm(num_outputs, dtype=dtype, rngs=rngs)
        self.dropout = nnx.data(nnx.Dropout(dropout_rate, rngs=rngs) if dropout_rate else None)
        self.conv2 = conv(num_outputs, num_outputs, (3, 3), padding=1)
        self.shortcut = nnx.data(
            conv(num_inputs, num_outputs, (1, 1), strides=stride, padding=0)
            if num_inputs != num_outputs
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the block's output, float[M, height / stride, width / stride, num_outputs]."""
        y = nnx.relu(self.norm1(x))
        if self.shortcut is not None:
            x = self.shortcut(y)
        y = nnx.relu(self.norm2(self.conv1(y)))
        if self.dropout is not None:
            y = self.dropout(y)
        return x + self.conv2(y)


class WideResNet(nnx.Module):
    """Three groups of blocks, at full, half and a quarter of the resolution."""

    def __init__(
        self,
        num_channels: int,
        num_classes: int,
        num_blocks: int,
        widen_factor: int,
        dropout_rate: float,
        dtype,
        *,
        rngs: nnx.Rngs,
        kernel_init,
    ):
        layer_args = {"rngs": rngs, "kernel_init": kernel_init}
        self.conv = Conv(
            num_channels, 16, (3, 3), padding=1, use_bias=False, dtype=dtype, **layer_args
        )
        self.blocks = nnx.List()
        width = 16
        for group in range(3):
            outputs = 16 * widen_factor * 2**group
            for index in range(num_blocks):
                stride = 2 if group > 0 and index == 0 else 1
                self.blocks.append(Block(width, outputs, stride, dropout_rate, dtype, **layer_args))
                width = outputs
        self.norm = BatchNorm(width, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, **layer_args)  # in the dtype of its parameters

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits, float[M, num_classes]."""
        x = self.conv(x)
        for block in self.blocks:
            x = block(x)
        return self.head(nnx.relu(self.norm(x)).mean(axis=(1, 2)))


def wide_resnet(
    input_shape: Sequence[int],
    num_classes: int = 10,
    *,
    depth: int = 16,
    widen_factor: int = 4,
    dropout_rate: float = 0.0,
    dtype: jax.typing.DTypeLike | None = None,
) -> Model:
    r"""A wide residual network, WRN-d-k, of blocks :math:`x_{l+1} = S(x_l) + F(x_l)`.

    For images of 32x32x3 and 10 classes, WRN-16-4 has 2,748,890 parameters and WRN-28-10 has
    36,479,194, as in the paper (2.75 and 36.5 million).

    Args:
      input_shape: (height, width, channels) of one image; height and width >= 4.
      num_classes: Number of outputs, an integer >= 1.
      depth: d, the number of layers, 6 n + 4 for n >= 1 blocks in each of the three groups.
      widen_factor: k, the width of the blocks relative to the original ResNet, an integer >= 1.
      dropout_rate: Rate of the dropout between the two convolutions of a block, in [0, 1).
      dtype: Dtype of the computation below the head, such as ``jnp.bfloat16``; that of the inputs if
        None. Parameters, batch statistics and outputs are always float32.

    Returns:
      A model with state (the statistics of BatchNorm) that maps images
      float[M, height, width, channels] to logits float32[M, num_classes]; its features are the
      64 k channels of the last image, averaged over its pixels.

    Raises:
      ValueError: If an argument is out of its range.

    Reference:
      Zagoruyko and Komodakis, BMVC 2016, https://arxiv.org/abs/1605.07146

    >>> import jax
    >>> from arbiter_jax import models
    >>> model = models.wide_resnet((32, 32, 3), num_classes=10, depth=16, widen_factor=4)
    >>> params, model_state = jax.eval_shape(model.init, jax.random.PRNGKey(0))
    >>> models.count_params(params), model.num_features
    (2748890, 256)
    """
    shape = image_shape(input_shape, minimum=4)
    num_outputs = _validate.integer(num_classes=num_classes, minimum=1)
    check_dtype(dtype)
    depth = _validate.integer(depth=depth, minimum=10)
    if (depth - 4) % 6:
        raise ValueError(f"depth must be 6 n + 4 for an integer n >= 1, got {depth}.")
    widen_factor = _validate.integer(widen_factor=widen_factor, minimum=1)
    rate = _validate.in_range(0, 1, closed="left", dropout_rate=dropout_rate)
    return build_model(
        functools.partial(
            WideResNet, shape[-1], num_outputs, (depth - 4) // 6, widen_factor, rate, dtype
        ),
        jax.ShapeDtypeStruct((1, *shape), jnp.float32),
        gain=2.0,
    )
