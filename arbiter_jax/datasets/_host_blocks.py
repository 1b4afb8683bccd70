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
from arbiter_jax.batching import Block, block_rows, interleaved, is_split, num_rows

_JOIN_SECONDS = 5.0


def epochs(
    data: PyTree, *, chunk_size: int = 1024, seed: int = 0, start: int = 0
) -> Iterator[PyTree]:
    """Iterates endlessly over arrays in chunks, reshuffled in every epoch.

    Args:
      data: Pytree of arrays [n, ...]. They may be memory-mapped, ``np.load(path, mmap_mode="r")``,
        and larger than memory.
      chunk_size: Number of examples per chunk, an integer >= 1. A chunk may cross the end of an
        epoch.
      seed: An integer in [0, 2**32). Seed and epoch number determine the permutation of an epoch.
      start: Number of examples to skip, an integer >= 0, to resume an interrupted run.

    Returns:
      An iterator over pytrees of arrays [chunk_size, ...].

    Raises:
      ValueError: If the arrays are empty or differ in length, or an argument is out of range.

    >>> import numpy as np
    >>> from arbiter_jax import datasets
    >>> chunks = datasets.epochs(np.arange(4), chunk_size=3)
    >>> sorted(np.concatenate([next(chunks) for _ in range(4)]).tolist())
    [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    """
    count = num_rows(data)
    chunk_size = _validate.integer(chunk_size=chunk_size, minimum=1)
    seed = _validate.integer(seed=seed, minimum=0, maximum=2**32 - 1)
    start = _validate.integer(start=start, minimum=0)

    def order(epoch: int) -> np.ndarray:
        return np.random.RandomState([seed, epoch]).permutation(count)

    def chunks() -> Iterator[PyTree]:
        epoch, offset = divmod(start, count)
        rest = order(epoch)[offset:]
        while True:
            while len(rest) < chunk_size:
                epoch += 1
                rest = np.concatenate([rest, order(epoch)])
            rows, rest = rest[:chunk_size], rest[chunk_size:]
            yield jax.tree.map(lambda x, rows=rows: np.asarray(x[rows]), data)

    return chunks()


class _Buffer:
    """Queue of the examples that were read from the source and not yet used."""

    def __init__(self, source: Iterator[PyTree]):
        self._source = source
        self._chunks: deque[PyTree] = deque()
        self._num_rows = 0
        self._kind: Any = None
        self._error: BaseException | None = None

    def _read(self) -> None:
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
        """The first `num_steps * batch_size` rows as [T, bucket, ...]; they stay in the buffer."""
        missing, parts, chunks = num_steps * batch_size, [], iter(self._chunks)
        while missing:
            parts.append(jax.tree.map(lambda x, n=missing: x[:n], next(chunks)))
            missing -= len(jax.tree.leaves(parts[-1])[0])
        rows = block_rows(window, batch_size, bucket_size, num_steps, position)
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[rows], *parts)

    def drop(self, count: int) -> None:
        """Removes the first `count` rows."""
        self._num_rows -= count
        while count:
            length = len(jax.tree.leaves(self._chunks[0])[0])
            if length > count:
                self._chunks[0] = jax.tree.map(lambda x, n=count: x[n:], self._chunks[0])
                return
            self._chunks.popleft()
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
        *sizes, num_steps = request
        if isinstance(result, Block) and sizes == guess and num_steps <= result.num_steps:
            result = result._replace(num_steps=np.int32(num_steps))
        else:
            result = make(request)
        results.put(result)
        if isinstance(result, Block):
            batch_size, bucket_size = guess = sizes
            buffer.drop(int(result.num_steps) * batch_size)
            # Sizes rarely change between windows, so guess that they stay. If the guess is wrong,
            # every batch size in the same bucket still finds all its rows in the buffer.
            result = make((batch_size, bucket_size, window))
            with contextlib.suppress(BaseException):  # raised when these rows are requested
                buffer.fill(window * bucket_size)
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
        self._requests: queue.SimpleQueue = queue.SimpleQueue()
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_serve,
            args=(iter(source), self.window, sharding, self._requests, self._results),
            name="arbiter_jax.host_blocks",
            daemon=True,
        )
        self._thread.start()
        # Also runs when the object is garbage-collected, and at exit while JAX still works.
        self._finalizer = weakref.finalize(self, _stop, self._thread, self._requests)

    def next_block(self, batch_size: int, bucket_size: int, num_steps: int | None = None) -> Block:
        """The batches of the next window, on the device.

        Args:
          batch_size: B, number of real examples per step, an integer >= 1.
          bucket_size: Number of rows per step, a power of two >= batch_size.
          num_steps: Number of steps, an integer in [1, T]. If None, T.

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
        batch_size = _validate.integer(batch_size=batch_size, minimum=1, maximum=bucket_size)
        num_steps = self.window if num_steps is None else num_steps
        num_steps = _validate.integer(num_steps=num_steps, minimum=1, maximum=self.window)
        if not self._finalizer.alive:
            raise ValueError("the blocks are closed; make new ones with host_blocks(...).")
        self._requests.put((batch_size, bucket_size, num_steps))
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        self.num_examples += int(result.num_steps) * batch_size
        return result

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
        thread. :func:`epochs` makes an endless one from arrays, and with
        ``start=int(state.num_examples)`` one that resumes where a checkpoint was written.
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
