"""AdaBatch: multiply the batch size every few epochs, and lower the learning rate with it.

Devarakonda, Naumov and Garland (2017), "AdaBatch: Adaptive Batch Sizes for Training Deep Neural
Networks", arXiv:1712.02029.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _validate
from arbiter_jax._count import to_count
from arbiter_jax.schedulers._from_schedule import scheduled


def adabatch(
    dataset_size: int,
    *,
    epochs: float = 20,
    factor: float = 2.0,
    min_batch_size: int = 8,
    max_batch_size: int = 512,
    initial_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the batch size by a factor every k epochs (AdaBatch).

    .. math:: B = B_0 a^{\lfloor n / (k N) \rfloor}

    with n the number of examples seen, N those of the data set, a = 2. Published together with a
    learning rate that is multiplied by 0.75 at the same moments: :func:`adabatch_learning_rate`.

    Args:
      dataset_size: N, number of training examples, an integer >= 1.
      epochs: k, epochs between two changes, > 0.
      factor: a, what the size is multiplied by, > 0.
      min_batch_size: Smallest batch size, an integer >= 1.
      max_batch_size: Largest batch size, an integer >= min_batch_size.
      initial_batch_size: B_0, in [min_batch_size, max_batch_size]; the smallest if None.

    Returns:
      A transformation that returns the updates unchanged. `update` reads `num_examples`, the
      examples before this step, and `batch_size` if they are given; your own loop under
      `optax.MultiSteps` has to pass them, see :func:`from_schedule`.

    Raises:
      ValueError: If an argument is out of its range.

    Reference:
      Devarakonda, Naumov and Garland, "AdaBatch: Adaptive Batch Sizes for Training Deep Neural
      Networks", arXiv:1712.02029.

    *Guarantees*:
      * Updates unchanged: they pass through as they are.
      * Stays in range: the size is an integer of [min_batch_size, max_batch_size].

    >>> import arbiter_jax as aj, optax
    >>> rule = aj.schedulers.adabatch(1_000, epochs=1, initial_batch_size=100)
    >>> _, state = rule.update({"w": 1.0}, rule.init({"w": 0.0}), batch_size=999)
    >>> _, later = rule.update({"w": 1.0}, state, batch_size=1)
    >>> int(state.batch_size), int(later.batch_size)
    (100, 200)
    """
    interval = _interval(dataset_size, epochs)
    ratio = _validate.positive(factor=factor)
    low, high, start = _validate.batch_size_range(
        min_batch_size, max_batch_size, initial_batch_size
    )
    return scheduled(
        lambda num_examples: start * ratio ** (num_examples // interval),
        count="num_examples",
        min_batch_size=low,
        max_batch_size=high,
    )


def adabatch_learning_rate(
    learning_rate: float, dataset_size: int, *, epochs: float = 20, factor: float = 0.75
) -> optax.Schedule:
    r"""The learning rate that goes with :func:`adabatch`, a schedule of the examples seen.

    .. math:: lr = lr_0 \cdot 0.75^{\lfloor n / (k N) \rfloor}

    Args:
      learning_rate: lr_0, the rate at the start, >= 0.
      dataset_size: N, number of training examples, an integer >= 1.
      epochs: k, epochs between two changes, > 0.
      factor: What the rate is multiplied by, > 0. It goes on when the size has reached its
        largest.

    Returns:
      A function of the examples seen, not of steps, of which an epoch has fewer and fewer: use it as
      `aj.learning_rate.scale_by_schedule(rate)` behind an optimizer with a rate of 1.

    Raises:
      ValueError: If an argument is out of its range.

    >>> rate = adabatch_learning_rate(0.1, 1_000, epochs=1)
    >>> [round(float(rate(n)), 3) for n in (0, 999, 1_000, 2_000)]
    [0.1, 0.1, 0.075, 0.056]
    """
    start = _validate.non_negative(learning_rate=learning_rate)
    interval = _interval(dataset_size, epochs)
    ratio = _validate.positive(factor=factor)
    return lambda num_examples: start * ratio ** (to_count(num_examples) // interval)


def _interval(dataset_size: int, epochs: float) -> Any:
    size = _validate.count(dataset_size=dataset_size)
    epochs = _validate.positive(epochs=epochs)
    if isinstance(size, jax.Array) or isinstance(epochs, jax.Array):
        whole = jnp.floor(epochs)  # apart: float32 does not hold every product
        rest = jnp.round(size * (epochs - whole)).astype(jnp.int32)
        steps = jnp.maximum(size * whole.astype(jnp.int32) + rest, 1)
        largest = _validate.LARGEST_INT32
        return jnp.where(size * epochs < largest, steps, largest)
    interval = max(1, round(size * epochs))
    if interval > _validate.LARGEST_COUNT:
        raise ValueError(
            f"epochs * dataset_size must be <= {_validate.LARGEST_COUNT}, got epochs={epochs!r} and "
            f"dataset_size={dataset_size!r}."
        )
    return interval
