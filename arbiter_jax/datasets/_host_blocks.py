"""Data larger than the device's memory: the batches of one window, prepared during the previous one.

An iterator yields examples in chunks of any size. A thread arranges them in blocks
``[T, bucket, ...]`` and moves them to the device, one window ahead of training. The iterator alone
decides the order of the examples; the batch size only decides how many are taken at a time.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from arbiter_jax import _validate
from arbiter_jax.base import PyTree
from arbiter_jax.batching import (
    Block,
    block_rows,
    block_shape,
    group_rows,
    interleaved,
    is_split,
    num_rows,
)
from arbiter_jax.datasets._epochs import is_resumable

_JOIN_SECONDS = 5.0


class _Buffer:
    """Queue of the examples that were read from the source and not yet used."""

    def __init__(self, source: Any):
        self._source = source  # an iterator, perhaps with get_state and set_state
        self._chunks: deque[PyTree] = deque()
        self._num_rows = 0
        self._kind: Any = None
        self._error: BaseException | None = None
        self._dropped = 0  # rows of the first chunk
        self._states: deque[Any] = deque()  # of the source, before each of the chunks

    def position(self) -> dict[str, Any] | None:
        """Where the next row comes from; None if the source cannot say."""
        if not is_resumable(self._source):
            return None
        states = self._states or (self._source.get_state(),)
        return {"source": states[0], "skip": self._dropped if self._states else 0}

    def go_to(self, position: dict[str, Any]) -> None:
        """Goes on at a position."""
        self._chunks.clear()
        self._states.clear()
        self._num_rows = self._dropped = 0
        self._error, skip = None, position["skip"]
        try:
            self._source.set_state(position["source"])
            if self.fill(skip) < skip:
                raise ValueError(
                    "source must hold what it held when it was saved, but it has ended before."
                )
            self.drop(skip)
        except BaseException as error:  # raised when rows are requested
            self._error = error

    def _read(self) -> None:
        state = self._source.get_state() if is_resumable(self._source) else None
        chunk = jax.tree.map(np.asarray, next(self._source))
        count, kind = num_rows(chunk, name="each chunk of the source"), _kind(chunk)
        if self._kind not in (None, kind):
            raise ValueError(
                "source must yield chunks of the same structure, shape and dtype, got "
                f"{self._kind[1]} and {kind[1]}."
            )
        for leaf in jax.tree.leaves(chunk) if self._kind is None else ():
            if leaf.dtype.kind in "OSUMm":
                raise ValueError(f"source must yield chunks of numbers, got dtype {leaf.dtype}.")
        self._kind = kind
        self._chunks.append(chunk)
        self._states.append(state)
        self._num_rows += count

    def fill(self, wanted: int) -> int:
        """Reads until there are `wanted` rows or the source has ended; returns how many there are.

        An exception of the source is kept and raised on every call that needs more rows: a
        generator raises it only once.
        """
        while self._num_rows < wanted:
            if self._error is None:
                try:
                    self._read()
                    continue
                except BaseException as error:  # raised below, and again on later calls
                    self._error = error
            if isinstance(self._error, StopIteration):
                break
            raise self._error
        return min(self._num_rows, wanted)

    def block(
        self, window: int, batch_size: int, bucket_size: int, num_steps: int, position: Any
    ) -> PyTree:
        """The first `num_steps * batch_size` rows as [T, bucket, ...]; they stay in the buffer.

        Steps of more rows than the bucket are split into groups; see :func:`group_rows`.
        """
        missing, parts, chunks = num_steps * batch_size, [], iter(self._chunks)
        while missing:
            parts.append(jax.tree.map(lambda x, n=missing: x[:n], next(chunks)))
            missing -= len(jax.tree.leaves(parts[-1])[0])
        num_slots, _ = block_shape(window, batch_size, bucket_size)
        arrange = block_rows if batch_size <= bucket_size else group_rows
        rows = arrange(num_slots, batch_size, bucket_size, num_steps, position)
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[rows], *parts)

    def drop(self, count: int) -> None:
        """Removes the first `count` rows."""
        self._num_rows -= count
        while count:
            length = len(jax.tree.leaves(self._chunks[0])[0])
            if length > count:
                self._dropped += count
                self._chunks[0] = jax.tree.map(lambda x, n=count: x[n:], self._chunks[0])
                return
            self._chunks.popleft()
            self._states.popleft()
            self._dropped = 0
            count -= length


def _kind(chunk: PyTree) -> tuple[Any, list[Any]]:
    """Structure, shapes and dtypes of a chunk, which all chunks of a source share."""
    leaves, structure = jax.tree.flatten(chunk)
    return structure, [(leaf.shape[1:], str(leaf.dtype)) for leaf in leaves]


def _serve(
    source: Iterator[PyTree],
    window: int,
    sharding: Any,
    requests: queue.SimpleQueue,
    results: queue.SimpleQueue,
) -> None:
    """The thread: answers requests (batch_size, bucket_size, num_steps) and prefetches.

    A result is a block, or the exception to raise instead.
    """
    buffer = _Buffer(source)

    def make(request: tuple[int, int, int]) -> Block | BaseException:
        batch_size, bucket_size, num_steps = request
        try:
            num_steps = min(num_steps, buffer.fill(num_steps * batch_size) // batch_size)
            if num_steps < 1:
                return StopIteration()
            position = interleaved(bucket_size) if is_split(sharding) else None
            block = buffer.block(window, batch_size, bucket_size, num_steps, position)
            sizes = np.int32(batch_size), np.int32(num_steps)
            return Block(jax.device_put(block, sharding), *sizes, position)
        except BaseException as error:
            return error

    request, guess, result = requests.get(), None, None
    while request is not None:
        if isinstance(request, dict):
            result = None
            buffer.go_to(request)
            request = requests.get()
            continue
        *sizes, num_steps = request
        if isinstance(result, Block) and sizes == guess and num_steps <= result.num_steps:
            result = result._replace(num_steps=np.int32(num_steps))
        else:
            result = make(request)
        if isinstance(result, Block):
            batch_size, bucket_size = guess = sizes
            buffer.drop(int(result.num_steps) * batch_size)
        results.put((result, buffer.position()))
        if isinstance(result, Block):
            # Sizes rarely change between windows, so guess that they stay. If the guess is wrong,
            # every batch size in the same bucket still finds all its rows in the buffer.
            num_slots, num_steps = block_shape(window, batch_size, bucket_size)
            result = make((batch_size, bucket_size, num_steps))
            with contextlib.suppress(BaseException):  # raised when these rows are requested
                buffer.fill(num_slots * bucket_size)
        request = requests.get()
    close = getattr(source, "close", None)
    if close is not None:
        with contextlib.suppress(Exception):
            close()


def _stop(thread: threading.Thread, requests: queue.SimpleQueue) -> None:
    requests.put(None)
    thread.join(_JOIN_SECONDS)


class HostBlocks:
    """Blocks of batches from an iterator over examples; see :func:`host_blocks`."""

    def __init__(self, source: Iterable[PyTree], window: int, sharding: Any = None):
        # Iterating over one of these would take their rows, parts or keys for chunks.
        is_data = isinstance(source, tuple | Mapping | str | bytes) or hasattr(source, "dtype")
        if is_data or not isinstance(source, Iterable):
            raise ValueError(
                "source must be an iterator over chunks of examples, got "
                f"{type(source).__name__}; datasets.epochs(data) makes one from arrays."
            )
        self.num_examples = 0  # examples in all blocks so far, without padding
        self.window = _validate.integer(window=window, minimum=1)
        iterator = iter(source)
        self._position = _Buffer(iterator).position()
        self._requests: queue.SimpleQueue = queue.SimpleQueue()
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_serve,
            args=(iterator, self.window, sharding, self._requests, self._results),
            name="arbiter_jax.host_blocks",
            daemon=True,
        )
        self._thread.start()
        # Also runs when the object is garbage-collected, and at exit while JAX still works.
        self._finalizer = weakref.finalize(self, _stop, self._thread, self._requests)

    def next_block(
        self,
        batch_size: int,
        bucket_size: int,
        num_steps: int | None = None,
        micro_batch_size: int | None = None,
    ) -> Block:
        """The batches of the next window, on the device.

        Args:
          batch_size: B, number of real examples per step, an integer >= 1.
          bucket_size: Number of rows per step, a power of two >= batch_size, if it is not the
            `micro_batch_size`.
          num_steps: Number of steps, an integer in [1, T]. If None, T.
          micro_batch_size: That of `run_window`, or None. Where `bucket_size` equals it, a step of
            more examples is split into n groups of so many rows. The block then holds T groups, of
            T // n steps; only a single step of more groups than that takes more, a power of two.

        Returns:
          A :class:`arbiter_jax.batching.Block` of arrays [T, bucket_size, ...]. Near the end of the
          source it holds as many whole batches as are left, ``block.num_steps``.

        Raises:
          StopIteration: If the source has fewer than B examples left.
          ValueError: If a size is out of range, the blocks are closed, or the chunks of the source
            do not have the same structure, shapes and dtypes.
          Exception: Whatever the source raises.
        """
        bucket_size = _validate.power_of_two(bucket_size=bucket_size)
        most = None if bucket_size == micro_batch_size else bucket_size
        batch_size = _validate.integer(batch_size=batch_size, minimum=1, maximum=most)
        num_steps = self.window if num_steps is None else num_steps
        num_steps = _validate.integer(num_steps=num_steps, minimum=1, maximum=self.window)
        num_steps = min(num_steps, block_shape(self.window, batch_size, bucket_size)[1])
        if not self._finalizer.alive:
            raise ValueError("the blocks are closed; make new ones with host_blocks(...).")
        self._requests.put((batch_size, bucket_size, num_steps))
        result, self._position = self._results.get()
        if isinstance(result, BaseException):
            raise result
        self.num_examples += int(result.num_steps) * batch_size
        return result

    def get_state(self) -> dict[str, Any]:
        """Where the next block begins, made of what the source's own ``get_state()`` returns.

        Raises:
          ValueError: If the source has no ``get_state()`` and ``set_state(state)``.
        """
        if self._position is None:
            raise ValueError(
                "source must be an iterator with get_state() and set_state(state) to go on where a "
                "run was saved, got one without, such as a generator: use datasets.epochs(data), "
                "or a dataset of grain."
            )
        return {**self._position, "num_examples": self.num_examples}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`get_state` was called, perhaps in another process."""
        self.get_state()  # raises
        self._position = {"source": state["source"], "skip": state["skip"]}
        self.num_examples = state["num_examples"]
        self._requests.put(self._position)

    def close(self) -> None:
        """Ends the thread and closes the source if it has a method ``close``; idempotent."""
        self._finalizer()

    def __enter__(self) -> HostBlocks:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def host_blocks(
    source: Iterable[PyTree], *, window: int, sharding: jax.sharding.Sharding | None = None
) -> HostBlocks:
    """Trains on more data than fits on the device: prefetches it from the host, window by window.

    While the device runs one window, a thread reads the next T * B examples, arranges them in a
    block [T, bucket, ...] and moves it to the device. The next batch size is known only when the
    window has ended: the thread guesses that it does not change, and reads as many rows as the
    bucket can hold. If the guess is wrong, the rows are arranged and moved again, which delays the
    window; reading is still overlapped.

    Pass the blocks to :func:`arbiter_jax.fit` instead of the training arrays. The validation data
    stays on the device. In your own loop, request the block of each window:

        size, bucket_size, _ = aj.next_window(state.opt_state)
        data = aj.Data(blocks.next_block(size, bucket_size), validation)
        state, info = aj.run_window(state, data, bucket_size=bucket_size, window=T, ...)

    Args:
      source: Iterable over chunks, pytrees of arrays [n, ...] with any n >= 1, used only by the
        thread. :func:`epochs` makes an endless one from arrays. Where its iterator has
        ``get_state()`` and ``set_state(state)``, as that of :func:`epochs` and grain's have, the
        blocks have them too, and a run is saved with its place in the data.
      window: T, number of steps per block, an integer >= 1; pass the same to training.
      sharding: Where to put the blocks; their second axis is that of the examples. If None, on the
        default device.

    Returns:
      A :class:`HostBlocks`, a context manager with
      ``next_block(batch_size, bucket_size, num_steps=None)``.

    Raises:
      ValueError: If source is data itself or cannot be iterated over, or window is not an
        integer >= 1.

    *Guarantees*:
      * Each example is used exactly once, in the order of the source, however the sizes change;
        nothing depends on timing. Only an incomplete batch at the end is left out.
      * Training on blocks equals training on the same examples in the same order on the device:
        programs per bucket, masks, signals and counts are the same.
      * An exception of the source is raised when the block that it affects is requested.
      * At the end of the ``with`` block the thread has ended, unless the source hangs.

    >>> import arbiter_jax as aj, jax.numpy as jnp, numpy as np, optax
    >>> from arbiter_jax import datasets
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(6))
    >>> loss_fn = lambda w, batch: (w - batch) ** 2 / 2
    >>> chunks = datasets.epochs(np.ones(50, np.float32), chunk_size=32)
    >>> with datasets.host_blocks(chunks, window=10) as blocks:
    ...     result = aj.fit(
    ...         loss_fn, jnp.zeros(()), tx, aj.Data(blocks), num_examples=100, window=10)
    >>> [record.num_examples for record in result.history], blocks.num_examples
    ([60, 96], 96)
    """
    return HostBlocks(source, window, sharding)
