"""Blocks of batches from the examples that a source yields in chunks of any size."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from arbiter_jax._processes import spans_processes
from arbiter_jax.base import PyTree
from arbiter_jax.batching import Block, block_rows, num_real_rows, num_rows
from arbiter_jax.datasets._placement import place, process_rows, steps_that_fit


class Buffer:
    """Queue of the examples that were read from the source and not yet used."""

    def __init__(self, source: Iterator[PyTree]):
        self._source = source
        self._chunks: deque[PyTree] = deque()
        self._num_rows = 0
        self._kind: Any = None
        self._first: PyTree = None  # one example, [1, ...]
        self._error: BaseException | None = None

    def _read(self) -> None:
        chunk = jax.tree.map(np.asarray, next(self._source))
        count, kind = num_rows(chunk, name="each chunk of the source"), _kind(chunk)
        if self._kind not in (None, kind):
            raise ValueError(
                "source must yield chunks of the same structure, shape and dtype, got "
                f"{self._kind[1]} and {kind[1]}."
            )
        if self._kind is None:
            for leaf in jax.tree.leaves(chunk):
                if leaf.dtype.kind in "OSUMm":
                    raise ValueError(
                        f"source must yield chunks of numbers, got dtype {leaf.dtype}."
                    )
            self._first = jax.tree.map(lambda x: x[:1].copy(), chunk)
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

    def example(self) -> PyTree | None:
        """Shapes and dtypes of one example on the device, or None if the source has none."""
        if self._first is None and not self.fill(1):
            return None
        dtype = jax.dtypes.canonicalize_dtype
        form = lambda x: jax.ShapeDtypeStruct(x.shape[1:], dtype(x.dtype))
        return jax.tree.map(form, self._first)

    def take(self, rows: np.ndarray) -> PyTree:
        """The examples of these numbers, int[...], counted from the first; they stay here."""
        missing, parts, chunks = int(rows.max()) + 1, [], iter(self._chunks)
        if missing > self._num_rows:  # for padding, a process without examples needs any of them
            missing, chunks = 1, iter([self._first])
        while missing:
            parts.append(jax.tree.map(lambda x, n=missing: x[:n], next(chunks)))
            missing -= len(jax.tree.leaves(parts[-1])[0])
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


class Request(NamedTuple):
    """What the thread is asked for."""

    batch_size: int
    bucket_size: int
    num_steps: int
    counts: bool = False  # only how many of these steps there are examples for


class BlockMaker:
    """Makes blocks of the rows that this process supplies."""

    def __init__(self, source: Iterator[PyTree], window: int, sharding: Any, max_bytes: int):
        self.buffer = Buffer(source)
        self._window, self._sharding, self._max_bytes = window, sharding, max_bytes
        self._spans_processes = spans_processes(sharding)

    def _form(self, bucket_size: int) -> tuple[int, np.ndarray | None]:
        """The steps that a block of this bucket has, and the rows that this process supplies."""
        example = self.buffer.example()
        if example is None:
            return 0, None
        steps = steps_that_fit(example, self._window, bucket_size, self._sharding, self._max_bytes)
        if not self._spans_processes:
            return steps, None
        shape = (steps, bucket_size, *jax.tree.leaves(example)[0].shape)
        return steps, process_rows(shape, self._sharding)

    def count(self, request: Request) -> int:
        """How many of the steps that are asked for this process has the examples for."""
        batch_size, bucket_size, num_steps, _ = request
        steps, rows = self._form(bucket_size)
        share, steps = num_real_rows(batch_size, bucket_size, rows), min(num_steps, steps)
        return min(steps, self.buffer.fill(steps * share) // share) if share else steps

    def block(self, request: Request) -> Block:
        batch_size, bucket_size, *_ = request
        num_steps = self.count(request)
        if num_steps < 1:
            raise StopIteration
        steps, rows = self._form(bucket_size)
        batches = self.buffer.take(block_rows(steps, batch_size, bucket_size, num_steps, rows))
        if self._spans_processes:
            batches = place(batches, bucket_size, self._sharding)
        else:
            batches = jax.device_put(batches, self._sharding)
        return Block(batches, np.int32(batch_size), np.int32(num_steps))

    def drop(self, block: Block, bucket_size: int) -> None:
        """Removes the examples of a block from the buffer; they are used."""
        share = num_real_rows(int(block.batch_size), bucket_size, self._form(bucket_size)[1])
        self.buffer.drop(int(block.num_steps) * share)

    def fill(self, bucket_size: int) -> None:
        """Reads as many examples as the next block can hold."""
        steps, rows = self._form(bucket_size)
        self.buffer.fill(steps * (bucket_size if rows is None else len(rows)))
