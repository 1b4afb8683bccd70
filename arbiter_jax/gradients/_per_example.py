"""The gradient of each example of a batch, and the statistics that follow from all of them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from arbiter_jax._numerics import at_least_float32, check_parameters, conjugate, tree_dot
from arbiter_jax.base import LossFn, PyTree
from arbiter_jax.batching import masked_mean
from arbiter_jax.batching._masking import replace_padding, total_weight
from arbiter_jax.batching._rows import num_data_devices
from arbiter_jax.gradients._counted import Trainable, counted_leaves, only_counted
from arbiter_jax.gradients._estimators import real_parts, scaled, stats_from_norms
from arbiter_jax.gradients._joined import times
from arbiter_jax.gradients._masked import GradientFn, call_loss, masked_value_and_grad


def per_example_grads(loss_fn: LossFn) -> Callable[[PyTree, PyTree], PyTree]:
    """The gradient of every example: ``fn(params, batch) -> pytree of float[M, ...]``.

    >>> fn = per_example_grads(lambda w, x: (w - x) ** 2)
    >>> fn(0.0, jnp.array([1.0, 3.0])).tolist()
    [-2.0, -6.0]
    """
    weighted = _per_example_grads_and_weights(loss_fn)
    return lambda params, batch: weighted(params, batch)[0]


def _per_example_grads_and_weights(
    loss_fn: LossFn, has_aux: bool = False
) -> Callable[..., tuple[PyTree, jax.Array]]:
    def one(params, example):
        row, real = jax.tree.map(lambda x: x[None], example), jnp.ones(1, bool)
        losses = call_loss(loss_fn, params, row, real, has_aux=has_aux)[0]
        return masked_mean(losses, real), total_weight(losses, real)

    def grad_and_weight(params, example):
        check_parameters(params)
        grads, weight = jax.grad(one, has_aux=True)(params, example)
        return conjugate(grads), weight

    return jax.vmap(grad_and_weight, in_axes=(None, 0))


def per_example_stats(
    loss_fn: LossFn, micro_batch_size: int, trainable: Trainable, has_aux: bool
) -> GradientFn:
    """As :func:`value_grad_and_stats` of method "per_example"."""
    plain = masked_value_and_grad(loss_fn, has_aux=has_aux)
    examples = _per_example_grads_and_weights(loss_fn, has_aux)

    def gradient_fn(params, batch, mask, model_state=None, key=None, preconditioner=None):
        if model_state is not None:
            raise ValueError(
                "method must be 'pieces' for a model with state, got 'per_example': BatchNorm ties "
                "the examples of a batch together, so that no example has a gradient of its own."
            )
        size = mask.shape[0]
        m = min(micro_batch_size, size)
        if size % m:
            raise ValueError(
                f"micro_batch_size must divide the {size} rows of batch or be at least "
                f"{size} where method is 'per_example', got {m}: pad the batch to "
                f"{-(-size // m) * m} rows and mark the real ones in mask."
            )
        batch = replace_padding(batch, mask)
        out = plain(params, batch, mask, None, key)
        groups = _in_groups((batch, mask, _first_half(mask)), m)
        counts = counted_leaves(params, trainable)
        # Scaling before the products is the same as giving each product the squared scale once.
        factors = only_counted(preconditioner, counts)
        scale = lambda g: scaled(only_counted(g, counts), factors)
        mean = scale(out.grads)

        def group(carry, xs):
            rows, real, in_first = xs
            grads, weights = examples(params, rows)
            grads, weights = jax.vmap(scale)(grads), jnp.where(real, weights, 0)
            norms = jax.vmap(tree_dot)(grads, grads)
            inner = jax.vmap(lambda g: tree_dot(g, mean))(grads)
            first, squares = carry
            first = jax.tree.map(
                lambda acc, g: acc + _weighted_sum(weights * in_first, g), first, grads
            )
            squares = jax.tree.map(
                lambda acc, g: acc + _weighted_sum(weights, jnp.square(g)),
                squares,
                jax.vmap(real_parts)(grads),
            )
            return (first, squares), (norms, inner, weights)

        zero = jax.tree.map(lambda x: jnp.zeros_like(at_least_float32(x)), mean)
        (first, squares), rows = jax.lax.scan(group, (zero, real_parts(zero)), groups)
        norms, inner, weights = (x.reshape(-1) for x in rows)
        # In examples, also where a loss weighs its examples.
        share = jnp.sum(mask) / jnp.sum(weights)
        first, squares = jax.tree.map(lambda x: times(x, share), (first, squares))
        in_first = jnp.sum(weights * share * groups[2].reshape(-1))
        stats = stats_from_norms(norms, inner, weights * share, mean, (first, in_first), squares)
        return out._replace(grad_stats=stats)

    return gradient_fn


def _in_groups(tree: PyTree, size: int) -> PyTree:
    """Rows in groups of a size, [M / size, size, ...]; on a mesh, each device has a part of each."""

    def group(x):
        if num_data_devices() == 1:
            return x.reshape((-1, size, *x.shape[1:]))
        return jnp.swapaxes(x.reshape((size, -1, *x.shape[1:])), 0, 1)

    return jax.tree.map(group, tree)


def _first_half(mask: jax.Array) -> jax.Array:
    """Marks the padding up to the middle and the first half of the real rows, bool[M]."""
    dealt_out = num_data_devices() > 1 and mask.shape[0] % 2 == 0  # see `batching.interleaved`
    ordered = mask.reshape(-1, 2).T.reshape(-1) if dealt_out else mask
    half = jnp.cumsum(ordered) <= jnp.sum(mask) // 2
    return half.reshape(2, -1).T.reshape(-1) if dealt_out else half


def _weighted_sum(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """The sum of the rows times their weights, in at least float32."""
    rows = at_least_float32(rows)
    # In full precision: what is made of the sums is subtracted later.
    return jnp.tensordot(weights.astype(rows.dtype), rows, 1, precision=jax.lax.Precision.HIGHEST)
