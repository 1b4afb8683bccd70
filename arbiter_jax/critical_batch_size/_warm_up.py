"""A warm-up of the batch size from critical sizes that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optax

from arbiter_jax import _validate
from arbiter_jax.base import LossFn, PyTree, get_batch_size
from arbiter_jax.critical_batch_size._branches import measure_critical_batch_size
from arbiter_jax.schedulers import BatchSchedule, parse_schedule
from arbiter_jax.training import Data, fit, init_state


def measured_warm_up(
    loss_fn: LossFn,
    params: PyTree,
    tx: optax.GradientTransformation,
    data: Data,
    *,
    num_examples: int,
    measure_at: Sequence[int],
    max_batch_size: int,
    key: Any = 0,
    model_state: PyTree = None,
    **options: Any,
) -> BatchSchedule:
    """Trains a run once, measures its critical size on the way, and plans a warm-up of the batch.

    The size starts at that of the rule in `tx` and doubles wherever the measured critical size is at
    least twice the one in use. The rate that goes with it: ``schedule.rate_scale("sqrt")`` for Adam,
    "linear" for SGD.

    Args:
      loss_fn: As for :func:`arbiter_jax.fit`, like params, data, key and model_state.
      params: Parameters at the start.
      tx: A chain with one batch-size rule, usually ``aj.schedulers.constant(B)``.
      data: What the run trains on.
      num_examples: Budget of the run, in examples.
      measure_at: Numbers of examples at which to measure, increasing integers in
        [0, num_examples].
      max_batch_size: The largest size to measure and to plan.
      key: PRNG key or an int.
      model_state: State of the model, or None.
      **options: Passed to :func:`measure_critical_batch_size`: exponent, num_steps, tolerance.

    Returns:
      A :class:`BatchSchedule` for :func:`arbiter_jax.schedulers.from_schedule`.

    Raises:
      ValueError: If an argument is out of its range.

    Reference:
      Merrill et al., arXiv:2505.23971, section 4.

    >>> import arbiter_jax as aj, jax, jax.numpy as jnp
    >>> tx = optax.chain(optax.sgd(0.01), aj.schedulers.constant(2))
    >>> data = aj.Data(jax.random.normal(jax.random.key(0), (512,)))
    >>> loss_fn = lambda w, x: (w - x) ** 2 / 2
    >>> measured_warm_up(loss_fn, jnp.ones(()), tx, data, num_examples=200, measure_at=(0, 100),
    ...     max_batch_size=8, exponent=1.0, num_steps=2).starts
    (0, 100)
    """
    budget = _validate.integer(num_examples=num_examples, minimum=1)
    points = [_validate.integer(measure_at=n, minimum=0, maximum=budget) for n in measure_at]
    if not points or points != sorted(set(points)):
        raise ValueError(f"measure_at must increase and not be empty, got {tuple(measure_at)!r}.")
    state = init_state(params, tx, key, model_state)
    size = int(get_batch_size(state.opt_state))
    pairs = [(0, size)]
    for point in points:
        if point:
            state = fit(
                loss_fn, params, tx, data, num_examples=budget, stop_at=point, state=state
            ).state
        if 2 * size <= max_batch_size:
            measured = measure_critical_batch_size(
                loss_fn, state, tx, data, max_batch_size=max_batch_size, **options
            )
            if measured.batch_size >= 2 * size:
                size *= 2
                pairs = [*(pair for pair in pairs if pair[0] < point), (point, size)]
    return parse_schedule(pairs)
