"""`fit`: trains window by window.

Before each window the host reads the rule's decision and picks the program compiled for its bucket.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax

from arbiter_jax import _validate
from arbiter_jax._count import as_count
from arbiter_jax._processes import spans_processes
from arbiter_jax.base import LossFn, PyTree, requests, the_rule
from arbiter_jax.gradients import GradientFn
from arbiter_jax.training._ahead import CompileAhead
from arbiter_jax.training._auto_micro_batch import MicroBatch
from arbiter_jax.training._call_errors import check_concrete
from arbiter_jax.training._callbacks import Callback, Callbacks, as_callbacks
from arbiter_jax.training._check_functions import check_functions, check_transformation
from arbiter_jax.training._checkpointing import Checkpoints, Keeper
from arbiter_jax.training._extra_args import ExtraArgs, check_extra_args
from arbiter_jax.training._interrupts import Interrupts
from arbiter_jax.training._mesh import in_mesh, place
from arbiter_jax.training._micro_batches import check_sampling
from arbiter_jax.training._records import FitResult
from arbiter_jax.training._resume import resume_state
from arbiter_jax.training._run import Run, check_budget, check_lengths
from arbiter_jax.training._run_data import closing, on_device
from arbiter_jax.training._seed_states import are_several
from arbiter_jax.training._seeds import fit_seeds
from arbiter_jax.training._state import init_state
from arbiter_jax.training._train_windows import train_windows
from arbiter_jax.training._window import run_window


@in_mesh
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
    extra_args: ExtraArgs | None = None,
    mesh: jax.sharding.Mesh | None = None,
    sampling: str = "exact",
    micro_batch_size: int | str | None = None,
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
    clock: Callable[[], float] | None = None,
    progress: bool | None = None,
) -> FitResult:
    """Trains for a number of examples, with the batch size that the rule in `tx` decides.

    The run ends when a whole batch no longer fits into what is left of `num_examples`, so two runs
    with the same budget differ by less than one batch. If that would leave a tenth of the budget or
    more, because the rule has chosen a batch above the mean of those so far, the run continues with
    the largest power of two that fits and is in the rule's range.

    **Several seeds**: with a vector of k keys, the arrays of `params`, and of `model_state` or
    `state`, have a leading axis of k, e.g. ``params=jax.vmap(init)(keys)``. Each seed is trained as
    ``fit(..., params=params_i, key=keys[i])`` trains it, to rounding, which a long run amplifies: it
    has its own batch sizes, windows and end. The seeds share the data and a bucket, that of the
    largest batch among them; padding costs time where their batch sizes differ, and every step at
    which one of them measures costs as much as if all did. The result has a stacked `state` and one
    history per seed; ``result.of_seed(i)`` is the result of one. A callback gets the list of their
    records once per window. Several seeds cannot be combined with rules that read the clock, with
    sources of blocks, or with `mesh`, `sampling`, `micro_batch_size`, `checkpoints` and `clock`. On two
    CPU cores they save little: eight seeds of an MLP 64-64-10 at a constant 64 took 0.9 of the CPU
    time of eight runs.

    **Sweeps**: a run compiles nothing if a run before had the same functions, `tx`, `window` and
    shapes, and made the same buckets. Every new `tx` is a new program, so keep the hyperparameter
    you sweep in the optimizer state: make the optimizer by `optax.inject_hyperparams`, and set the
    hyperparameter by `optax.tree.set`, as below. Programs stay in memory, 12 MiB each for a small
    network, even after their `tx` is gone: ``aj.run_window.clear_cache()`` frees them, after the last
    run that uses them, and ``jax.clear_caches()`` also frees those of several seeds.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``, the loss of each example; see
        :class:`arbiter_jax.base.LossFn`. None if `gradient_fn` is given.
      params: Parameters, any pytree of arrays.
      tx: An optax chain with one batch-size rule; ``aj.schedulers.constant(64)`` is one.
      data: :class:`Data`, or anything with attributes `train` and `validation` that are pytrees of
        arrays with one leading axis. `train` may also be a :class:`BlockSource` of the same window,
        for data larger than memory; the run then also ends when the source does. A loader (a
        DataLoader of torch, a dataset of grain, an iterable over batches) is passed on to
        ``arbiter_jax.datasets.host_blocks`` as `train`, repeated if it can be. As `validation` it
        must end, and ``arbiter_jax.datasets.take`` reads it into arrays. Each call reads a loader
        from its beginning: to continue with `state`, pass blocks that stay open.
      num_examples: Budget in training examples, an integer >= 1. It includes those that `state` has
        already seen. Rules that plan ahead get it.
      stop_at: Ends this call earlier, at this number of examples seen, an integer in [1,
        num_examples]: to change something and continue with `state`. Rules still plan for
        `num_examples`. If that is in the middle of a window, the next call finishes it first: two
        calls give the result of one.
      window: T, steps between two decisions, an integer >= 1. Arbiter's own `window` should be the
        same. A rule may ask for shorter windows.
      key: PRNG key or an int. The run is a pure function of it. A vector of k keys, typed or raw,
        trains k seeds in one program; see above.
      callbacks: Called as ``callback(record, state)`` after every window, one function or several;
        a true result ends the run. Each of several processes calls its own, and a true result on
        one of them ends the run on all. :mod:`arbiter_jax.callbacks` has ready ones.
      model_state: State of the model that is not trained by gradients, or None.
      state: Where to resume from: a :class:`TrainState` of the same `tx`. `params` is then unused.
        The range of batch sizes is that of `tx`, as in :func:`resume_state`.
      num_agent_inputs: Validation inputs that an agent sees at each step.
      gradient_fn: Replaces the gradient of `loss_fn`.
      transform_batch: ``transform_batch(key, batch) -> batch``, e.g. augmentation.
      inputs_of: ``inputs_of(batch) -> inputs``, the part of a batch that an agent sees; see
        :func:`run_window`.
      has_aux: Whether `loss_fn` returns ``(losses, aux)``; `aux` is in the `info` of the records.
      extra_args: ``extra_args(batch_loss) -> dict``, more extra arguments of ``tx.update``, such as
        ``lambda batch_loss: {"value_fn": batch_loss}`` for `optax.lbfgs`; see :func:`run_window`.
      mesh: Devices to train on, of which the axis "data", a power of two, splits the batches. Arrays
        that lie on it stay as they are, the others are replicated. If None, the mesh of the context
        or of the arrays, or one device. The guide to devices describes it, :doc:`/guides/devices`.
      sampling: "exact": the examples that one device would draw. "local": each device draws from
        its own rows of `data.train`, which then never move; every device must have the same number
        of rows, and there can be no `micro_batch_size`.
      micro_batch_size: A power of two, the most rows that are computed at once; larger batches take
        them in groups, in one program for all sizes: see :func:`run_window`. It bounds the memory of
        a window and the number of programs, ``max(1, log2(micro_batch_size /
        next_bucket(min_batch_size)) + 1)``. "auto" for the largest whose program fits into .8 of the
        device's memory, halved whenever memory runs out (one process only); None for no limit.
      checkpoints: ``aj.checkpoints(directory)``: where the run is saved, every few windows and at
        its end. SIGTERM and Ctrl-C then wait for the running window, save the run, and end the
        program as usual: with exit code 143, or with a KeyboardInterrupt. A second Ctrl-C ends it
        at once. A signal to one of several processes ends all of them, after the same window.
      resume: Whether to continue from the newest complete checkpoint; without one the run starts
        from the beginning. The result is bit for bit that of a run that was never stopped, unless rules
        read measured times.
      clock: ``clock() -> seconds``, instead of ``time.perf_counter``: makes runs of rules that read
        measured times repeatable. Everything it measures counts, including compilation.
      progress: Whether a line shows how far the run is, see :func:`arbiter_jax.callbacks.progress`.
        None shows it in a terminal, if rich is installed, or in a notebook, if tqdm is; True also
        raises an ImportError if the package is missing; False never shows it.

    Returns:
      A :class:`FitResult`; that of a resumed run has the whole history.

    Raises:
      ValueError: If an argument is out of its range or not what it should be, the data is empty,
        `tx` holds no rule or more than one, its rule was built for another budget, or the
        checkpoints are those of another run.
      RuntimeError: On every one of several processes, if they differ in a batch size, the steps of a
        window or the examples seen.
      OutOfMemoryError: If a window does not fit into the memory of the device. It carries the
        history and, where it can still be read, the last state; it names the last checkpoint.

    Warns:
      UserWarning: If losses were not finite, a source of blocks ended before the budget, or nothing
        could be trained.

    **Several processes**, joined by ``jax.distributed.initialize``, call this together with the same
    arguments; the arrays of `data`, `params` or `state` lie on the devices of all of them. Before
    each window they compare what they are about to do, and take the time of a step from the clock
    of process 0.

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

    A sweep over rates and seeds with one program:

    >>> tx = optax.chain(optax.inject_hyperparams(optax.sgd)(0.1), aj.schedulers.constant(6))
    >>> def train(rate, seed):
    ...     state = aj.init_state(jnp.zeros(()), tx, seed)
    ...     rate = jnp.asarray(rate, jnp.float32)
    ...     state = state._replace(opt_state=optax.tree.set(state.opt_state, learning_rate=rate))
    ...     return aj.fit(
    ...         loss_fn, None, tx, aj.Data(jnp.ones(50)), num_examples=100, window=10, state=state)
    >>> _ = train(0.1, seed=0)
    >>> [train(rate, seed).num_compilations for rate in (0.2, 0.4) for seed in (0, 1)]
    [0, 0, 0, 0]
    """
    options = {
        "loss_fn": loss_fn,
        "tx": tx,
        "num_agent_inputs": num_agent_inputs,
        "gradient_fn": gradient_fn,
        "transform_batch": transform_batch,
        "inputs_of": inputs_of,
        "has_aux": has_aux,
        "extra_args": extra_args,
        "sampling": sampling,
    }
    if are_several(key):
        return fit_seeds(
            params=params,
            data=data,
            num_examples=num_examples,
            stop_at=stop_at,
            window=window,
            key=key,
            callbacks=callbacks,
            model_state=model_state,
            state=state,
            mesh=mesh,
            micro_batch_size=micro_batch_size,
            checkpoints=checkpoints,
            resume=resume,
            clock=clock,
            progress=progress,
            **options,
        )
    num_examples, end, window = check_lengths(num_examples, stop_at, window, num_agent_inputs)
    callbacks = as_callbacks(callbacks, progress)
    check_transformation(tx)
    given, data = data, on_device(data, window, mesh)
    if state is None:
        state = init_state(place(params, mesh), tx, key, place(model_state, mesh))
    else:
        state = resume_state(place(state, mesh), tx)
    state = place(state, mesh)
    check_concrete(params=params, key=key, data=data, state=state)
    the_rule(requests(state.opt_state), "tx")
    check_functions(loss_fn, gradient_fn, transform_batch, state.model_state, inputs_of)
    check_extra_args(extra_args, micro_batch_size)
    check_budget(state.opt_state, num_examples)
    advance = functools.partial(
        run_window,
        budget=num_examples if num_examples < 2**31 else as_count(num_examples),
        window=window,
        **options,
    )
    if clock is not None:
        _validate.function("clock() -> seconds", clock=clock)
    check_sampling(sampling, micro_batch_size)
    shared = spans_processes((state, data))
    micro = MicroBatch(micro_batch_size, shared)
    run = Run(state, data, advance, num_examples, end, window, mesh, micro, clock)
    del state  # donated to the first window
    ahead = CompileAhead(run.state)
    keeper = Keeper(checkpoints, resume, run)
    start = run.now()
    with (
        Interrupts(enabled=checkpoints is not None) as interrupts,
        contextlib.closing(keeper),
        contextlib.closing(ahead),
        closing(data, given),
        contextlib.closing(Callbacks(callbacks)) as called,
    ):
        train_windows(run, tx, keeper, ahead, interrupts, called, shared)
    interrupts.end()  # a signal that came while the last checkpoint was written
    for message in run.what_went_wrong():
        _validate.warn(message)
    return run.result(run.now() - start, ahead.compilations())
