"""Hypergradient descent: gradient descent on the learning rate itself.

The derivative of the loss with respect to the rate of the previous step is minus the inner product
of the gradient with the direction of that step. It costs one inner product and no backward pass.

Reference: Baydin et al., `Online Learning Rate Adaptation with Hypergradient Descent
<https://arxiv.org/abs/1703.04782>`_, ICLR 2018.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _schedules, _validate
from arbiter_jax._numerics import (
    all_finite,
    scale_updates,
    tree_dot,
    tree_where,
    update_or_skip,
)


class HypergradientState(NamedTuple):
    """State of :func:`sgd_hd` and :func:`adam_hd`."""

    learning_rate: jax.Array  # shape=(), dtype=float32, the rate of the last step
    hypergradient: jax.Array  # shape=(), dtype=float32, h of the last step
    direction: Any  # like the parameters, u of the last step
    inner_state: Any  # of the transformation that turns gradients into u
    num_skipped: jax.Array  # shape=(), dtype=int32, steps whose gradients were not finite

    metrics = ("learning_rate", "hypergradient")


def _inner_product(a: Any, b: Any) -> jax.Array:
    """The inner product in float32, the type of the rate."""
    return jnp.asarray(tree_dot(a, b), jnp.float32)


def _cosine(inner_product: jax.Array, a: Any, b: Any) -> jax.Array:
    """The inner product divided by both norms, 0 if one of them is 0."""
    norms = jnp.sqrt(_inner_product(a, a)) * jnp.sqrt(_inner_product(b, b))
    return jnp.where(norms > 0, inner_product / jnp.where(norms > 0, norms, 1.0), 0.0)


def _hypergradient_descent(
    inner: optax.GradientTransformation,
    learning_rate: float,
    hypergradient_learning_rate: float,
    min_learning_rate: float,
    max_learning_rate: float,
    multiplicative: bool,
) -> optax.GradientTransformationExtraArgs:
    """Steps along the direction of `inner`, at a rate adapted by its hypergradient."""
    low = _validate.non_negative(min_learning_rate=min_learning_rate)
    high = _validate.in_range(low, math.inf, max_learning_rate=max_learning_rate)
    learning_rate = _validate.non_negative(learning_rate=learning_rate)
    learning_rate = _validate.in_range(low, high, learning_rate=learning_rate)
    _schedules.first_rate(learning_rate, learning_rate=learning_rate)
    meta_rate = _validate.non_negative(hypergradient_learning_rate=hypergradient_learning_rate)

    def init_fn(params):
        return HypergradientState(
            learning_rate=jnp.asarray(learning_rate, jnp.float32),
            hypergradient=jnp.zeros((), jnp.float32),
            direction=jax.tree.map(jnp.zeros_like, params),
            inner_state=inner.init(params),
            num_skipped=jnp.asarray(0, jnp.int32),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        hypergradient = _inner_product(updates, state.direction)  # h_t = g_t . u_{t-1}
        if multiplicative:
            cosine = _cosine(hypergradient, updates, state.direction)
            rate = state.learning_rate * (1 + meta_rate * cosine)
        else:
            rate = state.learning_rate + meta_rate * hypergradient
        rate = jnp.clip(rate, low, high)

        direction, inner_state = inner.update(updates, state.inner_state, params)
        direction = jax.tree.map(
            lambda d, u: jnp.asarray(d, jnp.result_type(u)), direction, updates
        )
        proposed = state._replace(
            learning_rate=rate,
            hypergradient=hypergradient,
            direction=direction,
            inner_state=inner_state,
        )
        step = scale_updates(direction, -rate)
        # Also check the state: squares of finite gradients may overflow although the step is finite.
        usable = all_finite(step, proposed)
        step = tree_where(usable, step, jax.tree.map(jnp.zeros_like, step))
        return step, update_or_skip(usable, proposed, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def sgd_hd(
    learning_rate: float,
    hypergradient_learning_rate: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    min_learning_rate: float = 0.0,
    max_learning_rate: float = math.inf,
    *,
    multiplicative: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD that adapts its learning rate by hypergradient descent.

    With g_t the gradient, u_t the direction of step t (the gradient; with momentum mu, the buffer
    :math:`v_t = \mu v_{t-1} + g_t`, or :math:`g_t + \mu v_t` with Nesterov), and :math:`u_0 = 0`,

    .. math::
      h_t = g_t \cdot u_{t-1}, \qquad
      \eta_t = clip(\eta_{t-1} + \beta h_t), \qquad
      w_{t+1} = w_t - \eta_t u_t;

    ``multiplicative=True`` uses :math:`\eta_t = \eta_{t-1} (1 + \beta h_t / (|g_t| |u_{t-1}|))`
    instead, which is independent of the scale of the loss. Unlike in the published code, the rate
    cannot leave its range; there, small batches can make it negative.

    Args:
      learning_rate: Rate of the first step, in [min_learning_rate, max_learning_rate].
      hypergradient_learning_rate: beta, the step size of the learning rate, >= 0; if
        multiplicative, the largest relative change per step.
      momentum: mu, in [0, 1).
      nesterov: Whether to use Nesterov momentum.
      min_learning_rate: Smallest rate, >= 0.
      max_learning_rate: Largest rate, >= min_learning_rate; may be infinite.
      multiplicative: Whether the rate changes by a factor instead of a term.

    Returns:
      A complete optimizer; its updates are ready for ``optax.apply_updates``. Its state is a
      :class:`HypergradientState`; ``learning_rate`` is the rate of the last step.

    Raises:
      ValueError: If an argument is outside its range.

    Reference:
      Baydin et al., `Online Learning Rate Adaptation with Hypergradient Descent
      <https://arxiv.org/abs/1703.04782>`_, ICLR 2018.

    *Guarantees*:
      * Stays in range: the rate is in [min_learning_rate, max_learning_rate] for any gradients.
      * Skips and counts: a step with a gradient that is not finite only increments `num_skipped`.
      * Is SGD at beta = 0: the updates are those of ``optax.sgd``.

    >>> import arbiter_jax as aj, jax.numpy as jnp
    >>> tx = aj.sgd_hd(0.1, 0.01)
    >>> params = jnp.array(1.0)
    >>> state = tx.init(params)
    >>> for grad in (2.0, 3.0):
    ...     update, state = tx.update(jnp.array(grad), state, params)
    >>> print(f"{state.learning_rate:.2f} {update:.2f}")  # .1 + .01 * 3 * 2; -.16 * 3
    0.16 -0.48
    """
    _validate.boolean(nesterov=nesterov)
    _validate.boolean(multiplicative=multiplicative)
    checked = _validate.in_range(0, 1, closed="left", momentum=momentum)
    # An array may become larger than 0 later.
    has_trace = isinstance(momentum, jax.Array) or checked > 0
    inner = optax.trace(checked, nesterov) if has_trace else optax.identity()
    return _hypergradient_descent(
        inner,
        learning_rate,
        hypergradient_learning_rate,
        min_learning_rate,
        max_learning_rate,
        multiplicative,
    )


