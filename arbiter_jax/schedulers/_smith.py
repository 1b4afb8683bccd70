"""Increase the batch size when a step schedule would divide the learning rate.

Smith, Kindermans, Ying and Le (2018), "Don't Decay the Learning Rate, Increase the Batch Size",
arXiv:1711.00489.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from arbiter_jax import _validate
from arbiter_jax._count import to_count
from arbiter_jax.schedulers._from_schedule import scheduled


def smith(
    boundaries: Sequence[int],
    dataset_size: int,
    *,
    factor: float = 5.0,
    count: str = "num_examples",
    min_batch_size: int = 8,
    max_batch_size: int = 512,
    initial_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the batch size where a step schedule would divide the learning rate.

    .. math:: B = B_0 a^{\min(m, g)}

    with m the number of boundaries passed and g the growths that fit under N / 10 and
    max_batch_size. The others divide the learning rate instead: :func:`smith_learning_rate`, which
    takes the same arguments.

    Args:
      boundaries: Counts at which a step schedule would divide the learning rate by a, increasing
        integers >= 1.
      dataset_size: N, number of training examples, an integer >= 1.
      factor: a, > 1.
      count: What the boundaries count: "num_steps", "num_examples" or "progress".
      min_batch_size: Smallest batch size, an integer >= 1.
      max_batch_size: Largest batch size, an integer >= min_batch_size.
      initial_batch_size: B_0, in [min_batch_size, max_batch_size]; the smallest if None.

    Returns:
      A transformation that returns the updates unchanged. `update` reads what the boundaries count,
      as in :func:`from_schedule`.

    Raises:
      ValueError: If an argument is out of its range.

    Reference:
      Smith, Kindermans, Ying and Le, "Don't Decay the Learning Rate, Increase the Batch Size",
      ICLR 2018, arXiv:1711.00489.

    *Guarantees*:
      * Updates unchanged: they pass through as they are.
      * Stays in range: the size is an integer of [min_batch_size, max_batch_size].
      * Noise scale falls alike: size over rate is multiplied by a at every boundary.

    >>> import arbiter_jax as aj, optax
    >>> plan = dict(boundaries=(100, 200), dataset_size=4_000, factor=4, initial_batch_size=64)
    >>> rule, rate = aj.schedulers.smith(**plan), aj.schedulers.smith_learning_rate(0.1, **plan)
    >>> state = rule.init({"w": 0.0})
    >>> for n in (0, 100, 200):
    ...     print(int(state.batch_size), round(float(rate(n)), 4))
    ...     _, state = rule.update({"w": 1.0}, state, batch_size=100)
    64 0.1
    256 0.1
    256 0.025
    """
    limits = _validate.batch_size_range(min_batch_size, max_batch_size, initial_batch_size)
    milestones, ratio, growths = _smith_plan(boundaries, dataset_size, factor, limits)
    low, high, start = limits
    _validate.one_of(("num_steps", "num_examples", "progress"), count=count)
    return scheduled(
        lambda n: start * ratio ** jnp.minimum(_passed(milestones, n), growths),
        count=count,
        min_batch_size=low,
        max_batch_size=high,
    )


def smith_learning_rate(
    learning_rate: float,
    boundaries: Sequence[int],
    dataset_size: int,
    *,
    factor: float = 5.0,
    min_batch_size: int = 8,
    max_batch_size: int = 512,
    initial_batch_size: int | None = None,
) -> optax.Schedule:
    r"""The learning rate that goes with :func:`smith`: it falls once the size can grow no further.

    .. math:: lr = lr_0 a^{-\max(m - g, 0)}

    Args:
      learning_rate: lr_0, the rate at the start, >= 0.
      boundaries: As for :func:`smith`, like all that follow.
      dataset_size: N.
      factor: a.
      min_batch_size: Smallest batch size.
      max_batch_size: Largest batch size.
      initial_batch_size: B_0.

    Returns:
      A function of what the boundaries count. If that is steps it is an optax schedule like any
      other; if examples, use it as `aj.learning_rate.scale_by_schedule(rate)` behind an optimizer
      with a rate of 1.

    Raises:
      ValueError: If an argument is out of its range.

    >>> rate = smith_learning_rate(0.1, (10, 20), 1_000, initial_batch_size=20)
    >>> [round(float(rate(n)), 4) for n in (0, 10, 20)]
    [0.1, 0.1, 0.02]
    """
    start = _validate.non_negative(learning_rate=learning_rate)
    limits = _validate.batch_size_range(min_batch_size, max_batch_size, initial_batch_size)
    milestones, ratio, growths = _smith_plan(boundaries, dataset_size, factor, limits)
    return lambda n: start * ratio ** -jnp.maximum(_passed(milestones, n) - growths, 0)


def _passed(milestones: tuple[int, ...], count: Any) -> jax.Array:
    return jnp.sum(to_count(count) >= np.asarray(milestones, np.int64))


def _smith_plan(
    boundaries: Sequence[int], dataset_size: int, factor: float, limits: tuple[Any, Any, Any]
) -> tuple[tuple[int, ...], Any, Any]:
    """The checked boundaries and factor, and how often the size can grow."""
    if isinstance(boundaries, str) or not isinstance(boundaries, Iterable):
        raise ValueError(
            f"boundaries must be a tuple of counts, got {_validate.shown(boundaries)}."
        )
    milestones = tuple(
        _validate.integer(boundaries=b, minimum=1, maximum=_validate.LARGEST_COUNT)
        for b in boundaries
    )
    if list(milestones) != sorted(set(milestones)):
        raise ValueError(f"boundaries must increase, got {tuple(boundaries)!r}.")
    size = _validate.count(dataset_size=dataset_size)
    ratio = _validate.greater(1, factor=factor)
    _, high, start = limits
    if any(isinstance(x, jax.Array) for x in (size, ratio, high, start)):
        powers = ratio ** jnp.arange(1.0, len(milestones) + 1)
        return milestones, ratio, jnp.sum(start * powers <= jnp.minimum(high, size / 10))
    growths = 0
    while growths < len(milestones) and start * ratio ** (growths + 1) <= min(high, size / 10):
        growths += 1
    return milestones, ratio, growths
