"""Going on with a state that was saved, perhaps under another range of batch sizes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from arbiter_jax.base import PyTree, requests
from arbiter_jax.training._check_functions import check_transformation
from arbiter_jax.training._check_state import check_same_chain, check_state
from arbiter_jax.training._state import TrainState, Unfinished, abstract_state, copy_state

_LIMITS = ("min_batch_size", "max_batch_size", "budget")
_SIZES = ("batch_size", "meta_batch_size")


def resume_state(state: TrainState, tx: optax.GradientTransformation) -> TrainState:
    """Prepares a saved state to continue with `tx`, under its range of batch sizes and its budget.

    A state carries the range that its rule was built with. If it was saved under another one, what
    `tx` says holds from the first window on: a decision outside its range becomes the nearest size
    inside, and a window that was left unfinished with another size is dropped. :func:`fit` does this
    with the state that it is given; call it in a loop of your own.

    Args:
      state: Of a chain of the same structure, e.g. restored from a checkpoint.
      tx: The transformation to go on with.

    Returns:
      A :class:`TrainState` in buffers of its own.

    Raises:
      ValueError: If `state` is not a TrainState of this `tx`, or its arrays were donated.

    >>> import arbiter_jax as aj
    >>> rule = lambda size: aj.schedulers.constant(size, max_batch_size=size)
    >>> tx = lambda size: optax.chain(optax.sgd(0.1), rule(size))
    >>> state = aj.init_state(jnp.zeros(3), tx(64), jax.random.PRNGKey(0))
    >>> int(aj.get_batch_size(resume_state(state, tx(8)).opt_state))
    8
    """
    check_transformation(tx)
    check_state(state, TrainState)
    check_same_chain(state, abstract_state(state, tx))
    opt_state = _with_limits_of(tx, state.opt_state, state.params)
    unfinished = _within_range(state.unfinished, opt_state)
    return copy_state(state._replace(opt_state=opt_state, unfinished=unfinished))


def _within_range(unfinished: Unfinished, opt_state: PyTree) -> Unfinished:
    for rule in requests(opt_state).rules:
        size = unfinished.batch_size
        low, high = (getattr(rule, name, size) for name in _LIMITS[:2])
        inside = (low <= size) & (size <= high)
        unfinished = jax.tree.map(lambda x, inside=inside: jnp.where(inside, x, 0), unfinished)
    return unfinished


def _with_limits_of(tx: optax.GradientTransformation, opt_state: PyTree, params: PyTree) -> PyTree:
    limits = _limits_of(params, tx)

    def replace(path: Any, leaf: Any) -> Any:
        (*node, name) = path or (None,)
        name = getattr(name, "name", None)
        at = lambda field: limits.get((jax.tree_util.keystr(tuple(node)), field))
        if name in _LIMITS:
            return at(name)
        low, high = at("min_batch_size"), at("max_batch_size")
        if name not in _SIZES or low is None or high is None:
            return leaf
        return jnp.clip(leaf, low, high).astype(leaf.dtype)

    return jax.tree.map_with_path(replace, opt_state)


@functools.partial(jax.jit, static_argnames="tx")
def _limits_of(params: PyTree, tx: optax.GradientTransformation) -> Any:
    """The range of `tx`. Compiled, and once: the rest of the state, which is large, is never made."""
    return _limits(tx.init(params))


def _limits(opt_state: PyTree) -> Any:
    """(Path of a node, name) -> what a state says about its range."""
    found = {}
    for (*node, name), leaf in jax.tree.leaves_with_path(opt_state):
        if getattr(name, "name", None) in _LIMITS:
            found[jax.tree_util.keystr(tuple(node)), name.name] = leaf
    return found
