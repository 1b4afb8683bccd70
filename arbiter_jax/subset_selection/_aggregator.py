"""Dynamic Batch Adaptation as an optax aggregator of per-example gradients."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax.subset_selection import _gram, _prefixes
from arbiter_jax.subset_selection._prefixes import Groups, Metric, Order, group_names
from arbiter_jax.subset_selection._select_subset import check_arguments


class DynamicBatchAdaptationState(NamedTuple):
    """State of :func:`dynamic_batch_adaptation`; layers in the order of :func:`group_names`."""

    selected_fraction: jax.Array  # shape=(num_groups,), dtype=float32, in [0, 1]
    num_selected: jax.Array  # shape=(num_groups,), dtype=int32
    num_skipped: jax.Array  # shape=(), dtype=int32, rows that were not finite, so far

    metrics = ("selected_fraction",)


def dynamic_batch_adaptation(
    metric: Metric = "signal_to_noise",
    min_size: int = 1,
    *,
    groups: Groups = "module",
    order: Order = "distance",
) -> optax.GradientTransformationExtraArgs:
    r"""Averages per-example gradients over the best subset of the batch, layer by layer.

    With :math:`S_l` the subset that :func:`select_subset` chooses for layer l,
    :math:`u_l = \frac{1}{|S_l|} \sum_{i \in S_l} g_{l,i}`. The caller computes the per-example
    gradients; :func:`subset_gradients` gives the same updates without them.

    Args:
      metric: See :func:`select_subset`.
      min_size: Minimum number of examples in a subset, an integer >= 1.
      groups: Which parameters form a layer: see :func:`group_names`.
      order: See :func:`select_subset`.

    Returns:
      An Aggregator for :func:`optax.experimental.aggregating.process`. Its ``update`` takes
      gradients with n leading rows and, as an extra argument, ``mask``: bool[n], True for a real
      example. If the mask is passed, transformations before it in ``process`` must accept extra
      arguments: see :func:`optax.with_extra_args_support`.

    Raises:
      ValueError: If an argument is out of its range; in ``init``, if the parameters hold the
        statistics of a BatchNorm.
      ImportError: If the installed optax has no ``optax.experimental.aggregating``.

    Reference:
      Simionescu et al., 2022, https://arxiv.org/abs/2208.00815

    >>> import arbiter_jax as aj, jax, jax.numpy as jnp, optax
    >>> from optax.experimental import aggregating
    >>> tx = aggregating.process(optax.identity(), aj.dynamic_batch_adaptation(), optax.adam(0.1))
    >>> params = {"w": jnp.zeros(2)}
    >>> state = tx.init(params)
    >>> loss = lambda params, x, y: (x @ params["w"] - y) ** 2
    >>> x, y = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), jnp.array([1.0, 1.0, -9.0])
    >>> grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(params, x, y)
    >>> updates, state = jax.jit(tx.update)(grads, state, params)
    >>> state[1].num_selected.tolist()
    [2]

    *Guarantees*
      - rows that are masked or not finite are never selected; the latter are counted;
      - with no row left, the update is zero;
      - with ``min_size`` at least n, and finite gradients, the update is the plain mean.
    """
    min_size = check_arguments(metric, min_size, order, groups)
    aggregating = _import_aggregating()

    def init_fn(params):
        num_groups = len(group_names(params, groups))
        return DynamicBatchAdaptationState(
            selected_fraction=jnp.zeros(num_groups, jnp.float32),
            num_selected=jnp.zeros(num_groups, jnp.int32),
            num_skipped=jnp.zeros((), jnp.int32),
        )

    def update_fn(per_elt_updates, state, params=None, *, mask=None, **extra_args):
        del params, extra_args
        rows, treedef = jax.tree.flatten(per_elt_updates)
        names = _prefixes.group_of_leaves(per_elt_updates, groups)
        grams = [_gram.gram_matrix(row) for row in rows]
        selection = _prefixes.select_by_group(
            grams, names, mask, metric=metric, order=order, min_size=min_size
        )
        sums = [
            _gram.weighted_sum(row, weights, selection.valid)
            for row, weights in zip(rows, selection.weights, strict=True)
        ]
        state = DynamicBatchAdaptationState(
            selected_fraction=selection.selected_fraction,
            num_selected=selection.num_selected,
            num_skipped=state.num_skipped + selection.num_skipped,
        )
        return jax.tree.unflatten(treedef, sums), state

    return aggregating.Aggregator(init_fn, update_fn)


def _import_aggregating() -> ModuleType:
    """The aggregators of optax, which are experimental: the library works without them."""
    try:
        from optax.experimental import aggregating
    except ImportError as error:
        raise ImportError(
            "dynamic_batch_adaptation needs optax.experimental.aggregating, which the installed "
            f"optax {optax.__version__} does not have: install optax 0.2.8, or use "
            "aj.subset_gradients, which does not need it."
        ) from error
    return aggregating
