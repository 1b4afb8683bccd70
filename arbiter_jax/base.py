"""The contract that rules and training loops are written against.

A batch-size rule is an ``optax.GradientTransformationExtraArgs`` that returns the updates unchanged
and keeps its decision in its state. The state also says what the rule wants to see: see
:class:`RuleState`. A loop reads all of that with :func:`requests`; no rule knows the loop, and the
loop knows no rule.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from arbiter_jax._count import Count, as_count

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

MEASURED_SIGNALS = frozenset({"grad_stats", "gradient_noise", "update_noise"})
VALIDATION_SIGNALS = frozenset({"agent_inputs", "meta_batch"})
COSTLY_SIGNALS = MEASURED_SIGNALS | VALIDATION_SIGNALS
"""The signals that a loop makes only at the steps at which some rule wants them."""


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
    progress_per_step: (
        jax.Array
    )  # shape=(), dtype=float, what the last update was worth, see adascale
    num_updates: jax.Array  # shape=(), dtype=int32, beside it: updates made; it may wrap


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


def children(node: PyTree) -> Iterator[PyTree]:
    """The children of a node of a pytree; none if it is a leaf or None."""
    flat = jax.tree_util.default_registry.flatten_one_level(node)
    return iter(()) if flat is None else iter(flat[0])


def as_pure(tree: PyTree) -> PyTree:
    """A pytree in which each NNX variable is replaced by what it holds.

    It is how ``nnx.Optimizer`` hands its state on to ``tx.update``. Flax's own function has another
    name in each of the versions that we support.
    """
    is_variable = lambda x: isinstance(x, nnx.Variable)
    unwrap = lambda x: as_pure(x.get_raw_value()) if is_variable(x) else x
    return jax.tree.map(unwrap, tree, is_leaf=is_variable)


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


def _wants_costly_signals(node: PyTree) -> bool:
    if COSTLY_SIGNALS & set(getattr(node, "requires", ())):
        return True
    return any(_wants_costly_signals(child) for child in children(node))


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


def applied_batch_size(batch_size: Any, state: Any) -> jax.Array:
    """The batch size that this step actually used, as int32[].

    ``run_window`` applies a decision at the next window and ``shadow`` never does, so the caller
    passes `batch_size`. Without it we assume that the latest decision was applied.
    """
    return state.batch_size if batch_size is None else jnp.asarray(batch_size).astype(jnp.int32)


class Update(NamedTuple):
    """What one update averages; from :func:`applied_update`."""

    call_size: jax.Array  # int32[], examples in this call
    size: (
        jax.Array
    )  # int32[], examples whose gradients it averages, those of earlier calls included
    num_calls: (
        jax.Array | int
    )  # size / call_size, float[]; the int 1 if that is known while tracing
    ledger: Count  # training examples so far; the state keeps it for the next update

    def per_call(self, size: Any) -> Any:
        """What a call contributes to an update of this size: what a rule decides on."""
        return size if isinstance(self.num_calls, int) else size / self.num_calls

    def per_update(self, size: Any) -> Any:
        """What an update has of this number of examples per call."""
        return size if isinstance(self.num_calls, int) else size * self.num_calls


def applied_update(
    state: Any,
    *,
    batch_size: Any = None,
    num_examples: Any = None,
    num_accumulated: Any = None,
    **extra_args: Any,
) -> Update:
    """How many examples the gradient of this update averages.

    Inside ``optax.MultiSteps`` a transformation gets the extra arguments of the last of k calls,
    and `batch_size` is the size of that call. The update averages what the ledger, `num_examples`,
    has counted since the last update of the state; or, if `num_accumulated` is given, at most that
    and this batch: the ledger also counts batches that `optax.apply_if_finite` has skipped, and
    a state that is new in the middle of a run knows no last update. Without the ledger an update is
    taken to be one call.

    Args:
      state: With a `ledger`, a :class:`Count`; and a `batch_size`, if it may be missing here.
      batch_size: See :func:`applied_batch_size`.
      num_examples: Training examples before this call, any number; None if nobody counts them.
      num_accumulated: See `SIGNALS`. The int 0 is known while tracing and costs nothing.
      **extra_args: Ignored, so that a rule can pass on what it was given.

    Returns:
      An :class:`Update`.

    >>> state = Update(call_size=None, size=None, num_calls=1, ledger=as_count(96))
    >>> update = applied_update(state, batch_size=8, num_examples=120)
    >>> int(update.size), float(update.num_calls), int(update.ledger)
    (32, 4.0, 128)
    """
    del extra_args
    call_size = applied_batch_size(batch_size, state)
    ledger = state.ledger
    size = None
    if num_examples is not None:
        ledger = as_count(num_examples) + call_size
        size = ledger.since(state.ledger)
    if isinstance(num_accumulated, int) and num_accumulated == 0:
        size = None
    elif num_accumulated is not None:
        held = jnp.asarray(num_accumulated).astype(jnp.int32) + call_size
        size = held if size is None else jnp.minimum(size, held)
    if size is None:
        return Update(call_size, call_size, 1, ledger)
    size = jnp.maximum(size, call_size)
    num_calls = size.astype(float) / jnp.maximum(call_size, 1)
    return Update(call_size, size, num_calls, ledger)


def examples_after(
    seen: Count, state: Any, *, batch_size: Any = None, num_examples: Any = None, **extra_args: Any
) -> Count:
    """Training examples after this call: the ledger's, or `seen` and this batch without one."""
    del extra_args
    before = seen if num_examples is None else as_count(num_examples)
    return before + applied_batch_size(batch_size, state)


def measures_now(signals_due: jax.Array | None, signals_made: Any) -> jax.Array | bool:
    """Whether a rule measures at this step: if its signals were made and its own interval says so.

    Args:
      signals_due: The flag in the rule's state; None for a rule that measures at every step.
      signals_made: The extra argument of that name. A Python bool is known while tracing: False
        means that the costly signals are zeros, True that every rule that asks for them is due. An
        array says only whether they were made. None means that what the caller passes was made.

    Returns:
      A Python bool if it is known while tracing, else bool[].
    """
    if isinstance(signals_made, bool):
        return signals_made
    own = True if signals_due is None else signals_due
    return own if signals_made is None else jnp.asarray(signals_made) & own


def require(rule: str, **signals: Any) -> None:
    """Raises a TypeError for the first signal that `update` was not given, with how to supply it."""
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
