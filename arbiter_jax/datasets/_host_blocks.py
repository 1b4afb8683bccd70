"""Data larger than the device's memory: blocks of one window, made while the last one runs.

An iterator delivers examples in chunks of any size; a thread cuts them into blocks
``[T, bucket, ...]`` and moves them to the device, one window ahead of training. The order of the
examples is that of the iterator: how many of them make a batch is decided without it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from arbiter_jax import _validate
from arbiter_jax.base import PyTree
from arbiter_jax.batching import Block, block_rows

_JOIN_SECONDS = 5.0


def epochs(
    data: PyTree, *, chunk_size: int = 1024, seed: int = 0, start: int = 0
) -> Iterator[PyTree]:
    """Endless chunks of arrays that need not fit into memory, reshuffled each epoch.

    Args:
      data: Pytree of arrays [n, ...], from ``np.load(path, mmap_mode="r")`` for instance.
      chunk_size: Examples a chunk, an integer >= 1. A chunk may cross the end of an epoch.
      seed: An integer in [0, 2**32); with the number of an epoch it determines its permutation.
      start: Number of examples to skip, an integer >= 0: where an earlier run was interrupted.

    Returns:
      An iterator over pytrees of arrays [chunk_size, ...].

    Raises:
      ValueError: If the arrays are empty or differ in length, or an argument is not in its range.

    >>> import numpy as np
    >>> from arbiter_jax import datasets
    >>> chunks = datasets.epochs(np.arange(4), chunk_size=3)
    >>> sorted(np.concatenate([next(chunks) for _ in range(4)]).tolist())
    [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    """
    count = _num_rows(data)
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


def _num_rows(chunk: PyTree) -> int:
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(chunk)]
    lengths = {shape[0] if shape else 0 for shape in shapes}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "data must be a pytree of arrays with equally many rows, at least one, got shapes "
            f"{shapes}."
        )
    return lengths.pop()


class _Buffer:
    """Examples in the order of the source, taken from the front."""

    def __init__(self, source: Iterator[PyTree]):
        self._source = source
        self._chunks: deque[PyTree] = deque()
        self._num_rows = 0
        self._kind: Any = None
        self._error: BaseException | None = None

    def _read(self) -> None:
        chunk = jax.tree.map(np.asarray, next(self._source))
        count, kind = _num_rows(chunk), _kind(chunk)
        if self._kind not in (None, kind):
            raise ValueError(
                "source must yield chunks of one structure, shape and dtype, got "
                f"{self._kind[1]} and {kind[1]}."
            )
        self._kind = kind
        self._chunks.append(chunk)
        self._num_rows += count

    def fill(self, num_rows: int) -> int:
        """Reads on until there are so many rows, or the source has ended; returns how many.

        Whatever else the source raises is raised whenever more rows are wanted than there are: what
        a generator has raised it does not raise again.
        """
        while self._num_rows < num_rows:
            if self._error is None:
                try:
                    self._read()
                    continue
                except BaseException as error:  # it belongs to who asks for the rows
                    self._error = error
            if isinstance(self._error, StopIteration):
                break
            raise self._error
        return min(self._num_rows, num_rows)

    def block(self, window: int, batch_size: int, bucket_size: int, num_steps: int) -> PyTree:
        """The first `num_steps * batch_size` rows as [T, bucket, ...]; they stay in the buffer."""
        wanted, taken, parts = num_steps * batch_size, 0, []
        for chunk in self._chunks:
            part = jax.tree.map(lambda x, n=wanted - taken: x[:n], chunk)
            parts.append(part)
            taken += len(jax.tree.leaves(part)[0])
            if taken == wanted:
                break
        rows = block_rows(window, batch_size, bucket_size, num_steps)
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[rows], *parts)

    def drop(self, num_rows: int) -> None:
        """Removes rows from the front."""
        self._num_rows -= num_rows
        while num_rows:
            count = len(jax.tree.leaves(self._chunks[0])[0])
            if count > num_rows:
                self._chunks[0] = jax.tree.map(lambda x, n=num_rows: x[n:], self._chunks[0])
                return
            self._chunks.popleft()
            num_rows -= count


def _kind(chunk: PyTree) -> tuple[Any, list[Any]]:
    """What the chunks of a source have in common."""
    leaves, structure = jax.tree.flatten(chunk)
    return structure, [(leaf.shape[1:], str(leaf.dtype)) for leaf in leaves]


def _serve(
    source: Iterator[PyTree],
    window: int,
    sharding: Any,
    requests: queue.SimpleQueue,
    results: queue.SimpleQueue,
) -> None:
    """The thread: answers requests (batch_size, bucket_size, num_steps), and works ahead.

    A result is a block, or the exception to raise in its place.
    """
    buffer = _Buffer(source)

    def make(request: tuple[int, int, int]) -> Block | BaseException:
        batch_size, bucket_size, num_steps = request
        try:
            num_steps = min(num_steps, buffer.fill(num_steps * batch_size) // batch_size)
            if num_steps < 1:
                return StopIteration()
            block = buffer.block(window, batch_size, bucket_size, num_steps)
            return Block(jax.device_put(block, sharding), np.int32(batch_size), np.int32(num_steps))
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
            # Sizes rarely change from one window to the next: the best guess is the last ones. Where
            # it is wrong, nothing is left to be read, whatever the size in this bucket will be.
            result = make((batch_size, bucket_size, window))
            with contextlib.suppress(BaseException):  # raised when its rows are asked for
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
    """Blocks of one window from an iterator over examples; see :func:`host_blocks`."""

    def __init__(self, source: Iterable[PyTree], window: int, sharding: Any = None):
        self.num_examples = 0  # delivered so far, padding aside
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
        # Also when the object is forgotten, and before the interpreter takes JAX down.
        self._finalizer = weakref.finalize(self, _stop, self._thread, self._requests)

    def next_block(self, batch_size: int, bucket_size: int, num_steps: int | None = None) -> Block:
        """The examples of the next window, on the device.

        Args:
          batch_size: Number B of real examples a step, an integer >= 1.
          bucket_size: Number of rows a step, a power of two >= batch_size.
          num_steps: Steps to be taken, an integer in [1, T]; T where it is None.

        Returns:
          A :class:`arbiter_jax.batching.Block` of arrays [T, bucket_size, ...]. At the end of the
          source it holds fewer steps than wanted, in whole batches: ``block.num_steps``.

        Raises:
          StopIteration: If the source has fewer than B examples left.
          ValueError: If the sizes are not in their range, the blocks are closed, or the source
            delivers something other than chunks of arrays of one kind.
          Exception: Whatever the source raises.
        """
        bucket_size = _validate.power_of_two(bucket_size=bucket_size)
        batch_size = _validate.integer(batch_size=batch_size, minimum=1, maximum=bucket_size)
        num_steps = self.window if num_steps is None else num_steps
        num_steps = _validate.integer(num_steps=num_steps, minimum=1, maximum=self.window)
        if not self._finalizer.alive:
            raise ValueError("the blocks are closed: make new ones with host_blocks(...).")
        self._requests.put((batch_size, bucket_size, num_steps))
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        self.num_examples += int(result.num_steps) * batch_size
        return result

    def close(self) -> None:
        """Ends the thread, and closes the source if it is a generator. Safe to call again."""
        self._finalizer()

    def __enter__(self) -> HostBlocks:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def host_blocks(
    source: Iterable[PyTree], *, window: int, sharding: jax.sharding.Sharding | None = None
) -> HostBlocks:
    """Blocks [T, bucket, ...] of examples from the host, prefetched by one window.

    While the device works on one window, a thread reads the next T * B examples, arranges them and
    moves them to the device. The next batch size is known only when the window has ended: the
    thread guesses that it stays as it is, and reads as many rows as its bucket can take. Where the
    guess is wrong the rows are arranged and moved anew, which is not overlapped; reading is.

    :func:`arbiter_jax.fit` takes the blocks in the place of the training arrays. Validation data
    stay on the device. One's own loop asks for each window's block:

        size, bucket_size, _ = aj.next_window(state.opt_state)
        data = aj.Data(blocks.next_block(size, bucket_size), validation)
        state, info = aj.run_window(state, data, bucket_size=bucket_size, window=T, ...)

    Args:
      source: Iterable over chunks: pytrees of arrays with any equal number of rows, at least one.
        It is used by the thread alone. :func:`epochs` makes an endless one of arrays, and with
        ``start=int(state.num_examples)`` one that goes on where a checkpoint was written.
      window: T, the number of steps a block, an integer >= 1, that of training.
      sharding: Where to put the blocks; the default device where it is None. The second axis of a
        block is that of the examples.

    Returns:
      A :class:`HostBlocks`, a context manager with
      ``next_block(batch_size, bucket_size, num_steps=None)``.

    Raises:
      ValueError: If the window is no integer >= 1.

    *Guarantees*:
      * Each example of the source is delivered once, in the order of the source, however the sizes
        change; nothing depends on timing. What is left at its end is less than a batch.
      * Training on blocks equals training on the same examples in the same order from the device:
        same programs a bucket, masks, signals and ledger.
      * An exception of the source is raised where its block is asked for.
      * At the end of the ``with`` the thread has ended, unless the source hangs.

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
