"""The hypergradient of a look-ahead, in forward mode through the inner step of `run_window`.

The parameters after T steps are a function of the hyperparameters. Their derivative is propagated
forward together with them, one tangent per hyperparameter, so memory does not grow with T. Wu et
al., "Understanding Short-Horizon Bias in Stochastic Meta-Optimization", ICLR 2018,
https://arxiv.org/abs/1803.02021.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from arbiter_jax import _validate
from arbiter_jax._numerics import at_least_float32, tree_where
from arbiter_jax.base import LossFn, PyTree
from arbiter_jax.batching import sample_batch
from arbiter_jax.batching._masking import num_rows
from arbiter_jax.batching._sampling import advance
from arbiter_jax.gradients import Gradient, masked_value_and_grad
from arbiter_jax.training import TrainState
from arbiter_jax.training._inner_step import inner_step

# Ranges of the effective learning rate, of 1 - momentum, and of the decay.
_BOUNDS = {"learning_rate": (1e-4, 10.0), "momentum": (1e-4, 1.0), "decay": (1e-4, 1e3)}
_MAX_GRADIENT = 10.0

DEFAULT_META_OPTIMIZER = optax.adam(0.01)

InnerOptimizer = Callable[..., optax.GradientTransformation]
"""``inner_optimizer(learning_rate, momentum) -> transformation``: `optax.sgd`, `optax.adam`, ..."""

LogValues = dict[str, jax.Array]
"""Logarithms of the learned ones among the effective learning rate
``learning_rate / (1 - momentum)``, ``1 - momentum``, and the decay."""


class Hyperparameters(NamedTuple):
    r"""Hyperparameters to learn: the rate of step t is :math:`\alpha_0 (1 + t/K)^{-\beta}`."""

    learning_rate: jax.Array | float  # shape=(), dtype=float, alpha_0 > 0
    momentum: jax.Array | float  # shape=(), dtype=float, in [0, 1); the first decay rate of Adam
    decay: jax.Array | float  # shape=(), dtype=float, beta >= 0


@dataclasses.dataclass(frozen=True)
class LookAheadConfig:
    """Everything that is static while hyperparameters are learned."""

    loss_fn: LossFn
    inner_optimizer: InnerOptimizer
    batch_size: int
    time_constant: float  # K, in steps
    horizon: int = 1  # T, in steps
    learned: tuple[str, ...] = ()
    effective_learning_rate: bool = False  # learn learning_rate / (1 - momentum)
    meta_optimizer: optax.GradientTransformation = DEFAULT_META_OPTIMIZER
    reset_meta_state: bool = False  # before every meta step

    def __post_init__(self):
        """Checks the ranges, and that functions are functions."""
        if not callable(self.loss_fn):
            raise ValueError(
                f"loss_fn must be a function (params, batch) -> float[M], got {self.loss_fn!r}."
            )
        if not callable(self.inner_optimizer):
            raise ValueError(
                "inner_optimizer must be a function (learning_rate, momentum) -> transformation: pass "
                f"optax.sgd and not optax.sgd(0.1), got {type(self.inner_optimizer).__name__}."
            )
        if not hasattr(self.meta_optimizer, "update"):
            raise ValueError(
                "meta_optimizer must be a transformation: pass optax.adam(0.01) and not optax.adam, "
                f"got {self.meta_optimizer!r}."
            )
        _validate.integer(horizon=self.horizon, minimum=1)
        _validate.integer(batch_size=self.batch_size, minimum=1)
        _validate.positive(time_constant=self.time_constant)
        for name in self.learned:
            _validate.one_of(Hyperparameters._fields, learned=name)

    def transformation(
        self, hyperparameters: Hyperparameters, step: jax.typing.ArrayLike = 0
    ) -> optax.GradientTransformationExtraArgs:
        """The inner optimizer at one step."""
        rate, momentum, decay = hyperparameters
        rate = rate * (1 + step / self.time_constant) ** -decay
        return optax.with_extra_args_support(self.inner_optimizer(rate, momentum))


def look_ahead_config(
    *,
    learned: Sequence[str],
    meta_optimizer: optax.GradientTransformation | None,
    effective_learning_rate: bool,
    reset_meta_state: bool,
    **others: Any,
) -> LookAheadConfig:
    """A configuration from the arguments of :func:`offline` and :func:`online`, checked."""
    return LookAheadConfig(
        **others,
        learned=as_names(learned),
        effective_learning_rate=bool(
            _validate.boolean(effective_learning_rate=effective_learning_rate)
        ),
        meta_optimizer=meta_optimizer or DEFAULT_META_OPTIMIZER,
        reset_meta_state=bool(_validate.boolean(reset_meta_state=reset_meta_state)),
    )


def as_names(learned: Sequence[str]) -> tuple[str, ...]:
    """The names of the hyperparameters to learn as a tuple, or an error if it is one name alone."""
    if isinstance(learned, str) or not isinstance(learned, Sequence):
        raise ValueError(
            f"learned must be a tuple of names, such as ('learning_rate',), got {learned!r}."
        )
    return tuple(learned)


def check_arguments(params: PyTree, *batches: PyTree) -> None:
    """Raises unless all parameters are floats and all data are numbers, one row per example."""
    for leaf in jax.tree.leaves(params) or [None]:
        if not jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact):
            raise ValueError(
                "params must be a pytree of arrays of floats, which are trained, got "
                f"{getattr(leaf, 'dtype', leaf)}."
            )
    for batch in batches:
        num_rows(batch)
        for leaf in jax.tree.leaves(batch):
            if getattr(getattr(leaf, "dtype", None), "kind", "f") in "OSUMm":
                raise ValueError(f"data must be arrays of numbers, got dtype {leaf.dtype}.")


def as_hyperparameters(hyperparameters: Hyperparameters) -> Hyperparameters:
    """Returns the hyperparameters as arrays of the default float type, or raises."""
    if not isinstance(hyperparameters, Hyperparameters):
        raise ValueError(
            "hyperparameters must be Hyperparameters(learning_rate, momentum, decay), got "
            f"{hyperparameters!r}."
        )
    if not any(isinstance(x, jax.core.Tracer) for x in hyperparameters):
        _validate.positive(learning_rate=hyperparameters.learning_rate)
        _validate.in_range(0.0, 1.0, closed="left", momentum=hyperparameters.momentum)
        _validate.non_negative(decay=hyperparameters.decay)
    return Hyperparameters(*(jnp.asarray(x, jnp.result_type(float)) for x in hyperparameters))


def to_log_values(config: LookAheadConfig, hyperparameters: Hyperparameters) -> LogValues:
    """The coordinates in which hyperparameters are learned, clipped to their ranges."""
    rate, momentum, decay = hyperparameters
    effective = rate / (1 - momentum) if config.effective_learning_rate else rate
    values = {"learning_rate": effective, "momentum": 1 - momentum, "decay": decay}
    return {name: _clip_log(name, jnp.log(values[name])) for name in config.learned}


def from_log_values(
    config: LookAheadConfig, log_values: LogValues, fixed: Hyperparameters
) -> Hyperparameters:
    """The hyperparameters at these coordinates; those not learned are taken from `fixed`."""
    rate, momentum, decay = fixed
    if "momentum" in log_values:
        momentum = 1 - jnp.exp(log_values["momentum"])
    if "learning_rate" in log_values:
        rate = jnp.exp(log_values["learning_rate"])
        rate = rate * (1 - momentum) if config.effective_learning_rate else rate
    if "decay" in log_values:
        decay = jnp.exp(log_values["decay"])
    return Hyperparameters(rate, momentum, decay)


def _clip_log(name: str, log_value: jax.Array) -> jax.Array:
    low, high = _BOUNDS[name]
    return jnp.clip(log_value, jnp.log(low), jnp.log(high))


def draw(
    state: TrainState, data: PyTree, batch_size: int
) -> tuple[TrainState, tuple[PyTree, jax.Array]]:
    """The next batch of a state's sampler, with a mask of ones."""
    sampler, batch, mask = sample_batch(state.train_sampler, data, batch_size, batch_size)
    return state._replace(train_sampler=sampler), (batch, mask)


