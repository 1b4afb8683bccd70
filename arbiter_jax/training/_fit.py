"""`fit`: trains window by window.

Before each window the host reads the rule's decision and picks the program compiled for its bucket.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from arbiter_jax import _validate
from arbiter_jax._count import as_count
from arbiter_jax._processes import agree, read, spans_processes
from arbiter_jax.base import LossFn, PyTree, StepInfo, requests, the_rule
from arbiter_jax.batching import Block, BlockSource, batch_of_the_rest, check_next_block
from arbiter_jax.gradients import GradientFn
from arbiter_jax.training._checks import (
    check_callback,
    check_concrete,
    check_data,
    check_functions,
    check_transformation,
)
from arbiter_jax.training._compilations import count_compilations
from arbiter_jax.training._next_window import next_window
from arbiter_jax.training._out_of_memory import (
    OutOfMemoryError,
    is_out_of_memory,
    out_of_memory,
)
from arbiter_jax.training._resume import resume_state
from arbiter_jax.training._state import Data, TrainState, init_state
from arbiter_jax.training._window import run_window


class WindowRecord(NamedTuple):
    """What happened in one window, on the host."""

    window_index: int
    batch_size: int
    bucket_size: int
    num_steps: int  # steps in this window
    num_examples: int  # training examples seen, up to the end of this window
    loss: float  # mean over the steps of this window
    seconds: float  # including compilation, if there was one
    num_compilations: int
    info: StepInfo  # NumPy arrays with a leading axis [num_steps]


class FitResult(NamedTuple):
    """What :func:`fit` returns."""

    state: TrainState
    history: list[WindowRecord]
    num_compilations: int  # window programs that were compiled
    num_cache_hits: int  # window programs that the persistent compilation cache had
    seconds: float

    def per_step(self, name: str) -> np.ndarray:
        """One quantity at every step of the run: "loss", "batch_size", or any metric."""
        infos = [record.info for record in self.history]
        if not infos:  # a budget of less than one batch
            return np.zeros(0)
        return np.concatenate(
            [getattr(i, name) if name in StepInfo._fields else i.metrics[name] for i in infos]
        )


Callback = Callable[[WindowRecord, TrainState], Any]
"""Called after every window; a true result ends the run. What it sets in the state changes nothing.
The state's arrays are donated to the next window: copy what you want to keep."""


def _on_device(data: Any, window: int) -> Data:
    """The data as arrays on the device, except for what comes in blocks."""
    check_data(data)
    data = Data(data.train, getattr(data, "validation", None))
    if isinstance(data.train, Block):
        raise ValueError(
            "data.train must be arrays or a source of blocks, got one Block, which is the data of "
            "one run_window: pass what made it, e.g. arbiter_jax.datasets.host_blocks(...)."
        )
    if not isinstance(data.train, BlockSource):
        return _to_device(data)
    if data.train.window != window:
        raise ValueError(
            f"window must be that of the blocks, {data.train.window}, got {window}: a block holds "
            "the batches of one window."
        )
    return data._replace(validation=_to_device(data.validation))


def _to_device(data: PyTree) -> Any:
    try:
        return jax.tree.map(jnp.asarray, data)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            "data does not fit into the memory of the device: pass the training examples in blocks, "
            "aj.Data(arbiter_jax.datasets.host_blocks(source, window=window), validation)."
        ) from error


def _window_data(data: Data, batch_size: int, bucket_size: int, num_steps: int) -> tuple[Data, int]:
    """What the next window trains on, and how many of its steps there are examples for."""
    if not isinstance(data.train, BlockSource):
        return data, num_steps
    try:
        block = data.train.next_block(batch_size, bucket_size, num_steps)
    except StopIteration:
        return data, 0
    check_next_block(block, batch_size, num_steps)
    return data._replace(train=block), int(block.num_steps)


def _check_budget(opt_state: PyTree, num_examples: int) -> None:
    """Raises a ValueError if a rule in the chain was built for another budget than this run's."""
    for budget in jax.device_get(requests(opt_state).budgets):
        known = int(np.max(np.asarray(budget)))
        if known not in (0, num_examples):
            raise ValueError(
                f"num_examples must be {known}, the budget that the rule in tx was built for, got "
                f"{num_examples}: pass the same number to both, or none to the rule."
            )


def _as_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    if callable(callbacks):
        callbacks = (callbacks,)
    callbacks = tuple(callbacks) if isinstance(callbacks, Iterable) else (callbacks,)
    for callback in callbacks:
        check_callback(callback)
    return callbacks


def _is_true(returned: Any) -> bool:
    try:
        return bool(returned)
    except ValueError:  # an array
        raise ValueError(
            "callbacks must return True to end the run, or None, got an array of shape "
            f"{np.shape(returned)}."
        ) from None


