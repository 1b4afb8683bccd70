"""Estimates of the mean and the covariance of gradients from those of the pieces of one batch.

With per-example gradients g_i of covariance S around G, the mean gradient of B examples has
covariance S / B. Comparing pieces of a batch estimates tr S and |G|^2 without a single
per-example gradient (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from arbiter_jax._numerics import at_least_float32, full_precision_matmul, tree_dot
from arbiter_jax.base import GradStats, PyTree

_SMALL_LEAF = 2**14  # elements


def _pack(tree: PyTree) -> list[jax.Array]:
    """The leaves of a tree, the small ones joined to one: inner products then cost few operations.

    A large leaf stays what it is, for joining would copy it.
    """
    leaves = [at_least_float32(x) for x in jax.tree.leaves(tree)]
    small = [x.ravel() for x in leaves if x.size <= _SMALL_LEAF]
    large = [x for x in leaves if x.size > _SMALL_LEAF]
    return large + ([jnp.concatenate(small)] if small else [])


def scaled(grads: PyTree, preconditioner: PyTree | None) -> PyTree:
    """The gradients times a preconditioner, in at least float32; as they are if there is none."""
    if preconditioner is None:
        return grads
    return jax.tree.map(lambda g, scale: at_least_float32(g) * scale, grads, preconditioner)


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
      pieces: Mean gradients, one pytree per piece, at least two.
      sizes: float[k], number of examples of each piece; 0 for an empty one.
      preconditioner: Optional pytree like the parameters that multiplies every gradient first:
        1 / (sqrt(v) + eps) for the statistics that Adam sees.

    Returns:
      A GradStats; NaN if fewer than two pieces hold an example.
    """
    pieces = [scaled(piece, preconditioner) for piece in pieces]
    # All the statistics follow from the k x k inner products: one pass over the gradients.
    k, pieces = len(pieces), [_pack(piece) for piece in pieces]
    upper = {(i, j): tree_dot(pieces[i], pieces[j]) for i in range(k) for j in range(i, k)}
    gram = jnp.stack([jnp.stack([upper[min(i, j), max(i, j)] for j in range(k)]) for i in range(k)])
    sizes = sizes.astype(gram.dtype)
    share = lambda part: part / jnp.maximum(jnp.sum(part), jnp.finfo(sizes.dtype).tiny)
    half = jnp.arange(k) < k // 2
    pieces = [real_parts(piece) for piece in pieces]
    total = lambda weights: [_weighted(weights, leaves) for leaves in zip(*pieces, strict=True)]
    mean = total(share(sizes))
    first, second = total(jnp.where(half, sizes, 0)), total(jnp.where(half, 0, sizes))
    # Of differences: it is not negative, and equal pieces have exactly none.
    spread = [
        _weighted(sizes, [jnp.square(x - m) for x in leaves])
        for m, *leaves in zip(mean, *pieces, strict=True)
    ]
    stats, in_first = stats_from_gram(gram, sizes), jnp.sum(jnp.where(half, sizes, 0))
    known = jnp.sum(sizes > 0), jnp.sum(sizes)
    return _with_absolute_norms(stats, known, spread, (first, in_first), second)


def real_parts(tree: PyTree) -> PyTree:
    """The tree in real numbers, of which a complex one is two."""
    return jax.tree.map(
        lambda x: jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x,
        tree,
    )


def _weighted(weights: jax.Array, leaves: Sequence[jax.Array]) -> Any:
    return sum(w * x for w, x in zip(weights, leaves, strict=True))


def _with_absolute_norms(
    stats: GradStats, known: Any, spread: PyTree, first: Any, second_sum: PyTree
) -> GradStats:
    r"""With what the noise scale in the l1 norm is made of, sums over all (real) parameters.

    .. math::
      \frac{1}{c_4(k)} \sum \sqrt{\frac{\sum_j b_j g_j^2 - B \bar g^2}{k - 1}},
      \qquad \sum G_1 \mathrm{sign}(G_2)

    c_4(k) is the mean of the standard deviation of k normal values over the true one, .80 for two.
    G_1 and G_2 are the means of the two halves of the pieces: in the norm of gbar itself noise would
    look like signal. The sum is |G|_1 where there is little noise and 0 where there is nothing else.

    Args:
      stats: What is known already.
      known: k, the number of pieces that are not empty, and B.
      spread: sum_j b_j g_j^2 - B gbar^2, elementwise.
      first: Sums of b_j g_j and of b_j over the first half of the pieces.
      second_sum: Sum of b_j g_j over the second half.
    """
    (first_sum, in_first), (count, size) = first, known
    n = jnp.maximum(count, 2).astype(size.dtype)
    gammas = lax.lgamma(n / 2) - lax.lgamma((n - 1) / 2)
    c4 = jnp.sqrt(2 / (n - 1)) * jnp.exp(gammas)
    total = lambda tree: sum(jnp.sum(x) for x in jax.tree.leaves(tree))
    deviation = total(jax.tree.map(lambda x: jnp.sqrt(jnp.maximum(x, 0) / (n - 1)), spread))
    signs = jax.tree.map(lambda a, b: a * jnp.sign(b), first_sum, second_sum)
    both = (in_first > 0) & (in_first < size)
    return stats._replace(
        abs_deviation=jnp.where(count > 1, deviation / c4, jnp.nan),
        abs_signal=jnp.where(both, total(signs) / jnp.where(both, in_first, 1), jnp.nan),
    )


