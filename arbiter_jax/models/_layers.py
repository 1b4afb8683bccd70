"""Layers of the convolutional networks, and the check of the shape of an image."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from flax import nnx

from arbiter_jax import _validate
from arbiter_jax.models._convolution import conv_general_dilated

# A convolution that is also fast inside a scan on CPU.
Conv = functools.partial(nnx.Conv, conv_general_dilated=conv_general_dilated)

# Momentum and epsilon of the published networks; Flax's momentum weighs the past.
BatchNorm = functools.partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5)


def image_shape(input_shape: Sequence[int], minimum: int) -> tuple[int, int, int]:
    """Checks the shape of an image, (height, width, channels), and returns it as ints.

    Args:
      input_shape: Shape of one image.
      minimum: Smallest height and width.
    """
    if len(tuple(input_shape)) != 3:
        raise ValueError(
            f"input_shape must be (height, width, channels), got {tuple(input_shape)!r}."
        )
    height, width, channels = input_shape
    return (
        _validate.integer(input_shape=height, minimum=minimum),
        _validate.integer(input_shape=width, minimum=minimum),
        _validate.integer(input_shape=channels, minimum=1),
    )
