"""Several processes that train one model: what the hosts decide is the same on all of them.

All processes run the same Python code, and a compiled program that only some of them start waits
forever for the others. So before each window the hosts compare what they are about to do. Where all
arrays lie on the devices of one process, nothing here communicates.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from arbiter_jax.base import PyTree

_MASK = 2**32 - 1


def spans_processes(tree: PyTree) -> bool:
    """Whether a sharding, an array or something else that has one uses devices of other processes."""
    if jax.process_count() == 1:
        return False
    shardings = [getattr(leaf, "sharding", leaf) for leaf in jax.tree.leaves(tree)]
    return not all(
        s.is_fully_addressable for s in shardings if isinstance(s, jax.sharding.Sharding)
    )


def gather(*numbers: int) -> list[list[int]]:
    """Integers in [0, 2^64) of every process: a list of one list per number. Main thread only."""
    # Two words each, because JAX has 32 bits by default.
    words = np.array([(n & _MASK, n >> 32) for n in numbers], np.uint32)
    table = np.asarray(multihost_utils.process_allgather(words)).astype(np.uint64)
    table = table[..., 0] + (table[..., 1] << np.uint64(32))  # [processes, numbers]
    return table.T.tolist()


def gather_text(text: str) -> list[str]:
    """A text of every process. Main thread only."""
    letters = np.frombuffer(text.encode(), np.uint8)
    (lengths,) = gather(len(letters))
    padded = np.zeros(max(lengths), np.uint8)
    padded[: len(letters)] = letters
    table = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:n].tobytes().decode() for row, n in zip(table, lengths, strict=True)]


def check_equal(**values: list[int]) -> None:
    """Raises a RuntimeError, on every process, if the processes do not agree on a number.

    >>> check_equal(batch_size=[8, 8])
    >>> check_equal(batch_size=[8, 16], num_steps=[3, 3])
    Traceback (most recent call last):
        ...
    RuntimeError: the processes must train alike, but they differ in batch_size, [8, 16] (process \
0, 1, ...): pass the same arguments, key and validation data to all of them.
    """
    different = [f"{name}, {got}" for name, got in values.items() if len(set(got)) > 1]
    if different:
        raise RuntimeError(
            f"the processes must train alike, but they differ in {' and in '.join(different)} "
            "(process 0, 1, ...): pass the same arguments, key and validation data to all of them."
        )


def agree(step_seconds: float, stop: int, **decision: int) -> tuple[float, int]:
    """What all processes use for the next window.

    Args:
      step_seconds: Time of a step on the clock of this process. Clocks differ: that of process 0 is
        everyone's.
      stop: Why this process wants to end the run, one bit for each reason, an integer in [0, 2^64).
        What one process wants, all get.
      decision: Numbers that every process has computed for itself, integers in [0, 2^64).

    Returns:
      (step_seconds, stop), the same on every process.

    Raises:
      RuntimeError: On every process, if they have not decided alike.
    """
    bits = int(np.float32(step_seconds).view(np.uint32))
    seconds, stops, *numbers = gather(bits, stop, *decision.values())
    check_equal(**dict(zip(decision, numbers, strict=True)))
    reasons = functools.reduce(operator.or_, stops)
    return float(np.uint32(seconds[0]).view(np.float32)), reasons


def read(tree: PyTree) -> Any:
    """The arrays of a tree on the host, as NumPy; those in parts on several processes put together."""

    def whole(leaf: Any) -> Any:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    if jax.process_count() > 1:
        tree = jax.tree.map(whole, tree)
    return jax.device_get(tree)
