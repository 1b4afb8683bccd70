"""Several PRNG keys instead of one, and the states that their runs start from."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from arbiter_jax._numerics import raw_key
from arbiter_jax.base import PyTree
from arbiter_jax.training._check_state import (
    check_key,
    check_model_state,
    check_params,
    check_state,
)
from arbiter_jax.training._resume import resume_state
from arbiter_jax.training._state import TrainState, copy_state, init_state


def are_several(key: Any) -> bool:
    """Whether this is a vector of PRNG keys, typed ones [k] or raw ones uint32[k, 2]."""
    dtype, shape = getattr(key, "dtype", None), jnp.shape(key) if hasattr(key, "shape") else ()
    if dtype is None:
        return False
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return len(shape) == 1
    one = jax.eval_shape(jax.random.PRNGKey, 0).shape
    return dtype == jnp.uint32 and len(shape) == 2 and shape[1:] == one


def stacked_state(
    params: PyTree, tx: optax.GradientTransformation, keys: Any, model_state: PyTree, state: Any
) -> TrainState:
    """The states at the start of the runs, with a leading axis, in buffers of their own."""
    num_seeds = len(keys)
    if num_seeds < 1:
        raise ValueError("key must hold at least one PRNG key, got none.")
    if state is not None:
        check_state(state, TrainState)
        _check_leading_axis(state, num_seeds, "state", "the state of that many seeds, result.state")
        return copy_state(jax.vmap(lambda state: resume_state(state, tx))(state))
    check_params(params)
    check_model_state(model_state)
    _check_leading_axis(params, num_seeds, "params", "jax.vmap(init)(keys)")
    _check_leading_axis(model_state, num_seeds, "model_state", "jax.vmap(init)(keys)")
    check_key(keys[0])  # the others are of its kind
    make = lambda params, key, model_state: init_state(params, tx, key, model_state)
    return copy_state(jax.vmap(make)(params, raw_key(keys), model_state))


def _check_leading_axis(tree: PyTree, num_seeds: int, name: str, source: str) -> None:
    for path, leaf in jax.tree.leaves_with_path(tree):
        if jnp.shape(leaf)[:1] != (num_seeds,):
            raise ValueError(
                f"{name} must have a leading axis of {num_seeds}, an entry for each key, got shape "
                f"{list(jnp.shape(leaf))} at {name}{jax.tree_util.keystr(path)}: pass {source}."
            )
