"""One window of training as one compiled program: a `lax.scan` over T inner steps.

The batch size is decided before a window and is constant within it; only the optimizer state
carries the decision into the next one. Shapes depend only on the bucket, so a run compiles at most
one program per bucket.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.typing
import optax

from arbiter_jax._count import Count
from arbiter_jax.base import LossFn, PyTree, StepInfo
from arbiter_jax.gradients import GradientFn
from arbiter_jax.training._call_errors import explained
from arbiter_jax.training._compile_log import log_trace
from arbiter_jax.training._extra_args import ExtraArgs
from arbiter_jax.training._mesh import check_bucket_of_mesh, on_auto_axes
from arbiter_jax.training._state import Data, TrainState
from arbiter_jax.training._window_arguments import check_arguments, check_whole_numbers, explain
from arbiter_jax.training._window_steps import begin_window, maybe_step


@explained(explain)
@functools.partial(
    jax.jit,
    static_argnames=(
        "loss_fn",
        "tx",
        "bucket_size",
        "window",
        "num_agent_inputs",
        "gradient_fn",
        "transform_batch",
        "inputs_of",
        "has_aux",
        "extra_args",
        "micro_batch_size",
        "sampling",
    ),
    donate_argnames="state",
)
@on_auto_axes
def run_window(
    state: TrainState,
    data: Data,
    num_steps: jax.typing.ArrayLike | None = None,
    step_seconds: jax.typing.ArrayLike = jnp.nan,
    budget: Count | jax.typing.ArrayLike | None = None,
    batch_size: jax.typing.ArrayLike | None = None,
    *,
    own_bucket_size: jax.typing.ArrayLike | None = None,
    loss_fn: LossFn | None = None,
    tx: optax.GradientTransformation,
    bucket_size: int,
    window: int = 100,
    num_agent_inputs: int = 32,
    gradient_fn: GradientFn | None = None,
    transform_batch: Callable[[jax.Array, PyTree], PyTree] | None = None,
    inputs_of: Callable[[PyTree], PyTree] | None = None,
    has_aux: bool = False,
    extra_args: ExtraArgs | None = None,
    micro_batch_size: int | None = None,
    sampling: str = "exact",
) -> tuple[TrainState, StepInfo]:
    """Runs T training steps in one compiled program.

    Each step samples a batch, computes the masked gradient and the signals that the rules in the
    chain ask for, and applies the updates. The batch size is ``get_batch_size`` of the state at the
    start, or that of a window which :func:`fit` left unfinished, ``state.unfinished``; at most
    `bucket_size` unless that is the `micro_batch_size`. The state is donated: use the returned one.
    With ``jax.set_mesh(mesh)`` around the call, rows are split over the mesh's axis "data".

    **Inside** ``jax.jit``, ``jax.lax.scan`` and ``jax.vmap`` of your own it is one more function, and
    nobody reads a decision on the host. The bucket is therefore fixed for the whole program, and only
    the mask moves: a smaller batch takes the time of a full bucket. Let the rule's `max_batch_size`
    be the bucket: a larger decision stays in the state, but the batch is clipped to the bucket. Or
    make the bucket a `micro_batch_size`, and batches of any size take as many groups as they need.
    Windows are `window` steps, whatever a rule asks for. What the caller passes with
    ``donate_argnums`` is donated, nothing else. `data` may be new in every window, as rollouts are::

        step = lambda state, data: aj.run_window(
            state, data, loss_fn=loss_fn, tx=tx, bucket_size=64, window=10)
        state, infos = jax.lax.scan(step, state, aj.Data(rollouts))  # leaves [num_windows, rows, ...]

    Args:
      state: From :func:`init_state` or a window before.
      data: ``Data(train, validation)``, pytrees of arrays on the device. `train` may also be a
        :class:`arbiter_jax.batching.Block`, whose batches are used as they are: the sampler stays
        where it is, and steps for which the block has no batch are not taken. A block of fewer than
        T steps makes a shorter window.
      num_steps: int32[], how many of the T steps to take; all if None. It is traced, so that the
        last window of a run needs no program of its own.
      step_seconds: float32[], measured time of one step in the last window, for rules that ask.
      budget: int32[], training examples of the whole run, for rules that plan ahead, or an
        ``aj.base.as_count(budget)`` if that is more than an int32 holds; None if unknown.
      batch_size: int32[], takes at most this many examples a step, for the last batch of a budget;
        what the rule has decided if None.
      own_bucket_size: int32[], the bucket that :func:`next_window` gives this state alone, where
        states that are vmapped together share a larger `bucket_size`. Then the result is that of a
        window of its own, to float rounding. It is traced; None for `bucket_size`.
      loss_fn: ``loss_fn(params, batch) -> float[M]``, see :class:`arbiter_jax.base.LossFn`.
      tx: A chain with one batch-size rule, or an optax transformation without one; its batches
        then fill the bucket.
      bucket_size: Static number of rows of a batch, a power of two: see :func:`next_window`.
      window: T, static, >= 1.
      num_agent_inputs: Validation inputs that an agent sees at each step.
      gradient_fn: Replaces the gradient of loss_fn, e.g. by one over a chosen subset of examples.
      transform_batch: ``transform_batch(key, batch) -> batch``, e.g. augmentation.
      inputs_of: ``inputs_of(batch) -> inputs``, the part of a validation batch that an agent sees;
        by default the first entry of a tuple or list, or the batch if it is one array. A batch of
        another form, a dict for example, needs it where the chain has an agent.
      has_aux: Whether `loss_fn` returns ``(losses, aux)``, with a model state ``(losses,
        model_state, aux)``; ``StepInfo.aux`` holds `aux`. At steps at which the gradient's noise is
        measured it is that of pieces of the batch: the means of floating-point leaves, the other
        leaves of the last piece.
      extra_args: ``extra_args(batch_loss) -> dict``, a hashable function that makes more extra
        arguments of ``tx.update``, for optimizers that evaluate the loss themselves:
        ``batch_loss(params) -> float[]`` is the mean loss of the batch of this step, with the model
        state before it and its key. `optax.lbfgs` takes ``lambda batch_loss: {"value_fn":
        batch_loss}``, `optax.contrib.sophia` ``{"obj_fn": batch_loss}``. It excludes a
        `micro_batch_size`.
      micro_batch_size: Static, a power of two, at least `bucket_size`, or None. Where `bucket_size`
        equals it, a batch of any size is computed in groups of `micro_batch_size` rows. Their number
        is traced, and only one group is in memory at a time. The result is that of one large bucket,
        but BatchNorm and dropout see each group by itself. Pass it to :func:`next_window` as well.
      sampling: "exact": the examples of one device, on any mesh. "local": each device of a mesh
        draws its share from its own rows of `data.train`, which excludes a `micro_batch_size`; see the
        guide to devices, :doc:`/guides/devices`.

    Returns:
      (state, info): info is a StepInfo whose leaves have a leading axis T, or that of a block of
      fewer steps; steps not taken have batch size 0 and zeros everywhere else.

    Raises:
      ValueError: If window < 1, the bucket is not a power of two or smaller than the mesh, the data
        is empty, ragged or a block of another window or bucket, a rule needs validation data that
        was not given, a function or the state is not what it should be, or the state was donated
        before.

    *Guarantees*:
      1. Padding contributes exactly zero to loss, gradients, statistics and state.
      2. One program per bucket, however the batch size moves within it.
      3. The updates are those of the optimizer: rules leave them unchanged.

    >>> import arbiter_jax as aj, optax
    >>> tx = optax.chain(optax.sgd(0.5), aj.schedulers.constant(3))
    >>> loss_fn = lambda w, batch: (w - batch) ** 2 / 2
    >>> state = aj.init_state(jnp.zeros(()), tx, jax.random.PRNGKey(0))
    >>> data = aj.Data(train=jnp.ones(10))
    >>> state, info = aj.run_window(state, data, loss_fn=loss_fn, tx=tx, bucket_size=4, window=2)
    >>> float(state.params), info.batch_size.tolist(), info.loss.tolist()
    (0.75, [3, 3], [0.5, 0.125])
    """
    options = {
        "tx": tx,
        "bucket_size": bucket_size,
        "window": window,
        "num_agent_inputs": num_agent_inputs,
        "loss_fn": loss_fn,
        "gradient_fn": gradient_fn,
        "transform_batch": transform_batch,
        "inputs_of": inputs_of,
        "has_aux": has_aux,
        "extra_args": extra_args,
        "micro_batch_size": micro_batch_size,
        "sampling": sampling,
    }
    check_arguments(state, data, **options)
    check_whole_numbers(num_steps=num_steps, batch_size=batch_size, own_bucket_size=own_bucket_size)
    check_bucket_of_mesh(bucket_size)
    log_trace(state, data, **options)
    state, plan = begin_window(
        state, data, num_steps, step_seconds, budget, batch_size, own_bucket_size, **options
    )
    steps = jnp.arange(plan.window, dtype=jnp.int32)
    return jax.lax.scan(lambda state, t: maybe_step(plan, state, t), state, steps)
