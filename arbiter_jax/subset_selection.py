"""Dynamic Batch Adaptation: which examples of a batch the step of each layer is made of.

The gradients of the single examples are analysed, and for each layer the update is the mean over
the subset that scores best on a metric such as the variance of that mean. Among n examples in an
order, only the n subsets of the first k are scored, all at once, from inner products of gradients.

Reference: Simionescu, Stoica and Herscovici, "Dynamic Batch Adaptation", 2022, arXiv:2208.00815.
Its code is not public: order, metrics and edge cases are this project's reading of it.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
from optax.experimental import aggregating

from arbiter_jax import _gram, _prefixes, _validate
from arbiter_jax._gradient_statistics import stats_from_gram
from arbiter_jax._prefixes import Groups, Metric, Order, group_names, prefix_scores
from arbiter_jax.base import GradStats, LossFn, PyTree
from arbiter_jax.batching import num_rows, replace_padding
from arbiter_jax.gradients import GradientFn

__all__ = [
    "DynamicBatchAdaptationState",
    "SubsetGradient",
    "dynamic_batch_adaptation",
    "group_names",
    "prefix_scores",
    "select_subset",
    "subset_gradients",
]


def _check(metric, min_size, order, groups="module") -> int:
    _validate.one_of(_prefixes.METRICS, metric=metric)
    _validate.one_of(_prefixes.ORDERS, order=order)
    _validate.one_of(_prefixes.GROUPS, groups=groups)
    return _validate.integer(min_size=min_size, minimum=1)


def select_subset(
    per_example_grads: jax.Array,
    metric: Metric = "signal_to_noise",
    min_size: int = 1,
    mask: jax.Array | None = None,
    *,
    order: Order = "distance",
) -> tuple[jax.Array, jax.Array]:
    r"""Chooses the examples of a batch whose mean gradient scores best, for one layer.

    The examples are put in order, and for each k the first k of them are scored by the squared norm
    :math:`M_k` of their mean gradient and the trace :math:`V_k` of their sample covariance:

    .. math::
      \text{signal\_to\_noise:}\ \max_k \frac{M_k}{V_k / k}, \qquad
      \text{variance:}\ \min_k \frac{V_k}{k}, \qquad
      \text{norm:}\ \max_k M_k.

    A single example has no sample covariance: the first two choose it only where there is no
    second. Ties go to the larger subset, so that identical gradients are all chosen.

    Args:
      per_example_grads: float[n, d] (or float[n, ...]), the gradient of each example.
      metric: ``"signal_to_noise"``, ``"variance"`` or ``"norm"``.
      min_size: Smallest k, an integer >= 1. Where fewer examples can be chosen, all of them are.
      mask: bool[n], True for a real example; all are where it is None.
      order: Key of the order: ``"distance"``, the distance to the mean gradient, ascending;
        ``"norm"``, ascending; ``"alignment"``, the inner product with the mean, descending.

    Returns:
      (selected, num_selected): bool[n] and int32[].

    Raises:
      ValueError: If metric, order or min_size is none of the above.

    Reference:
      Simionescu et al., 2022, https://arxiv.org/abs/2208.00815

    >>> import arbiter_jax as aj, jax.numpy as jnp
    >>> grads = jnp.array([[1.0, 0.1], [1.0, -0.1], [-3.0, 0.0], [1.1, 0.0]])
    >>> selected, num_selected = aj.select_subset(grads)
    >>> selected.tolist(), int(num_selected)
    ([True, True, False, True], 3)

    *Guarantees*
      - masked rows, and rows that are not finite, are never chosen and change nothing;
      - the subset has the best score of all prefixes that have min_size examples or more.
    """
    min_size = _check(metric, min_size, order)
    gram = _gram.gram_matrix(per_example_grads)
    valid = jnp.isfinite(jnp.diagonal(gram))
    if mask is not None:
        valid &= mask.astype(bool)
    return _prefixes.select(gram, valid, metric, order, min_size)


class DynamicBatchAdaptationState(NamedTuple):
    """State of :func:`dynamic_batch_adaptation`; layers in the order of :func:`group_names`."""

    selected_fraction: jax.Array  # shape=(num_groups,), dtype=float32, in [0, 1]
    num_selected: jax.Array  # shape=(num_groups,), dtype=int32
    num_skipped: jax.Array  # shape=(), dtype=int32, rows so far that were not finite

    logged = ("selected_fraction",)


def dynamic_batch_adaptation(
    metric: Metric = "signal_to_noise",
    min_size: int = 1,
    *,
    groups: Groups = "module",
    order: Order = "distance",
) -> aggregating.Aggregator:
    r"""Aggregates per-example gradients to the mean over the best subset, layer by layer.

    With :math:`S_l` the subset that :func:`select_subset` chooses for layer l,
    :math:`u_l = \frac{1}{|S_l|} \sum_{i \in S_l} g_{l,i}`. The per-example gradients are formed by
    the caller; :func:`subset_gradients` gives the same updates without them.

    Args:
      metric: See :func:`select_subset`.
      min_size: Fewest examples of a subset, an integer >= 1.
      groups: What a layer is: see :func:`group_names`.
      order: See :func:`select_subset`.

    Returns:
      An Aggregator for :func:`optax.experimental.aggregating.process`. Its ``update`` takes
      gradients with n leading rows and, as an extra argument, ``mask``: bool[n], True for a real
      example. Transformations before it in ``process`` must accept extra arguments if the mask is
      given: see :func:`optax.with_extra_args_support`.

    Raises:
      ValueError: If an argument is out of its range; in ``init``, if the parameters hold the
        statistics of a BatchNorm.

    Reference:
      Simionescu et al., 2022, https://arxiv.org/abs/2208.00815

    >>> import arbiter_jax as aj, jax, jax.numpy as jnp, optax
    >>> from optax.experimental import aggregating
    >>> tx = aggregating.process(optax.identity(), aj.dynamic_batch_adaptation(), optax.adam(0.1))
    >>> params = {"w": jnp.zeros(2)}
    >>> state = tx.init(params)
    >>> loss = lambda params, x, y: (x @ params["w"] - y) ** 2
    >>> x, y = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), jnp.array([1.0, 1.0, -9.0])
    >>> grads = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, y)
    >>> updates, state = tx.update(grads, state, params)
    >>> state[1].num_selected.tolist()
    [2]

    *Guarantees*
      - rows that are masked or not finite are never chosen; the latter are counted;
      - with no row left, the update is zero;
      - with ``min_size`` at least n, and finite gradients, the update is the plain mean.
    """
    min_size = _check(metric, min_size, order, groups)

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
        chosen = _prefixes.select_by_group(
            grams, names, mask, metric=metric, order=order, min_size=min_size
        )
        sums = [
            _gram.weighted_sum(row, weights, chosen.valid)
            for row, weights in zip(rows, chosen.weights, strict=True)
        ]
        state = DynamicBatchAdaptationState(
            chosen.selected_fraction, chosen.num_selected, state.num_skipped + chosen.num_skipped
        )
        return jax.tree.unflatten(treedef, sums), state

    return aggregating.Aggregator(init_fn, update_fn)


class SubsetGradient(NamedTuple):
    """A gradient over chosen examples, with the fields of :class:`arbiter_jax.gradients.Gradient`.

    Layers are in the order of :func:`group_names`.
    """

    value: jax.Array  # shape=(), dtype=float, mean loss of the real and finite examples, or nan
    grads: PyTree  # like the parameters
    model_state: PyTree  # None
    grad_stats: GradStats  # of the same, exact: from their inner products
    gradient_noise: PyTree  # None
    selected: jax.Array  # shape=(num_groups, n), dtype=bool
    selected_fraction: jax.Array  # shape=(num_groups,), dtype=float32, of the real examples
    num_selected: jax.Array  # shape=(num_groups,), dtype=int32
    num_skipped: jax.Array  # shape=(), dtype=int32, real examples that are not finite

    logged = ("selected_fraction",)


def subset_gradients(
    loss_fn: LossFn,
    metric: Metric = "signal_to_noise",
    min_size: int = 1,
    *,
    groups: Groups = "module",
    order: Order = "distance",
    factorize: bool = True,
    max_bytes: int = 2**28,
) -> GradientFn:
    r"""Replaces the gradient of a loss by the mean over the best subset, layer by layer.

    The updates of :func:`dynamic_batch_adaptation`, without the per-example gradients: a parameter
    of a dense or convolutional layer with inputs :math:`x_i` and errors :math:`d_i` has

    .. math::
      \langle g_i, g_j \rangle = \sum (x_i x_j^\top) \circ (d_i d_j^\top), \qquad
      u = \frac{1}{|S|} \sum_{i \in S} x_i^\top d_i.

    Inputs and errors are found in the traced loss, so that any model qualifies, in Flax or not.
    They are used for each parameter that enters exactly one operation; the gradients of the others
    (shared ones, and all of them if the loss holds a penalty on its parameters: let the optimizer
    decay the weights instead) are formed for each example.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``, or a
        :class:`arbiter_jax.base.WeightedLoss`. It is called with batches of one example.
      metric: See :func:`select_subset`.
      min_size: Fewest examples of a subset, an integer >= 1.
      groups: What a layer is: see :func:`group_names`.
      order: See :func:`select_subset`.
      factorize: False to form the gradients of all parameters for each example.
      max_bytes: Bound on the memory of per-example gradients, an integer >= 1, in bytes; at least
        those of two examples are formed. Gradients of more bytes are formed in blocks, once for
        each pair of blocks.

    Returns:
      ``gradient_fn(params, batch, mask=None) -> SubsetGradient``, for ``aj.run_window``, ``aj.fit``
      or a loop of one's own.

    Raises:
      ValueError: If an argument is out of its range; if the loss takes a model state, as that of a
        BatchNorm model does; when called, if the parameters hold the statistics of a BatchNorm or a
        Linen BatchNorm normalises over the batch.

    Reference:
      Simionescu et al., 2022, https://arxiv.org/abs/2208.00815

    >>> import arbiter_jax as aj, jax.numpy as jnp
    >>> loss_fn = lambda w, batch: (batch[0] @ w - batch[1]) ** 2
    >>> batch = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), jnp.array([1.0, 1.0, -9.0])
    >>> gradient = aj.subset_gradients(loss_fn)(jnp.zeros(2), batch)
    >>> gradient.selected.tolist(), [round(float(g), 3) for g in gradient.grads]
    ([[True, True, False]], [-2.0, -0.1])

    *Guarantees*
      - equals :func:`dynamic_batch_adaptation` on per-example gradients, to rounding;
      - masked examples, and examples whose loss or gradient is not finite, change nothing;
      - with ``min_size`` at least n, the gradient is that of the mean loss.
    """
    min_size = _check(metric, min_size, order, groups)
    max_bytes = _validate.integer(max_bytes=max_bytes, minimum=1)
    _refuse_model_state(loss_fn)

    def gradient_fn(params, batch, mask=None, model_state=None, key=None):
        del key
        if model_state is not None:
            raise ValueError(f"model_state must be None. {_gram.BATCH_NORM}")
        names = _prefixes.group_of_leaves(params, groups)
        mask = jnp.ones(num_rows(batch), bool) if mask is None else mask.astype(bool)
        batch = replace_padding(batch, mask)
        examples = _gram.per_example(
            loss_fn, params, batch, factorize=factorize, max_bytes=max_bytes
        )
        finite = jnp.isfinite(examples.losses) & jnp.isfinite(examples.weights)
        chosen = _prefixes.select_by_group(
            examples.grams, names, mask, finite, metric=metric, order=order, min_size=min_size
        )
        # The gradient of a weighted mean is the mean of gradients over the mean weight.
        weight = jnp.sum(jnp.where(chosen.valid, examples.weights, 0))
        weight = jnp.where(weight > 0, weight, 1)
        scale = jnp.sum(chosen.valid) / weight
        weights = [w * scale.astype(w.dtype) for w in chosen.weights]
        grads = examples.combine(weights, chosen.valid)
        value = jnp.sum(jnp.where(chosen.valid, examples.losses, 0)) / weight
        return SubsetGradient(
            value=jnp.where(jnp.any(chosen.valid) | ~jnp.any(mask), value, jnp.nan),
            grads=jax.tree.unflatten(jax.tree.structure(params), grads),
            model_state=None,
            grad_stats=_stats(sum(examples.grams) * scale**2, chosen.valid),
            gradient_noise=None,
            selected=chosen.selected,
            selected_fraction=chosen.selected_fraction,
            num_selected=chosen.num_selected,
            num_skipped=chosen.num_skipped,
        )

    return gradient_fn


def _stats(gram: jax.Array, valid: jax.Array) -> GradStats:
    # Every second valid row first, the others last: two halves with equal shares of them.
    second = jnp.cumsum(valid) % 2 == 0
    order = jnp.argsort(jnp.where(valid, 2 * second, 1))
    gram, valid = gram[order][:, order], valid[order]
    gram = jnp.where(valid[:, None] & valid[None, :], gram, 0)
    return stats_from_gram(gram, valid.astype(gram.dtype))


def _refuse_model_state(loss_fn: LossFn) -> None:
    try:
        parameters = inspect.signature(loss_fn).parameters.values()
    except (TypeError, ValueError):  # some callables have no signature
        return
    required = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) > 2:
        raise ValueError(
            f"loss_fn must be loss_fn(params, batch), got one of ({', '.join(required)}). "
            f"{_gram.BATCH_NORM}"
        )
