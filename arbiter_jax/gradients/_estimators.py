"""Estimates of the mean and the covariance of gradients from those of the pieces of one batch.

With per-example gradients g_i of covariance S around G, the mean gradient of B examples has
covariance S / B. Comparing pieces of a batch estimates tr S and |G|^2 without a single
per-example gradient (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from arbiter_jax._numerics import at_least_float32, tree_dot
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
    deviation, signal = _absolute_norms(pieces, sizes)
    return stats_from_gram(gram, sizes)._replace(abs_deviation=deviation, abs_signal=signal)


def _absolute_norms(
    pieces: Sequence[list[jax.Array]], sizes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    r"""What the noise scale in the l1 norm is made of, elementwise over packed gradients.

    .. math::
      \frac{1}{c_4(k)} \sum \sqrt v, \quad v = \frac{\sum_j b_j g_j^2 - B \bar g^2}{k - 1},
      \qquad \sum G_1 \mathrm{sign}(G_2)

    c_4(k) is the mean of the standard deviation of k normal values over the true one, .80 for two.
    G_1 and G_2 are the means of the two halves of the pieces: in |gbar| itself noise would look
    like signal.
    """
    k, total = len(pieces), jnp.sum(sizes)
    count = jnp.sum(sizes > 0)
    c4 = [
        math.sqrt(2 / (n - 1)) * math.gamma(n / 2) / math.gamma((n - 1) / 2)
        if n < 100
        else 1 - 1 / (4 * n)
        for n in range(2, k + 1)
    ]
    correction = jnp.asarray([1.0, 1.0, *c4], sizes.dtype)[count]
    share = lambda part: part / jnp.maximum(jnp.sum(part), jnp.finfo(sizes.dtype).tiny)
    half = jnp.arange(k) < k // 2
    shares = share(sizes), share(jnp.where(half, sizes, 0)), share(jnp.where(half, 0, sizes))
    deviation = signal = jnp.zeros((), sizes.dtype)
    for leaves in zip(*pieces, strict=True):
        mean, first, second = (sum(w * x for w, x in zip(ws, leaves, strict=True)) for ws in shares)
        # Of differences: it is not negative, and equal pieces have exactly none.
        spread = sum(b * jnp.square(jnp.abs(x - mean)) for b, x in zip(sizes, leaves, strict=True))
        deviation += jnp.sum(jnp.sqrt(spread / jnp.maximum(count - 1, 1)))
        signal += jnp.sum(jnp.real(first * jnp.conj(jnp.sign(second))))
    known = (count > 1) & (total > 0)
    return jnp.where(known, deviation / correction, jnp.nan), jnp.where(known, signal, jnp.nan)


def stats_from_gram(gram: jax.Array, sizes: jax.Array) -> GradStats:
    """The same from the inner products of the pieces, float[k, k]."""
    share = sizes / jnp.sum(sizes)
    half = jnp.arange(sizes.shape[0]) < sizes.shape[0] // 2
    first, second = jnp.where(half, sizes, 0), jnp.where(half, 0, sizes)
    products = first @ gram @ first, first @ gram @ second, second @ gram @ second
    return _estimates(jnp.diagonal(gram), gram @ share, sizes, share @ gram @ share, *products)


def stats_from_norms(norms, inner, sizes, mean, first_sum) -> GradStats:
    """The same from |g_j|^2, g_j . gbar, gbar, and the sum of b_j g_j over the first half."""
    total = jnp.sum(sizes)
    mean = jax.tree.map(at_least_float32, mean)
    second_sum = jax.tree.map(lambda m, f: m * total.astype(m.dtype) - f, mean, first_sum)
    halves = (first_sum, first_sum), (first_sum, second_sum), (second_sum, second_sum)
    products = [tree_dot(a, b) for a, b in halves]
    return _estimates(norms, inner, sizes.astype(norms.dtype), tree_dot(mean, mean), *products)


def _estimates(norms, inner, sizes, batch_sq_norm, first, across, second) -> GradStats:
    """From |g_j|^2, g_j . gbar, b_j, |gbar|^2, and the products of the sums of the two halves."""
    total, count = jnp.sum(sizes), jnp.sum(sizes > 0)
    known = lambda x: jnp.where(count > 1, x, jnp.nan)
    # Never negative but for rounding, where all pieces agree.
    unbiased = lambda spread: known(jnp.maximum(spread, 0) / jnp.maximum(count - 1, 1))
    variance_trace = unbiased(jnp.sum(sizes * norms) - total * batch_sq_norm)
    return GradStats(
        mean_sq_norm=batch_sq_norm - variance_trace / total,
        variance_trace=variance_trace,
        batch_size=total,
        batch_sq_norm=batch_sq_norm,
        # The product of the squared norms may over- or underflow; rounding may exceed 1.
        half_cosine=known(jnp.clip(across / (jnp.sqrt(first) * jnp.sqrt(second)), -1, 1)),
        # The same estimator for the scalars g_j . gbar, whose mean is |gbar|^2.
        inner_product_variance=unbiased(jnp.sum(sizes * (inner - batch_sq_norm) ** 2)),
    )
