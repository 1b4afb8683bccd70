"""Gradient accumulation in your own loop, over as many micro-batches as a rule asks for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import _validate
from arbiter_jax._numerics import cond_in_place
from arbiter_jax.base import MEASURED_SIGNALS, PyTree, requests, with_extra_args
from arbiter_jax.batching import MaskedBatch
from arbiter_jax.batching._masking import num_rows, replace_padding
from arbiter_jax.gradients._joined import has_rows, joined_aux
from arbiter_jax.gradients._masked import value_grad_and_weight
from arbiter_jax.gradients._streaming import Accumulated, add_piece, finished, init_accumulated
from arbiter_jax.training._check_functions import check_transformation
from arbiter_jax.training._mesh import on_auto_axes
from arbiter_jax.training._modules import unpacked
from arbiter_jax.training._own_arguments import check_batch, check_opt_state, given_signals
from arbiter_jax.training._own_loop import all_signals, apart, measured, moved_parameters
from arbiter_jax.training._signals import with_zero_statistics


class Accumulator(NamedTuple):
    """The three pure functions that accumulate a gradient; see :func:`accumulate`."""

    init: Callable[..., Accumulated]
    add: Callable[..., Any]
    finish: Callable[..., Any]


def accumulate(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    inputs_of: Callable[[PyTree], PyTree] | None = None,
    wrt: Any = None,
) -> Accumulator:
    """Accumulates the gradient of any number of micro-batches, with one compiled program.

    The batch size changes, the micro-batch does not: a step takes as many micro-batches as make up
    ``aj.get_batch_size(opt_state)``, and gradient noise is measured from them on the way::

        batch = accumulator.init(params, opt_state)
        for _ in range(-(-int(aj.get_batch_size(opt_state)) // micro_batch_size)):
            batch = accumulator.add(batch, params, opt_state, next(micro_batches))
        value, grads, signals = accumulator.finish(batch, params, opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, **signals)

    Here the number of micro-batches is rounded up: if the size is not a multiple of the micro-batch, a
    step takes more examples than the rule asks for, and the run takes fewer steps than planned. Rounded
    down, it takes more of them. To take exactly that size, mask the surplus rows of the last
    micro-batch; the sizes of ``seesaw(doubling=True)`` need no rounding.

    Value and gradient are means over all examples (weighted by their weights), summed in at least
    float32. At the steps at which a rule measures, the gradient of each micro-batch is computed in two
    halves, rows 0, 2, 4, ... and 1, 3, 5, ..., and statistics compare all halves.
    :func:`value_grad_and_signals` with a `micro_batch_size` does the same for a batch that is there
    as a whole.

    Args:
      loss_fn: As in :func:`value_grad_and_signals`; so are `tx` and `inputs_of`.
      tx: The whole chain.
      has_aux: Whether `loss_fn` also returns auxiliary output, as the last entry of a tuple.
      inputs_of: The part of a validation batch that an agent sees.
      wrt: The variables of an NNX module that are trained; see :func:`value_grad_and_signals`.

    Returns:
      A NamedTuple of three pure functions, compiled by themselves:

      - ``init(params, opt_state, model_state=None)`` begins a batch;
      - ``add(batch, params, opt_state, micro_batch, *, mask=None, key=None)`` adds a micro-batch, a
        pytree of arrays [M, ...] of the same M each time, with `mask` for a last one that is not
        full. It returns the batch; with `has_aux`, ``(batch, aux)``, the aux of this micro-batch;
      - ``finish(batch, params, opt_state, *, validation=None, num_examples=None,
        step_seconds=None)`` returns ``(value, grads, signals)``, as the function from
        :func:`value_grad_and_signals` does.

      Parameters and optimizer state are those before the step in all three. `params` may be an NNX
      module, whose state goes through the micro-batches and is put into it by ``finish``.

    Raises:
      ValueError: If an argument is not what it should be.

    >>> import arbiter_jax as aj
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.gradient_noise_scale())
    >>> accumulator = aj.accumulate(lambda w, batch: (w - batch) ** 2 / 2, tx)
    >>> params = jnp.zeros(())
    >>> opt_state = tx.init(params)
    >>> batch = accumulator.init(params, opt_state)
    >>> for micro_batch in jnp.array([[1.0, 3.0], [2.0, 2.0], [0.0, 4.0]]):
    ...     batch = accumulator.add(batch, params, opt_state, micro_batch)
    >>> value, grads, signals = accumulator.finish(batch, params, opt_state)
    >>> float(grads), int(signals["batch_size"]), float(signals["grad_stats"].variance_trace)
    (-2.0, 6, 2.0)
    """
    _validate.function("loss_fn(params, batch) -> float[M]", loss_fn=loss_fn)
    check_transformation(tx)
    has_aux = bool(_validate.boolean(has_aux=has_aux))
    if inputs_of is not None:
        _validate.function("inputs_of(validation) -> inputs", inputs_of=inputs_of)
    chain = with_extra_args(tx)
    split = functools.partial(unpacked, loss_fn, tx, wrt=wrt, has_aux=has_aux)

    def init(params: PyTree, opt_state: PyTree, model_state: PyTree = None) -> Accumulated:
        pure = split(params, opt_state, model_state)
        return _begun(pure.params, pure.opt_state, pure.model_state)

    add_rows = jax.jit(functools.partial(_add_rows, has_aux=has_aux), static_argnames="loss_fn")

    def add(
        state: Accumulated,
        params: PyTree,
        opt_state: PyTree,
        micro_batch: PyTree,
        *,
        mask: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Any:
        if isinstance(micro_batch, MaskedBatch) and mask is None:
            micro_batch, mask = micro_batch
        check_batch(micro_batch, mask)
        pure = split(params, opt_state, is_masked=mask is not None)
        _check_begun(state, pure.opt_state)
        added = add_rows(
            state, pure.params, pure.opt_state, micro_batch, mask, key, loss_fn=pure.loss_fn
        )
        return added if has_aux else added[0]

    @jax.jit
    @on_auto_axes
    def finish_all(params, state, opt_state, given):
        requested = requests(opt_state)
        moved = moved_parameters(chain, opt_state, params, requested, given)
        plain = lambda params, *_: finished(state, params, False, moved)
        full = lambda params, *_: finished(state, params, True, moved)
        functions = {True: full, False: with_zero_statistics(plain)}
        arguments = params, None, None, state.old_model_state, None
        size = state.num_examples
        return apart(
            *measured(functions, arguments, size, chain, opt_state, requested, moved, given), size
        )

    def finish(
        state: Accumulated,
        params: PyTree,
        opt_state: PyTree,
        *,
        validation: PyTree = None,
        num_examples: Any = None,
        step_seconds: Any = None,
    ) -> Any:
        pure = split(params, opt_state)
        _check_begun(state, pure.opt_state)
        requested = requests(pure.opt_state)
        check_opt_state(tx, pure.params, requested)
        given = given_signals(requested, validation, num_examples, step_seconds, inputs_of)
        grads, (gradient, noise, size) = finish_all(pure.params, state, pure.opt_state, given)
        model_state = pure.write(gradient.model_state)
        gradient = gradient._replace(grads=grads, model_state=model_state)
        signals = all_signals(gradient, noise, requested, size, given, tx)
        return gradient.value, pure.as_grads(gradient.grads), signals

    return Accumulator(init, add, finish)


@jax.jit
def _begun(params: PyTree, opt_state: PyTree, model_state: PyTree) -> Accumulated:
    measures = bool(requests(opt_state).signals & MEASURED_SIGNALS)
    return init_accumulated(params, model_state, measures)


@on_auto_axes
def _add_rows(
    state: Accumulated,
    params: PyTree,
    opt_state: PyTree,
    batch: PyTree,
    mask: jax.Array | None,
    key: jax.Array | None,
    *,
    loss_fn: Callable[..., Any],
    has_aux: bool,
) -> tuple[Accumulated, PyTree]:
    """The batch with a micro-batch more, in halves if a rule is due; and the aux of the latter."""
    weighted = value_grad_and_weight(loss_fn, has_aux)
    rows = num_rows(batch)
    mask = jnp.ones(rows, bool) if mask is None else mask
    batch = replace_padding(batch, mask)
    key = None if key is None else jax.random.fold_in(key, state.num_pieces)
    usable = lambda model_state: {} if key is not None and model_state is None else model_state

    def add_part(state, part, num_parts, in_first):
        piece, real = jax.tree.map(lambda x: x[part::num_parts], (batch, mask))
        piece_key = key if key is None or num_parts == 1 else jax.random.fold_in(key, part)
        gradient, weight = weighted(params, piece, real, usable(state.model_state), piece_key)
        size = jnp.sum(real, dtype=jnp.int32)
        return add_piece(state, gradient, weight, size, in_first), gradient.aux, weight

    def whole(state):
        # One row has no halves: the micro-batches alternate.
        in_first = state.num_pieces % 2 == 0 if rows == 1 else None
        return add_part(state, 0, 1, in_first)[:2]

    def halves(state):
        old_state = usable(state.model_state)
        state, *first = add_part(state, 0, 2, True)
        state, *second = add_part(state, 1, 2, False)
        if not has_aux:
            return state, None
        auxes, weights = zip(first, second, strict=True)
        sizes = -(-rows // 2), rows // 2
        with_rows = has_rows(loss_fn, auxes, sizes, params, batch, mask, old_state, key)
        return state, joined_aux(auxes, jnp.stack(weights), with_rows, contiguous=False)

    if state.spread is None or rows == 1:
        return whole(state)
    due = requests(opt_state).due
    if due is None:
        return halves(state)
    aux = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(whole, state)[1])
    carry = cond_in_place(due, lambda carry: halves(carry[0]), (state, aux))
    return cond_in_place(~due, lambda carry: whole(carry[0]), carry)


def _check_begun(state: Any, opt_state: PyTree) -> None:
    """Raises a ValueError if a batch was not begun by `init`, or for a chain with other rules."""
    if not isinstance(state, Accumulated):
        is_pair = isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], Accumulated)
        hint = "with has_aux=True, add returns (batch, aux)" if is_pair else "it comes first"
        raise ValueError(
            "batch must be what init(params, opt_state) or add(batch, ...) has returned, got "
            f"{type(state).__name__}: {hint}."
        )
    measures = bool(requests(opt_state).signals & MEASURED_SIGNALS)
    if measures != (state.spread is not None):
        raise ValueError(
            "batch must have been begun by init(params, opt_state) with the state of the same chain, "
            f"got one that {'keeps no' if measures else 'keeps'} statistics: the rules in this "
            f"opt_state read {'them' if measures else 'none'}."
        )
