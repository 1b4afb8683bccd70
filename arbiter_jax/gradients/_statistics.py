"""Gradients that come with statistics of their noise.

Here the batch is split into pieces whose gradients are computed one after the other. The other
methods have files of their own, and `_estimators` makes the statistics of what each of them finds.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from arbiter_jax import _validate
from arbiter_jax._numerics import at_least_float32, tree_where
from arbiter_jax.base import GradStats, LossFn, PyTree
from arbiter_jax.batching._masking import num_rows, replace_padding
from arbiter_jax.batching._rows import num_data_devices
from arbiter_jax.gradients._counted import Trainable, counted_leaves, only_counted, zero_others
from arbiter_jax.gradients._estimators import stats_from_pieces
from arbiter_jax.gradients._joined import has_rows, joined_aux, times, weighted_mean
from arbiter_jax.gradients._masked import Gradient, GradientFn, value_grad_and_weight
from arbiter_jax.gradients._normalization_stats import normalization_stats
from arbiter_jax.gradients._per_device import per_device_stats
from arbiter_jax.gradients._per_example import per_example_stats


def _split(tree: PyTree, num_pieces: int, piece: int, contiguous: bool) -> PyTree:
    def rows(x):
        if contiguous:
            return x.reshape((num_pieces, -1, *x.shape[1:]))[piece]
        # Dealt out in turn: where the real examples come first, every piece gets its share.
        if x.shape[0] % num_pieces:
            return x[piece::num_pieces]
        return x.reshape((-1, num_pieces, *x.shape[1:]))[:, piece]

    return jax.tree.map(rows, tree)


def value_grad_and_stats(
    loss_fn: LossFn,
    *,
    method: str = "pieces",
    num_pieces: int = 2,
    micro_batch_size: int = 32,
    sampled: bool = False,
    axis_name: str | None = None,
    trainable: Trainable = None,
    has_aux: bool = False,
) -> GradientFn:
    """A gradient function that estimates the gradient's mean and covariance on the way.

    Args:
      loss_fn: As in :func:`masked_value_and_grad`.
      method: "pieces": the batch is dealt out to `num_pieces` pieces whose gradients are computed
        one after the other and averaged; two halves cost about as much as the whole batch.
        "per_example": one gradient per example, `micro_batch_size` of them in memory at once.
        "per_device": within `shard_map` (or `pmap`), the part of the batch that a device holds is a
        piece; the result is that of the whole batch, the same on all devices. "normalization": from
        the gains of LayerNorm and RMSNorm alone; only ratios of the statistics are nearly those of
        the whole model, which is what `gradient_noise_scale` needs.
      num_pieces: Number of pieces, a power of two >= 2. A bucket of fewer rows has one piece a row.
      micro_batch_size: Per-example gradients held at once, a power of two >= 1.
      sampled: As in :func:`masked_value_and_grad`. The rows of these batches are dealt out already,
        and contiguous pieces need no copy. On a mesh, pass 2 pieces: its batches are dealt out to
        halves.
      axis_name: The mesh axis that the batch is split over, for "per_device".
      trainable: The parameters that the statistics are about: a pytree of bools like the parameters
        or a prefix of it, or a function of the parameters that returns one; all if None. Frozen
        parameters have gradients, too, but their noise moves nothing. Value and gradient are those
        of all parameters; `gradient_noise` is zero for the others.
      has_aux: As in :func:`masked_value_and_grad`. Of several pieces, ``Gradient.aux`` holds leaves
        with one row per example in the order of the batch; the means of other floating-point
        leaves, weighted as the loss is; and the rest as the last piece has it.

    Returns:
      ``gradient_fn(params, batch, mask, model_state=None, key=None, preconditioner=None) ->
      Gradient`` with `grad_stats`, and with `gradient_noise` where there are two pieces: half their
      difference, scaled where they are unequal, so that its covariance is S / B.

    Raises:
      ValueError: For arguments out of range; for a model with state under "per_example" (BatchNorm
        ties the examples of a batch together, so no example has a gradient of its own) and under
        "per_device" (whose states would have to be averaged). When traced, as
        :func:`masked_value_and_grad`, and if `trainable` or the shapes of the auxiliary output do
        not fit.

    *Guarantees*: a masked row changes no bit of the result; value and gradient are those of the
    whole batch.

    >>> gradient_fn = value_grad_and_stats(lambda w, x: (w - x) ** 2 / 2)
    >>> out = gradient_fn(jnp.zeros(()), jnp.array([1.0, 3.0]), jnp.ones(2, bool))
    >>> float(out.grads), float(out.grad_stats.variance_trace), abs(float(out.gradient_noise))
    (-2.0, 2.0, 1.0)
    """
    _validate.one_of(("pieces", "per_example", "per_device", "normalization"), method=method)
    if (axis_name is not None) != (method == "per_device"):
        raise ValueError(
            "axis_name must be given where method is 'per_device', and only there; got "
            f"axis_name={axis_name!r} and method={method!r}."
        )
    if _validate.power_of_two(num_pieces=num_pieces) < 2:
        raise ValueError(f"num_pieces must be a power of two >= 2, got {num_pieces}.")
    _validate.power_of_two(micro_batch_size=micro_batch_size)
    if method == "normalization":
        if trainable is not None or has_aux:
            raise ValueError(
                "method must be 'pieces' with `trainable` or `has_aux`, got 'normalization'."
            )
        return normalization_stats(loss_fn)
    if method == "per_example":
        return per_example_stats(loss_fn, micro_batch_size, trainable, has_aux)
    if axis_name is not None:
        return per_device_stats(loss_fn, axis_name, trainable, has_aux)
    weighted = value_grad_and_weight(loss_fn, has_aux)

    def gradient_fn(params, batch, mask, model_state=None, key=None, preconditioner=None):
        counts = counted_leaves(params, trainable)
        factors = only_counted(preconditioner, counts)
        k = min(num_pieces, mask.shape[0])
        # Here, not piece by piece: an empty piece has no real row that could stand in for padding.
        if not sampled:
            batch = replace_padding(batch, mask)
        if k == 1:  # a single row has no spread
            out = weighted(params, batch, mask, model_state, key)[0]
            sizes = jnp.ones(1)
            stats = stats_from_pieces([only_counted(out.grads, counts)], sizes, factors)
            nan = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), out.grads)
            return out._replace(grad_stats=stats, gradient_noise=zero_others(nan, counts))
        pieces, auxes, weights = [], [], []
        contiguous = sampled and num_data_devices() == 1  # see `batching.interleaved`
        whole = params, batch, mask, model_state, key
        for j in range(k):
            piece_key = None if key is None else jax.random.fold_in(key, j)
            rows, real = _split((batch, mask), k, j, contiguous)
            out, weight = weighted(params, rows, real, model_state, piece_key)
            piece = (out.value, out.grads)  # exactly zero for an empty piece, but for BatchNorm:
            if model_state is not None:  # statistics of nothing are 0 / 0
                zeros = jax.tree.map(jnp.zeros_like, piece)
                piece = tree_where(weight > 0, piece, zeros)
                model_state = tree_where(weight > 0, out.model_state, model_state)
            pieces.append(piece)
            auxes.append(out.aux)
            weights.append(weight)
        weights = jnp.stack(weights)
        value, grads = weighted_mean(pieces, weights)
        piece_grads = [piece[1] for piece in pieces]
        # In examples, also where a loss weighs its examples.
        sizes = jnp.sum(mask) * weights / jnp.maximum(jnp.sum(weights), 1e-30)
        stats = stats_from_pieces([only_counted(g, counts) for g in piece_grads], sizes, factors)
        noise = None
        if k == 2:
            unequal = jnp.sqrt(sizes[0] * sizes[1]) / jnp.sum(sizes)
            unequal = jnp.where(unequal > 0, unequal, jnp.nan)
            noise = jax.tree.map(
                lambda a, b: times(at_least_float32(a) - b, unequal).astype(a.dtype), *piece_grads
            )
            noise = zero_others(noise, counts)
        aux = None
        if has_aux:
            rows = [len(range(j, mask.shape[0], k)) for j in range(k)]
            with_rows = has_rows(loss_fn, auxes, rows, *whole)
            aux = joined_aux(auxes, weights, with_rows, contiguous)
        return Gradient(value, grads, model_state, stats, noise, aux)

    return gradient_fn


def _is_boolean(mask: Any) -> bool:
    return hasattr(mask, "dtype") and jnp.issubdtype(mask.dtype, jnp.bool)


def _check_preconditioner(preconditioner: PyTree, params: PyTree) -> None:
    def fits(factor: Any, leaf: Any) -> bool:
        return not isinstance(factor, str) and jnp.shape(factor) in ((), jnp.shape(leaf))

    same = jax.tree.structure(preconditioner) == jax.tree.structure(params)
    if not same or not all(jax.tree.leaves(jax.tree.map(fits, preconditioner, params))):
        raise ValueError(
            "preconditioner must be a pytree like params, of numbers or of arrays of the same shapes, "
            f"got {jax.tree.map(jnp.shape, preconditioner) if same else 'another structure'}."
        )


def gradient_stats(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    mask: jax.Array | None = None,
    *,
    method: str = "pieces",
    num_pieces: int = 2,
    micro_batch_size: int = 32,
    preconditioner: PyTree | None = None,
    axis_name: str | None = None,
    trainable: Trainable = None,
    has_aux: bool = False,
) -> GradStats:
    r"""Estimates :math:`|G|^2` and :math:`tr S` of the per-example gradients from one batch.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``.
      params: Parameters of the model.
      batch: Pytree of arrays [M, ...]; with "per_example", M is a multiple of micro_batch_size, or
        at most that.
      mask: bool[M], True for a real example; all of them if None.
      method: "pieces" (no per-example gradients), "per_example" (exact, and slower),
        "per_device" (within `shard_map`, where each device holds a piece of the batch already), or
        "normalization" (of the gains of LayerNorm and RMSNorm alone).
      num_pieces: Number of pieces, a power of two >= 2. More of them make a better estimate.
      micro_batch_size: Per-example gradients held in memory at once, a power of two >= 1.
      preconditioner: Optional pytree like params that multiplies every gradient first.
      axis_name: The mesh axis that the batch is split over, for "per_device".
      trainable: The parameters that the statistics are about, as in :func:`value_grad_and_stats`:
        those that the optimizer moves, if it leaves some as they are. All if None.
      has_aux: Whether `loss_fn` returns ``(float[M], aux)``.

    Returns:
      A :class:`GradStats` of scalars; NaN for a batch of one example.

    Raises:
      ValueError: If an argument is out of its range.

    Reference:
      McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv:1812.06162, A.1.

    *Guarantees*: both estimates are unbiased, for pieces of unequal sizes too; padding contributes
    exactly zero. The weights of a :class:`WeightedLoss` are read as counts, such as those of tokens. If
    they are importances instead, pieces of few examples and "per_example" take some of the noise for
    signal; two halves of a large batch do not.

    >>> stats = gradient_stats(lambda w, x: (w - x) ** 2 / 2, 0.0, jnp.array([1.0, 3.0]))
    >>> float(stats.variance_trace), float(stats.mean_sq_norm)  # of the gradients -1 and -3
    (2.0, 3.0)
    """
    fn = value_grad_and_stats(
        loss_fn,
        method=method,
        num_pieces=num_pieces,
        micro_batch_size=micro_batch_size,
        axis_name=axis_name,
        trainable=trainable,
        has_aux=has_aux,
    )
    num_examples = num_rows(batch, "batch")
    if mask is None:
        mask = jnp.ones(num_examples, bool)
    elif jnp.shape(mask) != (num_examples,) or not _is_boolean(mask):
        raise ValueError(
            f"mask must be bool[{num_examples}], one entry per row of batch, got "
            f"{_validate.shown(mask)}: weights of the examples go in an aj.WeightedLoss."
        )
    if preconditioner is not None:
        _check_preconditioner(preconditioner, params)
    gradient = fn(params, batch, mask, preconditioner=preconditioner)
    return gradient.grad_stats
