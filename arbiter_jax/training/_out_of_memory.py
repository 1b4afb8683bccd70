"""What is left of a run whose next window does not fit into the memory of the device."""

from __future__ import annotations

from typing import Any

import jax


class OutOfMemoryError(RuntimeError):
    """A window did not fit into the memory of the device; :func:`fit` raises it.

    Attributes:
      history: The windows before, a list of :class:`WindowRecord`.
      state: The :class:`TrainState` before the window, to go on from with a smaller
        `max_batch_size`; None if its buffers were already donated.
    """

    def __init__(self, message: str, history: Any = (), state: Any = None):
        super().__init__(message)
        self.history = list(history)
        self.state = state


def is_out_of_memory(error: BaseException) -> bool:
    """Whether XLA raised this because memory ran out, while compiling or while running."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def out_of_memory(
    history: list[Any], state: Any, size: int, bucket_size: int, checkpoint: str | None = None
) -> OutOfMemoryError:
    """The error for a window of this size that did not fit.

    Args:
      history: The windows before.
      state: What the window was given.
      size: Its batch size.
      bucket_size: Its rows per step.
      checkpoint: Path of the last checkpoint, if there is one.
    """
    before = ""
    if history:
        last = history[-1]
        before = f" The window before it took {last.batch_size} in a bucket of {last.bucket_size}."
    deleted = any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    kept = "history" if deleted else "history and the last state"
    where = "" if checkpoint is None else f"; the last checkpoint is {checkpoint}"
    return OutOfMemoryError(
        f"A window with batch size {size} in a bucket of {bucket_size} rows does not fit into the "
        f"memory of the device.{before} Give the rule a max_batch_size of at most "
        f"{max(1, bucket_size // 2)}; this error carries the {kept}{where}.",
        history,
        None if deleted else state,
    )
