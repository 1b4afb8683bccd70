"""The state of Arbiter, and how to anchor it to a batch size from outside a chain."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.typing

from arbiter_jax import _validate
from arbiter_jax._count import Count
from arbiter_jax.base import PyTree

ALPHA_SCALE = 1e-6  # the standard deviation of fresh mixture logits


class ArbiterState(NamedTuple):
    """State of :func:`arbiter`: arrays only; ``state._replace(...)`` sets one."""

    agent_params: PyTree  # phi
    mixture_logits: jax.Array  # shape=(N,), dtype=float, alpha
    response_weights: jax.Array  # shape=(num_features,), dtype=float, m
    agent_opt_state: PyTree  # of phi and m
    mixture_opt_state: PyTree  # of alpha
    proposals: jax.Array  # shape=(N,), dtype=float, sorted logits of the last hyper-step
    # Kept apart from alpha, which the end of a window draws again.
    mixture_weights: jax.Array  # shape=(N,), dtype=float, softmax(alpha) after the last hyper-step
    mixture: jax.Array  # shape=(), dtype=float, s
    offset: jax.Array  # shape=(), dtype=float, added to every proposal
    pending_anchor: jax.Array  # shape=(), dtype=int32, anchors the next hyper-step there; 0: no
    batch_size: jax.Array  # shape=(), dtype=int32, in examples
    min_batch_size: jax.Array  # shape=(), dtype=int32
    max_batch_size: jax.Array  # shape=(), dtype=int32
    meta_batch_size: jax.Array  # shape=(), dtype=int32, B_s, in examples
    meta_loss: jax.Array  # shape=(), dtype=float, F
    window_step: jax.Array  # shape=(), dtype=int32, updates since the window began
    signals_due: jax.Array | None  # shape=(), dtype=bool, next is a hyper-step; None: always
    num_clipped: jax.Array  # shape=(), dtype=int32, hyper-steps with B_s larger than the meta batch
    num_skipped: jax.Array  # shape=(), dtype=int32, hyper-steps skipped for a non-finite number
    key: jax.Array  # shape=(2,), dtype=uint32
    ledger: Count  # training examples up to the last update, if they are counted; see base
    statistics: PyTree = None  # of the meta-objective; says what that reads

    requires = ("agent_inputs",)
    metrics = ("proposals", "mixture_weights", "mixture", "meta_batch_size", "meta_loss")


def redraw_mixture(key: jax.Array, mixture_logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A new key, and new mixture logits."""
    key, alpha_key = jax.random.split(key)
    noise = jax.random.normal(alpha_key, mixture_logits.shape, mixture_logits.dtype)
    return key, ALPHA_SCALE * noise


def re_anchor(opt_state: PyTree, batch_size: jax.typing.ArrayLike) -> PyTree:
    """Anchors every Arbiter in an optimizer state to another batch size.

    To be called at the milestones of a schedule that Arbiter complements. The batch size becomes
    `batch_size`, the mixture is at its logit from the next hyper-step on, alpha and its window
    start over. What the agent has learned stays.

    Args:
      opt_state: State of a chain with :func:`arbiter` (``anchor="offset"``) in it.
      batch_size: int32[], in examples, within the range of that arbiter.

    Returns:
      The new optimizer state.

    Raises:
      ValueError: If there is no Arbiter in the state, or the size is not an integer in its range.

    >>> import arbiter_jax as aj
    >>> tx = aj.arbiter(aj.mlp_agent((3,)), lambda *args: None, num_features=3)
    >>> int(aj.get_batch_size(aj.re_anchor(tx.init(None), 128)))
    128
    """
    found = []

    def set_anchor(node):
        if not isinstance(node, ArbiterState):
            return node
        found.append(node)
        size = batch_size
        if not any(map(_validate.is_traced, (size, node.max_batch_size))) and jnp.ndim(size) == 0:
            low, high = (int(jnp.max(x)) for x in (node.min_batch_size, node.max_batch_size))
            size = _validate.integer(batch_size=size, minimum=low, maximum=high)
        # Shapes stay as they are, including those of a state that was vmapped over seeds.
        size = jnp.broadcast_to(jnp.asarray(size, jnp.int32), node.batch_size.shape)
        fresh = jnp.vectorize(redraw_mixture, signature="(k),(n)->(k),(n)")
        key, mixture_logits = fresh(node.key, node.mixture_logits)
        return node._replace(
            batch_size=size,
            meta_batch_size=size,
            pending_anchor=size,
            mixture_logits=mixture_logits,
            window_step=jnp.zeros_like(node.window_step),
            signals_due=jax.tree.map(jnp.ones_like, node.signals_due),
            key=key,
        )

    new_state = jax.tree.map(
        set_anchor, opt_state, is_leaf=lambda node: isinstance(node, ArbiterState)
    )
    if not found:
        raise ValueError("opt_state must hold the state of an aj.arbiter, found none.")
    return new_state
