"""Dynamic Batch Adaptation for the training loop: gradients over a selected subset of each batch."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp

from arbiter_jax import _validate
from arbiter_jax.base import GradStats, LossFn, PyTree
from arbiter_jax.batching._masking import num_rows, replace_padding
from arbiter_jax.gradients import GradientFn, Trainable
from arbiter_jax.gradients._counted import counted_leaves
from arbiter_jax.gradients._estimators import stats_from_gram
from arbiter_jax.subset_selection import _gram, _prefixes
from arbiter_jax.subset_selection._prefixes import Groups, Metric, Order
from arbiter_jax.subset_selection._select_subset import check_arguments


class SubsetGradient(NamedTuple):
    """A gradient over selected examples, with the fields of :class:`arbiter_jax.gradients.Gradient`.

    Layers are in the order of :func:`group_names`.
    """

    value: jax.Array  # shape=(), dtype=float, mean loss of the real and finite examples, or nan
    grads: PyTree  # like the parameters
    model_state: PyTree  # None
    grad_stats: GradStats  # of the same examples, exact: from their inner products
    gradient_noise: PyTree  # None
    selected: jax.Array  # shape=(num_groups, n), dtype=bool
    selected_fraction: jax.Array  # shape=(num_groups,), dtype=float32, of the real examples
    num_selected: jax.Array  # shape=(num_groups,), dtype=int32
    num_skipped: jax.Array  # shape=(), dtype=int32, real examples that are not finite

    metrics = ("selected_fraction",)


def subset_gradients(
    loss_fn: LossFn,
    metric: Metric = "signal_to_noise",
    min_size: int = 1,
    *,
    groups: Groups = "module",
    order: Order = "distance",
    factorize: bool = True,
    max_bytes: int = 2**28,
    trainable: Trainable = None,
) -> GradientFn:
    r"""Replaces the gradient of a loss by the mean over the best subset, layer by layer.

    The result is that of :func:`dynamic_batch_adaptation`, but without per-example gradients: a
    parameter of a dense or convolutional layer with inputs :math:`x_i` and errors :math:`d_i` has

    .. math::
      \langle g_i, g_j \rangle = \sum (x_i x_j^\top) \circ (d_i d_j^\top), \qquad
      u = \frac{1}{|S|} \sum_{i \in S} x_i^\top d_i.

    Inputs and errors are found in the traced loss, so any model will do, in Flax or not. They are
    used for each parameter that enters exactly one operation. The gradients of the other parameters
    are formed for each example: shared parameters, and all parameters if the loss contains a penalty
    on them (let the optimizer decay the weights instead).

    ``StepInfo.metrics`` reports ``selected_fraction``, the fraction of the real examples that each
    layer selected, in the order of :func:`group_names`.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``, or a
        :class:`arbiter_jax.WeightedLoss`. It is called with batches of one example.
      metric: See :func:`select_subset`.
      min_size: Minimum number of examples in a subset, an integer >= 1.
      groups: Which parameters form a layer: see :func:`group_names`.
      order: See :func:`select_subset`.
      factorize: False to form the gradients of all parameters for each example.
      max_bytes: Bound on the memory of per-example gradients, an integer >= 1, in bytes; those of
        two examples are always formed. Beyond it, gradients are formed in blocks, once per pair of
        blocks.
      trainable: The parameters that `grad_stats` is about, as in
        :func:`arbiter_jax.gradients.value_grad_and_stats`; all if None.

    Returns:
      ``gradient_fn(params, batch, mask=None) -> SubsetGradient``, for ``aj.fit``,
      ``aj.run_window`` or your own loop.

    Raises:
      ValueError: If an argument is out of its range; if the loss takes a model state, as that of a
        BatchNorm model does; when called, if the parameters hold the statistics of a BatchNorm, or a
        Linen BatchNorm normalizes over the batch.

    Reference:
      Simionescu et al., 2022, https://arxiv.org/abs/2208.00815

    >>> import arbiter_jax as aj, jax, jax.numpy as jnp
    >>> loss_fn = lambda w, batch: (batch[0] @ w - batch[1]) ** 2
    >>> batch = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), jnp.array([1.0, 1.0, -9.0])
    >>> gradient = jax.jit(aj.subset_gradients(loss_fn))(jnp.zeros(2), batch)
    >>> gradient.selected.tolist(), [round(float(g), 3) for g in gradient.grads]
    ([[True, True, False]], [-2.0, -0.1])

    *Guarantees*
      - equals :func:`dynamic_batch_adaptation` on per-example gradients, up to rounding;
      - masked examples, and examples whose loss or gradient is not finite, change nothing;
      - with ``min_size`` at least n, the gradient is that of the mean loss.
    """
    min_size = check_arguments(metric, min_size, order, groups)
    max_bytes = _validate.integer(max_bytes=max_bytes, minimum=1)
    _validate.function("loss_fn(params, batch) -> float[M]", loss_fn=loss_fn)
    _validate.boolean(factorize=factorize)
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
        selection = _prefixes.select_by_group(
            examples.grams, names, mask, finite, metric=metric, order=order, min_size=min_size
        )
        counts = counted_leaves(params, trainable) or [True] * len(examples.grams)
        counted = [gram for gram, c in zip(examples.grams, counts, strict=True) if c]
        # The gradient of a weighted mean is the mean gradient divided by the mean weight.
        weight = jnp.sum(jnp.where(selection.valid, examples.weights, 0))
        weight = jnp.where(weight > 0, weight, 1)
        scale = jnp.sum(selection.valid) / weight
        weights = [w * scale.astype(w.dtype) for w in selection.weights]
        grads = examples.combine(weights, selection.valid)
        value = jnp.sum(jnp.where(selection.valid, examples.losses, 0)) / weight
        return SubsetGradient(
            value=jnp.where(jnp.any(selection.valid) | ~jnp.any(mask), value, jnp.nan),
            grads=jax.tree.unflatten(jax.tree.structure(params), grads),
            model_state=None,
            grad_stats=_stats(sum(counted) * scale**2, selection.valid),
            gradient_noise=None,
            selected=selection.selected,
            selected_fraction=selection.selected_fraction,
            num_selected=selection.num_selected,
            num_skipped=selection.num_skipped,
        )

    return gradient_fn


def _stats(gram: jax.Array, valid: jax.Array) -> GradStats:
    # Split the valid rows evenly between the two halves: every second one first, the others last.
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
            f"loss_fn must take (params, batch), got one that takes ({', '.join(required)}). "
            f"{_gram.BATCH_NORM}"
        )
