"""Loss and accuracy of a model on a split, and confidence intervals over seeds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arbiter_jax import _validate
from arbiter_jax.base import PyTree, WeightedLoss
from arbiter_jax.batching import batch_mask, masked_mean
from arbiter_jax.batching._masking import num_rows, total_weight

__all__ = ["Metrics", "evaluate", "mean_and_interval"]


class Metrics(NamedTuple):
    """Means over all examples of a split."""

    loss: float  # weighted if the loss is a `WeightedLoss`
    accuracy: float  # fraction of labels that are the largest output; nan if not a classification


@functools.partial(jax.jit, static_argnames=("predict", "per_example_loss", "chunk_size"))
def _sums(predict, per_example_loss, params, data, model_state, chunk_size):
    """Per chunk: sum of the weighted losses, of their weights, of the hits, and of theirs."""
    n = num_rows(data)
    num_chunks = -(-n // chunk_size)

    def chunk(start):
        rows = jnp.minimum(start + jnp.arange(chunk_size), n - 1)
        inputs, labels = jax.tree.map(lambda x: x[rows], data)
        mask = batch_mask(n - start, chunk_size)
        state = () if model_state is None else (model_state,)
        outputs = predict(params, inputs, *state)
        losses = per_example_loss(outputs, labels)
        _check_losses(losses, labels, chunk_size)
        weight = total_weight(losses, mask)
        correct = count = jnp.nan
        if _are_classes(outputs, labels):
            # To argmax a nan is the largest of all.
            hits = (jnp.argmax(outputs, -1) == labels) & ~jnp.isnan(outputs).any(-1)
            hits = WeightedLoss(hits.astype(jnp.float32), _label_weights(losses, labels))
            count = total_weight(hits, mask)
            correct = masked_mean(hits, mask) * count
        return masked_mean(losses, mask) * weight, weight, correct, count

    return jax.lax.map(chunk, chunk_size * jnp.arange(num_chunks))


def _are_classes(outputs: PyTree, labels: PyTree) -> bool:
    """Whether there is one score per class, outputs [..., C], for each of the integer labels [...]."""
    return (
        isinstance(outputs, jax.Array)
        and isinstance(labels, jax.Array)
        and jnp.issubdtype(labels.dtype, jnp.integer)
        and outputs.ndim > 0
        and outputs.shape[:-1] == labels.shape
    )


def _label_weights(losses: jax.Array | WeightedLoss, labels: jax.Array) -> jax.Array:
    """The weight of each label in the loss: of its token, or else of its example; 1 without any."""
    ones = jnp.ones(labels.shape, jnp.float32)
    if not isinstance(losses, WeightedLoss):
        return ones
    weights = jnp.broadcast_to(losses.weights, losses.losses.shape)
    if weights.shape != labels.shape[: weights.ndim]:
        return ones
    return ones * weights.reshape(weights.shape + (1,) * (labels.ndim - weights.ndim))


def _check_losses(losses: Any, labels: PyTree, num_examples: int) -> None:
    """Raises unless there is a loss per example, or one per label, which broadcasting may hide."""
    expected = (
        f"per_example_loss must return one loss per example, float[{num_examples}], or an "
        "arbiter_jax.base.WeightedLoss"
    )
    if isinstance(losses, WeightedLoss):
        values, weights = jnp.shape(losses.losses), jnp.shape(losses.weights)
        fits = len(values) == len(weights) and all(
            w in (1, n) for w, n in zip(weights, values, strict=True)
        )
        if not fits or values[:1] != (num_examples,):
            raise ValueError(
                f"{expected} whose losses and weights have the same shape, with one row for each of "
                f"the {num_examples} examples, got losses {values} and weights {weights}."
            )
        return
    if not isinstance(losses, jax.Array):
        raise ValueError(f"{expected}, got {type(losses).__name__}.")
    per_label = isinstance(labels, jax.Array) and losses.shape == labels.shape
    if losses.shape != (num_examples,) and not per_label:
        raise ValueError(
            f"{expected}, got shape {losses.shape}: take the mean over all axes but the first, and "
            "compare outputs and labels of the same shape."
        )


def evaluate(
    predict: Callable[..., PyTree],
    per_example_loss: Callable[[PyTree, PyTree], jax.Array | WeightedLoss],
    params: PyTree,
    data: PyTree,
    model_state: PyTree = None,
    chunk_size: int = 1024,
) -> Metrics:
    """Computes mean loss and accuracy over a whole split, one chunk at a time.

    Labels are classes if they are one array of integers, [...], and the outputs one array [..., C];
    otherwise the accuracy is nan. A label counts in the accuracy with its weight in the loss: padding
    tokens do not count. Outputs with a nan are wrong for every label.

    Args:
      predict: ``predict(params, inputs) -> outputs``, with a third argument `model_state` if that
        is not None.
      per_example_loss: ``(outputs, labels) -> float[M]``, a loss per label in the shape of the
        labels, or a :class:`arbiter_jax.base.WeightedLoss`.
      params: Parameters.
      data: ``(inputs, labels)``, two arrays or pytrees of arrays, with leading axes of equal length.
      model_state: State of the model, or None.
      chunk_size: Number of examples per call of `predict`, an integer >= 1.

    Returns:
      :class:`Metrics`. A loss that is not finite makes the mean nan or infinite, and so do weights
      that are all 0.

    Raises:
      ValueError: If the split is empty, or not a pair of numbers; if the losses have another form; or
        if chunk_size is not an integer >= 1.

    >>> data = (jnp.eye(3), jnp.array([0, 1, 1]))
    >>> squares = lambda outputs, labels: jnp.sum(outputs**2, axis=-1)
    >>> evaluate(lambda params, x: params * x, squares, 2.0, data, chunk_size=2)
    Metrics(loss=4.0, accuracy=0.666...)
    """
    chunk_size = _validate.integer(chunk_size=chunk_size, minimum=1)
    for name, function in (("predict", predict), ("per_example_loss", per_example_loss)):
        if not callable(function):
            raise ValueError(f"{name} must be a function, got {function!r}.")
    check_split(data)
    chunk_size = min(chunk_size, num_rows(data))
    sums = _sums(predict, per_example_loss, params, tuple(data), model_state, chunk_size)
    # Sums over chunks in float64, on the host: float32 counts exactly only up to 2^24.
    loss, weight, correct, count = (float(np.sum(np.asarray(x, np.float64))) for x in sums)
    return Metrics(_ratio(loss, weight), _ratio(correct, count))


def check_split(data: Any) -> None:
    """Raises a ValueError unless this is a pair (inputs, labels) of numbers with rows."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise ValueError(
            "data must be a pair (inputs, labels), each an array or a pytree of arrays, got "
            f"{_described(data)}."
        )
    num_rows(data)
    for leaf in jax.tree.leaves(data):
        dtype = getattr(leaf, "dtype", None)
        if getattr(dtype, "kind", "") in "OSUMm":
            raise ValueError(f"data must be arrays of numbers, got dtype {dtype}.")


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _described(data: Any) -> str:
    if isinstance(data, Mapping):
        return f"a mapping with keys {list(data)}"
    if isinstance(data, tuple | list):
        return f"{len(data)} parts"
    return type(data).__name__


def mean_and_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The mean over seeds and the half-width of its Student's t confidence interval.

    Args:
      values: One value per seed, at least one.
      confidence: Probability that the interval contains the true mean, in (0, 1).

    Returns:
      (mean, half_width); half_width is nan for a single value.

    Raises:
      ValueError: If there is no value, they are not numbers, or confidence is not in (0, 1).

    >>> mean, half_width = mean_and_interval([1.0, 2.0, 3.0])
    >>> mean, round(half_width, 3)
    (2.0, 2.484)
    """
    from scipy import stats  # a dependency of JAX; slow to import and needed only here

    _validate.in_range(0, 1, closed="neither", confidence=confidence)
    try:
        sample = np.asarray(values, float)
    except (TypeError, ValueError):
        sample = np.asarray(math.nan)
    if sample.ndim != 1:
        raise ValueError(f"values must be numbers, one per seed, got {values!r}.")
    if not len(sample):
        raise ValueError("values must hold at least one value, got none.")
    mean = float(np.mean(sample))
    if len(sample) < 2:
        return mean, math.nan
    quantile = stats.t.ppf((1 + confidence) / 2, len(sample) - 1)
    return mean, float(quantile * np.std(sample, ddof=1) / math.sqrt(len(sample)))
