"""Parameters, keys and states, checked before a run starts from them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from arbiter_jax._numerics import raw_key
from arbiter_jax.base import PyTree
from arbiter_jax.training._difference import difference, node_parts
from arbiter_jax.training._leaves import called, is_array, is_deleted, leaves_of


def check_params(params: PyTree) -> None:
    """Raises a ValueError if the parameters are not a pytree of arrays."""
    hint = "pass what the model's init returns, e.g. model.init(key, inputs)['params'] in Flax"
    if isinstance(params, nnx.Module):
        raise ValueError(
            f"params must be a pytree of arrays, got the NNX module {type(params).__name__}: "
            "aj.attach(module, head, inputs) makes functions of it; its `init(key)` returns params "
            "and model_state."
        )
    leaves = leaves_of(params)
    if not leaves:
        raise ValueError(f"params must be a pytree of arrays, got {called(params)}: {hint}.")
    for path, leaf in leaves:
        if not is_array(leaf):
            where = "params" + jax.tree_util.keystr(path)
            raise ValueError(f"{where} must be an array of numbers, got {called(leaf)}: {hint}.")
    if is_deleted(params):
        raise ValueError(
            "params must be arrays that can be read, got deleted ones: they were donated to a "
            "program such as run_window; pass what it returned, or a copy made before."
        )


def check_key(key: Any) -> jax.Array:
    """The key of a run as plain numbers, or a ValueError if it is not one key of this process."""
    implementation = jax.config.jax_default_prng_impl  # pyright: ignore[reportAttributeAccessIssue]
    dtype = getattr(key, "dtype", None)
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        given = str(jax.random.key_impl(key))
        if given != implementation:
            raise ValueError(
                f"key must be of the implementation {implementation!r}, which "
                f"jax.config.jax_default_prng_impl names, got one of {given!r}: pass a seed, or "
                f"jax.random.key(seed, impl={implementation!r})."
            )
        usable = key.shape == ()
    elif dtype is None:
        usable = isinstance(key, int) and not isinstance(key, bool) and 0 <= key < 2**32
    elif jnp.shape(key) == ():
        usable = jnp.issubdtype(dtype, jnp.integer)
        if usable and not isinstance(key, jax.Array):
            usable = 0 <= int(key) < 2**32
    else:
        usable = dtype == jnp.uint32 and key.shape == jax.eval_shape(jax.random.PRNGKey, 0).shape
    if not usable:
        raise ValueError(
            "key must be one PRNG key, e.g. jax.random.key(0), or an integer in [0, 2**32), got "
            f"{repr(key) if dtype is None else called(key)}."
        )
    return raw_key(key)


def check_model_state(model_state: PyTree) -> None:
    """Raises a ValueError if the state of a model holds anything but arrays."""
    for path, leaf in leaves_of(model_state):
        if not is_array(leaf):
            where = "model_state" + jax.tree_util.keystr(path)
            raise ValueError(f"{where} must be an array of numbers, got {called(leaf)}.")


_TARGET = (
    "a checkpoint that Orbax restores without a target comes back as dicts and lists; restore it "
    "as checkpointer.restore(path, aj.init_state(params, tx, key))"
)


def check_state(state: Any, expected_type: type) -> None:
    """Raises a ValueError if `state` is not a TrainState whose arrays can be read."""
    if not isinstance(state, expected_type):
        hint = "make one with aj.init_state(params, tx, key)"
        if isinstance(state, dict | list):
            hint = _TARGET
        elif hasattr(state, "history") and hasattr(state, "state"):
            hint = "pass result.state"
        elif hasattr(state, "apply_fn") or hasattr(state, "opt_state"):
            hint = "pass its params and tx to fit, without state"
        elif isinstance(state, tuple):
            hint = (
                "to go on with the state of an optimizer alone, pass aj.init_state(params, tx, "
                "key)._replace(opt_state=...)"
            )
        raise ValueError(f"state must be an aj.TrainState, got {called(state)}: {hint}.")
    for path, leaf in leaves_of(state):
        if not is_array(leaf):
            where = "state" + jax.tree_util.keystr(path)
            raise ValueError(f"{where} must be an array, got {called(leaf)}.")
    if is_deleted(state):
        raise ValueError(
            "state must hold arrays that can be read, got deleted ones: run_window donates the "
            "state that it is given, and fit the one that it gives to callbacks; go on with the one "
            "that is returned, or keep a copy, jax.tree.map(jnp.copy, state)."
        )


def check_same_chain(state: Any, expected: Any) -> None:
    """Raises a ValueError if a state is not one of this `tx`.

    Args:
      state: A TrainState.
      expected: Shapes and dtypes of what ``init_state`` makes of the same parameters.
    """
    different = difference(state, expected)
    if different is None:
        return
    hint = "a state goes on under the chain that it was made with, so pass that tx"
    if _restored_without_target(state, expected):
        hint = _TARGET
    raise ValueError(f"state must be one of the given tx, but state{different}: {hint}.")


def _restored_without_target(found: PyTree, expected: PyTree) -> bool:
    """Whether a dict or list stands where a tuple was saved, as in a checkpoint read as it is."""
    if isinstance(expected, tuple) and isinstance(found, dict | list):
        return True
    parts, wanted = node_parts(found), node_parts(expected)
    return any(_restored_without_target(parts[k], wanted[k]) for k in wanted.keys() & parts.keys())