def _smaller_batch(state: TrainState, seen: int, num_examples: int) -> int:
    """The batch for what is left of the budget where a whole one does not fit; 0 for none."""
    rule = the_rule(requests(state.opt_state))
    least = getattr(rule, "min_batch_size", rule.batch_size)
    size, least = (int(x.max()) for x in jax.device_get((rule.batch_size, least)))
    return batch_of_the_rest(size, least, seen, int(state.num_steps), num_examples)


def _what_went_wrong(
    history: list[WindowRecord], source_ended: bool, seen: int, end: int, num_examples: int
) -> list[str]:
    """What a user should know of a run that has ended, besides its result."""
    found = []
    if source_ended:
        found.append(
            f"data.train ended after {seen} of {end} examples: pass a source that goes on, such as "
            "arbiter_jax.datasets.epochs(...), or a smaller num_examples."
        )
    elif not history and (seen == 0 or 10 * (end - seen) >= num_examples) and seen < end:
        found.append(
            f"fit has trained nothing: the next batch is larger than the {end - seen} examples that "
            f"are left of {end}; raise num_examples or let the rule take smaller batches."
        )
    elif seen > num_examples and not history:
        found.append(
            f"fit has trained nothing: state has seen {seen} examples, more than the num_examples of "
            f"{num_examples}, which include them; raise it."
        )
    losses = [record.info.loss for record in history]
    (bad,) = np.nonzero(~np.isfinite(np.concatenate([*losses, np.zeros(0)])))
    if bad.size:
        num_steps = sum(record.num_steps for record in history)
        found.append(
            f"{bad.size} of {num_steps} steps had a loss that was not finite, the first was step "
            f"{bad[0]} of this call: look for such numbers in data.train, lower the learning rate or "
            "clip the gradient; optax.apply_if_finite(tx, 5) skips such steps."
        )
    return found


