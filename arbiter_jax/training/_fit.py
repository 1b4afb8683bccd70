"""`fit`: trains window by window.

Before each window the host reads the rule's decision and picks the program compiled for its bucket.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import optax

from arbiter_jax import _validate
from arbiter_jax._count import as_count
from arbiter_jax.base import LossFn, PyTree, requests, the_rule
from arbiter_jax.gradients import GradientFn
from arbiter_jax.training._checks import (
    check_concrete,
    check_functions,
    check_transformation,
)
from arbiter_jax.training._compilations import count_compilations
from arbiter_jax.training._out_of_memory import is_out_of_memory, out_of_memory
from arbiter_jax.training._records import (
    Callback,
    FitResult,
    WindowRecord,
    any_ends,
    as_callbacks,
    what_went_wrong,
)
from arbiter_jax.training._resume import resume_state
from arbiter_jax.training._run import Plan, Run, check_budget
from arbiter_jax.training._run_data import data_of_window, on_device
from arbiter_jax.training._seeds import are_several, fit_seeds
from arbiter_jax.training._state import Data, init_state
from arbiter_jax.training._window import run_window


def _train_window(run: Run, plan: Plan, data: Data, advance: Callable[..., Any]) -> bool:
    """Trains one window and records it; False if there are no examples left for it."""
    size, bucket_size, num_steps = plan
    given = run.state
    try:
        window_data, num_steps = data_of_window(data, size, bucket_size, num_steps)
        if num_steps < 1:
            run.source_ended = True
            return False
        before = time.perf_counter()
        with count_compilations() as compilations:
            run.state, info = advance(
                given, window_data, num_steps, run.step_seconds, bucket_size=bucket_size
            )
        check_concrete(tx=info)
        info = jax.device_get(info)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(run.history, given, size, bucket_size) from error
    info = jax.tree.map(lambda x: x[:num_steps], info)
    seconds = time.perf_counter() - before
    # A time that includes a compilation is not the time of a step.
    run.step_seconds = float("nan") if compilations.num_programs else seconds / num_steps
    run.num_cache_hits += compilations.num_cache_hits
    run.seen += num_steps * size
    run.history.append(
        WindowRecord(
            window_index=len(run.history),
            batch_size=size,
            bucket_size=bucket_size,
            num_steps=num_steps,
            num_examples=run.seen,
            loss=float(np.mean(info.loss)),
            seconds=seconds,
            num_compilations=compilations.num_compilations,
            info=info,
        )
    )
    return True


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

    **Several seeds**: with a vector of k keys, the arrays of `params`, and of `model_state` or
    `state`, have a leading axis of k, e.g. ``params=jax.vmap(init)(keys)``. Each seed is trained as
    ``fit(..., params=params_i, key=keys[i])`` would, up to float rounding (which a long run amplifies):
    it has its own batch sizes, windows and end. They share the data and a bucket, that of the largest
    batch among them, whose padding costs time where their batch sizes differ, and a step takes the
    path of a measurement where any of them measures. The result has a stacked `state` and one history
    per seed; ``result.of_seed(i)`` is that of one. A callback gets the list of their records once a
    window. Rules that read the clock, and sources of blocks, are for one run at a time. On two
    CPU cores it saves little: eight seeds of an MLP 64-64-10 at a constant 64 took 0.9 of the CPU time
    of eight runs.

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
      key: PRNG key or an int. The run is a pure function of it. A vector of k keys, typed or raw,
        trains k seeds in one program; see below.
      callbacks: Called as ``callback(record, state)`` after every window, one function or several;
        a true result ends the run.
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
      OutOfMemoryError: If a window does not fit into the memory of the device. It carries the
        history and, where it can still be read, the last state.

    Warns:
      UserWarning: If losses were not finite, a source of blocks ended before the budget, or nothing
        could be trained.

    >>> import arbiter_jax as aj, jax.numpy as jnp
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(6))
    >>> loss_fn = lambda w, batch: (w - batch) ** 2 / 2
    >>> result = aj.fit(
    ...     loss_fn, jnp.zeros(()), tx, aj.Data(jnp.ones(50)), num_examples=100, window=10)
    >>> [record.num_examples for record in result.history], int(result.state.num_steps)
    ([60, 96], 16)

    Three seeds at once:

    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> result = aj.fit(
    ...     loss_fn, jnp.zeros(3), tx, aj.Data(jnp.ones(50)), num_examples=100, window=10, key=keys)
    >>> result.state.params.shape, [record.num_steps for record in result.of_seed(2).history]
    ((3,), [10, 6])
    """
    if are_several(key):
        return fit_seeds(**locals())
    num_examples = _validate.integer(num_examples=num_examples, minimum=1)
    end = num_examples
    if stop_at is not None:
        end = _validate.integer(stop_at=stop_at, minimum=1, maximum=num_examples)
    window = _validate.integer(window=window, minimum=1)
    _validate.integer(num_agent_inputs=num_agent_inputs, minimum=1)
    callbacks = as_callbacks(callbacks)
    check_transformation(tx)
    data = on_device(data, window)
    if state is None:
        state = init_state(params, tx, key, model_state)
    else:
        state = resume_state(state, tx)
    check_concrete(params=params, key=key, data=data, state=state)
    the_rule(requests(state.opt_state), "tx")
    check_functions(loss_fn, gradient_fn, transform_batch, state.model_state, inputs_of)
    check_budget(state.opt_state, num_examples)
    advance = functools.partial(
        run_window,
        budget=num_examples if num_examples < 2**31 else as_count(num_examples),
        loss_fn=loss_fn,
        tx=tx,
        window=window,
        num_agent_inputs=num_agent_inputs,
        gradient_fn=gradient_fn,
        transform_batch=transform_batch,
        inputs_of=inputs_of,
        has_aux=has_aux,
    )
    run = Run(state, num_examples, end, window, seen=int(state.num_examples))
    del state  # donated to the first window
    start = time.perf_counter()
    while (plan := run.next_plan()) is not None:
        if not _train_window(run, plan, data, advance):
            break
        if any_ends(callbacks, run.history[-1], run.state):
            break
    for message in what_went_wrong(run.history, run.source_ended, run.seen, end, num_examples):
        warnings.warn(message, UserWarning, stacklevel=2)
    return run.result(time.perf_counter() - start)
