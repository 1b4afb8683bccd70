"""AdamP: Adam without the part of the step that only makes scale-invariant weights longer.

Weights in front of a normalisation layer have gradients at right angles to them, so every step
grows their norm and shrinks the effective rate. AdamP finds such weights by that angle and
projects their step.

Reference: Heo et al., `AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant
Weights <https://arxiv.org/abs/2006.08217>`_, ICLR 2021.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _validate
from arbiter_jax._numerics import all_finite, tree_where
from arbiter_jax.base import require


class AdamPState(NamedTuple):
    """State of :func:`adamp`."""

    learning_rate: jax.Array  # shape=(), dtype=float32, the rate that the next step will use
    adam: Any  # optax.ScaleByAdamState: count, mu, nu
    num_skipped: jax.Array  # shape=(), dtype=int32, steps whose gradients were not finite

    metrics = ("learning_rate",)


def _project(
    param: jax.Array, grad: jax.Array, step: jax.Array, delta: float, channel_axis: int, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Projects one step if its weights look scale-invariant, by channel or else as a layer.

    Returns:
      The step, and whether it was projected, bool[].
    """
    if param.ndim < 2:  # biases and the gains of normalisation layers
        return step, jnp.asarray(False)
    dtype = jnp.promote_types(param.dtype, jnp.float32)
    param, grad, wide = param.astype(dtype), grad.astype(dtype), step.astype(dtype)
    every_axis = tuple(range(param.ndim))
    projected, invariant = wide, jnp.asarray(False)
    for axes in (tuple(a for a in every_axis if a != channel_axis % param.ndim), every_axis):

        def dot(x, y, axes=axes):
            return jnp.sum(x * y, axes, keepdims=True)

        dim = math.prod(param.shape[a] for a in axes)
        norm = jnp.sqrt(dot(param, param))
        cosine = jnp.abs(dot(grad, param)) / jnp.maximum(norm * jnp.sqrt(dot(grad, grad)), eps)
        hit = jnp.max(cosine) < delta / math.sqrt(dim)
        unit = param / (norm + eps)
        tangent = wide - unit * dot(unit, wide)
        projected = jnp.where(hit & ~invariant, tangent, projected)
        invariant = invariant | hit
    return projected.astype(step.dtype), invariant


def adamp(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    nesterov: bool = False,
    *,
    channel_axis: int = -1,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamP, Adam projected off the direction of scale-invariant weights.

    For every parameter tensor of two axes or more, with gradient g, weights w and Adam's
    direction p,

    .. math::
      q = \begin{cases}
        p - \hat w (\hat w \cdot p) & \text{if } |\cos(w, g)| < \delta / \sqrt{\dim w} \\
        p & \text{otherwise}
      \end{cases}
      \qquad \hat w = w / |w|, \qquad
      \Delta w = -\eta (q + \lambda w),

    first with w the weights of one output channel, where all channels must pass; if they do not,
    with w the whole tensor. The weight decay is decoupled, and :math:`\lambda` is `weight_decay`
    times `wd_ratio` where the step was projected.

    Args:
      learning_rate: eta, >= 0, or a schedule of the step. A constant is kept in the state and may
        be set there.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root of the second moment and to norms, > 0.
      weight_decay: lambda, >= 0.
      delta: How near to a right angle counts as scale-invariant, in [0, 1].
      wd_ratio: Share of the weight decay that scale-invariant weights get, in [0, 1].
      nesterov: Whether the first moment is Nesterov's, as in ``optax.nadam``.
      channel_axis: The axis of output channels: -1 as in Flax, or 0 for kernels laid out as in
        PyTorch.

    Returns:
      A complete optimizer, its updates ready for ``optax.apply_updates``. Its state is an
      :class:`AdamPState`.

    Raises:
      ValueError: If an argument is outside of its range.
      TypeError: If ``update`` is called without the parameters.

    Reference:
      Heo et al., `AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant
      Weights <https://arxiv.org/abs/2006.08217>`_, ICLR 2021, algorithm 2.

    *Guarantees*:
      * At right angles: a projected step is orthogonal to its weights, channel by channel or as a
        layer.
      * Is AdamW where nothing is projected: with `delta` 0 the updates are those of
        ``optax.adamw``.
      * Skips and counts: a step with a gradient that is not finite changes nothing but
        `num_skipped`.

    >>> import arbiter_jax as aj, jax.numpy as jnp
    >>> tx = aj.adamp(0.1)
    >>> params = jnp.array([[3.0], [4.0]])
    >>> updates, _ = tx.update(jnp.array([[4.0], [-3.0]]), tx.init(params), params)
    >>> print(*(f"{update:.3f}" for update in updates[:, 0]))  # Adam's step is -.1 (1, -1)
    -0.112 0.084
    """
    if not callable(learning_rate):
        learning_rate = _validate.non_negative(learning_rate=learning_rate)
    b1 = _validate.in_range(0, 1, closed="left", b1=b1)
    b2 = _validate.in_range(0, 1, closed="left", b2=b2)
    eps = _validate.positive(eps=eps)
    weight_decay = _validate.non_negative(weight_decay=weight_decay)
    delta = _validate.in_range(0, 1, delta=delta)
    wd_ratio = _validate.in_range(0, 1, wd_ratio=wd_ratio)
    channel_axis = _validate.one_of((0, -1), channel_axis=channel_axis)
    adam = optax.scale_by_adam(b1, b2, eps, nesterov=nesterov)

    def init_fn(params):
        start = (
            learning_rate(jnp.asarray(0, jnp.int32)) if callable(learning_rate) else learning_rate
        )
        return AdamPState(
            learning_rate=jnp.asarray(start, jnp.float32),
            adam=adam.init(params),
            num_skipped=jnp.asarray(0, jnp.int32),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        require("adamp", params=params)
        directions, adam_state = adam.update(updates, state.adam, params)

        def step(param, grad, direction):
            param = jnp.asarray(param)
            direction, invariant = _project(param, grad, direction, delta, channel_axis, eps)
            if weight_decay:
                decay = jnp.where(invariant, weight_decay * wd_ratio, weight_decay)
                direction = direction + decay.astype(param.dtype) * param
            return (-state.learning_rate * direction).astype(grad.dtype)

        steps = jax.tree.map(step, params, updates, directions)
        proposed = state._replace(adam=adam_state)
        if callable(learning_rate):
            next_rate = learning_rate(proposed.adam.count)
            proposed = proposed._replace(learning_rate=jnp.asarray(next_rate, jnp.float32))
        # The state too: squares of finite gradients may overflow and leave a finite step.
        usable = all_finite(steps, proposed)
        skipped = state._replace(num_skipped=optax.safe_increment(state.num_skipped))
        return (
            tree_where(usable, steps, jax.tree.map(jnp.zeros_like, steps)),
            tree_where(usable, proposed, skipped),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
