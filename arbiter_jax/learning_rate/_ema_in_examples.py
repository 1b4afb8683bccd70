"""An average over steps that spans the same number of examples at any batch size."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _validate
from arbiter_jax.base import PyTree
from arbiter_jax.learning_rate._memory_in_examples import average, batch_size_ratio


class EMAInExamplesState(NamedTuple):
    """State of :func:`ema_in_examples`."""

    ema: PyTree  # like the parameters
    weight: jax.Array  # shape=(), dtype=float32, 1 - the product of the decays that were used


def ema_in_examples(
    batch_size: int, decay: float = 0.999, debias: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""An average over steps that spans the same number of examples at any batch size.

    As `optax.ema`, of whatever passes through it, for example of the parameters:
    ``ema, state = tx.update(params, state, batch_size=B)``.

    .. math:: a \leftarrow \beta(B) a + (1 - \beta(B)) x, \qquad \beta(B) = \beta_0^{B / B_0}

    Args:
      batch_size: B_0, the size at which `decay` holds, an integer >= 1.
      decay: beta_0, in [0, 1).
      debias: Whether to correct for the start at 0.

    Returns:
      A transformation that reads `batch_size`; at B_0 throughout it is `optax.ema`.

    Raises:
      ValueError: If an argument is out of its range.
      TypeError: If `update` is called without `batch_size`.

    >>> tx = ema_in_examples(64, decay=0.5, debias=False)
    >>> average, _ = tx.update(jnp.ones(1), tx.init(jnp.zeros(1)), batch_size=128)
    >>> average.tolist()
    [0.75]
    """
    reference = _validate.int32(batch_size=batch_size, minimum=1)
    decay = _validate.in_range(0, 1, closed="left", decay=decay)

    def init_fn(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return EMAInExamplesState(zeros, jnp.zeros((), jnp.float32))

    def update_fn(updates, state, params=None, *, batch_size=None, probe=None, **extra_args):
        del params, extra_args
        size = reference if probe is not None and batch_size is None else batch_size
        beta = decay ** batch_size_ratio(size, reference, "ema_in_examples")
        ema, weight = average(state.ema, state.weight, updates, beta)
        out = jax.tree.map(lambda a: (a / weight).astype(a.dtype), ema) if debias else ema
        return out, EMAInExamplesState(ema, weight)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
