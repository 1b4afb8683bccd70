"""Layers of the convolutional networks, and the check of the shape of an image."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from arbiter_jax import _validate
from arbiter_jax.models._convolution import conv_general_dilated

# A convolution that is also fast inside a scan on CPU.
Conv = functools.partial(nnx.Conv, conv_general_dilated=conv_general_dilated)

# Momentum and epsilon of the published networks; Flax's momentum weighs the past.
BatchNorm = functools.partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5)


def sizes_of(**argument: Any) -> tuple[int, ...]:
    """Returns the argument as a tuple of ints, or raises unless it is a sequence of integers >= 1."""
    ((name, values),) = argument.items()
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a tuple of integers >= 1, got {values!r}.")
    return tuple(_validate.integer(**{name: value}, minimum=1) for value in values)


def check_dtype(dtype: Any) -> None:
    """Raises unless a network can compute in this dtype; None is that of its inputs."""
    try:
        valid = dtype is None or jnp.issubdtype(dtype, jnp.inexact)
    except TypeError:  # not a dtype at all
        valid = False
    if not valid:
        raise ValueError(
            f"dtype must be None or a dtype of floats, jnp.bfloat16 say, got {dtype!r}."
        )


def image_shape(input_shape: Sequence[int], minimum: int) -> tuple[int, int, int]:
    """Checks the shape of an image, (height, width, channels), and returns it as ints.

    Args:
      input_shape: Shape of one image.
      minimum: Smallest height and width.
    """
    if not isinstance(input_shape, Sequence) or len(input_shape) != 3:
        raise ValueError(f"input_shape must be (height, width, channels), got {input_shape!r}.")
    height, width, channels = input_shape
    return (
        _validate.integer(input_shape=height, minimum=minimum),
        _validate.integer(input_shape=width, minimum=minimum),
        _validate.integer(input_shape=channels, minimum=1),
    )
