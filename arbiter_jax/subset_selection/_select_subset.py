"""Selects the examples for the step of one layer from their gradients."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arbiter_jax import _validate
from arbiter_jax.subset_selection import _gram, _prefixes
from arbiter_jax.subset_selection._prefixes import Metric, Order


def check_arguments(metric, min_size, order, groups="module") -> Any:
    """Checks the arguments that the functions of this package share; returns min_size."""
    _validate.one_of(_prefixes.METRICS, metric=metric)
    _validate.one_of(_prefixes.ORDERS, order=order)
    _validate.one_of(_prefixes.GROUPS, groups=groups)
    return _validate.int32(min_size=min_size, minimum=1)


def select_subset(
    per_example_grads: jax.Array,
    metric: Metric = "signal_to_noise",
    min_size: int = 1,
    mask: jax.Array | None = None,
    *,
    order: Order = "distance",
) -> tuple[jax.Array, jax.Array]:
    r"""Selects the examples of a batch whose mean gradient scores best, for one layer.

    The examples are put in order. For each k, the first k of them are scored by the squared norm
    :math:`M_k` of their mean gradient and the trace :math:`V_k` of their sample covariance:

    .. math::
      \text{signal\_to\_noise:}\ \max_k \frac{M_k}{V_k / k}, \qquad
      \text{variance:}\ \min_k \frac{V_k}{k}, \qquad
      \text{norm:}\ \max_k M_k.

    A single example has no sample covariance: the first two metrics select it only if it is the only
    one. Ties go to the larger subset, so that identical gradients are all selected.

    Args:
      per_example_grads: float[n, d] (or float[n, ...]), the gradient of each example.
      metric: ``"signal_to_noise"``, ``"variance"`` or ``"norm"``.
      min_size: Smallest k, an integer >= 1. If fewer examples are available, all are selected.
      mask: bool[n], True for a real example. If None, all examples are real.
      order: How the examples are sorted: ``"distance"``, by distance to the mean gradient,
        ascending; ``"norm"``, by norm, ascending; ``"alignment"``, by inner product with the mean
        gradient, descending.

    Returns:
      (selected, num_selected): bool[n] and int32[].

    Raises:
      ValueError: If metric, order or min_size is not one of the above.

    Reference:
      Simionescu et al., 2022, https://arxiv.org/abs/2208.00815

    >>> import arbiter_jax as aj, jax.numpy as jnp
    >>> grads = jnp.array([[1.0, 0.1], [1.0, -0.1], [-3.0, 0.0], [1.1, 0.0]])
    >>> selected, num_selected = aj.select_subset(grads)
    >>> selected.tolist(), int(num_selected)
    ([True, True, False, True], 3)

    *Guarantees*
      - masked rows, and rows that are not finite, are never selected and change nothing;
      - the subset has the best score of all prefixes with min_size examples or more.
    """
    min_size = check_arguments(metric, min_size, order)
    shape = np.shape(per_example_grads) if per_example_grads is not None else ()
    if not shape or not math.prod(shape):
        raise ValueError(f"per_example_grads must be float[n, ...] with n >= 1, got shape {shape}.")
    per_example_grads = jnp.asarray(per_example_grads)
    if mask is not None and jnp.shape(mask) != shape[:1]:
        raise ValueError(f"mask must be bool[{shape[0]}], got shape {jnp.shape(mask)}.")
    gram = _gram.gram_matrix(per_example_grads)
    valid = jnp.isfinite(jnp.diagonal(gram))
    if mask is not None:
        valid &= jnp.asarray(mask).astype(bool)
    return _prefixes.select(gram, valid, metric, order, min_size)
