"""What one update averages: one batch, or all those that `optax.MultiSteps` has accumulated."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from arbiter_jax._count import Count, as_count


def applied_batch_size(batch_size: Any, state: Any) -> jax.Array:
    """The batch size that this step actually used, as int32[].

    ``run_window`` applies a decision at the next window and ``shadow`` never does, so the caller
    passes `batch_size`. Without it we assume that the latest decision was applied.

    Args:
      batch_size: The extra argument of that name, an integer; None if the caller did not pass it.
      state: State of the rule, which has a `batch_size`.

    Returns:
      int32[], in examples.

    >>> from arbiter_jax import schedulers
    >>> state = schedulers.constant(8).init({})
    >>> int(applied_batch_size(None, state)), int(applied_batch_size(6, state))
    (8, 6)
    """
    return state.batch_size if batch_size is None else jnp.asarray(batch_size).astype(jnp.int32)


class Update(NamedTuple):
    """What one update averages; from :func:`applied_update`."""

    call_size: jax.Array  # int32[], examples in this call
    size: jax.Array  # int32[], examples whose gradients it averages, of earlier calls as well
    num_calls: jax.Array | int  # size / call_size, float[]; the int 1 if known while tracing
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
    """Training examples after this call, for a rule that counts them.

    Args:
      seen: What the rule itself has counted before this call.
      state: State of the rule, which has a `batch_size`.
      batch_size: The extra argument of that name; None for the latest decision.
      num_examples: The extra argument of that name, which replaces `seen`; None if there is none.
      **extra_args: The other extra arguments, which are not read.

    Returns:
      A :class:`Count`.

    >>> from arbiter_jax import schedulers
    >>> state = schedulers.constant(8).init({})
    >>> int(examples_after(as_count(100), state)), int(examples_after(as_count(0), state, batch_size=4))
    (108, 4)
    """
    del extra_args
    before = seen if num_examples is None else as_count(num_examples)
    return before + applied_batch_size(batch_size, state)