def stats_from_gram(gram: jax.Array, sizes: jax.Array) -> GradStats:
    """Gradient statistics from the inner products of the gradients of the pieces, float[k, k]."""
    share = sizes / jnp.sum(sizes)
    half = jnp.arange(sizes.shape[0]) < sizes.shape[0] // 2
    first, second = jnp.where(half, sizes, 0), jnp.where(half, 0, sizes)
    inner = full_precision_matmul(gram, share)
    product = lambda a, b: full_precision_matmul(full_precision_matmul(a, gram), b)
    products = product(first, first), product(first, second), product(second, second)
    return _estimates(jnp.diagonal(gram), inner, sizes, product(share, share), *products)


def stats_from_norms(norms, inner, sizes, mean, first, squares) -> GradStats:
    """Gradient statistics from norms |g_j|^2 and inner products g_j . gbar of the pieces.

    Args:
      norms: |g_j|^2.
      inner: g_j . gbar.
      sizes: b_j.
      mean: gbar.
      first: Sums of b_j g_j and of b_j over the first half.
      squares: Sum of b_j g_j^2 over the real parts of g_j, elementwise.
    """
    first_sum, _ = first
    total = jnp.sum(sizes)
    mean = jax.tree.map(at_least_float32, mean)
    second_sum = jax.tree.map(lambda m, f: m * total.astype(m.dtype) - f, mean, first_sum)
    halves = (first_sum, first_sum), (first_sum, second_sum), (second_sum, second_sum)
    products = [tree_dot(a, b) for a, b in halves]
    sizes = sizes.astype(norms.dtype)
    stats = _estimates(norms, inner, sizes, tree_dot(mean, mean), *products)
    spread = jax.tree.map(
        lambda x, m: x - total.astype(x.dtype) * jnp.square(m), squares, real_parts(mean)
    )
    first_sum, second_sum = real_parts(first_sum), real_parts(second_sum)
    known = jnp.sum(sizes > 0), jnp.sum(sizes)
    return _with_absolute_norms(stats, known, spread, (first_sum, first[1]), second_sum)


def stats_from_moments(count, sizes, mean, first, sq_deviation, spread) -> GradStats:
    """Gradient statistics from running sums, which a loop over any number of pieces keeps.

    What would need a second pass over the pieces, the variance of g_j . gbar, is estimated from the
    two halves, with one degree of freedom.

    Args:
      count: Number of pieces that are not empty.
      sizes: B and the number of examples in the first half.
      mean: gbar.
      first: Mean gradient of the first half of the pieces.
      sq_deviation: sum_j b_j |g_j - gbar|^2.
      spread: Its terms, a pytree of the real parts of the parameters.
    """
    total, in_first = sizes
    in_second = total - in_first
    both = (in_first > 0) & (in_second > 0)
    ratio = in_first / jnp.where(both, in_second, 1)
    away = jax.tree.map(jnp.subtract, first, mean)
    second = jax.tree.map(lambda m, d: m - ratio.astype(d.real.dtype) * d, mean, away)
    halves = (first, first), (first, second), (second, second)
    products = [tree_dot(a, b) for a, b in halves]
    # Both terms of the sum over the halves: the second is -b_1 / b_2 times as far away as the first.
    inner = in_first * (1 + ratio) * jnp.square(tree_dot(away, mean))
    stats = _debiased(sq_deviation, inner, count, total, tree_dot(mean, mean), *products)
    stats = stats._replace(
        half_cosine=jnp.where(both, stats.half_cosine, jnp.nan),
        inner_product_variance=jnp.where(both, inner, jnp.nan),
    )
    scaled_by = lambda size, tree: jax.tree.map(lambda x: x * size.astype(x.dtype), tree)
    first, second = real_parts(first), real_parts(second)
    halves = (scaled_by(in_first, first), in_first), scaled_by(in_second, second)
    return _with_absolute_norms(stats, (count, total), spread, *halves)


def _estimates(norms, inner, sizes, batch_sq_norm, *products) -> GradStats:
    """From |g_j|^2, g_j . gbar, b_j, |gbar|^2, and the products of the sums of the two halves."""
    total, count = jnp.sum(sizes), jnp.sum(sizes > 0)
    sq_deviation = jnp.sum(sizes * norms) - total * batch_sq_norm
    # The same estimator for the scalars g_j . gbar, whose mean is |gbar|^2.
    inner = jnp.sum(sizes * (inner - batch_sq_norm) ** 2)
    return _debiased(sq_deviation, inner, count, total, batch_sq_norm, *products)


def _debiased(sq_deviation, inner, count, total, batch_sq_norm, first, across, second) -> GradStats:
    """From sums over the pieces of b_j |g_j - gbar|^2 and of b_j (g_j . gbar - |gbar|^2)^2."""
    known = lambda x: jnp.where(count > 1, x, jnp.nan)
    # Never negative but for rounding, where all pieces agree.
    unbiased = lambda spread: known(jnp.maximum(spread, 0) / jnp.maximum(count - 1, 1))
    variance_trace = unbiased(sq_deviation)
    return GradStats(
        mean_sq_norm=batch_sq_norm - variance_trace / total,
        variance_trace=variance_trace,
        batch_size=total,
        batch_sq_norm=batch_sq_norm,
        # The product of the squared norms may over- or underflow; rounding may exceed 1.
        half_cosine=known(jnp.clip(across / (jnp.sqrt(first) * jnp.sqrt(second)), -1, 1)),
        inner_product_variance=unbiased(inner),
    )
