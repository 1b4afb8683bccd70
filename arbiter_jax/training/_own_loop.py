"""A gradient for your own loop, with everything that the rules in a chain ask for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from arbiter_jax import _validate
from arbiter_jax.base import (
    MEASURED_SIGNALS,
    GradStats,
    PyTree,
    Requests,
    requests,
    takes_extra_args,
    with_extra_args,
)
from arbiter_jax.batching import MaskedBatch
from arbiter_jax.batching._masking import num_rows, replace_padding
from arbiter_jax.gradients import Gradient
from arbiter_jax.objectives import measure_persistence
from arbiter_jax.training._check_functions import check_transformation
from arbiter_jax.training._extra_args import (
    ExtraArgs,
    check_extra_args,
    loss_of_batch,
    made_extra_args,
    with_made_extra_args,
)
from arbiter_jax.training._gradient_fns import gradient_fns_of_batch
from arbiter_jax.training._inner_step import with_usable_model_state
from arbiter_jax.training._mesh import on_auto_axes
from arbiter_jax.training._modules import unpacked
from arbiter_jax.training._own_arguments import check_batch, check_opt_state, given_signals
from arbiter_jax.training._signals import (
    gradient_signals,
    moved_leaves,
    update_noise,
    with_moved_grad,
)


def value_grad_and_signals(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    micro_batch_size: int | None = None,
    has_aux: bool = False,
    inputs_of: Callable[[PyTree], PyTree] | None = None,
    wrt: Any = None,
    extra_args: ExtraArgs | None = None,
) -> Callable[..., Any]:
    """Makes a gradient function for your own training loop that also computes what rules read.

    It takes the place of ``jax.value_and_grad``. Besides value and gradient it returns the *signals*:
    the extra arguments that the rules in `tx` read, and no others. It knows from the state of `tx`
    which ones those are, and measures noise only at the steps at which a rule asks for it::

        value, grads, signals = grad_fn(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **signals)

    The batch is yours: its rows stay as they are, and its size is the number of its rows, or of the
    True entries of `mask`. ``aj.get_batch_size(opt_state)`` is the size that the rule wants next.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``, the loss of each example, or a
        :class:`arbiter_jax.WeightedLoss`. Where a `model_state` or a `key` is given, it is called as
        ``loss_fn(params, batch, model_state, mask, key) -> (float[M], model_state)``.
      tx: The whole chain, whose ``update`` is called with the signals.
      micro_batch_size: The most rows whose gradient is computed at once, an integer >= 1; larger
        batches take them in groups, in the memory of one group. None for the batch as a whole. The
        model state goes through the groups in turn. Groups of padding alone are skipped, so that the
        gradient of a batch with a mask cannot be differentiated in reverse mode again.
      has_aux: Whether `loss_fn` also returns auxiliary output, as the last entry of a tuple. Leaves
        with one row per example come back in the order of the batch. Where the gradient of a batch
        is computed in pieces, of other floating-point leaves it is the mean.
      inputs_of: ``inputs_of(validation) -> inputs``, the part of a validation batch that an agent
        sees; by default the first entry of a tuple or list, or the batch if it is one array.
      wrt: The variables of an NNX module that are trained, the same filter as for ``nnx.Optimizer``;
        ``nnx.Param`` if None.
      extra_args: ``extra_args(batch_loss) -> dict`` makes more extra arguments of ``tx.update``, for
        optimizers that evaluate the loss of the batch themselves; see :func:`run_window`. They are
        among the signals, functions too, which a compiled function cannot return.

    Returns:
      ``grad_fn(params, opt_state, batch, *, mask=None, validation=None, model_state=None, key=None,
      num_examples=None, step_seconds=None) -> (value, grads, signals)``, and `aux` as a fourth
      result with `has_aux`:

      - `value` is the mean loss, float[]; `grads` is like `params`.
      - `params` may be an NNX module, and `opt_state` that of its ``nnx.Optimizer``. The loss is then
        ``loss_fn(model, batch)``, with the parameters ``mask`` and ``key`` if it wants them; `grads`
        is what ``nnx.grad`` returns, for ``optimizer.update(model, grads, **signals)``; BatchNorm
        statistics and random streams of the module are updated in place. Rules see an ``nnx.State``
        of it: losses for them come from ``models.make_losses(aj.attach(model, ...), ...)``.
      - `batch` is any pytree of arrays [M, ...]. `mask`, bool[M], marks the real rows; padding
        changes no bit of the result. A pair from :func:`arbiter_jax.datasets.batches` is both.
      - `validation` is a batch of validation examples, a pytree like `batch`, for rules that measure
        on them. An agent sees the first 32 rows.
      - `model_state` is that of the model (BatchNorm statistics), `key` the source of randomness of
        dropout; with a `key` alone the model state is ``{}``. The new state is
        ``signals["model_state"]``; that of a batch whose loss or gradient is not finite is the old
        one.
      - `num_examples`, the training examples before this step, is what rules that count examples
        read. ``seesaw`` and learning rates by examples need it; the rest count for themselves.
      - `step_seconds` is the measured time of a step, for rules that ask; unknown if None.

      It is compiled by itself, and may be called inside ``jax.jit``, ``jax.lax.scan`` and
      ``jax.vmap`` too.

    Raises:
      ValueError: If an argument is not what it should be; when called, if the loss function does not
        return one loss per example, a rule needs validation examples and there are none, or the
        mask does not fit the batch.

    *Guarantees*:
      * As in fit: the same batches give the same decisions, up to rounding.
      * Padding changes no bit: of value, gradient and signals.

    >>> import arbiter_jax as aj
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.gradient_noise_scale())
    >>> loss_fn = lambda w, batch: (w - batch) ** 2 / 2
    >>> grad_fn = aj.value_grad_and_signals(loss_fn, tx)
    >>> params = jnp.zeros(())
    >>> opt_state = tx.init(params)
    >>> value, grads, signals = grad_fn(params, opt_state, jnp.array([1.0, 3.0, 2.0, 2.0]))
    >>> updates, opt_state = tx.update(grads, opt_state, params, **signals)
    >>> float(value), float(grads), sorted(signals)
    (2.25, -2.0, ['batch_size', 'grad', 'grad_stats', 'num_accumulated', 'value'])
    """
    _validate.function("loss_fn(params, batch) -> float[M]", loss_fn=loss_fn)
    check_transformation(tx)
    has_aux = bool(_validate.boolean(has_aux=has_aux))
    if micro_batch_size is not None:
        micro_batch_size = _validate.integer(micro_batch_size=micro_batch_size, minimum=1)
    if inputs_of is not None:
        _validate.function("inputs_of(validation) -> inputs", inputs_of=inputs_of)
    check_extra_args(extra_args, micro_batch_size)
    chain = with_extra_args(tx)
    if extra_args is not None:
        chain = with_made_extra_args(chain, extra_args)
    split = functools.partial(unpacked, loss_fn, tx, wrt=wrt, has_aux=has_aux)

    @functools.partial(jax.jit, static_argnames="loss_fn")
    @on_auto_axes
    def compute(params, opt_state, batch, mask, model_state, key, given, loss_fn):
        requested = requests(opt_state)
        moved = moved_parameters(chain, opt_state, params, requested, given)
        functions = gradient_fns_of_batch(
            loss_fn, micro_batch_size, requested.signals, moved, has_aux
        )
        ones = jnp.ones if micro_batch_size is None else np.ones  # of NumPy: known while tracing
        mask = ones(num_rows(batch), bool) if mask is None else mask
        arguments = params, batch, mask, model_state, key
        size = jnp.sum(mask, dtype=jnp.int32)
        return apart(
            *measured(functions, arguments, size, chain, opt_state, requested, moved, given), size
        )

    def grad_fn(
        params: PyTree,
        opt_state: PyTree,
        batch: PyTree,
        *,
        mask: jax.Array | None = None,
        validation: PyTree = None,
        model_state: PyTree = None,
        key: jax.Array | int | None = None,
        num_examples: Any = None,
        step_seconds: Any = None,
    ) -> Any:
        if isinstance(batch, MaskedBatch):
            if mask is not None:
                raise ValueError(
                    "mask must be None if batch is a pair from datasets.batches, which holds one, got "
                    f"{_validate.shown(mask)}."
                )
            batch, mask = batch
        if isinstance(key, int):
            key = jax.random.key(key)
        check_batch(batch, mask)
        pure = split(params, opt_state, model_state, key, is_masked=mask is not None)
        requested = requests(pure.opt_state)
        check_opt_state(tx, pure.params, requested)
        given = given_signals(requested, validation, num_examples, step_seconds, inputs_of)
        state = pure.params, pure.opt_state, batch, mask, pure.model_state
        grads, (gradient, noise, size) = compute(*state, key, given, loss_fn=pure.loss_fn)
        model_state = pure.write(gradient.model_state)
        gradient = gradient._replace(grads=grads, model_state=model_state)
        signals = all_signals(gradient, noise, requested, size, given, tx)
        if extra_args is not None:
            real = jnp.ones(num_rows(batch), bool) if mask is None else mask
            rows = batch if mask is None else replace_padding(batch, mask)
            options = {"loss_fn": pure.loss_fn, "gradient_fn": None, "has_aux": has_aux}
            batch_loss = loss_of_batch(rows, real, pure.model_state, key, **options)
            signals |= made_extra_args(extra_args, batch_loss, signals)
        returned = gradient.value, pure.as_grads(gradient.grads), signals
        return (*returned, gradient.aux) if has_aux else returned

    return grad_fn


def moved_parameters(
    tx: Any, opt_state: PyTree, params: PyTree, requested: Requests, given: dict[str, Any]
) -> PyTree | None:
    """As :func:`moved_leaves`, where noise is measured; None, all of them, elsewhere."""
    if not requested.signals & MEASURED_SIGNALS:
        return None
    persistence = _persistence(tx, params, requested)
    return moved_leaves(tx, opt_state, params, lambda: given | persistence)


def _persistence(tx: Any, params: PyTree, requested: Requests) -> dict[str, Any]:
    if "persistence" not in requested.signals:
        return {}
    return {"persistence": measure_persistence(tx, params)}


def measured(
    functions: dict[bool, Callable[..., Gradient]],
    arguments: tuple[Any, ...],
    batch_size: jax.Array,
    tx: Any,
    opt_state: PyTree,
    requested: Requests,
    moved: PyTree | None,
    given: dict[str, Any],
) -> tuple[Gradient, dict[str, Any]]:
    """The gradient of a step, and what its noise does, each measured only where a rule is due.

    Args:
      functions: Whether a rule is due -> ``fn(*arguments) -> Gradient``.
      arguments: ``(params, batch, mask, model_state, key)``, or what else the functions take.
      batch_size: int32[], real examples of the batch.
      tx: The chain; it takes any extra argument.
      opt_state: Its state.
      requested: What that asks for.
      moved: From :func:`moved_parameters`.
      given: From :func:`given_signals`.

    Returns:
      (gradient, signals): the signals `update_noise` and `persistence`, if a rule asks for them.
    """
    params, model_state = arguments[0], arguments[3]
    persistence = _persistence(tx, params, requested)
    chain = tx if moved is None else with_moved_grad(tx, moved)

    def noise_of(gradient: Gradient) -> PyTree:
        signals = all_signals(gradient, persistence, requested, batch_size, given, tx)
        signals |= {"gradient_noise": gradient.gradient_noise}
        return update_noise(chain, gradient.grads, opt_state, params, **signals)

    def step(due: bool) -> tuple[Gradient, PyTree]:
        gradient = functions[due](*arguments)
        if model_state is not None:
            gradient = with_usable_model_state(gradient, model_state)
        if gradient.grad_stats is not None:  # of one type, whether it was measured or not
            stats = (x.astype(float) for x in gradient.grad_stats)
            gradient = gradient._replace(grad_stats=GradStats(*stats))
        if "update_noise" not in requested.signals:
            return gradient, None
        if due:
            return gradient, noise_of(gradient)
        shapes = jax.eval_shape(noise_of, gradient)
        return gradient, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    if requested.due is None or not requested.signals & MEASURED_SIGNALS:
        gradient, noise = step(True)
    else:
        gradient, noise = jax.lax.cond(requested.due, lambda: step(True), lambda: step(False))
    return gradient, persistence | ({} if noise is None else {"update_noise": noise})


def apart(
    gradient: Gradient, noise: dict[str, Any], size: jax.Array
) -> tuple[PyTree, tuple[Gradient, dict[str, Any], jax.Array]]:
    """The gradient itself, which is sharded as the parameters, and everything else."""
    return gradient.grads, (gradient._replace(grads=None), noise, size)


def all_signals(
    gradient: Gradient,
    noise: dict[str, Any],
    requested: Requests,
    batch_size: jax.Array,
    given: dict[str, Any],
    tx: Any,
) -> dict[str, Any]:
    """All extra arguments of ``tx.update``; none for a chain that takes none."""
    if not takes_extra_args(tx):
        return {} if gradient.model_state is None else {"model_state": gradient.model_state}
    signals = {"batch_size": batch_size, **gradient_signals(gradient, requested.signals)}
    if "grad_stats" not in requested.signals:
        signals.pop("grad_stats", None)
    if not requested.accumulators:
        signals["num_accumulated"] = 0
    elif "num_examples" not in given and len(requested.accumulators) == 1:
        # Nobody counts: the calls since the last update are taken to have been as large as this.
        signals["num_accumulated"] = requested.accumulators[0].mini_step * batch_size
    return signals | noise | given
