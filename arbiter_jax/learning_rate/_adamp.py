"""AdamP: Adam without the component of the step that only increases the norm of the weights.

Weights before a normalization layer are scale-invariant: their gradients are orthogonal to them, so
every step increases their norm and thereby reduces the effective learning rate. AdamP recognizes
such weights by that angle and projects their step.

Reference: Heo et al., `AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant
Weights <https://arxiv.org/abs/2006.08217>`_, ICLR 2021.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _schedules, _validate
from arbiter_jax._numerics import all_finite, tree_where, update_or_skip
from arbiter_jax.base import require


class AdamPState(NamedTuple):
    """State of :func:`adamp`."""

    learning_rate: jax.Array  # shape=(), dtype=float32, the rate that the next step will use
    adam: Any  # optax.ScaleByAdamState: count, mu, nu
    # Steps whose gradients were not finite, or after which the schedule was not.
    num_skipped: jax.Array  # shape=(), dtype=int32

    metrics = ("learning_rate",)


def _dot(x: jax.Array, y: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(jnp.real(jnp.conj(x) * y), axes, keepdims=True)


def _project(
    param: jax.Array, grad: jax.Array, step: jax.Array, delta: float, channel_axis: Any, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Projects one step if its weights look scale-invariant, per channel or else as a layer.

    Returns:
      The step, and whether it was projected, bool[].
    """
    if _validate.is_traced(channel_axis):
        first, last = (_project(param, grad, step, delta, axis, eps) for axis in (0, -1))
        return tree_where(channel_axis == 0, first, last)
    if param.ndim < 2:  # biases and the gains of normalization layers
        return step, jnp.asarray(False)
    dtype = jnp.promote_types(param.dtype, jnp.float32)
    param, grad, wide = param.astype(dtype), grad.astype(dtype), step.astype(dtype)
    all_axes = tuple(range(param.ndim))
    projected, invariant = wide, jnp.asarray(False)
    for axes in (tuple(a for a in all_axes if a != channel_axis % param.ndim), all_axes):
        dim = math.prod(param.shape[a] for a in axes) * (2 if jnp.iscomplexobj(param) else 1)
        norm = jnp.sqrt(_dot(param, param, axes))
        norms = norm * jnp.sqrt(_dot(grad, grad, axes))
        cosine = jnp.abs(_dot(grad, param, axes)) / jnp.maximum(norms, eps)
        hit = jnp.max(cosine) < delta / math.sqrt(dim)
        unit = param / (norm + eps)
        tangent = wide - unit * _dot(unit, wide, axes)
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
    r"""Adam whose steps do not inflate the norm of scale-invariant weights.

    For every parameter tensor with at least two axes, with gradient g, weights w and Adam's
    direction p,

    .. math::
      q = \begin{cases}
        p - \hat w (\hat w \cdot p) & \text{if } |\cos(w, g)| < \delta / \sqrt{\dim w} \\
        p & \text{otherwise}
      \end{cases}
      \qquad \hat w = w / |w|, \qquad
      \Delta w = -\eta (q + \lambda w),

    The test and the projection apply per output channel if all channels pass the test, otherwise
    to the whole tensor. The weight decay is decoupled; :math:`\lambda` is `weight_decay`, times
    `wd_ratio` if the step was projected.

    Args:
      learning_rate: eta, >= 0, or a schedule of the step. A Python number is kept in the state,
        where it may be changed; an array, as in `optax.inject_hyperparams`, replaces what is there.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root of the second moment and to norms, > 0.
      weight_decay: lambda, >= 0.
      delta: Threshold of the cosine, in units of 1 / sqrt(dim w), below which weights count as
        scale-invariant, in [0, 1].
      wd_ratio: Factor of the weight decay for scale-invariant weights, in [0, 1].
      nesterov: Whether to use Nesterov momentum, as in ``optax.nadam``.
      channel_axis: The axis of output channels: -1 as in Flax, or 0 for the kernel layout of
        PyTorch.

    Returns:
      A complete optimizer; its updates are ready for ``optax.apply_updates``. Its state is an
      :class:`AdamPState`.

    Raises:
      ValueError: If an argument is outside its range; in `init`, if the schedule does not return a
        scalar, or one that is not finite at 0.
      TypeError: If ``update`` is called without the parameters.

    Reference:
      Heo et al., `AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant
      Weights <https://arxiv.org/abs/2006.08217>`_, ICLR 2021, algorithm 2.

    *Guarantees*:
      * Orthogonal: a projected step is orthogonal to its weights, per channel or as a layer.
      * Is AdamW without projection: with `delta` 0 the updates are those of ``optax.adamw``.
      * Skips and counts: a step with a gradient that is not finite only increments `num_skipped`. A
        rate of the schedule that is not finite is counted there as well, and the last one kept.

    >>> import arbiter_jax as aj, jax.numpy as jnp
    >>> tx = aj.adamp(0.1)
    >>> params = jnp.array([[3.0], [4.0]])
    >>> updates, _ = tx.update(jnp.array([[4.0], [-3.0]]), tx.init(params), params)
    >>> print(*(f"{update:.3f}" for update in updates[:, 0]))  # Adam's step is -.1 (1, -1)
    -0.112 0.084
    """
    # An array may be another one at the next step, in `optax.inject_hyperparams`.
    follows = isinstance(learning_rate, jax.Array)
    if not callable(learning_rate):
        learning_rate = _validate.non_negative(learning_rate=learning_rate)
        _schedules.first_rate(learning_rate, learning_rate=learning_rate)
    _validate.boolean(nesterov=nesterov)
    b1 = _validate.in_range(0, 1, closed="left", b1=b1)
    b2 = _validate.in_range(0, 1, closed="left", b2=b2)
    eps = _validate.positive(eps=eps)
    weight_decay = _validate.non_negative(weight_decay=weight_decay)
    decays = _validate.is_traced(weight_decay) or weight_decay > 0
    delta = _validate.in_range(0, 1, delta=delta)
    wd_ratio = _validate.in_range(0, 1, wd_ratio=wd_ratio)
    if not _validate.is_traced(channel_axis):
        channel_axis = _validate.one_of((0, -1), channel_axis=channel_axis)
    adam = optax.scale_by_adam(b1, b2, eps, nesterov=nesterov)

    def rate_at(step):
        return _schedules.schedule_value(step, jnp.float32, learning_rate=learning_rate)

    def init_fn(params):
        start = rate_at(jnp.asarray(0, jnp.int32)) if callable(learning_rate) else learning_rate
        return AdamPState(
            learning_rate=_schedules.first_rate(start, learning_rate=learning_rate),
            adam=adam.init(params),
            num_skipped=jnp.asarray(0, jnp.int32),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        require("adamp", params=params)
        if follows:
            state = state._replace(learning_rate=jnp.asarray(learning_rate, jnp.float32))
        directions, adam_state = adam.update(updates, state.adam, params)

        def step(param, grad, direction):
            param = jnp.asarray(param)
            direction, invariant = _project(param, grad, direction, delta, channel_axis, eps)
            if decays:
                decay = jnp.where(invariant, weight_decay * wd_ratio, weight_decay)
                direction = direction + decay.astype(param.dtype) * param
            return (-state.learning_rate * direction).astype(grad.dtype)

        steps = jax.tree.map(step, params, updates, directions)
        proposed = state._replace(adam=adam_state)
        if callable(learning_rate):
            rate = rate_at(proposed.adam.count)
            finite = jnp.isfinite(rate)
            proposed = proposed._replace(
                learning_rate=jnp.where(finite, rate, state.learning_rate),
                num_skipped=state.num_skipped + (~finite).astype(jnp.int32),
            )
        # Also check the state: squares of finite gradients may overflow although the step is finite.
        usable = all_finite(steps, proposed)
        steps = tree_where(usable, steps, jax.tree.map(jnp.zeros_like, steps))
        return steps, update_or_skip(usable, proposed, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
