"""Gradients that come with statistics of their noise.

The batch is split into pieces whose gradients are computed one after the other, one per device, or
one per example; `_estimators` compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arbiter_jax import _validate
from arbiter_jax._numerics import (
    at_least_float32,
    check_parameters,
    conjugate,
    tree_dot,
    tree_where,
)
from arbiter_jax.base import GradStats, LossFn, PyTree
from arbiter_jax.batching import (
    masked_mean,
    num_data_devices,
    num_rows,
    replace_padding,
    total_weight,
)
from arbiter_jax.gradients._estimators import (
    real_parts,
    scaled,
    stats_from_norms,
    stats_from_pieces,
)
from arbiter_jax.gradients._joined import (
    has_rows,
    joined_aux,
    joined_aux_of_devices,
    mean_of_devices,
    times,
    weighted_mean,
)
from arbiter_jax.gradients._masked import (
    Gradient,
    GradientFn,
    call_loss,
    masked_value_and_grad,
    value_grad_and_weight,
)
from arbiter_jax.gradients._normalization_stats import normalization_stats

Trainable = Any  # a pytree of bools, a function of the parameters that returns one, or None


def _split(tree: PyTree, num_pieces: int, piece: int, contiguous: bool) -> PyTree:
    def rows(x):
        if contiguous:
            return x.reshape((num_pieces, -1, *x.shape[1:]))[piece]
        # Dealt out in turn: where the real examples come first, every piece gets its share.
        if x.shape[0] % num_pieces:
            return x[piece::num_pieces]
        return x.reshape((-1, num_pieces, *x.shape[1:]))[:, piece]

    return jax.tree.map(rows, tree)


def counted_leaves(params: PyTree, trainable: Trainable) -> list[bool] | None:
    """Whether the statistics are about each leaf of the parameters; None if about all."""
    given = trainable(params) if callable(trainable) else trainable
    if given is None:
        return None
    spread = lambda counts, part: [counts] * len(jax.tree.leaves(part))
    try:
        counts: Any = jax.tree.leaves(jax.tree.map(spread, given, params))
    except (TypeError, ValueError):  # of another structure
        counts = [None]
    if not all(isinstance(x, (bool, np.bool_)) for x in counts) or not any(counts):
        raise ValueError(
            "trainable must be a pytree of bools like params, or a prefix of it, at least one of "
            f"them True, or a function of params that returns one, got {given!r}."
        )
    return None if all(counts) else counts


def _counted(tree: PyTree, counts: list[bool] | None) -> PyTree:
    """The leaves that the statistics are about, of a tree like the parameters, or None."""
    if counts is None or tree is None:
        return tree
    return [x for x, counted in zip(jax.tree.leaves(tree), counts, strict=True) if counted]


def _zero_others(tree: PyTree, counts: list[bool] | None) -> PyTree:
    """The tree with zeros for the leaves that the statistics are not about."""
    if counts is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    kept = [x if c else jnp.zeros_like(x) for x, c in zip(leaves, counts, strict=True)]
    return jax.tree.unflatten(structure, kept)


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
        return _per_example_stats(loss_fn, micro_batch_size, trainable, has_aux)
    if axis_name is not None:
        return _per_device_stats(loss_fn, axis_name, trainable, has_aux)
    weighted = value_grad_and_weight(loss_fn, has_aux)

    def gradient_fn(params, batch, mask, model_state=None, key=None, preconditioner=None):
        counts = counted_leaves(params, trainable)
        factors = _counted(preconditioner, counts)
        k = min(num_pieces, mask.shape[0])
        # Here, not piece by piece: an empty piece has no real row that could stand in for padding.
        if not sampled:
            batch = replace_padding(batch, mask)
        if k == 1:  # a single row has no spread
            out = weighted(params, batch, mask, model_state, key)[0]
            sizes = jnp.ones(1)
            stats = stats_from_pieces([_counted(out.grads, counts)], sizes, factors)
            nan = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), out.grads)
            return out._replace(grad_stats=stats, gradient_noise=_zero_others(nan, counts))
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
        stats = stats_from_pieces([_counted(g, counts) for g in piece_grads], sizes, factors)
        noise = None
        if k == 2:
            unequal = jnp.sqrt(sizes[0] * sizes[1]) / jnp.sum(sizes)
            unequal = jnp.where(unequal > 0, unequal, jnp.nan)
            noise = jax.tree.map(
                lambda a, b: times(at_least_float32(a) - b, unequal).astype(a.dtype), *piece_grads
            )
            noise = _zero_others(noise, counts)
        aux = None
        if has_aux:
            rows = [len(range(j, mask.shape[0], k)) for j in range(k)]
            with_rows = has_rows(loss_fn, auxes, rows, *whole)
            aux = joined_aux(auxes, weights, with_rows, contiguous)
        return Gradient(value, grads, model_state, stats, noise, aux)

    return gradient_fn


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


def _per_example_stats(
    loss_fn: LossFn, micro_batch_size: int, trainable: Trainable, has_aux: bool
) -> GradientFn:
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
        factors = _counted(preconditioner, counts)
        scale = lambda g: scaled(_counted(g, counts), factors)
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


def _per_device_stats(
    loss_fn: LossFn, axis_name: str, trainable: Trainable, has_aux: bool
) -> GradientFn:
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
        grad, mean = (_counted(g, counts) for g in (mine[1], grads))
        factors = _counted(preconditioner, counts)
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
