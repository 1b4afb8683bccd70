r"""What optimizers share whose memory is measured in examples, for a batch size that changes.

An average over the last 1 / (1 - beta) steps spans eight times as many examples once the batch is
eight times as large. Here beta belongs to one batch size, and at another the average has the same
half-life in examples, :math:`\beta(B) = \beta_0^{B / B_0}`.

Sources: Marek et al. (2025), arXiv:2507.07101 (second moment); Malladi et al. (2022),
arXiv:2205.10287 (first moment, epsilon); arXiv:2505.13738 (weight decay).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from arbiter_jax.base import PyTree, require


def batch_size_ratio(batch_size: Any, reference: int, name: str) -> jax.Array:
    """The batch size over B_0, float32[]; a TypeError that names the transformation if it is None."""
    require(name, batch_size=batch_size)
    # A window may contain steps without examples; their updates are 0 in any case.
    return jnp.maximum(jnp.asarray(batch_size), 1).astype(jnp.float32) / reference


def average(
    mean: PyTree, weight: jax.Array, sample: PyTree, beta: jax.Array
) -> tuple[PyTree, jax.Array]:
    """One step of an average that starts at 0, and of the weight that corrects it for that."""
    new = jax.tree.map(lambda m, x: (beta * m + (1 - beta) * x).astype(m.dtype), mean, sample)
    return new, beta * weight + (1 - beta)
