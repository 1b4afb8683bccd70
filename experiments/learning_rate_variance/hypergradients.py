"""Many samples of the hypergradient of the learning rate at a fixed point of training."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("previous g fixed", "both sampled", "look-ahead")
_GIVEN_SIZE = 64  # batch size of the fixed g[t-1]
_GRAM_SIZE = 1000  # examples whose gradients are in memory at once


def _mean_loss(loss_fn, params, batch):
    return jnp.mean(loss_fn(params, batch))


def _draw_rows(key, data, *shape):
    return jax.random.randint(key, shape, 0, len(data[1]))


def _given(loss_fn, params, data, rate, key):
    """Returns the parameters after a step with the fixed previous gradient, and that gradient."""
    rows = _draw_rows(key, data, _GIVEN_SIZE)
    grads = jax.grad(_mean_loss, 1)(loss_fn, params, jax.tree.map(lambda x: x[rows], data))
    return jax.tree.map(lambda p, g: p - rate * g, params, grads), grads


@functools.partial(jax.jit, static_argnames=("loss_fn", "size", "num_draws", "look_ahead"))
def draw_hypergradients(loss_fn, params, data, rate, key, *, size, num_draws, look_ahead):
    """Returns float[3, num_draws]: samples of each of :data:`KINDS`, on independent examples."""

    def mean_loss(params, rows):
        return _mean_loss(loss_fn, params, jax.tree.map(lambda x: x[rows], data))

    def descend(params, rate, rows):
        grads = jax.grad(mean_loss)(params, rows)
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), grads

    dot = lambda a, b: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))
    given_key, draws_key = jax.random.split(key)
    next_given, given = _given(loss_fn, params, data, rate, given_key)

    def draw(key):
        rows = _draw_rows(key, data, look_ahead + 1, size)
        following, first = descend(params, rate, rows[0])
        second = jax.grad(mean_loss)(following, rows[1])

        def final_loss(rate):  # loss on a new batch, after `look_ahead` steps at this rate
            step = lambda params, rows: (descend(params, rate, rows)[0], None)
            end, _ = jax.lax.scan(step, params, rows[:-1])
            return mean_loss(end, rows[-1])

        slope = jax.jvp(final_loss, (rate,), (jnp.ones_like(rate),))[1]
        given_only = dot(jax.grad(mean_loss)(next_given, rows[1]), given)
        return jnp.stack([given_only, dot(second, first), -slope])

    return jax.lax.map(draw, jax.random.split(draws_key, num_draws)).T


@functools.partial(jax.jit, static_argnames="loss_fn")
def _population(loss_fn, params, data, rate, key):
    """Returns the variances of the gradients along the fixed g[t-1] and along G, and tr(Sigma^2)."""
    given_key, rows_key = jax.random.split(key)  # as in draw_hypergradients: the same g[t-1]
    next_given, given = _given(loss_fn, params, data, rate, given_key)
    along_given = jax.jvp(lambda p: loss_fn(p, data), (next_given,), (given,))[1]
    mean_grad = jax.grad(_mean_loss, 1)(loss_fn, params, data)
    along_mean = jax.jvp(lambda p: loss_fn(p, data), (params,), (mean_grad,))[1]
    num_rows = min(_GRAM_SIZE, len(data[1]))
    rows = jax.random.permutation(rows_key, len(data[1]))[:num_rows]

    def grad_of(row):
        batch = jax.tree.map(lambda x: x[row][None], data)
        grads = jax.grad(_mean_loss, 1)(loss_fn, params, batch)
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)])

    grads = jax.lax.map(grad_of, rows)
    gram = (grads - grads.mean(0, keepdims=True)) @ (grads - grads.mean(0, keepdims=True)).T
    return jnp.var(along_given), jnp.var(along_mean), jnp.mean(gram**2)


def predict(
    loss_fn: Any,
    params: Any,
    data: Any,
    key: jax.Array,
    *,
    learning_rate: float,
    sizes: Sequence[int],
    look_ahead: int,
) -> dict[str, dict[str, float]]:
    r"""Predicts a and b of Var(h) = a / B + b / B^2 to first order in the learning rate.

    Let G and Sigma be the mean and the covariance of the examples' gradients, all at the same
    parameters. The hypergradient of T steps is :math:`g_T \cdot \sum_{t<T} g_t`, so
    :math:`a = (T^2 + T) G^T \Sigma G` and :math:`b = T \, tr(\Sigma^2)`; T = 1 if both gradients
    are sampled. With a fixed previous gradient g, :math:`a = g^T \Sigma g` and b = 0, at any rate.

    Returns:
      {kind: {"a", "b", "slope": of log variance in log B over the sizes}}.
    """
    rate = jnp.float32(learning_rate)
    given, along, squares = map(float, _population(loss_fn, params, data, rate, key))
    found = {KINDS[0]: {"a": given, "b": 0.0}}
    for kind, steps in zip(KINDS[1:], (1, look_ahead), strict=True):
        found[kind] = {"a": (steps**2 + steps) * along, "b": steps * squares}
    for numbers in found.values():
        size = np.array(sizes, float)
        variance = numbers["a"] / size + numbers["b"] / size**2
        numbers["slope"] = np.polyfit(np.log(size), np.log(variance), 1)[0]
    return found


def measure(
    loss_fn: Any,
    params: Any,
    data: Any,
    key: jax.Array,
    *,
    learning_rate: float,
    sizes: Sequence[int],
    num_draws: int,
    look_ahead: int,
) -> dict[str, dict[str, Any]]:
    """Measures the means and variances of h over the batch sizes.

    Few examples have large gradients, so h is heavy-tailed at small B. Smaller sizes therefore get
    more samples, up to 8 times `num_draws`, the number at the largest size.

    Returns:
      {kind: {"means", "variances": float[len(sizes)], "slope": of log variance in log B}}.
    """
    sample = functools.partial(
        draw_hypergradients, loss_fn, params, data, jnp.float32(learning_rate), key
    )
    means, variances = [], []
    for size in sizes:
        draws = num_draws * min(8, max(1, max(sizes) // size))
        h = np.asarray(sample(size=size, num_draws=draws, look_ahead=look_ahead), float)
        means.append(h.mean(1))
        variances.append(h.var(1, ddof=1))
    found = {}
    for kind, mean, variance in zip(
        KINDS, np.transpose(means), np.transpose(variances), strict=True
    ):
        slope = np.polyfit(np.log(sizes), np.log(variance), 1)[0]
        found[kind] = {"slope": slope, "means": mean, "variances": variance}
    return found
