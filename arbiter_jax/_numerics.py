"""Numerical helpers that any layer may use: trees, keys, averages, conditionals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from arbiter_jax.base import PyTree

State = TypeVar("State", bound=tuple)


def running_mean(mean: Any, weight: jax.Array, sample: Any, decay: float) -> tuple[Any, jax.Array]:
    """One step of an exponential average that is corrected for its start at any time.

    Args:
      mean: Averages so far, a pytree of scalars.
      weight: Sum of the weights so far, 1 - decay^t after t samples.
      sample: The new samples, a pytree like `mean`.
      decay: Weight of the past, in [0, 1).

    Returns:
      The new averages and the new weight.
    """
    weight = decay * weight + (1 - decay)
    rate = (1 - decay) / weight
    # A convex combination, not `mean + rate * (sample - mean)`: it cannot overflow.
    return jax.tree.map(lambda m, x: (1 - rate) * m + rate * x, mean, sample), weight


def measurable_range(low: Any, high: Any, start: Any) -> tuple[Any, Any, Any]:
    """The range and the first size of a rule that measures noise.

    Noise cannot be measured from a single example, so a rule whose size is 1 would keep it forever.
    The smallest size becomes 2 if the range allows it.

    >>> measurable_range(1, 64, 1), measurable_range(1, 1, 1)
    ((2, 64, 2), (1, 1, 1))
    """
    if any(isinstance(size, jax.Array) for size in (low, high, start)):
        least = jnp.minimum(2, high)
        return jnp.maximum(low, least), high, jnp.maximum(start, least)
    least = min(2, high)
    return max(low, least), high, max(start, least)


def raw_key(seed: Any) -> jax.Array:
    """An int, a typed or a raw PRNG key, as uint32[2]: plain arrays survive checkpoint and `where`."""
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(seed)
    return jax.random.PRNGKey(seed) if jnp.ndim(seed) == 0 else jnp.asarray(seed)


def typed_key(key: jax.Array | None) -> jax.Array:
    """A raw or typed PRNG key as a typed one; a constant if None, for code that draws nothing."""
    if key is None:
        return jax.random.key(0)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def all_finite(*trees: PyTree) -> jax.Array:
    """Whether every number of every inexact leaf is finite, as bool[]."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(trees)]
    leaves = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    if not leaves:
        return jnp.array(True)
    # x * 0 is nan if x is not finite, so the sum is too. One fused pass, no boolean reductions.
    sums = [jnp.sum(x * 0) for x in leaves if x.ndim]
    scalars = [x for x in leaves if not x.ndim]
    if scalars:
        # One reduction, which XLA does not repeat. A sum of scalars, and with it all that they were
        # computed from, would be repeated for every number that is kept only if all are finite.
        sums.append(jnp.sum(jnp.stack(scalars) * 0))
    return jnp.isfinite(sum(sums))


def tree_where(condition: jax.Array | bool, then: PyTree, otherwise: PyTree) -> PyTree:
    """Leaf-wise `where` on one scalar condition; keeps the types of `otherwise`."""

    def where(a, b):
        chosen, dtype = jnp.where(condition, a, b), jnp.result_type(b)
        # Concrete typed PRNG keys have no `astype`.
        return chosen if jnp.issubdtype(dtype, jax.dtypes.extended) else chosen.astype(dtype)

    return jax.tree.map(where, then, otherwise)


def scale_updates(updates: PyTree, factor: jax.Array) -> PyTree:
    """The updates times a scalar, in their own types."""
    return jax.tree.map(lambda u: (factor * u).astype(jnp.result_type(u)), updates)


def update_or_skip(usable: jax.Array, new: State, state: Any) -> State:
    """The new state, or the old one with one more skipped step.

    Args:
      usable: bool[], whether this step's inputs can be used.
      new: State after this step; taken only if every number in it is finite.
      state: State before it, with a field `num_skipped`.
    """
    skipped = state._replace(num_skipped=optax.safe_increment(state.num_skipped))
    return tree_where(usable & all_finite(new), new, skipped)


