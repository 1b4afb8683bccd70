"""The contract that rules and training loops are written against.

A batch-size rule is an ``optax.GradientTransformationExtraArgs`` that returns the updates unchanged
and keeps its decision in its state. The state also says what the rule wants to see: see
:class:`RuleState`. A loop reads all of that with :func:`requests`; no rule knows the loop, and the
loop knows no rule.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from arbiter_jax._count import Count, as_count
from arbiter_jax._requests import MEASURED_SIGNALS as MEASURED_SIGNALS
from arbiter_jax._requests import VALIDATION_SIGNALS as VALIDATION_SIGNALS
from arbiter_jax._requests import Requests, requests
from arbiter_jax._requests import children as children
from arbiter_jax._update import Update, applied_batch_size, applied_update, examples_after

__all__ = [
    "SIGNALS",
    "Count",
    "GradStats",
    "LossFn",
    "Requests",
    "RuleState",
    "StepInfo",
    "Update",
    "WeightedLoss",
    "applied_batch_size",
    "applied_update",
    "as_count",
    "as_pure",
    "examples_after",
    "get_batch_size",
    "measures_now",
    "requests",
    "require",
]

PyTree = Any

SIGNALS = {
    "value": "It is the mean loss of the batch, a scalar.",
    "grad_stats": "It is an aj.GradStats of the batch; aj.gradient_stats computes it.",
    "gradient_noise": (
        "It is half the difference of the gradients of the two halves of the batch, a pytree like "
        "the parameters."
    ),
    "update_noise": (
        "It is the derivative of the updates along `gradient_noise`, a pytree like the parameters; "
        "jax.jvp of tx.update computes it."
    ),
    "agent_inputs": "It is a batch of validation inputs.",
    "meta_batch": "It is a batch of validation examples.",
    "step_seconds": "It is the measured time of one step in the last window, nan if unknown.",
    "persistence": (
        "It is how long the optimizer goes on applying a gradient; "
        "aj.objectives.measure_persistence(tx, params) measures it once, before training."
    ),
    "batch_size": "It is the number of examples of this step; aj.get_batch_size(opt_state) has it.",
    "num_steps": "It is the number of steps before this one.",
    "num_examples": (
        "It is the number of training examples before this step, as a number or an aj.base.Count: "
        "in a loop of one's own, grad_fn(params, opt_state, batch, num_examples=...). "
        "A loop of one's own under optax.MultiSteps has to pass it: only then a rule inside knows "
        "what the calls between two updates have seen."
    ),
    "num_accumulated": (
        "It is the number of examples whose gradients optax.MultiSteps has accumulated before this "
        "step: 0 without it, and just after an update."
    ),
    "progress": "It is the sum of AdaScale's gains (1 per update without it) before this step.",
    "params": "They are the parameters before this step, the third argument of update.",
}
"""Every extra argument that a rule may ask for -> how a loop of one's own supplies it.

``aj.fit`` and ``aj.run_window`` supply all of them; see :mod:`arbiter_jax.training`.
"""


class LossFn(Protocol):
    """The loss of each example of a batch.

    ``loss_fn(params, batch) -> float[M]``, where ``batch`` is any pytree whose leaves have M leading
    rows, usually ``(inputs, labels)``. The engine averages over the real examples, so a term that
    belongs to the parameters alone (weight decay, say) is simply added to every entry. A weighted
    loss returns :class:`WeightedLoss`.
    """

    def __call__(self, params: PyTree, batch: PyTree, /) -> jax.Array | WeightedLoss:
        """Returns the loss of each example, float[M]."""
        ...


class WeightedLoss(NamedTuple):
    """Losses with weights: the value is ``sum(weights * losses) / sum(weights)``.

    The sums run over the real examples and, if the arrays have more than one axis, over those axes
    too: ``losses`` and ``weights`` of shape ``[M, length]`` are a per-token loss whose padding
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
    batch_size: jax.Array  # float, B
    batch_sq_norm: jax.Array  # float, |gbar|^2 of the mean gradient of the batch
    half_cosine: jax.Array  # float, cosine between the gradients of the two halves of the batch
    inner_product_variance: jax.Array  # float, estimate of Var_i(g_i . gbar)
    # The same in the l1 norm, which is what optimizers that step by the sign see; nan where only
    # inner products are known, as in `subset_gradients`:
    abs_deviation: Any = float("nan")  # float, estimate of sum sqrt(diag S)
    abs_signal: Any = float("nan")  # float, |G|_1 as far as two halves agree on it; may be < 0


class StepInfo(NamedTuple):
    """What one inner step reports; stacked over a window each leaf gains a leading axis [T]."""

    loss: jax.Array  # shape=(), dtype=float, mean loss of the real examples before the step
    batch_size: jax.Array  # shape=(), dtype=int32, number of real examples, 0 for a skipped step
    metrics: dict[str, jax.Array]  # what the states of the chain and the gradient report
    aux: PyTree = None  # auxiliary output of the loss function, if it has any


