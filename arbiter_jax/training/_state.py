"""What a run trains on, and everything that it carries from one step to the next."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax._count import Count, as_count
from arbiter_jax.base import PyTree
from arbiter_jax.batching import SamplerState, init_sampler
from arbiter_jax.training._check_functions import check_transformation
from arbiter_jax.training._check_state import check_key, check_model_state, check_params


class Data(NamedTuple):
    """The arrays that a run trains on, on the device."""

    # Leaves [num_examples, ...], usually (inputs, labels); or one window's Block from the host, and
    # for `fit` what it comes from.
    train: PyTree
    validation: PyTree = None  # the same, for rules that measure on validation examples


class Unfinished(NamedTuple):
    """The rest of a window that a run was stopped in; the next window finishes it."""

    batch_size: jax.Array  # shape=(), dtype=int32, that the window began with
    bucket_size: jax.Array  # shape=(), dtype=int32
    num_steps: jax.Array  # shape=(), dtype=int32, steps left, 0 if there is no such window


class TrainState(NamedTuple):
    """Everything that a run carries from one step to the next, all of it arrays.

    It is the state of :func:`fit` and :func:`run_window`, and not Flax's ``TrainState`` for a loop
    of your own: that is :class:`arbiter_jax.models.TrainState`.
    """

    params: PyTree  # what the optimizer updates
    model_state: PyTree  # BatchNorm statistics and the like; None for a model without any
    opt_state: PyTree  # of the whole chain, the batch-size rule included
    train_sampler: SamplerState  # where the run stands in the training data
    validation_sampler: SamplerState  # and in the validation data
    key: jax.Array  # shape=(2,), dtype=uint32, for dropout and augmentation
    num_steps: jax.Array  # shape=(), dtype=int32, stops at 2^31 - 1
    num_examples: Count  # training examples seen; `int(state.num_examples)` reads it
    num_accumulated: jax.Array  # shape=(), dtype=int32, of them, in the gradients of MultiSteps
    progress: jax.Array  # shape=(), dtype=float32, scale-invariant updates; see adascale
    progress_error: jax.Array  # shape=(), dtype=float32, what rounding has added to `progress`
    num_nonfinite: jax.Array  # shape=(), dtype=int32, steps whose loss was not finite
    step_seconds: jax.Array  # shape=(), dtype=float32, measured for rules that ask; 0: unknown
    unfinished: Unfinished  # what `fit` has left of a window that it was stopped in


def init_state(
    params: PyTree,
    tx: optax.GradientTransformation,
    key: jax.Array | int,
    model_state: PyTree = None,
) -> TrainState:
    """The state at the start of a run: a pure function of the parameters and a key.

    The arrays are copied, because :func:`run_window` donates the state that it is given and the
    caller may want to use `params` again.

    Args:
      params: Parameters, any pytree of arrays.
      tx: An optax transformation, with or without a batch-size rule in it.
      key: One PRNG key, raw or typed, or an int in [0, 2^32).
      model_state: State of the model that is not trained by gradients, or None.

    Returns:
      A :class:`TrainState` in buffers of its own.

    Raises:
      ValueError: If `params` is not a pytree of arrays, `tx` not an optax transformation or `key`
        not a PRNG key of the default implementation.

    >>> import arbiter_jax as aj
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(8))
    >>> state = init_state(jnp.zeros(3), tx, jax.random.PRNGKey(0))
    >>> int(state.num_steps), int(aj.get_batch_size(state.opt_state))
    (0, 8)
    """
    check_transformation(tx)
    check_params(params)
    check_model_state(model_state)
    train_key, validation_key, model_key = jax.random.split(check_key(key), 3)
    zero = lambda dtype: jnp.zeros((), dtype)
    state = TrainState(
        params=params,
        model_state=model_state,
        opt_state=tx.init(params),
        train_sampler=init_sampler(train_key),
        validation_sampler=init_sampler(validation_key),
        key=model_key,
        num_steps=zero(jnp.int32),
        num_examples=as_count(0),
        num_accumulated=zero(jnp.int32),
        progress=zero(jnp.float32),
        progress_error=zero(jnp.float32),
        num_nonfinite=zero(jnp.int32),
        step_seconds=zero(jnp.float32),
        unfinished=no_unfinished_window(),
    )
    return copy_state(state)


def no_unfinished_window() -> Unfinished:
    """What a state holds after a whole window: the rule decides on the next one.

    Put it into a state whose decision you change by hand, so that it holds from the next step on.

    >>> int(no_unfinished_window().num_steps)
    0
    """
    return Unfinished(*(jnp.zeros((), jnp.int32) for _ in Unfinished._fields))


def abstract_state(state: TrainState, tx: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of a state of `tx` with the parameters and the model state of another."""
    make = lambda params, model_state: init_state(params, tx, 0, model_state)
    return jax.eval_shape(make, state.params, state.model_state)


def copy_state(state: TrainState) -> TrainState:
    """A state in buffers of its own: donating one copy leaves the other as it is."""
    # With their types said: of a weakly typed array the second window would be another program.
    return jax.tree.map(lambda x: jnp.array(x, jnp.result_type(x), copy=True), state)
