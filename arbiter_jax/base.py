"""The contracts that the rest of the library is written against.

A batch-size rule is an ``optax.GradientTransformationExtraArgs`` that returns the updates unchanged
and keeps its decision in its state, as ``batch_size: int32[]``. What a rule needs to see arrives
through the extra arguments of ``update``, and only if its state says so: see
:func:`required_signals`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

PyTree = Any


SIGNALS = (
    "value",
    "grad_stats",
    "gradient_noise",
    "update_noise",
    "agent_inputs",
    "meta_batch",
    "step_seconds",
)
"""Every extra argument that the engine can supply to ``update``.

``value`` is the mean loss of the batch, ``grad_stats`` a :class:`GradStats`, ``gradient_noise`` half
the difference of the gradients of the two halves of the batch, ``update_noise`` the response of the
updates to it, ``agent_inputs`` a batch of validation inputs, ``meta_batch`` a batch of validation
examples, and ``step_seconds`` the measured time of one step in the last window (nan where unknown).
"""


class LossFn(Protocol):
    """The loss of each example of a batch.

    ``loss_fn(params, batch) -> float[M]``, where ``batch`` is any pytree whose leaves have M leading
    rows, usually ``(inputs, labels)``. The engine averages over the real examples, so a term that
    belongs to the parameters alone (weight decay, say) is simply added to every entry. A weighted
    loss returns :class:`WeightedLoss`.
    """

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array | WeightedLoss:
        """Returns the loss of each example, float[M]."""
        ...


class WeightedLoss(NamedTuple):
    """Losses with weights: the value is ``sum(weights * losses) / sum(weights)``.

    The sums run over the real examples and, where the arrays have more axes than one, over those
    axes too: ``losses`` and ``weights`` of shape ``[M, length]`` are a per-token loss whose padding
    tokens have weight 0.
    """

    losses: jax.Array  # shape=(M, ...), dtype=float
    weights: jax.Array  # shape=(M, ...), dtype=float


class GradStats(NamedTuple):
    """Statistics of the per-example gradients of one batch of B examples, all scalars.

    With g_i the gradient of example i, S the covariance of g_i and G its mean over the data:
    """

    mean_sq_norm: jax.Array  # float, unbiased estimate of |G|^2; a single one may be negative
    variance_trace: jax.Array  # float, unbiased estimate of tr S
    num_examples: jax.Array  # float, B
    batch_sq_norm: jax.Array  # float, |gbar|^2 of the mean gradient of the batch
    half_cosine: jax.Array  # float, cosine between the gradients of the two halves of the batch
    inner_product_variance: jax.Array  # float, estimate of Var_i(g_i . gbar)


class StepInfo(NamedTuple):
    """What one inner step reports; stacked over a window each leaf gains a leading axis [T]."""

    loss: jax.Array  # shape=(), dtype=float, mean loss of the real examples before the step
    batch_size: jax.Array  # shape=(), dtype=int32, number of real examples, 0 for a skipped step
    logged: dict[str, jax.Array]  # the fields that the states of the chain list in `logged`


def nodes(tree: PyTree) -> Iterator[PyTree]:
    """Every node of a pytree, parents before children, leaves included."""
    yield tree
    children = jax.tree_util.default_registry.flatten_one_level(tree)
    if children is not None:
        for child in children[0]:
            yield from nodes(child)


def required_signals(opt_state: PyTree) -> frozenset[str]:
    """The signals that the states inside an optimizer state ask for.

    A state class asks with a class attribute, ``requires = ("value", "grad_stats")``. It is read
    from the state and not from the transformation because states survive ``optax.chain``,
    ``optax.MultiSteps`` and ``optax.apply_if_finite``, all of which return new transformations.

    Args:
      opt_state: State of any optax transformation.

    Returns:
      A subset of :data:`SIGNALS`.

    >>> import optax
    >>> required_signals(optax.sgd(0.1).init({"w": 0.0}))
    frozenset()
    """
    return frozenset(name for node in nodes(opt_state) for name in getattr(node, "requires", ()))


def logged_fields(opt_state: PyTree) -> dict[str, jax.Array]:
    """The fields that the states inside an optimizer state want reported at every step.

    A state class lists them in a class attribute, ``logged = ("mixture",)``, or has a method
    ``logged_values() -> {name: array}`` that speaks for everything inside of it. Where two states
    log the same name, the later one in the chain is reported.
    """
    if hasattr(opt_state, "logged_values"):
        return opt_state.logged_values()
    values = {name: getattr(opt_state, name) for name in getattr(opt_state, "logged", ())}
    children = jax.tree_util.default_registry.flatten_one_level(opt_state)
    for child in () if children is None else children[0]:
        values |= logged_fields(child)
    return values


def _is_rule(node: PyTree) -> bool:
    return isinstance(node, tuple) and "batch_size" in getattr(node, "_fields", ())


def find_rules(opt_state: PyTree) -> list[Any]:
    """The states that decide a batch size; of a wrapper and the rule inside it, the wrapper."""
    if _is_rule(opt_state):
        return [opt_state]
    if getattr(opt_state, "acts", True) is False:  # a rule that only watches: schedulers.shadow
        return []
    children = jax.tree_util.default_registry.flatten_one_level(opt_state)
    return [] if children is None else [rule for c in children[0] for rule in find_rules(c)]


def get_batch_size(opt_state: PyTree) -> jax.Array:
    """The batch size that the one rule in an optimizer state has decided on.

    Args:
      opt_state: State of any optax chain that holds exactly one batch-size rule, at any depth.

    Returns:
      int32[] (int32[k] for a state that was vmapped over k seeds), in examples.

    Raises:
      ValueError: If the state holds no rule, or more than one.

    >>> import arbiter_jax as aj, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(32))
    >>> int(aj.get_batch_size(tx.init({"w": 0.0})))
    32
    """
    rules = find_rules(opt_state)
    if len(rules) != 1:
        found = ", ".join(type(rule).__name__ for rule in rules) or "none"
        raise ValueError(
            "opt_state must hold exactly one batch-size rule (a state with a field `batch_size`), "
            f"found {found}. aj.schedulers.constant(64), say, is one for a size that does not change."
        )
    return rules[0].batch_size


def meta_batch_sizes(opt_state: PyTree) -> list[jax.Array]:
    """How many validation examples the rules in a state look at, also inside of a wrapper."""
    return [node.meta_batch_size for node in nodes(opt_state) if hasattr(node, "meta_batch_size")]


def applied_batch_size(batch_size: Any, state: Any) -> jax.Array:
    """The size of the batch that this step saw.

    A decision may be applied late (at the next window) or never (under `shadow`), so the size comes
    from the caller; only a loop that does not say is taken to apply every decision at once.
    """
    return state.batch_size if batch_size is None else jnp.asarray(batch_size).astype(jnp.int32)


def require(rule: str, how: str, **signals: Any) -> None:
    """Raises a TypeError that names the first signal that `update` was not given."""
    for name, value in signals.items():
        if value is None:
            raise TypeError(
                f"{rule} needs the signal `{name}`: call update(..., {name}=...). {how}"
            )