class RuleState(Protocol):
    """What a training loop reads from the state of a batch-size rule; only `batch_size` is required.

    Other transformations may have any of these but `batch_size` too: what a state asks for is read
    from it and not from the transformation, because states survive ``optax.chain``,
    ``optax.MultiSteps`` and ``optax.apply_if_finite``, all of which return new transformations.
    """

    # The decision.
    batch_size: jax.Array  # shape=(), dtype=int32, in examples
    min_batch_size: jax.Array  # shape=(), dtype=int32, lower end of the rule's range
    max_batch_size: jax.Array  # shape=(), dtype=int32, upper end of the rule's range
    meta_batch_size: jax.Array  # shape=(), dtype=int32, validation examples that the rule uses
    window_steps: jax.Array  # shape=(), dtype=int32, steps until the next decision, at most
    budget: Count  # examples of the run that it was built for; 0 if unknown
    decides: bool  # False for a rule that only watches, and for all states inside it

    # What it wants to see, and when.
    requires: tuple[str, ...]  # names of SIGNALS
    signals_due: jax.Array | None  # shape=(), dtype=bool, whether the next step; None: every step

    # What it reports.
    metrics: tuple[str, ...] | dict[str, jax.Array]  # names of fields; a dict speaks for all inside
    # What the last update was worth, see adascale; and beside it the updates made, which may wrap.
    progress_per_step: jax.Array  # shape=(), dtype=float
    num_updates: jax.Array  # shape=(), dtype=int32


def as_pure(tree: PyTree) -> PyTree:
    """A pytree in which each NNX variable is replaced by what it holds.

    It is how ``nnx.Optimizer`` hands its state on to ``tx.update``. Flax's own function has another
    name in each of the versions that we support.

    >>> import jax.numpy as jnp
    >>> float(as_pure({"w": nnx.Param(jnp.ones(()))})["w"])
    1.0
    """
    is_variable = lambda x: isinstance(x, nnx.Variable)
    unwrap = lambda x: as_pure(x.get_raw_value()) if is_variable(x) else x
    return jax.tree.map(unwrap, tree, is_leaf=is_variable)


def get_batch_size(opt_state: PyTree) -> jax.Array:
    """The batch size that the one rule in an optimizer state has decided on.

    Args:
      opt_state: State of any optax chain that holds exactly one batch-size rule, at any depth; also
        the `opt_state` of an ``nnx.Optimizer``.

    Returns:
      int32[] (int32[k] for a state that was vmapped over k seeds), in examples.

    Raises:
      ValueError: If the state holds no rule, or more than one.

    >>> import arbiter_jax as aj, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(32))
    >>> int(aj.get_batch_size(tx.init({"w": 0.0})))
    32
    """
    return as_pure(the_rule(requests(opt_state)).batch_size)


def the_rule(requested: Requests, name: str = "opt_state") -> Any:
    """The state of the one rule that decides, or a ValueError that says what was found in `name`."""
    if len(requested.rules) != 1:
        found = ", ".join(type(rule).__name__ for rule in requested.rules) or "none"
        hint = "aj.schedulers.constant(64), for example, is one whose size is fixed."
        if requested.rules:
            hint = "Wrap those that should only watch in aj.schedulers.shadow."
        elif name == "opt_state":
            hint += (
                " The state is that of the whole chain, tx.init(params) or "
                "nnx.Optimizer(model, tx).opt_state; rules in aj.schedulers.shadow only watch."
            )
        raise ValueError(
            f"{name} must hold exactly one batch-size rule (a state with a field `batch_size`), "
            f"found {found}. {hint}"
        )
    return requested.rules[0]


def measures_now(signals_due: jax.Array | None, signals_made: Any) -> jax.Array | bool:
    """Whether a rule measures at this step: if its signals were made and its own interval says so.

    Args:
      signals_due: The flag in the rule's state; None for a rule that measures at every step.
      signals_made: The extra argument of that name. A Python bool is known while tracing: False
        means that the costly signals are zeros, True that every rule that asks for them is due. An
        array says only whether they were made. None means that what the caller passes was made.

    Returns:
      A Python bool if it is known while tracing, else bool[].

    >>> import jax.numpy as jnp
    >>> measures_now(None, None), bool(measures_now(jnp.array(False), None))
    (True, False)
    """
    if isinstance(signals_made, bool):
        return signals_made
    own = True if signals_due is None else signals_due
    return own if signals_made is None else jnp.asarray(signals_made) & own


def require(rule: str, **signals: Any) -> None:
    """Refuses an `update` that was not given a signal, and says how to supply it.

    Args:
      rule: Name of the rule, for the message.
      **signals: The signals that it needs, as they were passed; None if one was not.

    Raises:
      TypeError: For the first one that is None.

    >>> require("my_rule", value=1.0)
    >>> require("my_rule", value=None)
    Traceback (most recent call last):
      ...
    TypeError: my_rule needs the signal `value`: call update(..., value=...). ...
    """
    for name, value in signals.items():
        if value is None:
            raise TypeError(
                f"{rule} needs the signal `{name}`: call update(..., {name}=...). {SIGNALS[name]} "
                "aj.value_grad_and_signals makes all signals, for tx.update(..., **signals); aj.fit "
                "and aj.run_window pass them."
            )


def takes_extra_args(tx: Any) -> bool:
    """Whether the update of a transformation takes any extra argument."""
    parameters = inspect.signature(tx.update).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


def with_extra_args(tx: Any) -> optax.GradientTransformationExtraArgs:
    """As `optax.with_extra_args_support`, which drops the arguments that `optax.MultiSteps` takes."""
    if takes_extra_args(tx):
        return optax.GradientTransformationExtraArgs(tx.init, tx.update)
    return optax.with_extra_args_support(tx)
