"""The batch sizes that lower the loss the most for a given learning rate, in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from arbiter_jax import _validate


def optimal_schedule(learning_rates: Sequence[float], num_examples: int) -> npt.NDArray[np.float64]:
    r"""Computes the batch size of each step that leaves the least noise at the end of a run.

    .. math:: B_t \propto \frac{\eta_t}{\sqrt{S_{t+1}}}, \quad \sum_t B_t = D, \qquad
              S_t = \sum_{u \ge t} \eta_u, \quad S_{T+1} := \eta_T

    These minimize :math:`\sum_t \eta_t^2 / (S_{t+1} B_t)`, the noise term of the bound on the last
    iterate of SGD. At a constant rate the size grows as the inverse square root of the steps left;
    with a linear decay to 0 a constant size is the best. It keeps the number of steps and lowers
    the loss, where :func:`seesaw` keeps the loss and lowers the number of steps.

    Args:
      learning_rates: eta, one per step, each >= 0, the last ones may be 0.
      num_examples: D, the examples of the run, > 0.

    Returns:
      B, float[T], in examples, not rounded. A step of rate 0 has the size of the step before.

    Raises:
      ValueError: If there is no rate > 0, a rate is negative or not finite, or the first is 0.

    Reference:
      arXiv:2607.27731.

    >>> optimal_schedule([1.0, 1.0, 1.0, 1.0], num_examples=100).round(1).tolist()
    [17.6, 21.5, 30.4, 30.4]
    """
    try:
        rates = np.asarray(learning_rates, np.float64)
    except (TypeError, ValueError):
        rates = np.empty((0, 0))
    if rates.ndim != 1 or not rates.size or not np.all(np.isfinite(rates)) or np.any(rates < 0):
        raise ValueError(
            "learning_rates must be a sequence of finite numbers >= 0, one per step, got "
            f"{learning_rates!r}."
        )
    total = _validate.positive(num_examples=num_examples)
    if rates[0] == 0:
        raise ValueError(
            "learning_rates must begin with a rate > 0, got 0.0: a step of rate 0 takes the size of "
            "the step before it."
        )
    after = np.append(np.cumsum(rates[::-1])[::-1][1:], rates[-1])
    last = np.flatnonzero(rates)[-1]
    # Where only zeros follow, nothing is left: the last rate that is not 0 stands in for it.
    after[last:] = rates[last]
    sizes = rates / np.sqrt(after)
    moves = np.maximum.accumulate(np.where(rates > 0, np.arange(len(rates)), 0))
    sizes = sizes[moves]
    return sizes * (total / sizes.sum())
