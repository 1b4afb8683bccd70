"""Gradient statistics within `shard_map`: the part of the batch that a device holds is a piece."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from arbiter_jax._numerics import at_least_float32, tree_dot, tree_where
from arbiter_jax.base import LossFn
from arbiter_jax.batching._masking import replace_padding
from arbiter_jax.gradients._counted import Trainable, counted_leaves, only_counted
from arbiter_jax.gradients._estimators import real_parts, scaled, stats_from_norms
from arbiter_jax.gradients._joined import joined_aux_of_devices, mean_of_devices, times
from arbiter_jax.gradients._masked import Gradient, GradientFn, value_grad_and_weight


def per_device_stats(
    loss_fn: LossFn, axis_name: str, trainable: Trainable, has_aux: bool
) -> GradientFn:
    """As :func:`value_grad_and_stats` of method "per_device"."""
    weighted = value_grad_and_weight(loss_fn, has_aux)

    def gradient_fn(params, batch, mask, model_state=None, key=None, preconditioner=None):
        if model_state is not None:
            raise ValueError("method must be 'pieces' for a model with state, got 'per_device'.")
        counts = counted_leaves(params, trainable)
        try:
            device, num_devices = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
        except NameError:
            raise ValueError(
                "axis_name must be an axis of the jax.shard_map that this is called in, got "
                f"{axis_name!r}."
            ) from None
        key = None if key is None else jax.random.fold_in(key, device)
        # Said to differ between devices, or shard_map adds up the gradients of all of them.
        params = jax.lax.pcast(params, axis_name, to="varying")
        out, weight = weighted(params, replace_padding(batch, mask), mask, None, key)
        mine = (out.value, out.grads)
        mine = tree_where(weight > 0, mine, jax.tree.map(jnp.zeros_like, mine))
        share = weight / jnp.maximum(jax.lax.psum(weight, axis_name), 1e-30)
        value, grads = mean_of_devices(mine, share, axis_name)
        grad, mean = (only_counted(g, counts) for g in (mine[1], grads))
        factors = only_counted(preconditioner, counts)
        grad, mean = scaled(grad, factors), scaled(mean, factors)
        # In examples, also where a loss weighs its examples.
        size = jax.lax.psum(jnp.sum(mask), axis_name) * share
        in_first = jnp.where(device < num_devices // 2, size, 0)
        first = jax.tree.map(lambda g: jax.lax.psum(times(g, in_first), axis_name), grad)
        squares = jax.tree.map(
            lambda g: jax.lax.psum(times(jnp.square(at_least_float32(g)), size), axis_name),
            real_parts(grad),
        )
        numbers = jnp.stack([tree_dot(grad, grad), tree_dot(grad, mean), size])
        rows = jnp.where(jnp.arange(num_devices)[:, None] == device, numbers, 0)
        norms, inner, sizes = jax.lax.psum(rows, axis_name).T
        first_half = first, jax.lax.psum(in_first, axis_name)
        stats = stats_from_norms(norms, inner, sizes, mean, first_half, squares)
        aux = joined_aux_of_devices(out.aux, weight, share, axis_name)
        return Gradient(value, grads, None, stats, aux=aux)

    return gradient_fn
