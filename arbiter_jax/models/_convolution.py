"""Convolution and pooling that are also fast inside ``lax.scan`` on a CPU.

Inside a loop XLA's CPU backend runs a convolution without its threaded library, many times slower than
outside. The same convolution as a matrix product of the shifted slices of its input (its *patches*)
with the kernel stays fast, and has derivatives like any other ``jnp`` code.
Reference: Chellapilla, Puri and Simard, "High Performance Convolutional Neural Networks for
Document Processing", 2006.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from arbiter_jax import _validate
from arbiter_jax._numerics import extract_patches


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers=None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision=None,
    preferred_element_type=None,
    out_sharding=None,
) -> jax.Array:
    r"""``jax.lax.conv_general_dilated``, computed as patches and one dot on CPU.

    For an input :math:`x` and a kernel :math:`w`, with the sum over the kernel's positions
    :math:`k` (stride :math:`s`, dilation :math:`d`) and the input's features :math:`c`,

    .. math:: y_{n,p,o} = \sum_{k,c} x_{n,\,s p + d k,\,c}\; w_{k,c,o}

    On CPU the right-hand side is a single product of the matrix of patches,
    :math:`[n p, k c]`, with the kernel, :math:`[k c, o]`; on every other platform it is
    ``lax.conv_general_dilated`` itself. The platform is chosen when the program is lowered, so one
    traced function exports for all of them.

    This covers any number of spatial axes, any order of the axes, strides, padding, dilation of
    either operand, and feature groups. Integer operands, ``batch_group_count`` other than 1 and an
    explicit ``out_sharding`` go to ``lax`` on CPU as well.

    Args:
      lhs: Input, rank n + 2, by default ``[batch, features, *spatial]``.
      rhs: Kernel, rank n + 2, by default ``[features_out, features_in / groups, *spatial]``.
      window_strides: n integers >= 1.
      padding: ``"SAME"``, ``"SAME_LOWER"``, ``"VALID"``, or n pairs (low, high), in elements.
      lhs_dilation: n integers >= 1, or None for 1.
      rhs_dilation: n integers >= 1, or None for 1.
      dimension_numbers: As for ``lax``: None, three strings, or ``lax.ConvDimensionNumbers``.
      feature_group_count: Number of groups of features, an integer >= 1.
      batch_group_count: Number of groups of the batch, an integer >= 1.
      precision: Precision of the products, as for ``lax.dot_general``.
      preferred_element_type: Dtype of accumulation and result, as for ``lax.dot_general``.
      out_sharding: Sharding of the result.

    Returns:
      The convolution, in the order of axes that ``dimension_numbers`` gives for the output.

    Raises:
      TypeError: If shapes do not fit together, raised by ``lax``.
      ValueError: If strides, padding, dilation or groups do not fit, raised by ``lax``.

    Reference:
      Chellapilla et al., 2006, https://inria.hal.science/inria-00112631

    Layers of Flax accept it as an argument:

    >>> import functools, jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from arbiter_jax.models import conv_general_dilated
    >>> Conv = functools.partial(nnx.Conv, conv_general_dilated=conv_general_dilated)
    >>> apply = lambda x: Conv(3, 8, (3, 3), rngs=nnx.Rngs(0))(x)
    >>> jax.eval_shape(apply, jnp.ones((2, 32, 32, 3))).shape
    (2, 32, 32, 8)

    *Guarantees*
      - equals ``lax.conv_general_dilated`` to 1e-5, in value, gradient and forward derivative;
      - lowers for TPU and CUDA on a machine with neither, and is a convolution there.
    """
    pads: Any = padding if isinstance(padding, str) else tuple(map(tuple, padding))
    settings = _Settings(
        tuple(window_strides),
        pads,
        None if lhs_dilation is None else tuple(lhs_dilation),
        None if rhs_dilation is None else tuple(rhs_dilation),
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
    )
    inexact = jnp.issubdtype(lhs.dtype, jnp.inexact) and lhs.dtype == rhs.dtype
    if not inexact or batch_group_count != 1 or out_sharding is not None:
        return lax.conv_general_dilated(lhs, rhs, *settings, out_sharding=out_sharding)
    return _convolve(lhs, rhs, settings)


class _Settings(NamedTuple):
    """The static arguments of a convolution, hashable, in the order of `lax`."""

    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...] | None
    rhs_dilation: tuple[int, ...] | None
    dimension_numbers: Any
    feature_group_count: int
    batch_group_count: int
    precision: Any
    preferred_element_type: Any


# Outside any jit, every call would compile again without this one; inside a jit, `inline` removes it.
@functools.partial(jax.jit, static_argnums=2, inline=True)
def _convolve(lhs, rhs, settings):
    def by_lax(lhs, rhs):
        return lax.conv_general_dilated(lhs, rhs, *settings)

    def by_patches(lhs, rhs):
        return _convolve_by_patches(lhs, rhs, settings)

    def convolve(lhs, rhs):
        return lax.platform_dependent(lhs, rhs, cpu=by_patches, default=by_lax)

    # Abstract evaluation: lax's own checks and messages on every platform.
    jax.eval_shape(by_lax, lhs, rhs)
    # Without the checkpoint, reverse mode keeps the residuals of every platform's branch, many times
    # larger than the operands. XLA still builds the patches only once within a program.
    return jax.checkpoint(convolve, prevent_cse=False)(lhs, rhs)


def _convolve_by_patches(lhs, rhs, settings):
    """The convolution as one dot; `lax` has already checked the operands."""
    strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, num_groups, *_ = settings
    num_spatial = lhs.ndim - 2
    lhs_dilation = lhs_dilation or (1,) * num_spatial
    rhs_dilation = rhs_dilation or (1,) * num_spatial
    spec = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    # The order in which the features are contiguous: [batch, *spatial, features].
    x = lax.transpose(lhs, (spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1]))
    # [*spatial, features_in / groups, features_out]
    kernel = lax.transpose(rhs, (*spec.rhs_spec[2:], spec.rhs_spec[1], spec.rhs_spec[0]))

    *window, group_features, num_outputs = kernel.shape
    if isinstance(padding, str):
        reach = [(k - 1) * d + 1 for k, d in zip(window, rhs_dilation, strict=True)]
        padding = lax.padtype_to_pads(x.shape[1:-1], reach, strides, padding)
    config = [(low, high, d - 1) for (low, high), d in zip(padding, lhs_dilation, strict=True)]
    dot = {
        "precision": settings.precision,
        "preferred_element_type": settings.preferred_element_type,
    }
    # [groups, features_out / groups, k features_in / groups]. The barrier keeps the compiler from
    # undoing the transposition: so the gradient also has this form, which is the fast one.
    shape = (math.prod(window) * group_features, num_groups, num_outputs // num_groups)
    matrix = lax.optimization_barrier(kernel.reshape(shape).transpose(1, 2, 0))

    def convolve(x):
        if any(c != (0, 0, 0) for c in config):
            x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])
        patches = extract_patches(x, window, strides, rhs_dilation)
        last = patches.ndim - 1
        if num_groups == 1:
            return lax.dot_general(patches, matrix[0], (((last,), (1,)), ((), ())), **dot)
        patches = patches.reshape(*patches.shape[:-1], -1, num_groups, group_features)
        patches = jnp.swapaxes(patches, -3, -2)  # [batch, *out, groups, k, features]
        patches = patches.reshape(*patches.shape[:-2], -1)
        y = lax.dot_general(patches, matrix, (((last + 1,), (2,)), ((last,), (0,))), **dot)
        y = jnp.moveaxis(y, 0, -2)  # dot_general returns the groups first
        return y.reshape(*y.shape[:-2], num_outputs)

    y = _map_over_batch(convolve, x, growth=math.prod(window) // math.prod(strides))
    out_spec = (spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1])
    return lax.transpose(y, [out_spec.index(axis) for axis in range(y.ndim)])


# Patches of up to this many bytes stay in the cache of a core until they are used.
_CHUNK_BYTES = 2**21


def _map_over_batch(convolve, x, growth):
    """`convolve(x)`, one chunk of the batch at a time if the patches would not fit in the cache.

    Args:
      convolve: Function of x, [batch, *spatial, features].
      x: Input of the convolution.
      growth: Size of the patches relative to their input.
    """
    num_bytes = growth * x.size * x.dtype.itemsize
    if growth <= 1 or num_bytes <= 4 * _CHUNK_BYTES:  # too small for a loop to pay off
        return convolve(x)
    per_example = num_bytes // x.shape[0]
    # The largest divisor of the batch that keeps a chunk small; batches are powers of two.
    fits = [
        n for n in range(1, x.shape[0]) if x.shape[0] % n == 0 and n * per_example <= _CHUNK_BYTES
    ]
    size = max(fits, default=1)
    if size * per_example < _CHUNK_BYTES // 16:  # a batch without such a divisor
        return convolve(x)
    # Each chunk takes its examples from all over the batch, which may be sharded.
    chunks = jnp.swapaxes(x.reshape(size, -1, *x.shape[1:]), 0, 1)
    y = lax.map(jax.checkpoint(convolve, prevent_cse=False), chunks)
    return jnp.swapaxes(y, 0, 1).reshape(x.shape[0], *y.shape[2:])


def max_pool(inputs: jax.Array, window_shape: Sequence[int] = (2, 2)) -> jax.Array:
    r"""The maximum over windows that do not overlap: the stride equals the window.

    It is a reshape and a maximum, faster on CPU than ``lax.reduce_window``. Rows and columns that do
    not fill a window are dropped, as with ``padding="VALID"``.

    Args:
      inputs: float[batch, \*spatial, features].
      window_shape: Size of the window along each spatial axis, integers >= 1.

    Returns:
      float[batch, \*pooled, features]; an axis of n elements keeps ``n // window`` of them.

    Raises:
      ValueError: If the window's rank is not the number of spatial axes, or an entry is not an
        integer >= 1.

    >>> import jax.numpy as jnp
    >>> from arbiter_jax.models import max_pool
    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]

    *Guarantees*
      - equals ``flax.linen.max_pool`` with ``strides=window_shape`` exactly.
    """
    window_shape = tuple(window_shape) if isinstance(window_shape, Sequence) else (window_shape,)
    if len(window_shape) != inputs.ndim - 2:
        raise ValueError(
            f"window_shape must have one entry per spatial axis of inputs, {inputs.ndim - 2}, got "
            f"{window_shape!r}."
        )
    window = [_validate.integer(window_shape=k, minimum=1) for k in window_shape]
    batch, *spatial, features = inputs.shape
    pooled = [n // k for n, k in zip(spatial, window, strict=True)]
    limits = [n * k for n, k in zip(pooled, window, strict=True)]
    x = lax.slice(inputs, (0,) * inputs.ndim, (batch, *limits, features))
    split = [size for pair in zip(pooled, window, strict=True) for size in pair]
    return x.reshape(batch, *split, features).max(axis=tuple(range(2, 2 + 2 * len(window), 2)))
