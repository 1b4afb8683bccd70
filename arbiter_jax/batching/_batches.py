"""Batches of the size that a rule wants, from data that comes in pieces, for your own loop.

A data loader fixes its batch size when it is made; here the size is asked for before every batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from arbiter_jax import _validate
from arbiter_jax.base import PyTree
from arbiter_jax.batching._block_maker import Buffer
from arbiter_jax.batching._buckets import next_bucket
from arbiter_jax.batching._loaders import checked_position, chunks_of


class MaskedBatch(NamedTuple):
    """A batch in a bucket, which may have more rows than the batch has examples."""

    examples: PyTree  # leaves [bucket, ...]
    mask: Any  # an array, shape=(bucket,), dtype=bool, True for an example


class Batches:
    """Batches whose size may change, with their masks; see :func:`batches`."""

    def __init__(self, source: Any, batch_size: Any, batched: bool, repeat: bool):
        if not callable(batch_size):
            size = _validate.integer(batch_size=batch_size, minimum=1)
            batch_size = lambda: size
        elif not _takes_nothing(batch_size):
            raise ValueError(
                "batch_size must be an integer or a function without arguments, such as lambda: "
                f"aj.get_batch_size(opt_state), got {_validate.shown(batch_size)}."
            )
        self.num_examples = 0  # in all batches so far, without padding
        self._buffer = Buffer(chunks_of(source, batched=batched, repeat=repeat))
        self._source_name = type(source).__name__
        self._batch_size: Callable[[], Any] = batch_size

    def __iter__(self) -> Iterator[MaskedBatch]:
        return self

    def __next__(self) -> MaskedBatch:
        size = np.asarray(self._batch_size())  # waits for the step that decides it
        size = size.item() if size.ndim == 0 else size
        size = _validate.integer(batch_size=size, minimum=1)
        held = self._buffer.fill(size)
        if held < size:
            if not self.num_examples:
                _validate.warn(
                    f"datasets.batches: the source holds {held} examples, fewer than the first batch "
                    f"of {size}; repeat=True starts it again where it ends."
                )
            raise StopIteration
        rows = np.arange(next_bucket(size))
        mask = rows < size
        examples = self._buffer.take(np.where(mask, rows, 0))
        self._buffer.drop(size)
        self.num_examples += size
        return MaskedBatch(examples, mask)

    def get_state(self) -> dict[str, Any]:
        """Where the next batch begins, made of what the source's own ``get_state()`` returns.

        Raises:
          ValueError: If the source can be read only once and cannot say where it stands.
        """
        position = self._buffer.position()
        if position is None:
            raise ValueError(
                "source must be an iterator with get_state() and set_state(state), or iterable more "
                f"than once, to go on where a run was saved, got a {self._source_name}: use "
                "datasets.epochs(data), a dataset of grain or a DataLoader."
            )
        return {**position, "num_examples": self.num_examples}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`get_state` was called, perhaps in another process.

        Raises:
          ValueError: As :meth:`get_state`, or if it has not returned this state.
        """
        self.get_state()  # raises
        state = checked_position(state, "skip", "num_examples", others=("source",))
        self._buffer.go_to({"source": state["source"], "skip": state["skip"]})
        self.num_examples = state["num_examples"]


def _takes_nothing(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:  # some callables have no signature
        pass
    return True


def batches(
    source: Any,
    batch_size: int | Callable[[], Any],
    *,
    batched: bool = True,
    repeat: bool = False,
) -> Batches:
    """Iterates over batches of the size that a rule wants, in a training loop of your own.

    Whatever the sizes of the pieces that `source` yields, they are joined and cut again: each
    example is used once, in the order of the source. The size is asked for when the next batch is
    wanted. So a function that reads the optimizer state follows it from step to step; it waits for
    the step before to end, as reading a decision must.

    A batch has a power of two of rows, :func:`arbiter_jax.next_bucket` of its size, so that a jitted
    step compiles once per bucket and not once per size. The first `batch_size` rows are examples;
    the others repeat the first one, and the mask says which they are.

    Args:
      source: As in :func:`host_blocks`: a DataLoader of torch, a loader or dataset of grain, a
        generator of pytrees of arrays [n, ...]; :func:`epochs` makes an endless one from arrays.
      batch_size: Examples of a batch, an integer >= 1, or a function without arguments that returns
        it, such as ``lambda: aj.get_batch_size(opt_state)``.
      batched: Whether an item of the source is a batch, or a single example.
      repeat: Whether to start again where the source ends; a batch may then cross that end.

    Returns:
      An iterator over :class:`MaskedBatch`, pairs of examples, leaves [bucket, ...] of NumPy, and
      their mask, bool[bucket]. It ends where the source has no whole batch left, and counts the
      examples so far in `num_examples`. ``get_state()`` and ``set_state(state)`` save its place.

    Raises:
      ValueError: If source is data itself or cannot be iterated over, a size is not an integer >= 1,
        or the pieces differ in structure, shape or dtype.

    *Guarantees*:
      * Each example is used exactly once, in the order of the source, however the sizes change.
        Only an incomplete batch at the end is left out.

    >>> import numpy as np
    >>> from arbiter_jax import datasets
    >>> sizes = iter([2, 3, 2, 2, 2])
    >>> for batch, mask in datasets.batches([np.arange(4), np.arange(4, 9)], lambda: next(sizes)):
    ...     print(batch.tolist(), mask.tolist())
    [0, 1] [True, True]
    [2, 3, 4, 2] [True, True, True, False]
    [5, 6] [True, True]
    [7, 8] [True, True]

    The gradient function takes the pair as it is. Without the mask, padding would count as examples::

        grad_fn = aj.value_grad_and_signals(loss_fn, tx)
        for batch in datasets.batches(loader, lambda: aj.get_batch_size(opt_state)):
            value, grads, signals = grad_fn(params, opt_state, batch)
            updates, opt_state = tx.update(grads, opt_state, params, **signals)
            params = optax.apply_updates(params, updates)
    """
    return Batches(source, batch_size, batched, repeat)
