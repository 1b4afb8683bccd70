"""Gram matrices of per-example gradients, one per parameter, mostly without the gradients.

A parameter that enters one matrix product, ``y = x @ w``, has the per-example gradients
``x_i' d_i``, with d the gradient of the loss with respect to y. Their inner products follow from x
and d alone, ``<g_i, g_j> = sum((x_i x_j') * (d_i d_j'))``, and so does any weighted mean of them.
References: Goodfellow 2015, arXiv:1510.01799, for dense layers; Bu et al. 2022, arXiv:2205.10683,
for the choice between products and gradients by shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen
from jax import lax

from arbiter_jax._numerics import at_least_float32, check_parameters, conjugate
from arbiter_jax._parameter_sites import find_sites
from arbiter_jax.base import LossFn, PyTree, WeightedLoss
from arbiter_jax.batching._masking import num_rows
from arbiter_jax.gradients._masked import call_loss
from arbiter_jax.subset_selection import _sites

Weights = Sequence[jax.Array]  # float[n] per leaf of the parameters


class PerExample(NamedTuple):
    """The losses of the n examples of a batch, and products and sums of their gradients."""

    losses: jax.Array  # shape=(n,), dtype=float, times the weight of the example
    weights: jax.Array  # shape=(n,), dtype=float, 1 unless the loss is a WeightedLoss
    grams: list[jax.Array]  # per leaf, shape=(n, n), dtype=float, inner products of the gradients
    # (weights, bool[n] valid) -> leaves, the weighted sums of the gradients of the valid rows
    combine: Callable[[Weights, jax.Array], list[jax.Array]]


def per_example(
    loss_fn: LossFn, params: PyTree, batch: PyTree, *, factorize: bool, max_bytes: int
) -> PerExample:
    """Inner products and weighted sums of the gradients of the examples of a batch.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]`` or a WeightedLoss.
      params: Pytree of float arrays.
      batch: Pytree of arrays with n leading rows.
      factorize: Whether to use the inputs and errors of a layer instead of gradients, for the
        parameters that enter exactly one operation.
      max_bytes: Bound on the memory of the gradients of all other parameters, though those of two
        examples are always formed. Beyond it they are computed in blocks, once per pair of blocks.
    """
    check_parameters(params)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params)]
    treedef = jax.tree.structure(params)

    def loss_of_one(leaves, example):
        one_row = jax.tree.map(lambda x: x[None], example)
        params, real = jax.tree.unflatten(treedef, leaves), jnp.ones(1, bool)
        # Auxiliary output would be that of one example at a time.
        return _total_loss(call_loss(loss_fn, params, one_row, real, has_aux=None)[0])

    n = num_rows(batch)
    batch = jax.tree.map(jnp.asarray, batch)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    with linen.intercept_methods(_refuse_batch_norm):
        closed = jax.make_jaxpr(loss_of_one)(leaves, example)
    traced = find_sites(closed, len(leaves))
    # The factors of complex gradients are not pairs of real ones.
    real = {i: site for i, site in traced.by_leaf.items() if not jnp.iscomplexobj(site.output)}
    traced = traced._replace(by_leaf=real if factorize else {})
    sites = traced.by_leaf

    rest = [i for i in range(len(leaves)) if i not in sites]
    row_bytes = sum(leaves[i].size * leaves[i].dtype.itemsize for i in rest)
    whole = n * row_bytes <= max_bytes or n == 1

    def total(probes, rest_leaves, example):
        arguments = list(leaves)
        for i, leaf in zip(rest, rest_leaves, strict=True):
            arguments[i] = leaf
        arguments += jax.tree.leaves(example)
        (loss, weight), seen = _sites.evaluate(traced, arguments, probes)
        return loss, (weight, seen)

    probes = {i: jnp.zeros(site.output.shape, site.output.dtype) for i, site in sites.items()}
    rest_leaves = [leaves[i] for i in rest]
    argnums = (0, 1) if whole else 0
    with_errors = jax.vmap(jax.value_and_grad(total, argnums, has_aux=True), (None, None, 0))
    (losses, (weights, seen)), gradients = with_errors(probes, rest_leaves, batch)
    rest_rows: Any
    errors, rest_rows = gradients if whole else (gradients, None)
    rest_rows = conjugate(rest_rows)

    def rows_of(block):
        gradient = jax.grad(lambda *args: total(*args)[0], 1)
        return conjugate(jax.vmap(gradient, (None, None, 0))(probes, rest_leaves, block))

    layers = {
        i: _layer(site, leaves[i], seen[i], errors[i], max_bytes) for i, site in sites.items()
    }
    rest_grams, rest_sums = (
        _whole(rest_rows) if whole else _in_blocks(rows_of, batch, n, 2 * row_bytes, max_bytes)
    )
    grams = {i: gram for i, (gram, _) in layers.items()} | dict(zip(rest, rest_grams, strict=True))

    def combine(weights, valid):
        sums = {i: weighted(weights[i], valid) for i, (_, weighted) in layers.items()}
        rest_weights = [weights[i] for i in rest]
        sums |= zip(rest, rest_sums(rest_weights, valid), strict=True)
        return [sums[i] for i in range(len(leaves))]

    return PerExample(losses, weights, [grams[i] for i in range(len(leaves))], combine)


def _total_loss(losses: jax.Array | WeightedLoss) -> tuple[jax.Array, jax.Array]:
    """The loss of a batch of one example times its weight, and that weight."""
    values = at_least_float32(losses.losses if isinstance(losses, WeightedLoss) else losses)
    if isinstance(losses, WeightedLoss):
        weights = jnp.broadcast_to(lax.stop_gradient(losses.weights), values.shape)
        weights = weights.astype(values.dtype)
        return jnp.sum(jnp.where(weights != 0, values, 0) * weights), jnp.sum(weights)
    return jnp.mean(values), jnp.ones((), values.dtype)


def _refuse_batch_norm(next_fn: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    module = context.module
    if isinstance(module, linen.BatchNorm) and context.method_name == "__call__":
        frozen = args[1] if len(args) > 1 else kwargs.get("use_running_average")
        if not (module.use_running_average if frozen is None else frozen):
            raise ValueError(BATCH_NORM)
    return next_fn(*args, **kwargs)


BATCH_NORM = (
    "Examples that share batch statistics have no gradients of their own, so a subset cannot be "
    "selected for a model with BatchNorm: use LayerNorm or GroupNorm, or BatchNorm with "
    "use_running_average=True."
)


def _products(a: jax.Array, b: jax.Array) -> jax.Array:
    """Inner products of the rows, in full precision on every device; complex ones as real pairs."""
    a, b = (_real_rows(at_least_float32(x.reshape(x.shape[0], -1))) for x in (a, b))
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)


def _real_rows(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x.real, x.imag], axis=1) if jnp.iscomplexobj(x) else x


def gram_matrix(rows: jax.Array) -> jax.Array:
    """Inner products of the n rows of float[n, ...], float[n, n]."""
    return _products(rows, rows)


def _rows_where(valid: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.where(valid.reshape(valid.shape + (1,) * (rows.ndim - 1)), rows, 0)


def weighted_sum(rows: jax.Array, weights: jax.Array, valid: jax.Array) -> jax.Array:
    """Sum of the valid rows of float[n, ...] times their weights; the other rows may be NaN."""
    total = jnp.tensordot(weights, at_least_float32(_rows_where(valid, rows)), axes=1)
    return total.astype(rows.dtype)


def _whole(rows: list[jax.Array]):
    """Inner products and weighted sums of gradients that are all held in memory."""

    def sums(weights, valid):
        return [weighted_sum(r, w, valid) for r, w in zip(rows, weights, strict=True)]

    return [gram_matrix(r) for r in rows], sums


def _in_blocks(rows_of: Callable, batch: PyTree, n: int, bytes_per_row: int, max_bytes: int):
    """Gram matrices and weighted sums, with two blocks of the gradients in memory at a time."""
    size = _largest_block(n, bytes_per_row, max_bytes)

    def split(x):
        return x.reshape(n // size, size, *x.shape[1:])

    numbers, blocks = jnp.arange(n // size), jax.tree.map(split, batch)

    def against_all(numbered_block):
        i, block = numbered_block
        rows = rows_of(block)

        def products(numbered_block):
            j, block = numbered_block

            def compute():
                return [_products(a, b) for a, b in zip(rows, rows_of(block), strict=True)]

            shapes = jax.eval_shape(compute)
            return lax.cond(j <= i, compute, lambda: [jnp.zeros(s.shape, s.dtype) for s in shapes])

        return lax.map(products, (numbers, blocks))

    block_of = jnp.arange(n) // size
    grams = [
        jnp.where(block_of[:, None] >= block_of[None, :], lower, lower.T)
        for blocks_of_leaf in lax.map(against_all, (numbers, blocks))
        for lower in [blocks_of_leaf.swapaxes(1, 2).reshape(n, n)]
    ]

    def sums(weights, valid):
        def add(carry, block):
            rows, block_weights, block_valid = rows_of(block[0]), block[1], block[2]
            added = [
                total + weighted_sum(r, w, block_valid)
                for total, r, w in zip(carry, rows, block_weights, strict=True)
            ]
            return added, None

        shapes = jax.eval_shape(rows_of, jax.tree.map(lambda x: x[:1], batch))
        start = [jnp.zeros(s.shape[1:], s.dtype) for s in shapes]
        return lax.scan(add, start, (blocks, [split(w) for w in weights], split(valid)))[0]

    return grams, sums


def _largest_block(n: int, bytes_per_row: int, max_bytes: int) -> int:
    """The largest number of rows that divides n and fits in memory, at least 1."""
    return max(
        m
        for m in range(1, n + 1)
        if n % m == 0 and m * bytes_per_row <= max(max_bytes, bytes_per_row)
    )


def _gram_of_factors(x: jax.Array, d: jax.Array, max_bytes: int) -> jax.Array:
    """Inner products of the x_i' d_i, from those of the rows of x, [n, t, p], and d, [n, t, q]."""
    n, t, _ = x.shape
    if t == 1:
        return gram_matrix(x) * gram_matrix(d)
    all_x, all_d = (y.reshape(n * t, -1) for y in (x, d))

    def against_all(block):
        x, d = (y.reshape(-1, y.shape[-1]) for y in block)
        both = _products(x, all_x) * _products(d, all_d)
        return both.reshape(-1, t, n, t).sum(axis=(1, 3))

    size = _largest_block(n, 3 * 4 * n * t * t, max_bytes)
    blocks = [y.reshape(n // size, size, *y.shape[1:]) for y in (x, d)]
    return lax.map(against_all, blocks).reshape(n, n)


def _layer(site: _sites.Site, leaf: jax.Array, seen: list, errors: jax.Array, max_bytes: int):
    """Inner products and weighted sums at one site, from its inputs and errors."""
    n = errors.shape[0]
    matrix = _sites.as_matrix(site)
    if matrix is None:
        # Biases, scales, embeddings: the gradients themselves, from the derivative of one equation.
        def gradient(error, others):
            return jax.vjp(lambda leaf: site.apply(leaf, others), leaf)[1](error)[0]

        rows = jax.vmap(gradient)(errors, seen)
        return gram_matrix(rows), lambda weights, valid: weighted_sum(rows, weights, valid)

    x, d = jax.vmap(matrix.factors)(seen[matrix.data], errors)
    (_, t, p), q = x.shape, d.shape[2]
    # Inner products of the factors if there are few positions t. With many, as in a first
    # convolution, the gradients are smaller than the products.
    if n * t * t * (p + q) < (n + t) * p * q:
        gram, rows = _gram_of_factors(x, d, max_bytes), None
    else:
        rows = jnp.einsum("ntp,ntq->npq", x, d)
        gram = gram_matrix(rows)

    def weighted(weights, valid):
        if rows is None:
            wide = at_least_float32(d)
            scaled = _rows_where(valid, wide) * weights.astype(wide.dtype)[:, None, None]
            total = jnp.einsum("ntp,ntq->pq", at_least_float32(_rows_where(valid, x)), scaled)
        else:
            total = weighted_sum(rows, weights, valid)
        total = matrix.to_operand(total).astype(site.operand.dtype)
        return jax.linear_transpose(site.view, leaf)(total)[0]

    return gram, weighted
