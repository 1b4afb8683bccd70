"""Loss and accuracy of a model on a split, and confidence intervals over seeds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arbiter_jax import _validate
from arbiter_jax.base import PyTree, WeightedLoss
from arbiter_jax.batching import batch_mask, masked_mean, num_rows, total_weight


class Metrics(NamedTuple):
    """Means over all examples of a split."""

    loss: float  # weighted if the loss is a `WeightedLoss`
    accuracy: float  # fraction of labels that are the largest output; nan if not a classification


@functools.partial(jax.jit, static_argnames=("predict", "per_example_loss", "chunk_size"))
def _evaluate(predict, per_example_loss, params, data, model_state, chunk_size):
    n = num_rows(data)
    num_chunks = -(-n // chunk_size)

    def chunk(start):
        rows = jnp.minimum(start + jnp.arange(chunk_size), n - 1)
        inputs, labels = jax.tree.map(lambda x: x[rows], data)
        mask = batch_mask(n - start, chunk_size)
        state = () if model_state is None else (model_state,)
        outputs = predict(params, inputs, *state)
        losses = per_example_loss(outputs, labels)
        weight = total_weight(losses, mask)
        correct = jnp.nan
        if jnp.ndim(outputs) == jnp.ndim(labels) + 1 and jnp.issubdtype(labels.dtype, jnp.integer):
            hits = jnp.argmax(outputs, -1) == labels
            correct = masked_mean(hits.astype(jnp.float32), mask) * jnp.sum(mask)
        return masked_mean(losses, mask) * weight, weight, correct

    losses, weights, correct = jax.lax.map(chunk, chunk_size * jnp.arange(num_chunks))
    return jnp.sum(losses) / jnp.sum(weights), jnp.sum(correct) / n


def evaluate(
    predict: Callable[..., PyTree],
    per_example_loss: Callable[[PyTree, PyTree], jax.Array | WeightedLoss],
    params: PyTree,
    data: PyTree,
    model_state: PyTree = None,
    chunk_size: int = 1024,
) -> Metrics:
    """Computes mean loss and accuracy over a whole split, one chunk at a time.

    Labels are classes if they are integers and the outputs have one more axis; otherwise the
    accuracy is nan.

    Args:
      predict: ``predict(params, inputs) -> outputs``, with a third argument `model_state` if that
        is not None.
      per_example_loss: ``(outputs, labels) -> float[M]``, or a
        :class:`arbiter_jax.base.WeightedLoss`.
      params: Parameters.
      data: ``(inputs, labels)``, arrays with leading axes of equal length.
      model_state: State of the model, or None.
      chunk_size: Number of examples per call of `predict`, an integer >= 1.

    Returns:
      :class:`Metrics`.

    Raises:
      ValueError: If the split is empty or chunk_size is not an integer >= 1.

    >>> data = (jnp.eye(3), jnp.array([0, 1, 1]))
    >>> squares = lambda outputs, labels: jnp.sum(outputs**2, axis=-1)
    >>> evaluate(lambda params, x: params * x, squares, 2.0, data, chunk_size=2)
    Metrics(loss=4.0, accuracy=0.666...)
    """
    chunk_size = _validate.integer(chunk_size=chunk_size, minimum=1)
    chunk_size = min(chunk_size, num_rows(data))
    loss, accuracy = _evaluate(predict, per_example_loss, params, data, model_state, chunk_size)
    return Metrics(float(loss), float(accuracy))


def mean_and_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The mean over seeds and the half-width of its Student's t confidence interval.

    Args:
      values: One value per seed, at least one.
      confidence: Probability that the interval contains the true mean, in (0, 1).

    Returns:
      (mean, half_width); half_width is nan for a single value.

    Raises:
      ValueError: If there is no value, or confidence is not in (0, 1).

    >>> mean, half_width = mean_and_interval([1.0, 2.0, 3.0])
    >>> mean, round(half_width, 3)
    (2.0, 2.484)
    """
    from scipy import stats  # a dependency of JAX; slow to import and needed only here

    _validate.in_range(0, 1, closed="neither", confidence=confidence)
    sample = np.asarray(values, float)
    if not len(sample):
        raise ValueError("values must hold at least one value, got none.")
    mean = float(np.mean(sample))
    if len(sample) < 2:
        return mean, math.nan
    quantile = stats.t.ppf((1 + confidence) / 2, len(sample) - 1)
    return mean, float(quantile * np.std(sample, ddof=1) / math.sqrt(len(sample)))
