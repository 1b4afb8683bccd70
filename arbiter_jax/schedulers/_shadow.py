"""A wrapper that lets a batch-size rule watch a run without acting on it."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import base
from arbiter_jax.schedulers import _rule


class ShadowState(NamedTuple):
    """State of :func:`shadow`. It decides nothing: it has no field `batch_size`."""

    watched: dict[str, Any]  # the name of the rule -> its state
    decides = False

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """What is reported at every step, for this state and all states inside it."""
        return {f"shadow/{name}": size for name, size in _sizes(self).items()}


def shadow(
    rule: optax.GradientTransformation, *, name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Lets a rule watch a run: it reports what it would choose and decides nothing.

    A chain may have any number of shadows beside the one rule that decides, so that one run ranks
    many rules. `get_batch_size` does not see them; :func:`shadow_batch_sizes` does.

    Args:
      rule: Any batch-size rule, or a chain that holds one. It gets the applied size, which is not
        its own decision: the extra argument `batch_size`, or the number of examples in
        `grad_stats` if that is not given.
      name: What to call it in the metrics; by default the name of its state, `cabs` for a CABSState.
        Names must differ within one chain.

    Returns:
      A transformation that returns the updates unchanged and takes the signals of the rule.

    Raises:
      ValueError: If the rule is not a transformation, the name is empty, or `init` finds no rule
        inside, or several.

    *Guarantees*:
      * Updates unchanged: they pass through as they are.
      * Never acts: `get_batch_size` of a chain is the same with and without it.

    >>> import arbiter_jax as aj, optax
    >>> watched = aj.schedulers.adadamp(decay=0, initial_batch_size=32)
    >>> tx = optax.chain(
    ...     optax.sgd(0.1), aj.schedulers.constant(64), aj.schedulers.shadow(watched)
    ... )
    >>> state = tx.init({"w": 0.0})
    >>> for loss in (2.0, 1.0):
    ...     _, state = tx.update({"w": 1.0}, state, value=loss)
    >>> int(aj.get_batch_size(state))
    64
    >>> {k: int(v) for k, v in aj.schedulers.shadow_batch_sizes(state).items()}
    {'adadamp': 64}
    """
    inner = _rule.checked_rule(rule)
    if name is not None and (not isinstance(name, str) or not name):
        raise ValueError(f"name must be a string that is not empty, got {name!r}.")

    def init_fn(params):
        state = inner.init(params)
        base.the_rule(base.requests(state), "rule")  # raises unless there is one
        return ShadowState(watched={name or _default_name(state): state})

    def update_fn(updates, state, params=None, *, batch_size=None, **extra_args):
        if not {"updates_only", "probe"}.isdisjoint(extra_args):
            return updates, state
        if batch_size is None and extra_args.get("grad_stats") is not None:
            size = jnp.nan_to_num(extra_args["grad_stats"].batch_size)
            batch_size = jnp.clip(jnp.round(size), 0, _rule.UNLIMITED)
        if batch_size is not None:
            extra_args["batch_size"] = batch_size
        ((label, watched),) = state.watched.items()
        _, watched = inner.update(updates, watched, params, **extra_args)
        return updates, ShadowState(watched={label: watched})

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def shadow_batch_sizes(opt_state: base.PyTree) -> dict[str, jax.Array]:
    """What each rule under :func:`shadow` would choose.

    Args:
      opt_state: State of any optax chain; also the `opt_state` of an ``nnx.Optimizer``.

    Returns:
      The name of each shadow and its size, int32[] in examples, in the order of the chain.

    Raises:
      ValueError: If two shadows have one name.

    >>> import arbiter_jax as aj, optax
    >>> watched = aj.schedulers.shadow(aj.schedulers.constant(32), name="small")
    >>> tx = optax.chain(aj.schedulers.constant(64), watched)
    >>> {k: int(v) for k, v in shadow_batch_sizes(tx.init({"w": 0.0})).items()}
    {'small': 32}
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, ShadowState))
    sizes: dict[str, jax.Array] = {}
    for node in nodes:
        if not isinstance(node, ShadowState):
            continue
        for name, size in _sizes(node).items():
            if name in sizes:
                raise ValueError(
                    f"two shadows are called {name!r}: tell them apart with shadow(rule, name=...)."
                )
            sizes[name] = size
    return sizes


def _sizes(state: ShadowState) -> dict[str, jax.Array]:
    return {name: base.get_batch_size(watched) for name, watched in state.watched.items()}


def _default_name(opt_state: Any) -> str:
    """The name of the state in snake case, without the word State."""
    name = type(base.the_rule(base.requests(opt_state))).__name__.removesuffix("State")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