def skip_examples(state: TrainState, data: PyTree, num_examples: int) -> TrainState:
    """The state with its sampler advanced by `num_examples`."""
    sampler = advance(state.train_sampler, num_examples, num_rows(data))
    return state._replace(train_sampler=sampler)


def train_steps(
    config: LookAheadConfig,
    state: TrainState,
    data: PyTree,
    hyperparameters: Hyperparameters,
    num_steps: int,
) -> tuple[TrainState, jax.Array]:
    """Trains for `num_steps` steps; returns the state and the loss before each, float[num_steps]."""
    gradient_fn = masked_value_and_grad(config.loss_fn)

    def body(state, _):
        tx = config.transformation(hyperparameters, state.num_steps)
        state, batch = draw(state, data, config.batch_size)
        state, gradient = inner_step(state, *batch, gradient_fn=gradient_fn, tx=tx)
        return state, gradient.value

    return jax.lax.scan(body, state, None, length=num_steps)


def evaluate(config: LookAheadConfig, params: PyTree, batch: PyTree, state: TrainState) -> Gradient:
    """The mean loss of all rows of a batch, with its gradient, at the model state of `state`."""
    mask = jnp.ones(num_rows(batch), bool)
    gradient_fn = masked_value_and_grad(config.loss_fn)
    return gradient_fn(params, batch, mask, state.model_state, state.key)


