"""LeNet-5: two convolutions, each with pooling, and three dense layers.

With ReLU and max pooling, as is usual today; the original has tanh and trained averages.
Reference: LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied to Document
Recognition", Proceedings of the IEEE 86(11), 1998.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from arbiter_jax import _validate
from arbiter_jax.models._build import build_model
from arbiter_jax.models._convolution import max_pool
from arbiter_jax.models._layers import Conv, check_dtype, image_shape
from arbiter_jax.models._model import Model


class LeNet(nnx.Module):
    """LeNet-5 for images of 4x4 pixels or more."""

    def __init__(self, input_shape: Sequence[int], num_classes: int, dtype, **layer_args):
        height, width, channels = input_shape
        # The original takes 32x32 pixels. Smaller images are padded so that some pixels remain.
        padding = ["VALID" if min(height, width) >= 32 else "SAME"]
        padding += ["VALID" if min(height, width) >= 24 else "SAME"]

        def conv(num_inputs, num_outputs, padding):
            return Conv(num_inputs, num_outputs, (5, 5), padding=padding, dtype=dtype, **layer_args)

        self.conv1 = conv(channels, 6, padding[0])
        self.conv2 = conv(6, 16, padding[1])
        for pad in padding:
            lost = 4 if pad == "VALID" else 0
            height, width = (height - lost) // 2, (width - lost) // 2
        self.dense1 = nnx.Linear(height * width * 16, 120, dtype=dtype, **layer_args)
        self.dense2 = nnx.Linear(120, 84, dtype=dtype, **layer_args)
        self.head = nnx.Linear(84, num_classes, **layer_args)  # in the dtype of its parameters

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits, float[M, num_classes]."""
        x = max_pool(nnx.relu(self.conv1(x)))
        x = max_pool(nnx.relu(self.conv2(x)))
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(self.dense1(x))
        x = nnx.relu(self.dense2(x))
        return self.head(x)


def lenet(
    input_shape: Sequence[int],
    num_classes: int = 10,
    *,
    dtype: jax.typing.DTypeLike | None = None,
) -> Model:
    r"""LeNet-5, for images of 4x4 pixels or more.

    With 10 classes it has 61,706 parameters for images of 28x28x1, and 62,006 for 32x32x3.

    Args:
      input_shape: (height, width, channels) of one image; height and width >= 4.
      num_classes: Number of outputs, an integer >= 1.
      dtype: Dtype of the computation below the head, such as ``jnp.bfloat16``; that of the inputs if
        None. Parameters and outputs are always float32.

    Returns:
      A model without state that maps images float[M, height, width, channels] to logits
      float32[M, num_classes]; its features are the 84 units of the last hidden layer.

    Raises:
      ValueError: If the shape is not that of an image, or a size is too small.

    Reference:
      LeCun et al., Proceedings of the IEEE 86(11), 1998, https://doi.org/10.1109/5.726791

    >>> import jax, jax.numpy as jnp
    >>> from arbiter_jax import models
    >>> model = models.lenet((28, 28, 1), num_classes=10)
    >>> params, model_state = jax.eval_shape(model.init, jax.random.PRNGKey(0))
    >>> images = jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32)
    >>> features, _ = jax.eval_shape(model.features, params, model_state, images)
    >>> models.count_params(params), features.shape
    (61706, (2, 84))
    """
    shape = image_shape(input_shape, minimum=4)
    num_outputs = _validate.integer(num_classes=num_classes, minimum=1)
    check_dtype(dtype)
    return build_model(
        functools.partial(LeNet, shape, num_outputs, dtype),
        jax.ShapeDtypeStruct((1, *shape), jnp.float32),
    )