def adam_hd(
    learning_rate: float,
    hypergradient_learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    min_learning_rate: float = 0.0,
    max_learning_rate: float = math.inf,
    *,
    multiplicative: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam that adapts its learning rate by hypergradient descent.

    Like :func:`sgd_hd`, with the direction :math:`u_t = \hat m_t / (\sqrt{\hat v_t} + \epsilon)`
    of Adam, both moments bias-corrected.

    Args:
      learning_rate: Rate of the first step, in [min_learning_rate, max_learning_rate].
      hypergradient_learning_rate: beta, the step size of the learning rate, >= 0; if
        multiplicative, the largest relative change per step.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root of the second moment, > 0.
      min_learning_rate: Smallest rate, >= 0.
      max_learning_rate: Largest rate, >= min_learning_rate; may be infinite.
      multiplicative: Whether the rate changes by a factor, as in :func:`sgd_hd`.

    Returns:
      A complete optimizer; its updates are ready for ``optax.apply_updates``. Its state is a
      :class:`HypergradientState`; ``learning_rate`` is the rate of the last step.

    Raises:
      ValueError: If an argument is outside its range.

    Reference:
      Baydin et al., `Online Learning Rate Adaptation with Hypergradient Descent
      <https://arxiv.org/abs/1703.04782>`_, ICLR 2018.

    *Guarantees*:
      * Stays in range: the rate is in [min_learning_rate, max_learning_rate] for any gradients.
      * Skips and counts: a step with a gradient that is not finite only increments `num_skipped`.
      * Is Adam at beta = 0: the updates are those of ``optax.adam``.

    >>> import arbiter_jax as aj, jax.numpy as jnp
    >>> tx = aj.adam_hd(0.1, 0.01)
    >>> params = jnp.array(1.0)
    >>> state = tx.init(params)
    >>> for grad in (2.0, 3.0):
    ...     update, state = tx.update(jnp.array(grad), state, params)
    >>> print(f"{state.learning_rate:.2f}")  # the first direction is 1: .1 + .01 * 3 * 1
    0.13
    """
    _validate.boolean(multiplicative=multiplicative)
    b1 = _validate.in_range(0, 1, closed="left", b1=b1)
    b2 = _validate.in_range(0, 1, closed="left", b2=b2)
    eps = _validate.positive(eps=eps)
    return _hypergradient_descent(
        optax.scale_by_adam(b1, b2, eps),
        learning_rate,
        hypergradient_learning_rate,
        min_learning_rate,
        max_learning_rate,
        multiplicative,
    )
