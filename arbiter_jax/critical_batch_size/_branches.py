"""Branches of one run, each with a larger batch, on the same examples."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from arbiter_jax import _validate
from arbiter_jax._numerics import scale_updates
from arbiter_jax.base import LossFn, get_batch_size, requests, with_extra_args
from arbiter_jax.training import Data, FitResult, TrainState, fit, no_unfinished_window

_SMOOTHING = 0.5  # Weight of the past in the loss, per step of the largest branch.


class CriticalBatchSize(NamedTuple):
    """What :func:`measure_critical_batch_size` returns."""

    batch_size: int  # the largest one that loses no progress, in examples
    batch_sizes: tuple[int, ...]  # of the branches, increasing
    losses: tuple[float, ...]  # their smoothed training losses after the same examples
    is_bounded: bool  # False if the largest branch was still as good: the true one may be larger


class BranchState(NamedTuple):
    """State of a branch: its `batch_size` takes the place of that of the rule inside."""

    batch_size: jax.Array  # shape=(), dtype=int32
    scale: jax.Array  # shape=(), dtype=float32, of the updates
    chain: Any  # state of the chain of the run


def _branch(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The chain of the run, with the batch size and the factor of the rate in its state."""
    inner = with_extra_args(tx)

    def update_fn(updates, state, params=None, **extra_args):
        updates, chain = inner.update(updates, state.chain, params, **extra_args)
        return scale_updates(updates, state.scale), state._replace(chain=chain)

    init_fn = lambda params: BranchState(jnp.ones((), jnp.int32), jnp.ones(()), inner.init(params))
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def measure_critical_batch_size(
    loss_fn: LossFn,
    state: TrainState,
    tx: optax.GradientTransformation,
    data: Data,
    *,
    max_batch_size: int,
    exponent: float = 0.5,
    batch_size: int | None = None,
    num_steps: int = 20,
    tolerance: float = 0.01,
) -> CriticalBatchSize:
    r"""Measures the critical batch size at one point in a run.

    That is the largest batch size that loses no progress per example.

    From the state, for k = 1, 2, 4, ..., a branch trains with batches of k B and a rate multiplied by
    :math:`k^p`, all on the same examples. The critical size is the largest k B whose training loss
    is within the tolerance of those of all smaller ones. The losses are averages over the last
    examples, weighted by one half per step of the largest branch, the same examples for all.

    Args:
      loss_fn: As for :func:`arbiter_jax.fit`.
      state: Where the run stands. It is left as it is.
      tx: The chain of the run. If it scales the rate with the batch size by itself, as
        :func:`arbiter_jax.seesaw` does, pass ``exponent=0``.
      data: What the run trains on; arrays, not blocks.
      max_batch_size: The largest branch has at most this size, an integer >= 2 B.
      exponent: p, in [0, 2]: 0.5 for Adam, 1 for SGD.
      batch_size: B; the size that the rule in `state` has decided on if None.
      num_steps: Steps of the largest branch, an integer >= 1; 20 or more are reliable.
      tolerance: By how much the loss of a branch may exceed those of smaller sizes, >= 0.

    Returns:
      A :class:`CriticalBatchSize`. A branch whose loss is not finite is worse than any. If that of
      size B is one, nothing can be measured: the size is B, with a warning.

    Raises:
      ValueError: If an argument is out of its range, or the training data is smaller than needed.

    Reference:
      Merrill et al., "Critical Batch Size Revisited", arXiv:2505.23971.

    *Guarantees*:
      * Leaves the run alone: the state can be trained on as if nothing had been measured.
      * The same examples: all branches see the same ones in the same order.

    >>> import arbiter_jax as aj
    >>> tx = optax.chain(optax.sgd(0.01), aj.schedulers.constant(2))
    >>> data = aj.Data(jax.random.normal(jax.random.key(0), (512,)))
    >>> state = aj.init_state(jnp.ones(()), tx, jax.random.key(1))
    >>> loss_fn = lambda w, x: (w - x) ** 2 / 2
    >>> found = measure_critical_batch_size(
    ...     loss_fn, state, tx, data, max_batch_size=8, exponent=1.0, tolerance=0.1)
    >>> found.batch_sizes, found.batch_size
    ((2, 4, 8), 8)
    """
    size = int(get_batch_size(state.opt_state)) if batch_size is None else batch_size
    size = _validate.integer(batch_size=size, minimum=1)
    largest = _validate.integer(max_batch_size=max_batch_size, minimum=2 * size)
    power = _validate.in_range(0, 2, exponent=exponent)
    steps = _validate.integer(num_steps=num_steps, minimum=1)
    slack = _validate.non_negative(tolerance=tolerance)
    doublings = int(math.log2(largest / size))
    branch = _branch(tx)
    end = int(state.num_examples) + steps * 2**doublings * size
    budgets = [0, *(int(budget.max()) for budget in requests(state.opt_state).budgets)]
    sizes, losses = [], []
    for k in (2**i for i in range(doublings + 1)):
        opt_state = BranchState(
            jnp.asarray(k * size, jnp.int32), jnp.asarray(float(k) ** power), state.opt_state
        )
        with warnings.catch_warnings():
            # A branch that diverges has an answer: it is too large.
            warnings.filterwarnings("ignore", "[0-9]+ of [0-9]+ steps had a loss", UserWarning)
            result = fit(
                loss_fn,
                None,
                branch,
                data,
                num_examples=max(end, *budgets),
                stop_at=end,
                window=min(100, steps * 2**doublings // k),
                # A branch has a size of its own from its first step on.
                state=state._replace(opt_state=opt_state, unfinished=no_unfinished_window()),
            )
        sizes.append(k * size)
        losses.append(_smoothed(result, _SMOOTHING ** (k / 2**doublings)))
    if not math.isfinite(losses[0]):
        _validate.warn(
            f"the branch with the smallest batch size, {size}, had a loss that is not finite, so that "
            "no size could be measured: lower the learning rate, or measure at an earlier state."
        )
    # One that is not finite is never as good, not even as others that are not.
    as_good = [
        math.isfinite(loss) and loss <= min(losses[:i]) + slack
        for i, loss in enumerate(losses)
        if i
    ]
    return CriticalBatchSize(
        batch_size=max(s for s, good in zip(sizes, [True, *as_good], strict=True) if good),
        batch_sizes=tuple(sizes),
        losses=tuple(losses),
        is_bounded=not as_good[-1],
    )


def _smoothed(result: FitResult, decay: float) -> float:
    """The average of the losses of a branch, the last ones first, inf if one is not finite."""
    losses = result.per_step("loss")[::-1].astype(float)
    weights = decay ** np.arange(len(losses))
    mean = float(np.sum(weights * losses) / np.sum(weights))
    return mean if math.isfinite(mean) else math.inf
