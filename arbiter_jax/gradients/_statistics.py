"""Gradients that come with statistics of their noise.

The batch is split into pieces whose gradients are computed one after the other, one per device, or
one per example; `_estimators` compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from arbiter_jax import _validate
from arbiter_jax._numerics import tree_dot, tree_where
from arbiter_jax.base import GradStats, LossFn, PyTree
from arbiter_jax.batching import masked_mean, num_rows, replace_padding, total_weight
from arbiter_jax.gradients._estimators import stats_from_norms, stats_from_pieces
from arbiter_jax.gradients._masked import (
    Gradient,
    GradientFn,
    _value_grad_and_weight,
    masked_value_and_grad,
)


def _split(tree: PyTree, num_pieces: int, piece: int, contiguous: bool) -> PyTree:
    def rows(x):
        if contiguous:
            return x.reshape((num_pieces, -1, *x.shape[1:]))[piece]
        # Dealt out in turn: where the real examples come first, every piece gets its share.
        return x.reshape((-1, num_pieces, *x.shape[1:]))[:, piece]

    return jax.tree.map(rows, tree)


def _weighted_mean(trees: Sequence[PyTree], weights: jax.Array) -> PyTree:
    shares = weights / jnp.maximum(jnp.sum(weights), jnp.finfo(weights.dtype).tiny)
    return jax.tree.map(
        lambda *xs: sum(x * share.astype(x.dtype) for x, share in zip(xs, shares, strict=True)),
        *trees,
    )


def value_grad_and_stats(
    loss_fn: LossFn,
    *,
    method: str = "pieces",
    num_pieces: int = 2,
    micro_batch_size: int = 32,
    sampled: bool = False,
    axis_name: str | None = None,
) -> GradientFn:
    """A gradient function that estimates the gradient's mean and covariance on the way.

    Args:
      loss_fn: As in :func:`masked_value_and_grad`.
      method: "pieces": the batch is dealt out to `num_pieces` pieces whose gradients are computed
        one after the other and averaged; two halves cost about as much as the whole batch.
        "per_example": one gradient per example, `micro_batch_size` of them in memory at once.
        "per_device": within `shard_map` (or `pmap`), the part of the batch that a device holds is a
        piece; the result is that of the whole batch, the same on all devices.
      num_pieces: Number of pieces, a power of two >= 2. A bucket of fewer rows has one piece a row.
      micro_batch_size: Per-example gradients held at once, a power of two >= 1.
      sampled: As in :func:`masked_value_and_grad`. The rows of these batches are dealt out already,
        and contiguous pieces need no copy.
      axis_name: The mesh axis that the batch is split over, for "per_device".

    Returns:
      ``gradient_fn(params, batch, mask, model_state=None, key=None, preconditioner=None) ->
      Gradient`` with `grad_stats`, and with `gradient_noise` where there are two pieces: half their
      difference, scaled where they are unequal, so that its covariance is S / B.

    Raises:
      ValueError: For arguments out of range; for a model with state under "per_example" (BatchNorm
        ties the examples of a batch together, so no example has a gradient of its own) and under
        "per_device" (whose states would have to be averaged).

    *Guarantees*: a masked row changes no bit of the result; value and gradient are those of the
    whole batch.
    """
    _validate.one_of(("pieces", "per_example", "per_device"), method=method)
    if (axis_name is not None) != (method == "per_device"):
        raise ValueError(
            "axis_name must be given where method is 'per_device', and only there; got "
            f"axis_name={axis_name!r} and method={method!r}."
        )
    if _validate.power_of_two(num_pieces=num_pieces) < 2:
        raise ValueError(f"num_pieces must be a power of two >= 2, got {num_pieces}.")
    _validate.power_of_two(micro_batch_size=micro_batch_size)
    if method == "per_example":
        return _per_example_stats(loss_fn, micro_batch_size)
    if axis_name is not None:
        return _per_device_stats(loss_fn, axis_name)
    weighted = _value_grad_and_weight(loss_fn)

    def gradient_fn(params, batch, mask, model_state=None, key=None, preconditioner=None):
        k = min(num_pieces, mask.shape[0])
        # Here, not piece by piece: an empty piece has no real row that could stand in for padding.
        if not sampled:
            batch = replace_padding(batch, mask)
        if k == 1:  # a single row has no spread
            out = weighted(params, batch, mask, model_state, key)[0]
            sizes = jnp.ones(1)
            stats = stats_from_pieces([out.grads], sizes, preconditioner)
            nan = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), out.grads)
            return out._replace(grad_stats=stats, gradient_noise=nan)
        pieces, weights = [], []
        for j in range(k):
            piece_key = None if key is None else jax.random.fold_in(key, j)
            rows, real = _split((batch, mask), k, j, contiguous=sampled)
            out, weight = weighted(params, rows, real, model_state, piece_key)
            piece = (out.value, out.grads)  # exactly zero for an empty piece, but for BatchNorm:
            if model_state is not None:  # statistics of nothing are 0 / 0
                zeros = jax.tree.map(jnp.zeros_like, piece)
                piece = tree_where(weight > 0, piece, zeros)
                model_state = tree_where(weight > 0, out.model_state, model_state)
            pieces.append(piece)
            weights.append(weight)
        weights = jnp.stack(weights)
        value, grads = _weighted_mean(pieces, weights)
        piece_grads = [piece[1] for piece in pieces]
        # In examples, also where a loss weighs its examples.
        sizes = jnp.sum(mask) * weights / jnp.maximum(jnp.sum(weights), 1e-30)
        stats = stats_from_pieces(piece_grads, sizes, preconditioner)
        noise = None
        if k == 2:
            unequal = jnp.sqrt(sizes[0] * sizes[1]) / jnp.sum(sizes)
            unequal = jnp.where(unequal > 0, unequal, jnp.nan)
            noise = jax.tree.map(lambda a, b: (a - b) * unequal.astype(a.dtype), *piece_grads)
        return Gradient(value, grads, model_state, stats, noise)

    return gradient_fn


def per_example_grads(loss_fn: LossFn) -> Callable[[PyTree, PyTree], PyTree]:
    """The gradient of every example: ``fn(params, batch) -> pytree of float[M, ...]``.

    >>> fn = per_example_grads(lambda w, x: (w - x) ** 2)
    >>> fn(0.0, jnp.array([1.0, 3.0])).tolist()
    [-2.0, -6.0]
    """
    weighted = _per_example_grads_and_weights(loss_fn)
    return lambda params, batch: weighted(params, batch)[0]


def _per_example_grads_and_weights(loss_fn: LossFn) -> Callable[..., tuple[PyTree, jax.Array]]:
    def one(params, example):
        row = jax.tree.map(lambda x: x[None], example)
        losses, real = loss_fn(params, row), jnp.ones(1, bool)
        return masked_mean(losses, real), total_weight(losses, real)

    return jax.vmap(jax.grad(one, has_aux=True), in_axes=(None, 0))


def _per_example_stats(loss_fn: LossFn, micro_batch_size: int) -> GradientFn:
    plain = masked_value_and_grad(loss_fn)
    examples = _per_example_grads_and_weights(loss_fn)

    def gradient_fn(params, batch, mask, model_state=None, key=None, preconditioner=None):
        if model_state is not None:
            raise ValueError(
                "method must be 'pieces' for a model with state, got 'per_example': BatchNorm ties "
                "the examples of a batch together, so that no example has a gradient of its own."
            )
        batch = replace_padding(batch, mask)
        out = plain(params, batch, mask, None, key)
        m = min(micro_batch_size, mask.shape[0])
        groups = jax.tree.map(lambda x: x.reshape((-1, m, *x.shape[1:])), (batch, mask))
        # Scaling before the products is the same as giving each product the squared scale once.
        scale = (
            (lambda g: g)
            if preconditioner is None
            else (lambda g: jax.tree.map(jnp.multiply, g, preconditioner))
        )
        mean = scale(out.grads)
        half = jnp.cumsum(mask) <= jnp.sum(mask) // 2
        half = half.reshape(groups[1].shape)

        def group(carry, xs):
            rows, real, in_first = xs
            grads, weights = examples(params, rows)
            grads, weights = jax.vmap(scale)(grads), jnp.where(real, weights, 0)
            norms = jax.vmap(tree_dot)(grads, grads)
            inner = jax.vmap(lambda g: tree_dot(g, mean))(grads)
            first = jax.tree.map(
                lambda acc, g: acc + jnp.tensordot((weights * in_first).astype(g.dtype), g, 1),
                carry,
                grads,
            )
            return first, (norms, inner, weights)

        zero = jax.tree.map(jnp.zeros_like, mean)
        first, rows = jax.lax.scan(group, zero, (*groups, half))
        norms, inner, weights = (x.reshape(-1) for x in rows)
        # In examples, also where a loss weighs its examples.
        share = jnp.sum(mask) / jnp.sum(weights)
        first = jax.tree.map(lambda x: x * share.astype(x.dtype), first)
        stats = stats_from_norms(norms, inner, weights * share, mean, first)
        return out._replace(grad_stats=stats)

    return gradient_fn


def _per_device_stats(loss_fn: LossFn, axis_name: str) -> GradientFn:
    weighted = _value_grad_and_weight(loss_fn)

    def gradient_fn(params, batch, mask, model_state=None, key=None, preconditioner=None):
        if model_state is not None:
            raise ValueError("method must be 'pieces' for a model with state, got 'per_device'.")
        device, num_devices = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
        key = None if key is None else jax.random.fold_in(key, device)
        # Said to differ between devices, or shard_map adds up the gradients of all of them.
        params = jax.lax.pcast(params, axis_name, to="varying")
        out, weight = weighted(params, replace_padding(batch, mask), mask, None, key)
        mine = (out.value, out.grads)
        mine = tree_where(weight > 0, mine, jax.tree.map(jnp.zeros_like, mine))
        share = weight / jnp.maximum(jax.lax.psum(weight, axis_name), 1e-30)
        value, grads = jax.lax.psum(
            jax.tree.map(lambda x: x * share.astype(x.dtype), mine), axis_name
        )
        grad, mean = mine[1], grads
        if preconditioner is not None:
            grad, mean = (jax.tree.map(jnp.multiply, g, preconditioner) for g in (grad, mean))
        # In examples, also where a loss weighs its examples.
        size = jax.lax.psum(jnp.sum(mask), axis_name) * share
        in_first = jnp.where(device < num_devices // 2, size, 0)
        first = jax.tree.map(lambda g: jax.lax.psum(g * in_first.astype(g.dtype), axis_name), grad)
        numbers = jnp.stack([tree_dot(grad, grad), tree_dot(grad, mean), size])
        rows = jnp.where(jnp.arange(num_devices)[:, None] == device, numbers, 0)
        norms, inner, sizes = jax.lax.psum(rows, axis_name).T
        stats = stats_from_norms(norms, inner, sizes, mean, first)
        return Gradient(value, grads, None, stats)

    return gradient_fn


def gradient_stats(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    mask: jax.Array | None = None,
    *,
    method: str = "pieces",
    num_pieces: int = 2,
    micro_batch_size: int = 32,
    preconditioner: PyTree | None = None,
    axis_name: str | None = None,
) -> GradStats:
    r"""Estimates :math:`|G|^2` and :math:`tr S` of the per-example gradients from one batch.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``.
      params: Parameters of the model.
      batch: Pytree of arrays [M, ...], M a multiple of num_pieces (or of micro_batch_size).
      mask: bool[M], True for a real example; all of them if None.
      method: "pieces" (no per-example gradients), "per_example" (exact, and slower), or
        "per_device" (within `shard_map`, where each device holds a piece of the batch already).
      num_pieces: Number of pieces, a power of two >= 2. More of them make a better estimate.
      micro_batch_size: Per-example gradients held in memory at once.
      preconditioner: Optional pytree like params that multiplies every gradient first.
      axis_name: The mesh axis that the batch is split over, for "per_device".

    Returns:
      A :class:`GradStats` of scalars; NaN for a batch of one example.

    Raises:
      ValueError: If an argument is out of its range.

    Reference:
      McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv:1812.06162, A.1.

    *Guarantees*: both estimates are unbiased; padding contributes exactly zero.

    >>> stats = gradient_stats(lambda w, x: (w - x) ** 2 / 2, 0.0, jnp.array([1.0, 3.0]))
    >>> float(stats.variance_trace), float(stats.mean_sq_norm)  # of the gradients -1 and -3
    (2.0, 3.0)
    """
    fn = value_grad_and_stats(
        loss_fn,
        method=method,
        num_pieces=num_pieces,
        micro_batch_size=micro_batch_size,
        axis_name=axis_name,
    )
    if mask is None:
        mask = jnp.ones(num_rows(batch), bool)
    gradient = fn(params, batch, mask, preconditioner=preconditioner)
    return gradient.grad_stats