def look_ahead_gradient(
    config: LookAheadConfig,
    coordinates: PyTree,
    decode: Callable[[PyTree], Hyperparameters],
    state: TrainState,
    data: PyTree,
    evaluation: PyTree,
) -> tuple[jax.Array, PyTree]:
    """The loss after T steps, and its derivative with respect to the coordinates.

    Args:
      config: The static configuration.
      coordinates: Pytree of scalars.
      decode: Maps coordinates to hyperparameters.
      state: Where the look-ahead starts.
      data: Pytree of arrays [num_examples, ...].
      evaluation: Batch whose mean loss is evaluated at the end.
    """

    def look_ahead(coordinates):
        after, _ = train_steps(config, state, data, decode(coordinates), config.horizon)
        return after.params, after

    # One unit tangent per coordinate; under vmap they share the primal computation.
    leaves, treedef = jax.tree.flatten(coordinates)
    units = treedef.unflatten(list(jnp.eye(len(leaves), dtype=leaves[0].dtype)))
    params, tangents, after = jax.vmap(
        lambda tangent: jax.jvp(look_ahead, (coordinates,), (tangent,), has_aux=True),
        out_axes=(None, 0, None),
    )(units)
    gradient = evaluate(config, params, evaluation, after)
    # <grad L(theta_T), d theta_T / d coordinate>
    pairs = zip(jax.tree.leaves(gradient.grads), jax.tree.leaves(tangents), strict=True)
    slopes = jnp.stack([_products(g, t) for g, t in pairs]).sum(0)
    return gradient.value, treedef.unflatten(list(slopes))


def _products(gradient: jax.Array, tangents: jax.Array) -> jax.Array:
    """Inner products of a gradient with k tangents, float[k], in at least float32."""
    gradient, tangents = at_least_float32(gradient), at_least_float32(tangents)
    products = jnp.real(jnp.conj(gradient)[None] * tangents)
    return jnp.sum(products, axis=range(1, tangents.ndim))


class MetaState(NamedTuple):
    """Hyperparameters that are being learned, and the state of their optimizer."""

    log_values: LogValues
    opt_state: optax.OptState
    num_skipped: jax.Array  # shape=(), dtype=int32, meta steps whose hypergradient was not finite


def init_meta_state(config: LookAheadConfig, start: Hyperparameters) -> MetaState:
    """The initial state of meta-descent."""
    log_values = to_log_values(config, start)
    opt_state = config.meta_optimizer.init(log_values)
    return MetaState(log_values, opt_state, jnp.zeros((), jnp.int32))


def meta_step(config: LookAheadConfig, meta: MetaState, gradient: LogValues) -> MetaState:
    """One step of the hyperparameters against a hypergradient, with all limits applied."""
    if config.reset_meta_state:
        meta = meta._replace(opt_state=config.meta_optimizer.init(meta.log_values))
    finite = jnp.all(jnp.isfinite(jnp.stack(list(gradient.values()))))
    # d/d log x = x d/dx, and the limit applies to d/dx.
    limits = {name: _MAX_GRADIENT * jnp.exp(x) for name, x in meta.log_values.items()}
    clipped = {
        name: jnp.where(finite, jnp.clip(g, -limits[name], limits[name]), 0)
        for name, g in gradient.items()
    }
    updates, opt_state = config.meta_optimizer.update(clipped, meta.opt_state, meta.log_values)
    moved: Any = optax.apply_updates(meta.log_values, updates)
    moved = {name: _clip_log(name, x) for name, x in moved.items()}
    log_values, opt_state = tree_where(
        finite, (moved, opt_state), (meta.log_values, meta.opt_state)
    )
    return MetaState(log_values, opt_state, meta.num_skipped + ~finite)


def warn_of_steps(losses: jax.Array, num_skipped: Any = 0, num_meta_steps: int = 0) -> None:
    """Warns of losses and meta steps that were not finite; does nothing while tracing.

    Args:
      losses: One per step.
      num_skipped: Meta steps whose hypergradient was not finite.
      num_meta_steps: Of how many.
    """
    if _validate.is_traced(losses) or _validate.is_traced(num_skipped):
        return
    hint = "look for such numbers in data and params, or lower the learning rate."
    if int(num_skipped):
        _validate.warn(
            f"{int(num_skipped)} of {num_meta_steps} meta steps had a hypergradient that was not "
            f"finite and changed nothing: {hint}"
        )
        return
    (bad,) = np.nonzero(~np.isfinite(np.asarray(losses, float)))
    if bad.size:
        _validate.warn(
            f"{bad.size} of {losses.size} steps had a loss that was not finite, the first was step "
            f"{bad[0]}: {hint}"
        )
