"""VGG11 with batch normalization, in the form that is usual for 32x32 images.

Eight 3x3 convolutions, each with BatchNorm and ReLU, max pooling between them, and one linear layer.
Reference: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition", ICLR 2015, configuration A; the form for small images is that of Liu,
https://github.com/kuangliu/pytorch-cifar.
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
from arbiter_jax.models._layers import BatchNorm, Conv, check_dtype, image_shape
from arbiter_jax.models._model import Model

# Features of the convolutions, one tuple per resolution; a max pooling follows each tuple.
_STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class VGG11(nnx.Module):
    """VGG11 with BatchNorm and a single linear layer."""

    def __init__(self, num_channels: int, num_classes: int, dtype, *, rngs: nnx.Rngs, kernel_init):
        self.convs, self.norms = nnx.List(), nnx.List()
        for features in (features for stage in _STAGES for features in stage):
            self.convs.append(
                Conv(
                    num_channels,
                    features,
                    (3, 3),
                    dtype=dtype,
                    rngs=rngs,
                    kernel_init=kernel_init,
                )
            )
            self.norms.append(BatchNorm(features, dtype=dtype, rngs=rngs))
            num_channels = features
        # The head computes in the dtype of its parameters.
        self.head = nnx.Linear(num_channels, num_classes, rngs=rngs, kernel_init=kernel_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits, float[M, num_classes]."""
        layers = zip(self.convs, self.norms, strict=True)
        for stage in _STAGES:
            for _ in stage:
                conv, norm = next(layers)
                x = nnx.relu(norm(conv(x)))
            if min(x.shape[1:3]) >= 2:  # smaller images have fewer resolutions
                x = max_pool(x)
        return self.head(x.mean(axis=(1, 2)))


def vgg11(
    input_shape: Sequence[int],
    num_classes: int = 10,
    *,
    dtype: jax.typing.DTypeLike | None = None,
) -> Model:
    r"""VGG11 with batch normalization, for images of 4x4 pixels or more.

    It has 9,231,114 parameters for images of 32x32x3 and 10 classes.

    Args:
      input_shape: (height, width, channels) of one image; height and width >= 4.
      num_classes: Number of outputs, an integer >= 1.
      dtype: Dtype of the computation below the head, such as ``jnp.bfloat16``; that of the inputs if
        None. Parameters, batch statistics and outputs are always float32.

    Returns:
      A model with state (the statistics of BatchNorm) that maps images
      float[M, height, width, channels] to logits float32[M, num_classes]; its features are the 512
      channels of the last image, averaged over its pixels.

    Raises:
      ValueError: If the shape is not that of an image, or a size is too small.

    Reference:
      Simonyan and Zisserman, ICLR 2015, https://arxiv.org/abs/1409.1556

    >>> import jax
    >>> from arbiter_jax import models
    >>> model = models.vgg11((32, 32, 3), num_classes=10)
    >>> params, model_state = jax.eval_shape(model.init, jax.random.PRNGKey(0))
    >>> models.count_params(params), model.num_features
    (9231114, 512)
    """
    shape = image_shape(input_shape, minimum=4)
    num_outputs = _validate.integer(num_classes=num_classes, minimum=1)
    check_dtype(dtype)
    return build_model(
        functools.partial(VGG11, shape[-1], num_outputs, dtype),
        jax.ShapeDtypeStruct((1, *shape), jnp.float32),
        gain=2.0,
    )
