"""Compiles the window programs of the neighboring buckets while the device trains.

A change of bucket then finds its program in the cache of :func:`run_window` and does not wait. Only
for runs on an accelerator: there the compiler runs on a host that has little else to do, while on a
CPU it would take its cores from the training.
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any

import jax

from arbiter_jax.base import requests, the_rule
from arbiter_jax.batching import Block, next_bucket
from arbiter_jax.training._compilations import Compilations, count_compilations
from arbiter_jax.training._compile_log import logger
from arbiter_jax.training._state import Data, TrainState


class CompileAhead:
    """The programs of one run that are compiled before a window asks for them."""

    def __init__(self, state: TrainState):
        self._compilations: list[Compilations] = []  # a thread appends, which is atomic
        self._buckets = _buckets_of(state) if _is_worth_it() else []
        self._futures: dict[int, concurrent.futures.Future[None] | None] = {}  # None: has run
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None

    def wait(self, bucket_size: int) -> None:
        """Waits for the program of the next window if it is being compiled."""
        future = self._futures.get(bucket_size)
        if future is not None:
            concurrent.futures.wait([future])
        self._futures[bucket_size] = None

    def start(
        self,
        arguments: functools.partial[Any],
        data: Data,
        bucket_size: int,
        options_of: Callable[[int, int], dict[str, Any]],
    ) -> bool:
        """Begins with the neighbors of a bucket whose window is running.

        They are traced and lowered here, in the context of the caller (its mesh, its number types)
        and while the device is busy; the compiler, which takes longest, runs on threads.

        Args:
          arguments: :func:`run_window` of everything but the data and what the bucket says.
          data: What the running window trains on.
          bucket_size: Of the running window.
          options_of: ``options_of(batch_size, bucket_size)``, the options of a bucket's program.

        Returns:
          Whether there was anything to do: then the time of this window is not that of its steps.
        """
        largest = bucket_size if options_of(bucket_size, bucket_size) else bucket_size * 2
        found = [
            size
            for size in (2 * bucket_size, bucket_size // 2)
            if size in self._buckets and size <= largest and size not in self._futures
        ]
        for size in found:
            logger.debug("bucket %d is made ahead of time, a neighbor of %d", size, bucket_size)
            options = arguments.keywords | options_of(size, size) | {"bucket_size": size}
            try:
                traced = arguments.func.trace(*arguments.args, _with_bucket(data, size), **options)
                lowered = traced.lower()
            except Exception as error:  # of the user's functions, for a window that may never be
                logger.debug("bucket %d cannot be made ahead of time: %s", size, error)
                self._futures[size] = None
                continue
            if self._threads is None:  # one for each neighbor
                self._threads = concurrent.futures.ThreadPoolExecutor(2, "arbiter_jax compiles")
            self._futures[size] = self._threads.submit(self._compile, lowered)
        return bool(found)

    def _compile(self, lowered: Any) -> None:
        with count_compilations() as compilations:
            lowered.compile()  # an error stays in the future: the window itself will raise it
        self._compilations.append(compilations)

    def compilations(self) -> Compilations:
        """What was compiled so far."""
        return sum(self._compilations, Compilations())

    def close(self) -> None:
        """Drops what has not begun; what has ends by itself."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


def _is_worth_it() -> bool:
    """Whether the compiler does not take its time from the training.

    Several processes would have to compile the same programs at the same time, for the compilers of
    GPUs share what they have tuned.
    """
    return jax.default_backend() != "cpu" and jax.process_count() == 1


def _buckets_of(state: TrainState) -> list[int]:
    """The buckets between the limits that the rule in a state says it has; none if it says none."""
    rule = the_rule(requests(state.opt_state))
    if not (hasattr(rule, "min_batch_size") and hasattr(rule, "max_batch_size")):
        return []
    low, high = jax.device_get((rule.min_batch_size, rule.max_batch_size))
    sizes = (2**i for i in range(31))
    return [size for size in sizes if next_bucket(int(low.min())) <= size < 2 * int(high.max())]


def _with_bucket(data: Data, bucket_size: int) -> Data:
    """The types of the data of a window of another bucket: only a block depends on it."""
    if not isinstance(data.train, Block):
        return data

    def resize(x: Any) -> jax.ShapeDtypeStruct:
        shape = (x.shape[0], bucket_size, *x.shape[2:])
        placed = x.sharding if getattr(x, "committed", False) else None
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=placed)

    batches = jax.tree.map(resize, data.train.batches)
    return data._replace(train=data.train._replace(batches=batches))
