"""Masked gradients, and what their spread within a batch says about gradient noise.

With per-example gradients g_i of covariance S around G, the mean gradient of B examples has
covariance S / B. Comparing pieces of a batch estimates tr S and |G|^2 without a single
per-example gradient (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from arbiter_jax import _validate
from arbiter_jax.base import GradStats, LossFn, PyTree, tree_where
from arbiter_jax.batching import masked_mean, num_rows, replace_padding, total_weight

_SMALL_LEAF = 2**14  # elements


class Gradient(NamedTuple):
    """What a gradient function returns: the gradient of one batch, and what came with it."""

    value: jax.Array  # shape=(), dtype=float, mean loss of the real examples
    grads: PyTree  # like the parameters
    model_state: PyTree = None  # like the model state that went in
    grad_stats: GradStats | None = None
    gradient_noise: PyTree = None  # like the parameters, half the difference of two half batches


GradientFn = Callable[..., Any]
"""``gradient_fn(params, batch, mask, model_state=None, key=None) -> Gradient``."""


def _value_grad_and_weight(loss_fn: Any) -> Callable[..., tuple[Gradient, jax.Array]]:
    """The masked gradient, with the total weight of the examples that it is a mean over."""

    def mean_loss(params, batch, mask, model_state, key):
        if model_state is None:
            losses = loss_fn(params, batch)
        else:
            losses, model_state = loss_fn(params, batch, model_state, mask, key)
        return masked_mean(losses, mask), (model_state, total_weight(losses, mask))

    def gradient_fn(params, batch, mask, model_state=None, key=None):
        (value, (model_state, weight)), grads = jax.value_and_grad(mean_loss, has_aux=True)(
            params, batch, mask, model_state, key
        )
        return Gradient(value, grads, model_state), weight

    return gradient_fn


def masked_value_and_grad(loss_fn: LossFn, *, sampled: bool = False) -> GradientFn:
    """The mean loss of the real examples of a batch, and its gradient.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``; for a model with state (BatchNorm, dropout)
        ``loss_fn(params, batch, model_state, mask, key) -> (float[M], model_state)``, which is what
        is called where a model state is given.
      sampled: True for the batches of `sample_batch`, whose masked rows repeat a real example: it
        saves the pass over the batch that makes any other padding harmless.

    Returns:
      ``gradient_fn(params, batch, mask, model_state=None, key=None) -> Gradient``.

    *Guarantees*: a masked row changes no bit of the result, whatever it holds.

    >>> gradient_fn = masked_value_and_grad(lambda w, x: (w - x) ** 2)
    >>> out = gradient_fn(0.0, jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False]))
    >>> float(out.value), float(out.grads)
    (5.0, -4.0)
    """
    weighted = _value_grad_and_weight(loss_fn)

    def gradient_fn(params, batch, mask, model_state=None, key=None):
        if not sampled:
            batch = replace_padding(batch, mask)
        return weighted(params, batch, mask, model_state, key)[0]

    return gradient_fn


def _split(tree: PyTree, num_pieces: int, piece: int, contiguous: bool) -> PyTree:
    def rows(x):
        if contiguous:
            return x.reshape((num_pieces, -1, *x.shape[1:]))[piece]
        # Dealt out in turn: where the real examples come first, every piece gets its share.
        return x.reshape((-1, num_pieces, *x.shape[1:]))[:, piece]

    return jax.tree.map(rows, tree)


def _dot(a: PyTree, b: PyTree) -> jax.Array:
    """Inner product over all leaves, in at least float32."""

    def leaf(x, y):
        dtype = jnp.promote_types(jnp.result_type(x), jnp.float32)
        return jnp.vdot(x.astype(dtype), y.astype(dtype))

    return sum(jax.tree.leaves(jax.tree.map(leaf, a, b)), start=jnp.zeros(()))


def _pack(tree: PyTree) -> list[jax.Array]:
    """The leaves of a tree, the small ones joined to one: inner products then cost few operations.

    A large leaf stays what it is, for joining would copy it.
    """
    leaves = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in jax.tree.leaves(tree)]
    small = [x.ravel() for x in leaves if x.size <= _SMALL_LEAF]
    large = [x for x in leaves if x.size > _SMALL_LEAF]
    return large + ([jnp.concatenate(small)] if small else [])


def _weighted_mean(trees: Sequence[PyTree], weights: jax.Array) -> PyTree:
    shares = weights / jnp.maximum(jnp.sum(weights), jnp.finfo(weights.dtype).tiny)
    return jax.tree.map(
        lambda *xs: sum(x * share.astype(x.dtype) for x, share in zip(xs, shares, strict=True)),
        *trees,
    )


def stats_from_pieces(
    pieces: Sequence[PyTree], sizes: jax.Array, preconditioner: PyTree | None = None
) -> GradStats:
    r"""Gradient statistics from the mean gradients of the pieces of one batch.

    With pieces of b_j examples and mean gradients g_j, gbar their mean weighted by b_j, k the
    number of pieces that are not empty and B the sum of the b_j,

    .. math::
      \widehat{tr S} = \frac{\sum_j b_j |g_j|^2 - B |\bar g|^2}{k - 1}, \qquad
      \widehat{|G|^2} = |\bar g|^2 - \widehat{tr S} / B.

    Both are unbiased for pieces of any sizes. For equal ones they are the two-batch-size formulas
    of McCandlish et al. (2018), and for pieces of one example the usual sample covariance.

    Args:
      pieces: Mean gradients, one pytree a piece, at least two.
      sizes: float[k], number of examples of each piece; 0 for an empty one.
      preconditioner: Optional pytree like the parameters that multiplies every gradient first:
        1 / (sqrt(v) + eps) for the statistics that Adam sees.

    Returns:
      A GradStats; NaN where fewer than two pieces hold an example.
    """
    if preconditioner is not None:
        pieces = [jax.tree.map(jnp.multiply, piece, preconditioner) for piece in pieces]
    # All the statistics follow from the k x k inner products: one pass over the gradients.
    k, pieces = len(pieces), [_pack(piece) for piece in pieces]
    upper = {(i, j): _dot(pieces[i], pieces[j]) for i in range(k) for j in range(i, k)}
    gram = jnp.stack([jnp.stack([upper[min(i, j), max(i, j)] for j in range(k)]) for i in range(k)])
    return _stats_from_gram(gram, sizes.astype(gram.dtype))


def _stats_from_gram(gram: jax.Array, sizes: jax.Array) -> GradStats:
    total = jnp.sum(sizes)
    share = sizes / total
    batch_sq_norm = share @ gram @ share
    count = jnp.sum(sizes > 0)

    def unbiased(weighted_squares, square_of_mean):
        # Never negative but for rounding, where all pieces agree.
        spread = jnp.maximum(jnp.sum(weighted_squares) - total * square_of_mean, 0)
        return jnp.where(count > 1, spread / jnp.maximum(count - 1, 1), jnp.nan)

    variance_trace = unbiased(sizes * jnp.diagonal(gram), batch_sq_norm)
    # The same estimator for the scalars g_j . gbar, whose mean is |gbar|^2.
    inner_product_variance = unbiased(sizes * (gram @ share) ** 2, batch_sq_norm**2)
    half = jnp.arange(sizes.shape[0]) < sizes.shape[0] // 2
    first, second = jnp.where(half, sizes, 0), jnp.where(half, 0, sizes)
    cosine = (first @ gram @ second) / jnp.sqrt((first @ gram @ first) * (second @ gram @ second))
    return GradStats(
        mean_sq_norm=batch_sq_norm - variance_trace / total,
        variance_trace=variance_trace,
        num_examples=total,
        batch_sq_norm=batch_sq_norm,
        half_cosine=jnp.where(count > 1, cosine, jnp.nan),
        inner_product_variance=inner_product_variance,
    )


def value_grad_and_stats(
    loss_fn: LossFn,
    *,
    method: str = "pieces",
    num_pieces: int = 2,
    micro_batch_size: int = 32,
    sampled: bool = False,
) -> GradientFn:
    """A gradient function that estimates the gradient's mean and covariance on the way.

    Args:
      loss_fn: As in :func:`masked_value_and_grad`.
      method: "pieces": the batch is dealt out to `num_pieces` pieces whose gradients are computed
        one after the other and averaged; two halves cost about as much as the whole batch.
        "per_example": one gradient an example, `micro_batch_size` of them in memory at once.
      num_pieces: Number of pieces, a power of two >= 2. A bucket of fewer rows has one piece a row.
      micro_batch_size: Per-example gradients held at once, a power of two >= 1.
      sampled: As in :func:`masked_value_and_grad`. The rows of these batches are dealt out already,
        and contiguous pieces need no copy.

    Returns:
      ``gradient_fn(params, batch, mask, model_state=None, key=None, preconditioner=None) ->
      Gradient`` with `grad_stats`, and with `gradient_noise` where there are two pieces: half their
      difference, scaled where they are unequal, so that its covariance is S / B.

    Raises:
      ValueError: For arguments out of range, and for per-example gradients of a model with state:
        BatchNorm ties the examples of a batch together, so no example has a gradient of its own.

    *Guarantees*: a masked row changes no bit of the result; value and gradient are those of the
    whole batch.
    """
    _validate.one_of(("pieces", "per_example"), method=method)
    if _validate.power_of_two(num_pieces=num_pieces) < 2:
        raise ValueError(f"num_pieces must be a power of two >= 2, got {num_pieces}.")
    _validate.power_of_two(micro_batch_size=micro_batch_size)
    if method == "per_example":
        return _per_example_stats(loss_fn, micro_batch_size)
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
            norms = jax.vmap(_dot)(grads, grads)
            inner = jax.vmap(lambda g: _dot(g, mean))(grads)
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
        stats = _stats_from_norms(norms, inner, weights * share, mean, first)
        return out._replace(grad_stats=stats)

    return gradient_fn


def _stats_from_norms(norms, inner, sizes, mean, first_sum) -> GradStats:
    """Statistics from |g_i|^2, g_i . gbar, gbar, and the sum of b_i g_i over the first half.

    The same estimators as for pieces: each example is a piece of size b_i, 1 without weights.
    """
    sizes = sizes.astype(norms.dtype)
    total, count = jnp.sum(sizes), jnp.sum(sizes > 0)
    batch_sq_norm = _dot(mean, mean)
    unbias = lambda s: jnp.where(count > 1, jnp.maximum(s, 0) / jnp.maximum(count - 1, 1), jnp.nan)
    variance_trace = unbias(jnp.sum(sizes * norms) - total * batch_sq_norm)
    spread = inner - batch_sq_norm
    second_sum = jax.tree.map(lambda m, f: m * total.astype(m.dtype) - f, mean, first_sum)
    cosine = _dot(first_sum, second_sum) / jnp.sqrt(
        _dot(first_sum, first_sum) * _dot(second_sum, second_sum)
    )
    return GradStats(
        mean_sq_norm=batch_sq_norm - variance_trace / total,
        variance_trace=variance_trace,
        num_examples=total,
        batch_sq_norm=batch_sq_norm,
        half_cosine=jnp.where(count > 1, cosine, jnp.nan),
        inner_product_variance=unbias(jnp.sum(sizes * spread**2)),
    )


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
) -> GradStats:
    r"""Estimates :math:`|G|^2` and :math:`tr S` of the per-example gradients from one batch.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``.
      params: Parameters of the model.
      batch: Pytree of arrays [M, ...], M a multiple of num_pieces (or of micro_batch_size).
      mask: bool[M], True for a real example; all where None.
      method: "pieces" (no per-example gradients) or "per_example" (exact, and slower).
      num_pieces: Number of pieces, a power of two >= 2. More of them make a better estimate; as
        many as there are devices cost nothing where the batch is sharded.
      micro_batch_size: Per-example gradients held in memory at once.
      preconditioner: Optional pytree like params that multiplies every gradient first.

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
        loss_fn, method=method, num_pieces=num_pieces, micro_batch_size=micro_batch_size
    )
    if mask is None:
        mask = jnp.ones(num_rows(batch), bool)
    gradient = fn(params, batch, mask, preconditioner=preconditioner)
    return gradient.grad_stats
