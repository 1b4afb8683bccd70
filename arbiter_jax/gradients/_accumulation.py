"""The gradient of a batch in groups of a fixed number of rows, of which there may be any number.

The number of groups is traced, so one program serves every batch size, and only one group is in
memory at a time. Where statistics are asked for, the groups are the pieces that they compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.typing

from arbiter_jax._numerics import at_least_float32, tree_dot, tree_where
from arbiter_jax.base import GradStats, LossFn, PyTree
from arbiter_jax.gradients._counted import Trainable, counted_leaves, only_counted
from arbiter_jax.gradients._estimators import real_parts, stats_from_moments
from arbiter_jax.gradients._joined import check_aux
from arbiter_jax.gradients._masked import Gradient, GradientFn, call_loss, value_grad_and_weight


class Groups(NamedTuple):
    """What a gradient function over groups takes for its batch, of any number of examples."""

    take: Callable[[jax.Array, Any], tuple[PyTree, jax.Array]]  # (j, key) -> batch, mask of group j
    num_groups: jax.typing.ArrayLike  # shape=(), dtype=int32, >= 1


class Moments(NamedTuple):
    """What the statistics keep of the groups so far."""

    count: jax.Array  # shape=(), dtype=int32, groups with an example
    in_first: jax.Array  # shape=(), dtype=float, weight of the first half of the groups
    first: PyTree  # mean gradient of the first half
    sq_deviation: jax.Array  # shape=(), dtype=float, weighted sum of |g_j - mean|^2
    spread: PyTree  # weighted sum of (g_j - mean)^2 for every real number of the gradient


def accumulated_value_and_grad(
    loss_fn: LossFn,
    *,
    statistics: bool = False,
    trainable: Trainable = None,
    has_aux: bool = False,
) -> GradientFn:
    r"""Makes a gradient function that loops over groups of a batch, with one in memory at a time.

    Value and gradient are means over the groups, weighted by the total weight of each, in at least
    float32: those of the whole batch. The state of a model goes through the groups in turn. A group
    without an example changes nothing. The key of group j is the given one folded with j.

    With `statistics`, the groups are the pieces of :func:`value_grad_and_stats`, and no gradient is
    computed twice. What they spread around their mean is updated group by group,

    .. math::
      \sum_{i \le j} b_i |g_i - \bar g_j|^2 =
        \sum_{i < j} b_i |g_i - \bar g_{j-1}|^2 + \frac{b_j W_j}{W_{j-1}} |g_j - \bar g_j|^2,

    with :math:`W_j = b_1 + ... + b_j`. Unlike a difference of sums of squares, it is never negative.
    The noise vector, the cosine, and the variance of inner products (which would need a second pass)
    compare the first half of the groups with the second.

    Args:
      loss_fn: As in :func:`masked_value_and_grad`.
      statistics: Whether the gradient comes with `grad_stats` and `gradient_noise`, which are NaN
        where fewer than two groups hold an example.
      trainable: As in :func:`value_grad_and_stats`.
      has_aux: Whether `loss_fn` returns auxiliary output; the result has the means of its
        floating-point leaves and the other leaves of the last group.

    Returns:
      ``gradient_fn(params, groups, num_examples, model_state=None, key=None) -> Gradient``, for
      :class:`Groups` of `num_examples`, int32[], real examples together.

    Reference:
      West (1979), "Updating mean and variance estimates: an improved method".
    """
    # Traced once, for its shapes as well as for the loop.
    weighted = jax.jit(value_grad_and_weight(loss_fn, has_aux))

    def gradient_fn(params, groups, num_examples, model_state=None, key=None):
        counts = counted_leaves(params, trainable) if statistics else None

        def group(j, model_state):
            batch, mask = groups.take(j, key)
            return weighted(params, batch, mask, model_state, _folded(key, j))

        def moments_after(moments, j, out, mean, weight, before):
            grads, mean = (only_counted(x.grads, counts) for x in (out, mean))
            # From the mean after the group alone, so that the one before it needs no memory.
            delta = jax.tree.map(lambda g, m: at_least_float32(g) - m, grads, mean)
            in_first = j < groups.num_groups // 2
            # Zero for the first group, and for an empty one, whose gradient may be 0 / 0.
            factor = jnp.where(before > 0, weight * (before + weight) / or_one(before), 0)
            spread = lambda total, x: (
                total + jnp.where(factor > 0, factor * x, 0).astype(total.dtype)
            )
            return Moments(
                moments.count + (weight > 0),
                moments.in_first + jnp.where(in_first, weight, 0),
                tree_where(in_first, mean, moments.first),
                spread(moments.sq_deviation, tree_dot(delta, delta)),
                jax.tree.map(
                    lambda total, x: spread(total, jnp.square(x)), moments.spread, real_parts(delta)
                ),
            )

        if has_aux:
            _check_shapes_of_aux(loss_fn, params, groups, model_state, key)
        if not statistics:
            return _mean(group, groups.num_groups, params, model_state)[0]
        zeros = jax.tree.map(lambda x: jnp.zeros_like(at_least_float32(x)), params)
        zeros, zero = only_counted(zeros, counts), jnp.zeros((), float)
        start = Moments(jnp.int32(0), zero, zeros, zero, real_parts(zeros))
        out, mean, total, moments = _mean(
            group, groups.num_groups, params, model_state, start, moments_after
        )
        if moments is None:
            return out
        return with_statistics(out, moments, mean.grads, total, num_examples, counts)

    return gradient_fn


def accumulated_gradient(gradient_fn: GradientFn) -> GradientFn:
    """Makes any gradient function average over groups, weighted by their numbers of real examples.

    Args:
      gradient_fn: ``gradient_fn(params, batch, mask, model_state, key)``; all floating-point numbers
        that it returns are averaged, and other values come from the last group. Statistics of the
        groups become those of the whole batch.

    Returns:
      A gradient function as :func:`accumulated_value_and_grad` returns.
    """
    traced_once = jax.jit(gradient_fn)

    def over_groups(params, groups, num_examples, model_state=None, key=None):
        def group(j, model_state):
            batch, mask = groups.take(j, key)
            out = traced_once(params, batch, mask, model_state, _folded(key, j))
            return out, jnp.sum(mask, dtype=jnp.float32)

        out = _mean(group, groups.num_groups, params, model_state)[0]
        if getattr(out, "grad_stats", None) is None:
            return out
        return out._replace(grad_stats=_stats_of_all(out.grad_stats, num_examples))

    return over_groups


def _mean(
    group: Callable[..., Any],
    num_groups: jax.typing.ArrayLike,
    params: PyTree,
    model_state: PyTree,
    moments: Any = None,
    moments_after: Callable[..., Any] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """The weighted mean of what `group` returns.

    Args:
      group: ``group(j, model_state) -> (Gradient, weight)``.
      num_groups: How many there are, traced or not.
      params: What the gradients should be like.
      model_state: Goes through all groups in turn.
      moments: What else the loop carries.
      moments_after: Returns the moments updated with a group.

    Returns:
      (out, mean, total, moments): the Gradient, the same in at least float32, and the total weight;
      if the first group does not return a Gradient, only what it returns: the caller raises.
    """
    first = jnp.int32(0)
    like, weight = jax.eval_shape(group, first, model_state)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    has_fields = all(hasattr(like, name) for name in ("grads", "model_state", "_replace"))
    pair = lambda: ((like.grads, like.model_state), (params, model_state))
    if not has_fields or shapes(pair()[0]) != shapes(pair()[1]):
        return group(first, model_state)[0], None, None, None
    like = like._replace(model_state=None)
    zero = lambda x: jnp.zeros(x.shape, _type_of_mean(x.dtype))

    def body(j, carry):
        mean, model_state, before, moments = carry
        out, weight = group(j, model_state)
        real, after = weight > 0, before + weight
        share = weight / or_one(after)

        def update(old, x):
            if not jnp.issubdtype(x.dtype, jnp.inexact):
                return jnp.where(real, x, old)
            # A group without an example has the statistics of nothing, 0 / 0, in a BatchNorm.
            return jnp.where(real, old + (x.astype(old.dtype) - old) * share.astype(old.dtype), old)

        new = jax.tree.map(update, mean, out._replace(model_state=None))
        if moments_after is not None:
            moments = moments_after(moments, j, out, new, weight, before)
        if model_state is not None:
            model_state = tree_where(real, out.model_state, model_state)
        return new, model_state, after, moments

    start = jax.tree.map(zero, like), model_state, jnp.zeros((), weight.dtype), moments
    mean, model_state, total, moments = jax.lax.fori_loop(0, num_groups, body, start)
    out = jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), mean, like)
    return out._replace(model_state=model_state), mean, total, moments


def _type_of_mean(dtype: Any) -> Any:
    inexact = jnp.issubdtype(dtype, jnp.inexact)
    return jnp.promote_types(dtype, jnp.float32) if inexact else dtype


def _folded(key: jax.Array | None, j: jax.Array) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, j)


def or_one(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, 1, x)


def with_statistics(
    gradient: Gradient,
    moments: Moments,
    mean: PyTree,
    total: jax.Array,
    num_examples: jax.Array,
    counts: list[bool] | None,
) -> Gradient:
    """The gradient with `grad_stats` and `gradient_noise`.

    Args:
      gradient: The result without them.
      moments: Of all groups, for the parameters that count.
      mean: The mean gradient in at least float32.
      total: Total weight of the examples.
      num_examples: int32[], their number.
      counts: Which parameters count, None for all.
    """
    # In examples, also where a loss weighs its examples.
    share = num_examples / or_one(total)
    sizes = total * share, moments.in_first * share
    spreads = jax.tree.map(
        lambda x: x * share.astype(x.dtype), (moments.sq_deviation, moments.spread)
    )
    counted = only_counted(mean, counts)
    stats = stats_from_moments(moments.count, sizes, counted, moments.first, *spreads)
    noise = _noise(moments, counted, total, gradient.grads, counts)
    return gradient._replace(grad_stats=stats, gradient_noise=noise)


def _noise(
    moments: Moments, mean: PyTree, total: jax.Array, grads: PyTree, counts: list[bool] | None
) -> PyTree:
    """The mean of the first half minus that of the second, as large as the noise of the mean."""
    in_first, in_second = moments.in_first, total - moments.in_first
    both = (in_first > 0) & (in_second > 0)
    # The mean of all lies between those of the halves.
    factor = jnp.where(both, jnp.sqrt(in_first / or_one(in_second)), jnp.nan)
    away = jax.tree.map(lambda f, m: (f - m) * factor.astype(f.dtype), moments.first, mean)
    leaves, structure = jax.tree.flatten(grads)
    found = iter(jax.tree.leaves(away))
    counts = counts or [True] * len(leaves)
    noise = [
        next(found).astype(g.dtype) if counted else jnp.zeros_like(g)
        for g, counted in zip(leaves, counts, strict=True)
    ]
    return jax.tree.unflatten(structure, noise)


def _stats_of_all(stats: GradStats, num_examples: jax.Array) -> GradStats:
    """Statistics of a batch from means of those of its groups.

    What a group knows of G and S needs no correction. What depends on the size of the batch follows
    from their definition: ``E|gbar|^2 = |G|^2 + tr S / B``, and twice the noise in each half.
    """
    size = jnp.asarray(num_examples, stats.variance_trace.dtype)
    noise = stats.variance_trace / size
    half = stats.mean_sq_norm + 2 * noise
    return stats._replace(
        batch_size=size,
        batch_sq_norm=jnp.maximum(stats.mean_sq_norm + noise, 0),
        half_cosine=jnp.clip(stats.mean_sq_norm / or_one(half), -1, 1),
    )


def _check_shapes_of_aux(
    loss_fn: Any, params: PyTree, groups: Groups, model_state: PyTree, key: Any
) -> None:
    """Raises a ValueError if the shapes of auxiliary output depend on the number of rows."""
    rows = jax.eval_shape(groups.take, jnp.int32(0), key)
    double = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype), rows
    )
    aux = _aux_of(loss_fn, params, *rows, model_state, key)
    check_aux(loss_fn, aux, params, *double, model_state, key)


def _aux_of(loss_fn: Any, *arguments: Any) -> PyTree:
    return jax.eval_shape(lambda *args: call_loss(loss_fn, *args, has_aux=True)[2], *arguments)
