"""Blocks of batches from the examples that a source yields in chunks of any size."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import jax
import numpy as np

from arbiter_jax._processes import spans_processes
from arbiter_jax.base import PyTree
from arbiter_jax.batching._blocks import Block, block_rows, num_real_rows
from arbiter_jax.batching._groups import block_shape, group_rows
from arbiter_jax.batching._loaders import Chunks, is_resumable
from arbiter_jax.batching._masking import check_integers
from arbiter_jax.batching._placement import place, process_rows, steps_that_fit
from arbiter_jax.batching._rows import interleaved, is_split


class Buffer:
    """Queue of the examples that were read from the source and not yet used."""

    def __init__(self, source: Chunks):
        self._source: Any = source  # perhaps with get_state and set_state
        self._chunks: deque[PyTree] = deque()
        self._num_rows = 0
        self._first: PyTree = None  # one example, [1, ...]
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
        chunk = next(self._source)
        for path, leaf in jax.tree.leaves_with_path(chunk):
            check_integers(leaf, f"each chunk of the source{jax.tree_util.keystr(path)}")
        if self._first is None:
            self._first = jax.tree.map(lambda x: x[:1].copy(), chunk)
        self._chunks.append(chunk)
        self._states.append(state)
        self._num_rows += len(jax.tree.leaves(chunk)[0])

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
                self._dropped += count
                self._chunks[0] = jax.tree.map(lambda x, n=count: x[n:], self._chunks[0])
                return
            self._chunks.popleft()
            self._states.popleft()
            self._dropped = 0
            count -= length


class Request(NamedTuple):
    """What the thread is asked for."""

    batch_size: int
    bucket_size: int
    num_steps: int
    counts: bool = False  # only how many of these steps there are examples for


class BlockMaker:
    """Makes blocks of the rows that this process supplies."""

    def __init__(self, source: Chunks, window: int, sharding: Any, max_bytes: int):
        self.buffer = Buffer(source)
        self._window, self._sharding, self._max_bytes = window, sharding, max_bytes
        self._spans_processes = spans_processes(sharding)
        self._interleaves = is_split(sharding)  # for the devices of a mesh

    def _form(self, request: Request) -> tuple[int, int, np.ndarray | None]:
        """The slots and steps of the block of these sizes, and the rows that this process supplies.

        A slot holds a step, or one group of it where a step has more rows than the bucket.
        """
        example = self.buffer.example()
        if example is None:
            return 0, 0, None
        batch_size, bucket_size, *_ = request
        fitting = steps_that_fit(
            example, self._window, bucket_size, self._sharding, self._max_bytes
        )
        num_slots, steps = block_shape(fitting, batch_size, bucket_size)
        if not self._spans_processes:
            return num_slots, steps, None
        shape = (num_slots, bucket_size, *jax.tree.leaves(example)[0].shape)
        return num_slots, steps, process_rows(shape, self._sharding)

    def _position(self, bucket_size: int) -> np.ndarray | None:
        return interleaved(bucket_size) if self._interleaves else None

    def _share(self, request: Request, rows: np.ndarray | None) -> int:
        """The examples of a step that this process supplies."""
        batch_size, bucket_size, *_ = request
        return num_real_rows(batch_size, bucket_size, rows, self._position(bucket_size))

    def count(self, request: Request) -> int:
        """How many of the steps that are asked for this process has the examples for."""
        _, steps, rows = self._form(request)
        share, steps = self._share(request, rows), min(request.num_steps, steps)
        return min(steps, self.buffer.fill(steps * share) // share) if share else steps

    def block(self, request: Request) -> Block:
        batch_size, bucket_size, *_ = request
        num_steps = self.count(request)
        if num_steps < 1:
            raise StopIteration
        num_slots, _, rows = self._form(request)
        arrange = block_rows if batch_size <= bucket_size else group_rows
        position = self._position(bucket_size)
        rows = arrange(num_slots, batch_size, bucket_size, num_steps, position, rows)
        batches = self.buffer.take(rows)
        if self._spans_processes:
            batches = place(batches, bucket_size, self._sharding)
        else:
            batches = jax.device_put(batches, self._sharding)
        return Block(batches, np.int32(batch_size), np.int32(num_steps), position)

    def drop(self, block: Block, request: Request) -> None:
        """Removes the examples of a block from the buffer; they are used."""
        share = self._share(request, self._form(request)[2])
        self.buffer.drop(int(block.num_steps) * share)

    def fill(self, request: Request) -> None:
        """Reads as many examples as the next block in this bucket can hold."""
        num_slots, _, rows = self._form(request)
        self.buffer.fill(num_slots * (request.bucket_size if rows is None else len(rows)))
