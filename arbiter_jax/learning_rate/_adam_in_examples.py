"""Adam, AdamW and LAMB whose averages span the same number of examples at any batch size."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _validate
from arbiter_jax._numerics import scale_updates
from arbiter_jax.base import PyTree
from arbiter_jax.learning_rate._memory_in_examples import average, batch_size_ratio
from arbiter_jax.learning_rate._weight_decay_in_examples import add_decayed_weights_in_examples


class AdamInExamplesState(NamedTuple):
    """State of :func:`scale_by_adam_in_examples`."""

    mu: PyTree  # like the parameters, average of the gradients
    nu: PyTree  # like the parameters, average of their squares
    weight_mu: jax.Array  # shape=(), dtype=float32, 1 - the product of the betas that were used
    weight_nu: jax.Array  # shape=(), dtype=float32


def scale_by_adam_in_examples(
    batch_size: int, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's direction, with averages that span the same number of examples at any batch size.

    .. math:: \beta_i(B) = \beta_i^{B / B_0}, \qquad \epsilon(B) = \epsilon \sqrt{B_0 / B}

    and a correction for the start that multiplies the betas that were used.

    Args:
      batch_size: B_0, the size at which the betas hold, an integer >= 1.
      b1: beta of the first moment, in [0, 1).
      b2: beta of the second moment, in [0, 1).
      eps: epsilon, >= 0.

    Returns:
      A transformation that reads `batch_size`; at B_0 throughout it is `optax.scale_by_adam`.

    Raises:
      ValueError: If an argument is out of its range.
      TypeError: If `update` is called without `batch_size`.

    >>> tx = scale_by_adam_in_examples(64)
    >>> updates, _ = tx.update(jnp.ones(1), tx.init(jnp.zeros(1)), batch_size=512)
    >>> updates.round(3).tolist()
    [1.0]
    """
    reference = _validate.int32(batch_size=batch_size, minimum=1)
    b1 = _validate.in_range(0, 1, closed="left", b1=b1)
    b2 = _validate.in_range(0, 1, closed="left", b2=b2)
    eps = _validate.non_negative(eps=eps)

    def init_fn(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        start = jnp.zeros((), jnp.float32)
        return AdamInExamplesState(zeros, jax.tree.map(jnp.copy, zeros), start, start + 0)

    def update_fn(updates, state, params=None, *, batch_size=None, probe=None, **extra_args):
        del params, extra_args
        # A probe asks what the optimizer does at its own batch size.
        size = reference if probe is not None and batch_size is None else batch_size
        ratio = batch_size_ratio(size, reference, "scale_by_adam_in_examples")
        mu, weight_mu = average(state.mu, state.weight_mu, updates, b1**ratio)
        squares = jax.tree.map(lambda g: jnp.real(g * jnp.conj(g)), updates)
        nu, weight_nu = average(state.nu, state.weight_nu, squares, b2**ratio)
        scaled_eps = eps / jnp.sqrt(ratio)

        def direction(m, v):
            return ((m / weight_mu) / (jnp.sqrt(v / weight_nu) + scaled_eps)).astype(m.dtype)

        new = AdamInExamplesState(mu, nu, weight_mu, weight_nu)
        return jax.tree.map(direction, mu, nu), new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adamw_in_examples(
    learning_rate: float | optax.Schedule,
    batch_size: int,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    exponent: float = 1.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW whose averages and weight decay are those of examples, not of steps.

    Inside :func:`arbiter_jax.seesaw` with `learning_rate=1.0`, and with the same `exponent`.

    .. math:: \beta_i(B) = \beta_i^{B / B_0}, \qquad \lambda(B) = \lambda (B / B_0)^{1 - p}

    Args:
      learning_rate: A number, or an optax schedule of the steps; 1.0 inside `seesaw`.
      batch_size: B_0, the size at which the other numbers hold, an integer >= 1.
      b1: beta of the first moment, in [0, 1).
      b2: beta of the second moment, in [0, 1).
      eps: epsilon, >= 0; it goes as :math:`\sqrt{B_0 / B}`.
      weight_decay: lambda, >= 0; 0 is Adam.
      exponent: p, the power of the batch size by which the rate is scaled, in [0, 2].
      mask: Which parameters decay, as in `optax.adamw`.

    Returns:
      An optimizer that reads `batch_size`; at B_0 throughout it is `optax.adamw`.

    Raises:
      ValueError: If an argument is out of its range.
      TypeError: If `update` is called without `batch_size`.

    Reference:
      Marek et al., arXiv:2507.07101; Malladi et al., arXiv:2205.10287; arXiv:2505.13738.

    *Guarantees*:
      * The reference is neutral: at B = B_0 the updates are those of `optax.adamw`.
      * The same half-life: k steps at B_0 and one step at k B_0 forget alike.

    >>> tx = adamw_in_examples(1e-3, batch_size=64)
    >>> updates, _ = tx.update(jnp.ones(1), tx.init(jnp.zeros(1)), jnp.zeros(1), batch_size=64)
    >>> print(f"{updates[0]:.4f}")
    -0.0010
    """
    return optax.chain(
        scale_by_adam_in_examples(batch_size, b1, b2, eps),
        add_decayed_weights_in_examples(weight_decay, batch_size, exponent=exponent, mask=mask),
        _at_rate(learning_rate),
    )


def lamb_in_examples(
    learning_rate: float | optax.Schedule,
    batch_size: int,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    exponent: float = 1.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """LAMB whose averages and weight decay are those of examples: as :func:`adamw_in_examples`.

    Args:
      learning_rate: A number, or an optax schedule of the steps; 1.0 inside `seesaw`.
      batch_size: B_0, the size at which the other numbers hold, an integer >= 1.
      b1: beta of the first moment, in [0, 1).
      b2: beta of the second moment, in [0, 1).
      eps: epsilon, >= 0.
      weight_decay: lambda, >= 0.
      exponent: p, the power of the batch size by which the rate is scaled, in [0, 2].
      mask: Which parameters decay, as in `optax.lamb`.

    Returns:
      An optimizer that reads `batch_size`; at B_0 throughout it is `optax.lamb`.

    Raises:
      ValueError: If an argument is out of its range.
      TypeError: If `update` is called without `batch_size`.

    >>> tx = lamb_in_examples(1e-3, batch_size=64)
    >>> updates, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1), batch_size=64)
    >>> print(f"{updates[0]:.4f}")
    -0.0010
    """
    return optax.chain(
        scale_by_adam_in_examples(batch_size, b1, b2, eps),
        add_decayed_weights_in_examples(weight_decay, batch_size, exponent=exponent, mask=mask),
        optax.scale_by_trust_ratio(),
        _at_rate(learning_rate),
    )


def _at_rate(learning_rate: float | optax.Schedule) -> optax.GradientTransformation:
    if callable(learning_rate):
        return optax.scale_by_learning_rate(learning_rate)
    rate = _validate.non_negative(learning_rate=learning_rate)
    # Not optax's, which gives updates of half precision the type of an array.
    return optax.stateless(lambda updates, params: scale_updates(updates, -rate))
