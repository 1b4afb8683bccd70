"""Statistics of the gradient from its normalization layers alone.

The per-example gradients of the gains of LayerNorm and RMSNorm are sums over positions that the
gradient of the batch makes anyway, and their noise scale is nearly that of the whole model.

Gray et al. (2024), "Normalization Layer Per-Example Gradients are Sufficient to Predict Gradient
Noise Scale in Transformers", arXiv:2411.00999.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from arbiter_jax._numerics import (
    at_least_float32,
    check_parameters,
    conjugate,
    full_precision_matmul,
)
from arbiter_jax._parameter_sites import find_sites
from arbiter_jax.base import LossFn, PyTree
from arbiter_jax.batching import masked_mean
from arbiter_jax.batching._masking import replace_padding, total_weight
from arbiter_jax.gradients._estimators import stats_from_norms
from arbiter_jax.gradients._masked import Gradient, GradientFn, call_loss


def normalization_stats(loss_fn: LossFn) -> GradientFn:
    """As :func:`value_grad_and_stats` of method "normalization"."""

    def gradient_fn(params, batch, mask, model_state=None, key=None, preconditioner=None):
        del key  # of dropout, which a model without state has none of
        if model_state is not None or preconditioner is not None:
            raise ValueError(
                "method must be 'pieces' for a model with state or with a preconditioner, got "
                "'normalization': it takes the gradient of every single example."
            )
        check_parameters(params)
        batch = replace_padding(batch, mask)
        leaves, treedef = jax.tree.flatten(params)
        gains = _gains(loss_fn, params, batch)

        def loss_of_one(gain_rows, leaves, example):
            mine = list(leaves)
            for i, gain in zip(gains, gain_rows, strict=True):
                mine[i] = gain
            row, real = jax.tree.map(lambda x: x[None], example), jnp.ones(1, bool)
            losses = call_loss(loss_fn, jax.tree.unflatten(treedef, mine), row, real)[0]
            return masked_mean(losses, real), total_weight(losses, real)

        def mean_loss(gain_rows, leaves):
            # A gain a row: its gradient is that of the example, and their sum that of the gain.
            values, weights = jax.vmap(loss_of_one, (0, None, 0))(gain_rows, leaves, batch)
            weights = jax.lax.stop_gradient(jnp.where(mask, weights, 0))
            shares = weights / jnp.maximum(jnp.sum(weights), jnp.finfo(weights.dtype).tiny)
            return jnp.sum(jnp.where(shares > 0, values, 0) * shares), shares

        rows = mask.shape[0]
        gain_rows = [jnp.broadcast_to(leaves[i], (rows, *leaves[i].shape)) for i in gains]
        (value, shares), (row_grads, grads) = jax.value_and_grad(
            mean_loss, argnums=(0, 1), has_aux=True
        )(gain_rows, leaves)
        for i, each in zip(gains, row_grads, strict=True):
            grads[i] = jnp.sum(at_least_float32(each), axis=0).astype(leaves[i].dtype)
        grads = conjugate(jax.tree.unflatten(treedef, grads))
        stats = _stats(row_grads, shares, jnp.sum(mask))
        return Gradient(value, grads, None, stats)

    return gradient_fn


def _stats(row_grads: Any, shares: jax.Array, num_examples: jax.Array) -> Any:
    """Statistics of the gradients of the gains, each of them times its share in the mean."""
    flat = jnp.concatenate([at_least_float32(g).reshape(g.shape[0], -1) for g in row_grads], axis=1)
    mean = jnp.sum(flat, axis=0)
    real = shares > 0
    each = jnp.where(real[:, None], flat / jnp.where(real, shares, 1)[:, None], 0)
    sizes = shares * num_examples
    first_half = jnp.cumsum(real) <= jnp.sum(real) // 2
    in_first = jnp.where(first_half, sizes, 0)
    return stats_from_norms(
        jnp.sum(jnp.square(each), axis=1),
        full_precision_matmul(each, mean),
        sizes,
        mean,
        (full_precision_matmul(in_first, each), jnp.sum(in_first)),
        full_precision_matmul(sizes, jnp.square(each)),
    )


def _gains(loss_fn: LossFn, params: PyTree, batch: PyTree) -> list[int]:
    """Which leaves are gains: vectors that enter one product, elementwise, and nothing else."""
    leaves, treedef = jax.tree.flatten(params)
    one = jax.tree.map(lambda x: x[:1], batch)

    def losses(leaves, one):
        found = call_loss(loss_fn, jax.tree.unflatten(treedef, leaves), one, jnp.ones(1, bool))[0]
        return jax.tree.leaves(found)

    sites = find_sites(jax.make_jaxpr(losses)(leaves, one), len(leaves)).by_leaf
    gains = [i for i, site in sites.items() if leaves[i].ndim <= 1 and site.op.name == "mul"]
    if not gains:
        raise ValueError(
            "method must be 'pieces' or 'per_example' for a model without LayerNorm or RMSNorm, got "
            "'normalization': it measures the gradients of the gains of such layers, and loss_fn has "
            "no parameter of at most one axis that enters one elementwise product."
        )
    return gains
