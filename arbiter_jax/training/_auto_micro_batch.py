"""The micro-batch that "auto" stands for: the largest whose program fits into the device's memory."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable
from typing import Any

import jax

from arbiter_jax import _validate
from arbiter_jax.base import PyTree
from arbiter_jax.batching import Block, BlockSource
from arbiter_jax.batching._groups import block_shape
from arbiter_jax.batching._rows import num_data_devices
from arbiter_jax.training._out_of_memory import is_out_of_memory

_log = logging.getLogger("arbiter_jax")
_SHARE = 0.8  # of the memory: the rest is for what else a process keeps on the device


class MicroBatch:
    """The micro-batch of one run, host side: a number, none, or the one that "auto" finds."""

    def __init__(self, micro_batch_size: Any, shared: bool = False):
        if isinstance(micro_batch_size, str):
            if micro_batch_size != "auto":
                raise ValueError(
                    "micro_batch_size must be a power of two >= 1, 'auto' or None, got "
                    f"{micro_batch_size!r}."
                )
            if shared:
                raise ValueError(
                    "micro_batch_size must be a power of two or None if several processes train "
                    "together, got 'auto': each of them would find its own."
                )
        self.is_auto = isinstance(micro_batch_size, str)
        self.size: int | None = None  # "auto" has none until a program does not fit
        if micro_batch_size is not None and not self.is_auto:
            self.size = _validate.power_of_two(micro_batch_size=micro_batch_size)
            if self.size < num_data_devices():
                raise ValueError(
                    f"micro_batch_size must be at least {num_data_devices()}, the devices that share "
                    f"the rows of a batch, got {micro_batch_size}."
                )
        self._fitting: set[int] = set()  # buckets whose programs fit, as long as there is no limit
        self._block: Any = None  # shapes of the last block from the host

    def limited(self, bucket_size: int) -> int:
        """The bucket, or the micro-batch if that is smaller; at least a row for every device."""
        bucket_size = bucket_size if self.size is None else min(bucket_size, self.size)
        return max(bucket_size, num_data_devices())

    def saw(self, data: Any) -> None:
        """Remembers the shapes of a window's data, by which the next program is searched."""
        if self.is_auto and isinstance(data.train, Block):
            shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
            self._block = jax.tree.map(shape, data.train)

    def options(self, batch_size: int, bucket_size: int) -> dict[str, Any]:
        """Arguments of `run_window`; none for a smaller bucket, whose program knows no groups."""
        if bucket_size != self.size:
            return {}
        return {"batch_size": batch_size, "micro_batch_size": bucket_size}

    def fitting_bucket(
        self,
        batch_size: int,
        bucket_size: int,
        data: Any,
        window: int,
        run: functools.partial[Any],
    ) -> int:
        """The bucket for a window: the given one, or the micro-batch if its program does not fit.

        Args:
          batch_size: B.
          bucket_size: Rows that the window is to have.
          data: That of the run.
          window: T.
          run: :func:`run_window` of everything but the data and what the bucket says.
        """
        # A bucket below a micro-batch that was found needs less than that.
        if not self.is_auto or self.size is not None or bucket_size in self._fitting:
            return bucket_size
        is_streamed = isinstance(data.train, BlockSource)
        if is_streamed and self._block is None:  # the shapes of an example are not known yet
            return bucket_size

        def shapes(rows: int) -> Any:
            if not is_streamed:
                return data
            old = self._block
            held, of_rows = jax.tree.leaves(old.batches)[0].shape[:2]
            # A short block has as many rows as its limit of bytes allows.
            fitting = window if held >= window else max(1, min(window, held * of_rows // rows))
            num_slots, _ = block_shape(fitting, batch_size, rows)
            like = lambda x: jax.ShapeDtypeStruct((num_slots, rows, *x.shape[2:]), x.dtype)
            return data._replace(train=old._replace(batches=jax.tree.map(like, old.batches)))

        def compile_window(rows: int, micro_batch_size: int | None) -> Any:
            groups = MicroBatch(micro_batch_size).options(batch_size, rows)
            lowered = run.func.lower(
                *run.args, shapes(rows), bucket_size=rows, **run.keywords, **groups
            )
            return lowered.compile()

        limit, wanted = _SHARE * _memory(), bucket_size
        while bucket_size > num_data_devices():
            in_groups = bucket_size if bucket_size < wanted else None
            fixed, varying = _needed(functools.partial(compile_window, bucket_size, in_groups))
            if fixed + varying <= limit:
                break
            # What depends on the number of rows grows in proportion to it, if the compiler has said
            # how much it is; else half the rows are tried.
            share = (limit - fixed) / varying if fixed < limit and varying < math.inf else 0.5
            largest = 1 << max(int(bucket_size * share), 1).bit_length() - 1
            bucket_size = max(min(bucket_size // 2, largest), num_data_devices())
        self._fitting.add(bucket_size)
        if bucket_size < wanted:
            self.size = bucket_size
            _log.info(
                "micro_batch_size='auto': %d rows, because the program of %d does not fit into %.2g "
                "of the memory of the device, %.3g GiB.",
                bucket_size,
                wanted,
                _SHARE,
                _memory() / 2**30,
            )
        return bucket_size

    def halve(self, bucket_size: int, state: PyTree, data: Any) -> bool:
        """After the device ran out of memory: whether to try the window again in smaller groups.

        Args:
          bucket_size: Rows of the window that failed.
          state: What the window was given; it may be donated.
          data: The data of the run; a block from the host is used up.
        """
        lost = any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        if (
            not self.is_auto
            or lost
            or bucket_size <= num_data_devices()
            or isinstance(data.train, BlockSource)
        ):
            return False
        self.size = bucket_size // 2
        _log.warning(
            "micro_batch_size='auto': %d rows, because the device ran out of memory with %d.",
            self.size,
            bucket_size,
        )
        return True


def _memory() -> float:
    """Bytes that the device has; those of the machine where it does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or float(
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )


def _needed(compile_window: Callable[[], Any]) -> tuple[float, float]:
    """Bytes that a program needs: its arguments and results, and what else it computes with."""
    try:
        found = compile_window().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return 0.0, math.inf
    if found is None:  # a backend that does not say
        return 0.0, 0.0
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return float(held), float(found.temp_size_in_bytes)