def loop_if(condition: jax.Array, fn: Callable[[Any], Any], carry: Any) -> Any:
    """``lax.cond(condition, fn, identity, carry)`` as a loop of one iteration or none.

    ``vmap`` turns ``lax.cond`` into a select, which runs `fn` at every step. The loop remains a
    branch: its body runs only if at least one member of the batch needs it.
    """
    return jax.lax.fori_loop(0, condition.astype(jnp.int32), lambda _, carry: fn(carry), carry)


def cond_in_place(condition: jax.Array, fn: Callable[[Any], Any], carry: Any) -> Any:
    """``lax.cond(condition, fn, identity, carry)`` that changes the carry in place.

    XLA copies what passes through the idle branch of a condition, but not the carry of a loop
    with zero or one iterations. On a GPU the host waits twice for the condition of a loop, and a
    copy is cheap.
    """
    if jax.default_backend() == "gpu":
        return jax.lax.cond(condition, fn, lambda carry: carry, carry)
    return loop_if(condition, fn, carry)


def at_least_float32(x: Any) -> jax.Array:
    """An array in its own type, or in float32 if that is wider."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def conjugate(tree: PyTree) -> PyTree:
    """The complex conjugate of all complex leaves; the others are returned as they are."""
    return jax.tree.map(lambda x: jnp.conj(x) if jnp.iscomplexobj(x) else x, tree)


def full_precision_matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a @ b`` with the precision of its operands on every device.

    By default, a GPU may multiply float32 numbers as TF32 and a TPU as bfloat16. A statistic that is
    the difference of two such products would be lost in their rounding errors.
    """
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def tree_dot(a: PyTree, b: PyTree) -> jax.Array:
    """Inner product over all leaves, in at least float32, with that precision on every device.

    Complex numbers count as pairs of real ones: it is the real part of ``conj(a) b``.
    """

    def leaf(x, y):
        dtype = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
        x, y = jnp.asarray(x, dtype), jnp.asarray(y, dtype)
        return jnp.real(jnp.vdot(x, y, precision=lax.Precision.HIGHEST))

    return sum(jax.tree.leaves(jax.tree.map(leaf, a, b)), start=jnp.zeros(()))


def check_parameters(params: PyTree) -> None:
    """Raises a ValueError that names the first leaf that has no gradient: an integer, a string."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        found = "None" if params is None else f"a {type(params).__name__} without any"
        raise ValueError(f"params must hold floating-point arrays, got {found}.")
    for path, leaf in leaves:
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"params must hold floating-point arrays, got {dtype} at "
                f"params{jax.tree_util.keystr(path)}: keep what is not trained in model_state, or "
                "convert it to float."
            )


def extract_patches(
    x: jax.Array, window: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> jax.Array:
    """The part of the input that each output of a convolution depends on.

    Args:
      x: [batch, *spatial, features], padded.
      window: Size of the kernel along each spatial axis.
      strides: Distance between windows along each spatial axis.
      dilation: Distance between the elements of a window along each spatial axis.

    Returns:
      [batch, *out, prod(window) * features], the elements of a window in the kernel's order.
    """
    last = x.ndim - 1
    axes = []
    for axis in range(1, last):
        size, stride, step = window[axis - 1], strides[axis - 1], dilation[axis - 1]
        num_outputs = max(0, (x.shape[axis] - (size - 1) * step - 1) // stride + 1)
        if num_outputs:
            extent = (num_outputs - 1) * stride + 1
            axes.append([(axis, k * step, k * step + extent, stride) for k in range(size)])
        else:  # a window larger than its input
            axes.append([(axis, 0, 0, stride)] * size)
    if x.shape[-1] < 16:
        # One axis at a time: 2n slices for a window of n x n instead of n^2, which compile faster
        # and, with few features, run faster. The last axis first gives the kernel's order.
        passes = [[(cut,) for cut in cuts] for cuts in reversed(axes)]
    else:
        passes = [[*itertools.product(*axes)]]
    for cuts in passes:
        pieces = []
        for cut in cuts:
            piece = x
            for axis, start, limit, stride in cut:
                piece = lax.slice_in_dim(piece, start, limit, stride, axis=axis)
            pieces.append(piece)
        x = pieces[0] if len(pieces) == 1 else lax.concatenate(pieces, last)
    return x
