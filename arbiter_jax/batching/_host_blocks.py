"""Data larger than the device's memory: the batches of one window, prepared during the previous one.

An iterator yields examples in chunks of any size. A thread arranges them in blocks
``[T, bucket, ...]`` and moves them to the device, one window ahead of training. The iterator alone
decides the order of the examples; the batch size only decides how many are taken at a time.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import jax

from arbiter_jax import _validate
from arbiter_jax._processes import check_equal, gather, spans_processes
from arbiter_jax.base import PyTree
from arbiter_jax.batching._block_maker import BlockMaker, Request
from arbiter_jax.batching._blocks import Block, num_real_rows
from arbiter_jax.batching._loaders import checked_position, chunks_of
from arbiter_jax.batching._placement import process_rows
from arbiter_jax.batching._prefetch import serve

_JOIN_SECONDS = 5.0
_MAX_BYTES = 2**28


def _stop(thread: threading.Thread, requests: queue.SimpleQueue) -> None:
    requests.put(None)
    thread.join(_JOIN_SECONDS)


class HostBlocks:
    """Blocks of batches from an iterator over examples; see :func:`host_blocks`."""

    def __init__(
        self,
        source: Iterable[PyTree],
        window: int,
        sharding: Any = None,
        max_bytes: int = _MAX_BYTES,
        batched: bool = True,
        repeat: bool = False,
    ):
        if not isinstance(sharding, jax.sharding.Sharding | jax.Device | None):
            raise ValueError(
                "sharding must be a jax.sharding.Sharding, such as NamedSharding(mesh, "
                f'PartitionSpec(None, "data")), or None, got {_validate.shown(sharding)}.'
            )
        self.num_examples = 0  # examples in all blocks so far, without padding
        self.num_local_examples = 0  # of them, those from the source of this process
        self.sharding = sharding
        self.window = _validate.integer(window=window, minimum=1)
        max_bytes = _validate.integer(max_bytes=max_bytes, minimum=1)
        chunks = chunks_of(source, batched=batched, repeat=repeat)
        self._source_name = type(source).__name__
        maker = BlockMaker(chunks, self.window, sharding, max_bytes)
        self._position = maker.buffer.position()
        self._requests: queue.SimpleQueue = queue.SimpleQueue()
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        self._asked: Request | None = None  # what has no answer yet
        self._thread = threading.Thread(
            target=serve,
            args=(chunks, maker, self.window, self._requests, self._results),
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
            more examples is split into n groups of `bucket_size` rows. The block then holds T groups,
            enough for T // n steps. If n > T, it holds one step, in the next power of two of groups.

        Returns:
          A :class:`arbiter_jax.batching.Block` of arrays [T, bucket_size, ...], or of fewer steps or
          groups if those are larger than `max_bytes`, but at least one step. Near the end of the
          source it holds as many whole batches as are left, ``block.num_steps``. Several processes
          call this together, and get as many steps as the one whose source has the fewest left.

        Raises:
          StopIteration: If the source, or that of another process, does not have enough examples
            left for a step.
          ValueError: If a size is out of range, the blocks are closed, or the chunks of the source
            do not have the same structure, shapes and dtypes.
          RuntimeError: If the source of another process has raised an error, or processes ask for
            different sizes.
          Exception: Whatever the source raises.
        """
        bucket_size = _validate.power_of_two(bucket_size=bucket_size)
        most = None if bucket_size == micro_batch_size else bucket_size
        batch_size = _validate.integer(batch_size=batch_size, minimum=1, maximum=most)
        num_steps = self.window if num_steps is None else num_steps
        num_steps = _validate.integer(num_steps=num_steps, minimum=1, maximum=self.window)
        if not self._finalizer.alive:
            raise ValueError("the blocks are closed; make new ones with host_blocks(...).")
        request = Request(batch_size, bucket_size, num_steps)
        if spans_processes(self.sharding):
            request = request._replace(num_steps=self._common_steps(request))
        block, self._position = self._ask(request)
        if isinstance(block, BaseException):
            raise block
        shape = jax.tree.leaves(block.batches)[0].shape
        rows = process_rows(shape, self.sharding) if spans_processes(self.sharding) else None
        self.num_examples += int(block.num_steps) * batch_size
        self.num_local_examples += int(block.num_steps) * num_real_rows(
            batch_size, bucket_size, rows, block.position
        )
        return block

    def _ask(self, request: Request) -> Any:
        # Ctrl-C may have come before an answer, whose examples were then never returned.
        if self._asked is not None and (self._position is not None or self._asked != request):
            self.set_state(self.get_state())
        if self._asked is None:
            self._asked = request
            self._requests.put(request)
        asked, answer = None, None
        while asked is not self._asked:  # an equal one may have been given up
            asked, answer = self._results.get()
        self._asked = None
        return answer

    def _common_steps(self, request: Request) -> int:
        """The steps that every process has examples for; raises on all of them if there are none."""
        answer = self._ask(request._replace(counts=True))
        error = isinstance(answer, BaseException)
        steps = 0 if error else answer
        failed, steps, sizes, buckets = gather(
            error, steps, request.batch_size, request.bucket_size
        )
        if error:
            raise answer
        if any(failed):
            raise RuntimeError(
                f"the source of process {failed.index(1)} has raised an error, which that process "
                "shows: no process gets a block that another one lacks."
            )
        check_equal(batch_size=sizes, bucket_size=buckets)
        if min(steps) < 1:
            raise StopIteration
        return min(steps)

    def get_state(self) -> dict[str, Any]:
        """Where the next block begins, made of what the source's own ``get_state()`` returns.

        Each of several processes has its own.

        Raises:
          ValueError: If the source can be read only once and cannot say where it stands.
        """
        if self._position is None:
            raise ValueError(
                "source must be an iterator with get_state() and set_state(state), or iterable more "
                f"than once, to go on where a run was saved, got a {self._source_name}: use "
                "datasets.epochs(data), a dataset of grain or a DataLoader."
            )
        return {
            **self._position,
            "num_examples": self.num_examples,
            "num_local_examples": self.num_local_examples,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`get_state` was called, perhaps in another process.

        Raises:
          ValueError: As :meth:`get_state`, or if it has not returned this state.
        """
        self.get_state()  # raises
        counts = "skip", "num_examples", "num_local_examples"
        state = checked_position(state, *counts, others=("source",))
        self._position = {"source": state["source"], "skip": state["skip"]}
        self.num_examples = state["num_examples"]
        self.num_local_examples = state["num_local_examples"]
        self._asked = None
        self._requests.put(self._position)

    def close(self) -> None:
        """Ends the thread and closes the source if it has a method ``close``; idempotent."""
        self._finalizer()

    def __enter__(self) -> HostBlocks:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def host_blocks(
    source: Iterable[PyTree],
    *,
    window: int,
    batched: bool = True,
    repeat: bool = False,
    sharding: jax.sharding.Sharding | None = None,
    max_bytes: int = _MAX_BYTES,
) -> HostBlocks:
    """Trains on more data than fits on the device: prefetches it from the host, window by window.

    While the device runs one window, a thread reads the next T * B examples, arranges them in a
    block [T, bucket, ...] and moves it to the device. The next batch size is known only when the
    window has ended: the thread guesses that it does not change, and reads as many rows as the
    bucket can hold. If the guess is wrong, the rows are arranged and moved again, which delays the
    window; reading is still overlapped.

    The source may be anybody's loader; the sizes of its batches do not matter, because they are cut
    again. What it yields may be arrays, tensors of torch or numbers, in any pytree. Lists become
    tuples, because torch collates pairs as lists: a loss gets ``(inputs, labels)``.

    =====================================  ============  ==========================================
    source                                 repeat=True   position, for checkpoints
    =====================================  ============  ==========================================
    ``datasets.epochs(data)``              no need       its ``get_state``
    dataset or DataLoader of grain         yes           its iterator's ``get_state``
    StatefulDataLoader of torchdata        yes           its ``state_dict``
    DataLoader of torch, tfds.as_numpy,    yes           read again from the beginning up to there:
    other iterables, lists                               its order must be repeatable
    generator, iterator                    no: an error  none: an error where a run is saved
    =====================================  ============  ==========================================

    Each epoch iterates over the source once more; to reshuffle is its own matter. A repeatable order
    needs a seed, e.g. ``DataLoader(..., generator=torch.Generator().manual_seed(0))``, and the same
    program that made the loader. A StatefulDataLoader without workers continues with the rest of its
    epoch, and shuffles later ones again. A run whose source yields other examples when it is read
    again is refused. Workers of a DataLoader need ``multiprocessing_context="forkserver"`` or
    "spawn", because JAX has threads.

    Pass the blocks to :func:`arbiter_jax.fit` instead of the training arrays. It also takes a loader
    as it is, ``aj.Data(loader, validation)``: one that can be iterated over again is then repeated.
    The validation data stays on the device; :func:`take` makes it of a loader. In your own loop,
    request the block of each window::

        size, bucket_size, _ = aj.next_window(state.opt_state)
        data = aj.Data(blocks.next_block(size, bucket_size), validation)
        state, info = aj.run_window(state, data, bucket_size=bucket_size, window=T, ...)

    With a `sharding` over the devices of several processes, each process reads a source of its own
    and supplies the rows that its devices hold: its share of the B examples of a step, in the order
    of its source. The shares of processes that split the rows evenly differ by at most two examples,
    or by two in each group where micro-batches split a step. Nothing is sent between the processes
    but the number of steps that each has left.

    Args:
      source: Iterable over chunks, pytrees of arrays [n, ...] with any n >= 1, which it does not
        change afterwards. The thread reads it, in the order that it has. :func:`epochs` makes an
        endless one from arrays.
      window: T, number of steps per block, an integer >= 1; pass the same to training.
      batched: Whether an item of the source is a batch of any size; False for a single example, which
        is 0.1 ms slower. Only an item whose arrays have no common leading axis is refused as a batch.
      repeat: Whether to iterate over the source again when it ends. A batch may cross the end of an
        epoch.
      sharding: Where to put the blocks; their second axis is that of the examples. If None, on the
        default device. Processes that hold the same rows must read the same source.
      max_bytes: Limit for a block, in bytes on one device, an integer >= 1; two blocks exist at a
        time. A larger block has fewer steps than T, at least one, and so has the window: the next
        decision is read the earlier. That number is the same for all blocks of a bucket, so there
        is still one program for each. Where micro-batches split a step, it counts groups.

    Returns:
      A :class:`HostBlocks`, a context manager with
      ``next_block(batch_size, bucket_size, num_steps=None)``.

    Raises:
      ValueError: If source is data itself or cannot be iterated over, or cannot be iterated over
        again with ``repeat=True``, window or max_bytes is not an integer >= 1, or sharding is
        neither a sharding nor None.

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

    A loader of six examples, repeated:

    >>> with datasets.host_blocks([np.arange(4), np.arange(4, 6)], window=2, repeat=True) as blocks:
    ...     blocks.next_block(4, 4).batches.tolist()
    [[0, 2, 1, 3], [4, 0, 5, 1]]
    """
    return HostBlocks(source, window, sharding, max_bytes, batched, repeat)
