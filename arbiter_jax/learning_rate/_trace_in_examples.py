"""Momentum that spans the same number of examples at any batch size."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _validate
from arbiter_jax.base import PyTree
from arbiter_jax.learning_rate._memory_in_examples import batch_size_ratio


class TraceInExamplesState(NamedTuple):
    """State of :func:`trace_in_examples`."""

    trace: PyTree  # like the parameters


def trace_in_examples(
    batch_size: int, decay: float = 0.9, nesterov: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum that spans the same number of examples at any batch size, with the same gain.

    .. math:: m \leftarrow \beta(B) m + g, \qquad
              \Delta w = \frac{1 - \beta(B)}{1 - \beta_0} m, \qquad \beta(B) = \beta_0^{B / B_0}

    Args:
      batch_size: B_0, the size at which `decay` holds, an integer >= 1.
      decay: beta_0, in [0, 1).
      nesterov: Whether to look ahead, as in `optax.trace`.

    Returns:
      A transformation that reads `batch_size`; at B_0 throughout it is `optax.trace`.

    Raises:
      ValueError: If an argument is out of its range.
      TypeError: If `update` is called without `batch_size`.

    >>> tx = trace_in_examples(64, decay=0.5)
    >>> updates, _ = tx.update(jnp.ones(1), tx.init(jnp.zeros(1)), batch_size=128)
    >>> updates.tolist()  # (1 - .5 ** 2) / (1 - .5)
    [1.5]
    """
    reference = _validate.int32(batch_size=batch_size, minimum=1)
    decay = _validate.in_range(0, 1, closed="left", decay=decay)

    def init_fn(params):
        return TraceInExamplesState(jax.tree.map(jnp.zeros_like, params))

    def update_fn(updates, state, params=None, *, batch_size=None, probe=None, **extra_args):
        del params, extra_args
        size = reference if probe is not None and batch_size is None else batch_size
        beta = decay ** batch_size_ratio(size, reference, "trace_in_examples")
        gain = (1 - beta) / (1 - decay)
        step = lambda g, m: (g + beta * m).astype(m.dtype)
        trace = jax.tree.map(step, updates, state.trace)
        ahead = jax.tree.map(step, updates, trace) if nesterov else trace
        scaled = jax.tree.map(lambda m: (gain * m).astype(m.dtype), ahead)
        return scaled, TraceInExamplesState(trace)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
