"""Goodput: the batch size with the most examples per second, weighted by what each is worth.

Qiao, Choe, Subramanya et al. (2021), "Pollux: Co-adaptive Cluster Scheduling for Goodput-Optimized
Deep Learning", OSDI, arXiv:2008.12260.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _numerics, _validate, base
from arbiter_jax._count import Count, as_count
from arbiter_jax.schedulers import _rule, _step_times
from arbiter_jax.schedulers._step_times import StepTimes


class GoodputState(NamedTuple):
    """State of :func:`goodput`."""

    batch_size: jax.Array  # shape=(), dtype=int32, in examples
    min_batch_size: jax.Array  # shape=(), dtype=int32
    max_batch_size: jax.Array  # shape=(), dtype=int32
    variance_trace: jax.Array  # shape=(), dtype=float, average of the estimates of tr S
    mean_sq_norm: jax.Array  # shape=(), dtype=float, average of the estimates of |G|^2
    weight: jax.Array  # shape=(), dtype=float, of both averages, 0 at the start
    times: StepTimes  # what the fit of the step time has seen
    ledger: Count  # training examples up to the last update, if they are counted; see base
    num_skipped: jax.Array  # shape=(), dtype=int32, steps whose signals carried no information
    requires = ("grad_stats", "step_seconds")


def goodput(
    *,
    min_improvement: float = 1.05,
    max_growth: float = 2.0,
    decay: float = 0.99,
    candidates: Sequence[int] | None = None,
    min_batch_size: int = 8,
    max_batch_size: int = 512,
    initial_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Chooses the batch size that makes the most progress per second, on one machine (Pollux).

    .. math::
      B = \arg\max_b \frac{b}{t_0 + t_1 b} \cdot \frac{\varphi + B_0}{\varphi + b}, \qquad
      \varphi = \frac{E[\widehat{tr S}]}{E[\widehat{|G|^2}]}

    That is the goodput: throughput times statistical efficiency. The seconds of a step, t_0 + t_1 b,
    are a running least-squares fit of relative errors to the measured times, with t_0, t_1 >= 0.
    Until two sizes have been measured, a step is assumed to cost the same at any size, as in Pollux:
    this makes the rule explore.

    Args:
      min_improvement: Switch only if the goodput is more than this many times that of the applied
        size, >= 1.
      max_growth: Candidates beyond this many times the largest size measured so far wait, > 1.
      decay: Weight of the past in the averages of the statistics, in [0, 1).
      candidates: Sizes to choose from, increasing integers of [min_batch_size, max_batch_size]. By
        default the powers of two of that range, which fill their bucket, and its ends.
      min_batch_size: Smallest batch size, an integer >= 1; 1 is taken as 2, because one example
        carries no information about noise.
      max_batch_size: Largest batch size, an integer >= min_batch_size.
      initial_batch_size: B_0, in [min_batch_size, max_batch_size]; the smallest if None.

    Returns:
      A transformation that returns the updates unchanged and whose `update` reads `grad_stats`,
      `step_seconds` and, if given, `batch_size`, the applied size. `step_seconds` is the measured
      time of one step of the last window, nan if unknown; it counts for the size that was applied
      in that window. Leave out times that contain a compilation.

    Raises:
      ValueError: If an argument is out of its range.
      TypeError: If `update` is called without a signal.

    Reference:
      Qiao et al., "Pollux: Co-adaptive Cluster Scheduling for Goodput-Optimized Deep Learning",
      OSDI 2021, arXiv:2008.12260.

    *Guarantees*:
      * Updates unchanged: they pass through as they are.
      * Stays in range: the size is an integer of [min_batch_size, max_batch_size].
      * Skips and counts: statistics that are not finite change nothing but `num_skipped` and the
        fit of the times; a time that is not finite and positive does not enter that fit.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.goodput(initial_batch_size=32))
    >>> stats, state = aj.GradStats(*jnp.array([0.5, 40.0, 32.0, 1.75, 0.2, 3.0])), tx.init(0.0)
    >>> for seconds, size in [(jnp.nan, 32), (0.01, 64), (0.016, 64)]:
    ...     signals = {"grad_stats": stats, "step_seconds": seconds, "batch_size": size}
    ...     _, state = tx.update(1.0, state, **signals)
    ...     print(int(aj.get_batch_size(state)))  # no time known; 10 ms for 32; 16 ms for 64
    32
    64
    64
    """
    min_improvement = _validate.greater(1, closed=True, min_improvement=min_improvement)
    max_growth = _validate.greater(1, max_growth=max_growth)
    decay = _validate.in_range(0, 1, closed="left", decay=decay)
    low, high, start = _validate.batch_size_range(
        min_batch_size, max_batch_size, initial_batch_size
    )
    given = _candidates(candidates, low, high)
    low, high, start = _numerics.measurable_range(low, high, start)
    if isinstance(low, jax.Array) or isinstance(high, jax.Array):
        options = jnp.sort(jnp.clip(jnp.asarray(given, jnp.int32), low, high))
    else:
        options = tuple(sorted({max(size, low) for size in given}))

    def init_fn(params):
        del params
        return GoodputState(
            **_rule.sizes(low, high, start),
            variance_trace=_rule.zero(),
            mean_sq_norm=_rule.zero(),
            weight=_rule.zero(),
            times=_step_times.init(start),
            ledger=as_count(0),
            num_skipped=_rule.int32(),
        )

    def update_state(state, *, grad_stats: Any = None, step_seconds: Any = None, **signals):
        base.require("goodput", grad_stats=grad_stats, step_seconds=step_seconds)
        update = base.applied_update(state, **signals)
        applied = jnp.clip(update.call_size, low, high)
        timed = state._replace(
            times=_step_times.measure(state.times, step_seconds, applied), ledger=update.ledger
        )

        sample = grad_stats.variance_trace, grad_stats.mean_sq_norm
        (variance, signal), weight = _numerics.running_mean(
            (state.variance_trace, state.mean_sq_norm), state.weight, sample, decay
        )
        signal_left = jnp.maximum(signal, 0)

        def goodput_of(b):
            seconds = _step_times.seconds_of(timed.times, b)
            # (phi + B_0) / (phi + b), multiplied out so that phi may be infinite. The seconds are
            # those of a call, but what an example is worth is a matter of the whole update.
            first, size = update.per_update(start), update.per_update(b)
            return b / seconds * (variance + first * signal_left) / (variance + size * signal_left)

        sizes = jnp.asarray(options, variance.dtype)
        known = timed.times.weight > 0
        within_reach = sizes <= max_growth * timed.times.largest
        values = jnp.where(within_reach & known, goodput_of(sizes), -jnp.inf)
        best = jnp.argmax(values)
        switch = values[best] > min_improvement * goodput_of(applied.astype(variance.dtype))
        new = timed._replace(
            batch_size=jnp.where(switch, jnp.asarray(options, jnp.int32)[best], applied),
            variance_trace=variance,
            mean_sq_norm=signal,
            weight=weight,
        )
        usable = _rule.is_informative(*sample) & (variance + signal_left > 0)
        return _numerics.update_or_skip(usable, new, timed)

    return _rule.transformation(init_fn, update_state, (low, high))


def _candidates(candidates: Sequence[int] | None, low: Any, high: Any) -> tuple[int, ...]:
    if candidates is None:
        if isinstance(low, jax.Array) or isinstance(high, jax.Array):
            return (0, *(1 << e for e in range(31)), _validate.LARGEST_INT32)  # to be clipped
        powers = (1 << e for e in range(low.bit_length(), high.bit_length()))
        return tuple(sorted({low, high, *powers}))
    limits = {}
    if not (_validate.is_traced(low) or _validate.is_traced(high)):
        limits = {"minimum": int(low), "maximum": int(high)}
    if isinstance(candidates, str) or not isinstance(candidates, Iterable):
        raise ValueError(
            f"candidates must be a tuple of batch sizes, got {_validate.shown(candidates)}."
        )
    sizes = tuple(_validate.integer(candidates=c, **limits) for c in candidates)
    if not sizes or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"candidates must increase and not be empty, got {tuple(candidates)!r}.")
    return sizes
