r"""Optimizers whose memory is measured in examples, for a batch size that changes during a run.

An average over the last 1 / (1 - beta) steps spans eight times as many examples once the batch is
eight times as large. Here beta belongs to one batch size, and at another the average has the same
half-life in examples, :math:`\beta(B) = \beta_0^{B / B_0}`.

Sources: Marek et al. (2025), arXiv:2507.07101 (second moment); Malladi et al. (2022),
arXiv:2205.10287 (first moment, epsilon); arXiv:2505.13738 (weight decay).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _validate
from arbiter_jax._numerics import scale_updates
from arbiter_jax.base import PyTree, require


class AdamInExamplesState(NamedTuple):
    """State of :func:`scale_by_adam_in_examples`."""

    mu: PyTree  # like the parameters, average of the gradients
    nu: PyTree  # like the parameters, average of their squares
    weight_mu: jax.Array  # shape=(), dtype=float32, 1 - the product of the betas that were used
    weight_nu: jax.Array  # shape=(), dtype=float32


class TraceInExamplesState(NamedTuple):
    """State of :func:`trace_in_examples`."""

    trace: PyTree  # like the parameters


class EMAInExamplesState(NamedTuple):
    """State of :func:`ema_in_examples`."""

    ema: PyTree  # like the parameters
    weight: jax.Array  # shape=(), dtype=float32, 1 - the product of the decays that were used


def _ratio(batch_size: Any, reference: int, name: str) -> jax.Array:
    require(name, batch_size=batch_size)
    # A window may contain steps without examples; their updates are 0 in any case.
    return jnp.maximum(jnp.asarray(batch_size), 1).astype(jnp.float32) / reference


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
        ratio = _ratio(size, reference, "scale_by_adam_in_examples")
        mu, weight_mu = _average(state.mu, state.weight_mu, updates, b1**ratio)
        squares = jax.tree.map(lambda g: jnp.real(g * jnp.conj(g)), updates)
        nu, weight_nu = _average(state.nu, state.weight_nu, squares, b2**ratio)
        scaled_eps = eps / jnp.sqrt(ratio)

        def direction(m, v):
            return ((m / weight_mu) / (jnp.sqrt(v / weight_nu) + scaled_eps)).astype(m.dtype)

        new = AdamInExamplesState(mu, nu, weight_mu, weight_nu)
        return jax.tree.map(direction, mu, nu), new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _average(
    mean: PyTree, weight: jax.Array, sample: PyTree, beta: jax.Array
) -> tuple[PyTree, jax.Array]:
    """One step of an average that starts at 0, and of the weight that corrects it for that."""
    new = jax.tree.map(lambda m, x: (beta * m + (1 - beta) * x).astype(m.dtype), mean, sample)
    return new, beta * weight + (1 - beta)


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
        beta = decay ** _ratio(size, reference, "trace_in_examples")
        gain = (1 - beta) / (1 - decay)
        step = lambda g, m: (g + beta * m).astype(m.dtype)
        trace = jax.tree.map(step, updates, state.trace)
        ahead = jax.tree.map(step, updates, trace) if nesterov else trace
        scaled = jax.tree.map(lambda m: (gain * m).astype(m.dtype), ahead)
        return scaled, TraceInExamplesState(trace)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def add_decayed_weights_in_examples(
    weight_decay: float, batch_size: int, *, exponent: float = 1.0, mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Decoupled weight decay that takes the same off the weights per example at any batch size.

    .. math:: \Delta w = u + \lambda (B / B_0)^{1 - p} w

    for a rate that goes as :math:`(B / B_0)^p` and is applied after this.

    Args:
      weight_decay: lambda, at B_0, >= 0.
      batch_size: B_0, an integer >= 1.
      exponent: p, the power of the batch size in the rate, in [0, 2].
      mask: Which parameters decay, as in `optax.add_decayed_weights`.

    Returns:
      A transformation that reads `batch_size` and the parameters.

    Raises:
      ValueError: If an argument is out of its range.
      TypeError: If `update` is called without `batch_size`.

    >>> tx = add_decayed_weights_in_examples(0.1, batch_size=64, exponent=0.5)
    >>> updates, _ = tx.update(jnp.zeros(1), tx.init(jnp.ones(1)), jnp.ones(1), batch_size=256)
    >>> print(f"{updates[0]:.2f}")
    0.20
    """
    decay = _validate.non_negative(weight_decay=weight_decay)
    reference = _validate.int32(batch_size=batch_size, minimum=1)
    exponent = _validate.in_range(0, 2, exponent=exponent)

    def update_fn(updates, state, params=None, *, batch_size=None, probe=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "params must be given to the update of add_decayed_weights_in_examples, got None."
            )
        size = reference if probe is not None and batch_size is None else batch_size
        ratio = _ratio(size, reference, "add_decayed_weights_in_examples")
        factor = decay * ratio ** (1 - exponent)
        return jax.tree.map(lambda u, w: (u + factor * w).astype(u.dtype), updates, params), state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
    return tx if mask is None else optax.masked(tx, mask)


def _at_rate(learning_rate: float | optax.Schedule) -> optax.GradientTransformation:
    if callable(learning_rate):
        return optax.scale_by_learning_rate(learning_rate)
    rate = _validate.non_negative(learning_rate=learning_rate)
    # Not optax's, which gives updates of half precision the type of an array.
    return optax.stateless(lambda updates, params: scale_updates(updates, -rate))


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
        beta = decay ** _ratio(size, reference, "ema_in_examples")
        ema, weight = _average(state.ema, state.weight, updates, beta)
        out = jax.tree.map(lambda a: (a / weight).astype(a.dtype), ema) if debias else ema
        return out, EMAInExamplesState(ema, weight)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
