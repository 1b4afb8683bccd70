"""Scores the subsets "the first k examples" of an order, and selects the best one for each layer.

All of it follows from the inner products of the per-example gradients, in O(n^2) for n examples.
See :mod:`arbiter_jax.subset_selection` for the metrics, the orders and their source.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from arbiter_jax import _validate
from arbiter_jax.base import PyTree
from arbiter_jax.subset_selection._gram import BATCH_NORM

Metric = Literal["signal_to_noise", "variance", "norm"]
Order = Literal["distance", "norm", "alignment"]
Groups = Literal["module", "leaf", "model"]

METRICS = ("signal_to_noise", "variance", "norm")
ORDERS = ("distance", "norm", "alignment")
GROUPS = ("module", "leaf", "model")


class PrefixScores(NamedTuple):
    """The subsets of the first k examples, each at the index of its last example."""

    size: jax.Array  # shape=(n,), dtype=int32, k; examples that are not valid come last
    mean_sq_norm: jax.Array  # shape=(n,), dtype=float, M_k
    variance: jax.Array  # shape=(n,), dtype=float, V_k, nan for k = 1
    score: jax.Array  # shape=(n,), dtype=float, the metric, higher is better, -inf if not eligible


def prefix_scores(
    gram: jax.Array, valid: jax.Array, metric: Metric = "signal_to_noise", order: Order = "distance"
) -> PrefixScores:
    r"""Scores the first k examples for every k, in :math:`O(n^2)`, from their Gram matrix.

    With :math:`K_{ij} = \langle g_i, g_j \rangle` in the chosen order, for the first k rows

    .. math::
      M_k = \frac{1}{k^2} \sum_{i,j \le k} K_{ij}, \qquad
      V_k = \frac{1}{k - 1} \Big( \sum_{i \le k} K_{ii} - k M_k \Big).

    Args:
      gram: float[n, n], inner products of the gradients.
      valid: bool[n], the examples that may be selected.
      metric: See :func:`select_subset`.
      order: See :func:`select_subset`.

    Returns:
      A PrefixScores. A variance that is zero up to rounding is exactly zero.

    >>> gram = jnp.array([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]])
    >>> scores = prefix_scores(gram, jnp.ones(3, bool), "norm")
    >>> scores.size.tolist(), [round(x, 3) for x in scores.mean_sq_norm.tolist()]
    ([1, 3, 2], [1.0, 0.111, 1.0])
    """
    gram = jnp.where(valid[:, None] & valid[None, :], gram, 0)
    squares = jnp.diagonal(gram)
    # The metrics are homogeneous, so the unit is free; this one avoids overflow and underflow.
    unit = jnp.max(squares, initial=0)
    unit = jnp.where(unit > 0, unit, 1)
    gram, squares = gram / unit, squares / unit

    count = jnp.sum(valid, dtype=jnp.int32)
    with_mean = jnp.sum(gram, axis=1) / jnp.maximum(count, 1)  # <g_i, mean>
    keys = {"distance": squares - 2 * with_mean, "norm": squares, "alignment": -with_mean}
    key = jnp.where(valid, keys[order], jnp.inf)
    # Compare integer ranks, not keys: a compiler may compute a key twice, with different rounding,
    # and an example would then come before itself.
    rank = jnp.argsort(jnp.argsort(key, stable=True))
    before = rank[None, :] < rank[:, None]
    until = rank[None, :] <= rank[:, None]
    size = (rank + 1).astype(jnp.int32)

    # What a row and a column add to the sum over K.
    added = squares + 2 * jnp.sum(jnp.where(before, gram, 0), axis=1)
    total = jnp.sum(jnp.where(until, added[None, :], 0), axis=1)
    trace = jnp.sum(jnp.where(until, squares[None, :], 0), axis=1)
    k = size.astype(gram.dtype)
    mean_sq_norm = jnp.maximum(total, 0) / k**2
    variance = (trace - k * mean_sq_norm) / jnp.where(k > 1, k - 1, jnp.nan)
    rounding = 64 * jnp.finfo(gram.dtype).eps * trace / k
    variance = jnp.where(variance <= rounding, 0, variance)

    if metric == "norm":
        score = mean_sq_norm * unit
    elif metric == "variance":
        score = -variance / k * unit
    else:
        noise = jnp.where(variance > 0, variance, 1) / k
        certain = jnp.where(mean_sq_norm > 0, jnp.inf, 0)
        score = jnp.where(variance > 0, mean_sq_norm / noise, certain)
    known = valid & ((size > 1) | (metric == "norm"))
    score = jnp.where(known, score, -jnp.inf)
    return PrefixScores(size, mean_sq_norm * unit, variance * unit, score)


def select(
    gram: jax.Array, valid: jax.Array, metric: Metric, order: Order, min_size: int
) -> tuple[jax.Array, jax.Array]:
    """The best prefix, bool[n], and its size, int32[]. Ties, up to rounding, go to the larger."""
    scores = prefix_scores(gram, valid, metric, order)
    count = jnp.sum(valid, dtype=jnp.int32)
    allowed = valid & (scores.size >= jnp.minimum(min_size, count))
    score = jnp.where(allowed, scores.score, -jnp.inf)
    best = jnp.max(score)
    slack = jnp.where(jnp.isfinite(best), 64 * jnp.finfo(gram.dtype).eps * jnp.abs(best), 0)
    chosen = jnp.max(jnp.where(allowed & (score >= best - slack), scores.size, 0))
    chosen = jnp.maximum(chosen, jnp.minimum(min_size, count))
    return valid & (scores.size <= chosen), chosen


def group_names(params: PyTree, groups: Groups = "module") -> tuple[str, ...]:
    """Names the layers that select a subset each, in the order of the arrays in the state.

    Args:
      params: Parameters, or any pytree with their structure.
      groups: Which parameters form a layer: ``"module"``, those in the same node of the tree, such
        as kernel and bias; ``"leaf"``, each on its own; ``"model"``, all together.

    Returns:
      One name per layer, its path joined by ``/``.

    Raises:
      ValueError: If ``groups`` is not one of the above, or the parameters hold the statistics of a
        BatchNorm.

    >>> params = {"hidden": {"kernel": 0.0, "bias": 0.0}, "head": {"kernel": 0.0}}
    >>> group_names(params)
    ('head', 'hidden')
    >>> group_names(params, "leaf")
    ('head/kernel', 'hidden/bias', 'hidden/kernel')
    """
    return tuple(dict.fromkeys(group_of_leaves(params, groups)))


def group_of_leaves(params: PyTree, groups: Groups) -> list[str]:
    """The name of the layer of each leaf."""
    _validate.one_of(GROUPS, groups=groups)
    is_variable = lambda x: isinstance(x, nnx.Variable)
    paths = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if isinstance(leaf, nnx.BatchStat) or "batch_stats" in name.split("/"):
            raise ValueError(f"params must hold no batch statistics, got {name}. {BATCH_NORM}")
        paths += [path] * len(jax.tree.leaves(leaf))
    if groups == "model":
        return ["model"] * len(paths)
    if groups == "module":
        paths = [path[:-1] for path in paths]
    return [jax.tree_util.keystr(path, simple=True, separator="/") or "model" for path in paths]


class Selection(NamedTuple):
    """The examples that each layer has selected."""

    selected: jax.Array  # shape=(num_groups, n), dtype=bool
    num_selected: jax.Array  # shape=(num_groups,), dtype=int32
    selected_fraction: jax.Array  # shape=(num_groups,), dtype=float32, of the real examples
    valid: jax.Array  # shape=(n,), dtype=bool, real and finite in every layer
    num_skipped: jax.Array  # shape=(), dtype=int32, real and not finite
    weights: list[jax.Array]  # per leaf, shape=(n,), dtype=float, 1 / k or 0


def select_by_group(
    grams: list[jax.Array],
    names: list[str],
    mask: jax.Array | None,
    finite: jax.Array | None = None,
    *,
    metric: Metric,
    order: Order,
    min_size: int,
) -> Selection:
    """Selects for each layer, from the Gram matrix and the layer's name of each leaf."""
    groups = list(dict.fromkeys(names))
    stacked = jnp.stack(
        [sum(g for g, name in zip(grams, names, strict=True) if name == group) for group in groups]
    )
    all_finite = jnp.all(jnp.isfinite(jnp.diagonal(stacked, axis1=1, axis2=2)), axis=0)
    finite = all_finite if finite is None else all_finite & finite
    mask = jnp.ones(finite.shape, bool) if mask is None else mask.astype(bool)
    valid = mask & finite
    selected, num_selected = jax.vmap(lambda gram: select(gram, valid, metric, order, min_size))(
        stacked
    )
    weights = selected / jnp.maximum(num_selected, 1).astype(stacked.dtype)[:, None]
    num_real = jnp.maximum(jnp.sum(mask), 1)
    return Selection(
        selected=selected,
        num_selected=num_selected,
        selected_fraction=(num_selected / num_real).astype(jnp.float32),
        valid=valid,
        num_skipped=jnp.sum(mask & ~finite, dtype=jnp.int32),
        weights=[weights[groups.index(name)] for name in names],
    )