def fit(
    loss_fn: LossFn | None,
    params: PyTree,
    tx: optax.GradientTransformation,
    data: Any,
    *,
    num_examples: int,
    stop_at: int | None = None,
    window: int = 100,
    key: jax.Array | int = 0,
    callbacks: Callback | Iterable[Callback] = (),
    model_state: PyTree = None,
    state: Any = None,
    num_agent_inputs: int = 32,
    gradient_fn: GradientFn | None = None,
    transform_batch: Callable[[jax.Array, PyTree], PyTree] | None = None,
    inputs_of: Callable[[PyTree], PyTree] | None = None,
    has_aux: bool = False,
) -> FitResult:
    """Trains for a number of examples, with the batch size that the rule in `tx` decides.

    The run ends when a whole batch no longer fits into what is left of `num_examples`, so two runs
    with the same budget differ by less than one batch. If that would leave a tenth of the budget or
    more, because the rule leapt to a batch above the mean of those so far, the run goes on with the
    largest power of two that fits and is in the rule's range.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``, the loss of each example; see
        :class:`arbiter_jax.base.LossFn`. None if `gradient_fn` is given.
      params: Parameters, any pytree of arrays.
      tx: An optax chain with one batch-size rule; ``aj.schedulers.constant(64)`` is one.
      data: :class:`Data`, or anything with attributes `train` and `validation` that are pytrees of
        arrays with one leading axis. `train` may also be a :class:`BlockSource` of the same window,
        for data larger than memory; the run then also ends when the source does.
      num_examples: Budget in training examples, an integer >= 1. It includes those that `state` has
        already seen. Rules that plan ahead are given it.
      stop_at: Ends this call earlier, at this number of examples seen, an integer in [1,
        num_examples]: to change something and go on with `state`. Rules still plan for
        `num_examples`.
      window: T, steps between two decisions, an integer >= 1. Arbiter's own `window` should be the
        same. A rule may ask for shorter windows.
      key: PRNG key or an int. The run is a pure function of it.
      callbacks: Called as ``callback(record, state)`` after every window, one function or several;
        a true result ends the run. Of several processes each calls its own, and a true result of
        one ends the run on all.
      model_state: State of the model that is not trained by gradients, or None.
      state: Where to resume from: a :class:`TrainState` of the same `tx`. `params` is then unused.
        The range of batch sizes is that of `tx`, as in :func:`resume_state`.
      num_agent_inputs: Validation inputs that an agent sees at each step.
      gradient_fn: Replaces the gradient of `loss_fn`.
      transform_batch: ``transform_batch(key, batch) -> batch``, e.g. augmentation.
      inputs_of: ``inputs_of(batch) -> inputs``, the part of a batch that an agent sees; see
        :func:`run_window`.
      has_aux: Whether `loss_fn` returns ``(losses, aux)``; `aux` is in the `info` of the records.

    Returns:
      A :class:`FitResult`.

    Raises:
      ValueError: If an argument is out of its range or not what it should be, the data is empty,
        `tx` holds no rule or more than one, or its rule was built for another budget.
      RuntimeError: On every one of several processes, if they have not decided alike on a batch
        size, the steps of a window or the examples seen.
      OutOfMemoryError: If a window does not fit into the memory of the device. It carries the
        history and, where it can still be read, the last state.

    Warns:
      UserWarning: If losses were not finite, a source of blocks ended before the budget, or nothing
        could be trained.

    Several processes, which ``jax.distributed.initialize`` has joined, call this together, with the
    same arguments; the arrays of `data`, or of `params` or `state`, lie on the devices of them all.
    Before each window they compare what they are about to do, and take the time of a step from the
    clock of process 0.

    >>> import arbiter_jax as aj
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(6))
    >>> loss_fn = lambda w, batch: (w - batch) ** 2 / 2
    >>> result = aj.fit(
    ...     loss_fn, jnp.zeros(()), tx, aj.Data(jnp.ones(50)), num_examples=100, window=10)
    >>> [record.num_examples for record in result.history], int(result.state.num_steps)
    ([60, 96], 16)
    """
    num_examples = _validate.integer(num_examples=num_examples, minimum=1)
    end = num_examples
    if stop_at is not None:
        end = _validate.integer(stop_at=stop_at, minimum=1, maximum=num_examples)
    window = _validate.integer(window=window, minimum=1)
    _validate.integer(num_agent_inputs=num_agent_inputs, minimum=1)
    callbacks = _as_callbacks(callbacks)
    check_transformation(tx)
    data = _on_device(data, window)
    if state is None:
        state = init_state(params, tx, key, model_state)
    else:
        state = resume_state(state, tx)
    check_concrete(params=params, key=key, data=data, state=state)
    the_rule(requests(state.opt_state), "tx")
    check_functions(loss_fn, gradient_fn, transform_batch, state.model_state, inputs_of)
    _check_budget(state.opt_state, num_examples)
    history: list[WindowRecord] = []
    source_ended = False
    num_cache_hits = 0
    step_seconds = float("nan")
    stop = False
    shared = spans_processes((state, data))
    seen = int(state.num_examples)
    budget = num_examples if num_examples < 2**31 else as_count(num_examples)
    start = time.perf_counter()
    while True:
        size, bucket_size, num_steps = next_window(state.opt_state, window)
        num_steps = min(num_steps, (end - seen) // size)
        if num_steps < 1 and end == num_examples:
            # The step takes no more examples than its bucket has rows.
            size = bucket_size = _smaller_batch(state, seen, num_examples)
            num_steps = min(size, 1)
        if shared:
            step_seconds, stop = agree(
                step_seconds,
                stop,
                batch_size=size,
                bucket_size=bucket_size,
                num_steps=num_steps,
                num_examples=seen,
            )
        if stop or num_steps < 1:
            break
        given = state
        try:
            window_data, num_steps = _window_data(data, size, bucket_size, num_steps)
            if num_steps < 1:
                source_ended = True
                break
            before = time.perf_counter()
            with count_compilations() as compilations:
                state, info = run_window(
                    state,
                    window_data,
                    num_steps,
                    step_seconds,
                    budget,
                    loss_fn=loss_fn,
                    tx=tx,
                    bucket_size=bucket_size,
                    window=window,
                    num_agent_inputs=num_agent_inputs,
                    gradient_fn=gradient_fn,
                    transform_batch=transform_batch,
                    inputs_of=inputs_of,
                    has_aux=has_aux,
                )
            check_concrete(tx=info)
            info = read(info)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(history, given, size, bucket_size) from error
        info = jax.tree.map(lambda x, n=num_steps: x[:n], info)
        seconds = time.perf_counter() - before
        # A time that includes a compilation is not the time of a step.
        step_seconds = float("nan") if compilations.num_programs else seconds / num_steps
        num_cache_hits += compilations.num_cache_hits
        seen += num_steps * size
        record = WindowRecord(
            window_index=len(history),
            batch_size=size,
            bucket_size=bucket_size,
            num_steps=num_steps,
            num_examples=seen,
            loss=float(np.mean(info.loss)),
            seconds=seconds,
            num_compilations=compilations.num_compilations,
            info=info,
        )
        history.append(record)
        # All of them are called, each with containers of its own.
        stops = [
            _is_true(callback(record, jax.tree.map(lambda x: x, state))) for callback in callbacks
        ]
        stop = any(stops)
        if stop and not shared:
            break
    for message in _what_went_wrong(history, source_ended, seen, end, num_examples):
        warnings.warn(message, UserWarning, stacklevel=2)
    return FitResult(
        state=state,
        history=history,
        num_compilations=sum(record.num_compilations for record in history),
        num_cache_hits=num_cache_hits,
        seconds=time.perf_counter() - start,
    )
