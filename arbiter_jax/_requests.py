"""What the states of a chain ask of a training loop, and what they report to it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

PyTree = Any

MEASURED_SIGNALS = frozenset({"grad_stats", "gradient_noise", "update_noise"})
VALIDATION_SIGNALS = frozenset({"agent_inputs", "meta_batch"})
COSTLY_SIGNALS = MEASURED_SIGNALS | VALIDATION_SIGNALS
"""The signals that a loop makes only at the steps at which some rule wants them."""


class Requests(NamedTuple):
    """What all states inside an optimizer state ask for and report; from :func:`requests`."""

    rules: tuple[Any, ...]  # states that decide a batch size; a wrapper hides the rule inside it
    bucket_sizes: tuple[jax.Array, ...]  # of those rules: batches that have to fit into one bucket
    window_steps: tuple[jax.Array, ...]  # of those rules: steps until the next decision, at most
    budgets: tuple[Any, ...]  # a Count each, examples that a rule was built for, 0 if unknown
    signals: frozenset[str]  # names of SIGNALS
    meta_batch_size: jax.Array | None  # int32[], validation examples that count as used
    flags: tuple[jax.Array | None, ...]  # one per state that wants costly signals; None: always
    opt_state: PyTree  # the state that was read
    progress_per_step: jax.Array | float  # 1 if no state says otherwise
    num_updates: jax.Array | None  # int32[], of the state that says so, if it counts them
    progress: jax.Array | None  # float[], the sum of the gains, of the state that says so
    accumulators: tuple[Any, ...]  # states of optax.MultiSteps
    finite_flags: tuple[jax.Array, ...]  # bool[] each, `last_finite` of optax.apply_if_finite

    def num_accumulated(self, counted: jax.Array) -> jax.Array | int | None:
        """The extra argument of that name.

        Args:
          counted: int32[], what :meth:`accumulated_after` has counted so far.

        Returns:
          The int 0, known while tracing, for a chain without optax.MultiSteps; None for one with
          several of them, of which each has accumulated something else.
        """
        states = list(self.accumulators)
        if len(states) != 1:
            return None if states else 0
        # The chain may be a new one: then nothing is left of what was counted for the old one.
        return jnp.where(states[0].mini_step == 0, 0, counted)

    def accumulated_after(
        self, before: Requests, counted: jax.Array, batch_size: jax.Array
    ) -> jax.Array:
        """Examples whose gradients optax.MultiSteps holds after a step; `before`: the same before.

        A batch that it never saw, or skipped, does not count.
        """
        if len(self.accumulators) != 1:
            return counted
        (old,), (new,) = before.accumulators, self.accumulators
        grown = jnp.where(old.mini_step == 0, 0, counted) + batch_size
        counted = jnp.where(new.mini_step == old.mini_step, counted, grown)
        return jnp.where(new.mini_step == 0, 0, counted)

    def progress_since(self, before: Requests) -> jax.Array | float:
        """What a step was worth, `before`: the same before it. A step without an update: 0."""
        if self.num_updates is not None:  # whatever skips an update keeps this count as it was
            made = self.num_updates != before.num_updates
            return jnp.where(made, self.progress_per_step, 0)
        made = list(self.finite_flags)
        if self.accumulators:
            old, new = before.accumulators[0], self.accumulators[0]
            made.append(new.gradient_step != old.gradient_step)
        if not made:
            return self.progress_per_step
        return jnp.where(functools.reduce(jnp.logical_and, made), self.progress_per_step, 0)

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """What the states report; of two with the same name, the later one in the chain.

        Some states compute what they report: only who reads it needs arrays, and not their shapes.
        """
        found: dict[str, jax.Array] = {}

        def visit(node: PyTree) -> None:
            if isinstance(node, jax.Array):
                return
            named = getattr(node, "metrics", ())
            if isinstance(named, dict):  # it speaks for everything inside
                found.update(named)
                return
            found.update({name: getattr(node, name) for name in named})
            for child in children(node):
                visit(child)

        visit(self.opt_state)
        return found

    @property
    def due(self) -> jax.Array | None:
        """Whether any state wants its costly signals at the next step; None: always, or never."""
        flags = [flag for flag in self.flags if flag is not None]
        if not flags or len(flags) < len(self.flags):
            return None
        return functools.reduce(jnp.logical_or, flags)


def requests(opt_state: PyTree) -> Requests:
    """Reads everything that the states inside an optimizer state ask of a training loop.

    Args:
      opt_state: State of any optax transformation. That of an ``nnx.Optimizer`` gives variables
        where another gives arrays: call :func:`as_pure` first to compute with them.

    Returns:
      A :class:`Requests`, with values of this state: read it again after an update.

    >>> import arbiter_jax as aj, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.gradient_noise_scale())
    >>> sorted(requests(tx.init({"w": 0.0})).signals)
    ['grad_stats']
    """
    rules: list[Any] = []
    bucket_sizes: list[jax.Array] = []
    window_steps: list[jax.Array] = []
    budgets: list[jax.Array] = []
    signals: set[str] = set()
    meta_batch_sizes: list[jax.Array] = []
    flags: list[jax.Array | None] = []
    progress: list[Any] = []
    accumulators: list[Any] = []
    finite_flags: list[jax.Array] = []

    def visit(node: PyTree, decides: bool, in_rule: bool, flagged: bool) -> None:
        if isinstance(node, jax.Array):  # nearly all nodes, and a loop reads the state every window
            return
        if isinstance(node, nnx.Variable):  # it would ask its array for each of the names below
            return
        fields = getattr(node, "_fields", ())
        if "mini_step" in fields and {"gradient_step", "acc_grads"}.issubset(fields):
            accumulators.append(node)
        if "last_finite" in fields and "total_notfinite" in fields:
            finite_flags.append(node.last_finite)
        decides = decides and getattr(node, "decides", True)
        if decides and not in_rule and "batch_size" in fields:
            rules.append(node)
            bucket_sizes.append(node.batch_size)
            in_rule = True
        if hasattr(node, "meta_batch_size"):
            meta_batch_sizes.append(node.meta_batch_size)
            bucket_sizes.extend([node.meta_batch_size] if in_rule else [])
        if in_rule and hasattr(node, "window_steps"):
            window_steps.append(node.window_steps)
        if in_rule and hasattr(node, "budget"):
            budgets.append(node.budget)
        if hasattr(node, "progress_per_step"):
            progress.append(node)
        asked = set(getattr(node, "requires", ()))
        signals.update(asked)
        # The flag of a state speaks for everything inside it.
        if not flagged:
            flag = getattr(node, "signals_due", None)
            if flag is not None and _wants_costly_signals(node):
                flags.append(flag)
                flagged = True
            elif flag is None and asked & COSTLY_SIGNALS:
                flags.append(None)
                flagged = True
        for child in children(node):
            visit(child, decides, in_rule, flagged)

    visit(opt_state, True, False, False)
    return Requests(
        rules=tuple(rules),
        bucket_sizes=tuple(bucket_sizes),
        window_steps=tuple(window_steps),
        budgets=tuple(budgets),
        signals=frozenset(signals),
        meta_batch_size=meta_batch_sizes[0] if meta_batch_sizes else None,
        flags=tuple(flags),
        opt_state=opt_state,
        progress_per_step=progress[-1].progress_per_step if progress else 1.0,
        num_updates=getattr(progress[-1], "num_updates", None) if progress else None,
        progress=getattr(progress[-1], "progress", None) if progress else None,
        accumulators=tuple(accumulators),
        finite_flags=tuple(finite_flags),
    )


def children(node: PyTree) -> Iterator[PyTree]:
    """The children of a node of a pytree; none if it is a leaf or None."""
    flat = jax.tree_util.default_registry.flatten_one_level(node)
    return iter(()) if flat is None else iter(flat[0])


def _wants_costly_signals(node: PyTree) -> bool:
    if COSTLY_SIGNALS & set(getattr(node, "requires", ())):
        return True
    return any(_wants_costly_signals(child) for child in children(node))
