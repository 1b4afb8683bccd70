"""What the thread of :mod:`arbiter_jax.batching._host_blocks` does: blocks, one window ahead."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from arbiter_jax.batching._block_maker import BlockMaker, Request
from arbiter_jax.batching._blocks import Block
from arbiter_jax.batching._loaders import Chunks


def _try(make: Callable[[Request], Any], request: Request) -> Any:
    """What is made, or the exception that the main thread is to raise instead."""
    try:
        return make(request)
    except BaseException as error:
        return error


def _serves(block: Block, guess: Request | None, request: Request) -> bool:
    """Whether a block that was made on a guess holds all that can be had of what is asked for."""
    num_slots = jax.tree.leaves(block.batches)[0].shape[0]
    room = num_slots // -(-request.batch_size // request.bucket_size)  # steps
    same_sizes = guess is not None and guess[:2] == request[:2]
    return same_sizes and min(request.num_steps, room) <= int(block.num_steps)


def serve(
    source: Chunks,
    maker: BlockMaker,
    window: int,
    requests: queue.SimpleQueue,
    results: queue.SimpleQueue,
) -> None:
    """The thread: answers requests and prefetches; a request may also be a position to go to.

    A result is what was asked for with a block and the position after it, or the exception to raise
    instead of the block.
    """
    request, guess, result = requests.get(), None, None
    while request is not None:
        if isinstance(request, dict):
            result = None
            maker.buffer.go_to(request)
            request = requests.get()
            continue
        if request.counts:
            results.put((request, _try(maker.count, request)))
            request = requests.get()
            continue
        if isinstance(result, Block) and _serves(result, guess, request):
            fewer = np.minimum(result.num_steps, np.int32(request.num_steps))
            result = result._replace(num_steps=fewer)
        else:
            result = _try(maker.block, request)
        if isinstance(result, Block):
            maker.drop(result, request)
        position = _try(lambda _: maker.buffer.position(), request)
        if isinstance(position, BaseException):  # of the source's get_state
            result, position = position, None
        results.put((request, (result, position)))
        if isinstance(result, Block):
            # Sizes rarely change between windows, so guess that they stay. If the guess is wrong,
            # every batch size in the same bucket still finds all its rows in the buffer.
            guess = request._replace(num_steps=window)
            result = _try(maker.block, guess)
            with contextlib.suppress(BaseException):  # raised when these rows are requested
                maker.fill(guess)
        request = requests.get()
    source.close()
