"""A wrapper that lets batch-size rules watch a run without acting on it.

It is the cheapest way to see what a rule would do with your own model, optimizer and data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import base
from arbiter_jax.schedulers import _rule
from arbiter_jax.schedulers._adaptive_sampling import inner_product_test, norm_test
from arbiter_jax.schedulers._gradient_noise_scale import gradient_noise_scale
from arbiter_jax.schedulers._noise_floor import noise_floor


class ShadowState(NamedTuple):
    """State of one rule of :func:`shadow`. It decides nothing: it has no field `batch_size`."""

    watched: dict[str, Any]  # the name of the rule -> its state
    decides = False

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """What is reported at every step, for this state and all states inside it."""
        return {f"shadow/{name}": size for name, size in _sizes(self).items()}


def shadow(
    rules: optax.GradientTransformation
    | Mapping[str, optax.GradientTransformation]
    | Sequence[optax.GradientTransformation]
    | None = None,
    *,
    name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Reports at every step which batch size each rule would choose, without applying any.

    Add one line to a chain, train as before, and look at what each rule would have chosen:
    ``optax.chain(optimizer, aj.schedulers.shadow())``. :func:`arbiter_jax.fit` also needs a rule that
    decides in the chain, such as :func:`constant`. A training loop with a batch size of its own needs
    none: there, :func:`arbiter_jax.value_grad_and_signals` computes what the rules read. Signals that
    several rules read are computed once, and each rule measures at its own interval.
    `get_batch_size` does not see the shadows; :func:`shadow_batch_sizes` does, and
    :func:`arbiter_jax.plotting.shadow` draws them.

    Args:
      rules: What to watch: a dict ``{name: rule}``; one rule, or several in a sequence, which get
        the names of their states, `cabs` for a CABSState; or None for a ready set that needs
        no knowledge of the run: :func:`gradient_noise_scale`, :func:`inner_product_test`,
        :func:`noise_floor` and ``norm_test(eta=0.5)``, of sizes from 2 to 32768, which measure at
        every 10th step. A rule may also be a chain that holds one. It gets the applied size, which
        is not its own decision: the extra argument `batch_size`, or the number of examples in
        `grad_stats` if that is not given.
      name: What to call a single rule. Names must differ within one chain.

    Returns:
      A transformation that returns the updates unchanged and takes the signals of the rules.

    Raises:
      ValueError: If one of them is not a transformation, a name is empty or given twice, or `init`
        finds no rule inside one, or several. In training, if :func:`noise_floor` cannot follow the
        optimizer, as `optax.lion` or `optax.lbfgs`: then name the rules to watch.

    *Guarantees*:
      * Updates unchanged: they pass through as they are.
      * Never acts: `get_batch_size` of a chain is the same with and without it.

    >>> import arbiter_jax as aj, optax
    >>> fast = aj.schedulers.adadamp(decay=0, initial_batch_size=32)
    >>> slow = aj.schedulers.adadamp(decay=0.9, initial_batch_size=32)
    >>> watched = aj.schedulers.shadow({"fast": fast, "slow": slow})
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(64), watched)
    >>> state = tx.init({"w": 0.0})
    >>> for loss in (2.0, 1.0):
    ...     _, state = tx.update({"w": 1.0}, state, value=loss)
    >>> int(aj.get_batch_size(state))
    64
    >>> {k: int(v) for k, v in aj.schedulers.shadow_batch_sizes(state).items()}
    {'fast': 64, 'slow': 44}
    """
    if rules is None:
        rules = _ready_set()
    if isinstance(rules, optax.GradientTransformation):
        return _shadow_of_one(rules, name)
    if name is not None:
        raise ValueError(
            f"name must be None unless there is a single rule, got {name!r}: name several in a "
            "dict, shadow({name: rule})."
        )
    if isinstance(rules, Mapping):
        shadows = [_shadow_of_one(rule, label) for label, rule in rules.items()]
    elif isinstance(rules, tuple | list):
        shadows = [_shadow_of_one(rule, None) for rule in rules]
    else:
        raise ValueError(
            "rules must be a batch-size rule (an optax gradient transformation), a sequence of them, "
            f"a dict {{name: rule}}, or None for a ready set, got {rules!r}."
        )
    if not shadows:
        raise ValueError("rules must hold at least one rule, got none: shadow() has a ready set.")
    joined = optax.chain(*shadows)

    def init_fn(params):
        state = joined.init(params)
        shadow_batch_sizes(state)  # raises where two have one name
        return state

    return optax.GradientTransformationExtraArgs(init_fn, joined.update)


def _ready_set() -> dict[str, optax.GradientTransformation]:
    """Rules that need nothing but the batch: no validation data, learning rate or measured time."""
    shared: dict[str, Any] = {
        "measure_every": 10,
        "min_batch_size": 2,
        "max_batch_size": 2**15,
    }
    return {
        # At every 10th step a weight of 0.9 remembers about 100 steps.
        "gradient_noise_scale": gradient_noise_scale(decay=0.9, **shared),
        "inner_product_test": inner_product_test(decay=0.9, **shared),
        # Its decision is not applied, so there is nothing that it would have to change gradually.
        "noise_floor": noise_floor(max_change=2.0**15, **shared),
        "norm_test": norm_test(eta=0.5, decay=0.9, **shared),
    }


def _shadow_of_one(
    rule: optax.GradientTransformation, name: str | None
) -> optax.GradientTransformationExtraArgs:
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
    """Reads the batch size that each rule under :func:`shadow` would choose.

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
                    f"two shadows are called {name!r}: tell them apart with shadow({{name: rule}})."
                )
            sizes[name] = size
    return sizes


def _sizes(state: ShadowState) -> dict[str, jax.Array]:
    return {name: base.get_batch_size(watched) for name, watched in state.watched.items()}


def _default_name(opt_state: Any) -> str:
    """The name of the state in snake case, without the word State."""
    name = type(base.the_rule(base.requests(opt_state))).__name__.removesuffix("State")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
