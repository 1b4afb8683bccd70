"""Counts compilations, so that the compile budget of a run can be measured."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.monitoring


@dataclass
class Compilations:
    """What was compiled inside one :func:`count_compilations` block."""

    num_programs: int = 0  # programs asked of the compiler
    num_cache_hits: int = 0  # those that the persistent compilation cache had

    @property
    def num_compilations(self) -> int:
        """Programs that were really compiled."""
        return self.num_programs - self.num_cache_hits

    def __add__(self, other: Compilations) -> Compilations:
        return Compilations(
            self.num_programs + other.num_programs, self.num_cache_hits + other.num_cache_hits
        )


_counting = threading.local()  # a program is compiled on the thread that calls it


def _on_duration(event: str, duration_secs: float, **kwargs: Any) -> None:
    del duration_secs, kwargs
    if event == "/jax/core/compile/backend_compile_duration":
        for counter in getattr(_counting, "counters", ()):
            counter.num_programs += 1


def _on_event(event: str, **kwargs: Any) -> None:
    del kwargs
    if event == "/jax/compilation_cache/cache_hits":
        for counter in getattr(_counting, "counters", ()):
            counter.num_cache_hits += 1


jax.monitoring.register_event_duration_secs_listener(_on_duration)
jax.monitoring.register_event_listener(_on_event)


@contextlib.contextmanager
def count_compilations() -> Iterator[Compilations]:
    """Counts the programs that this thread compiles inside the block.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> x, double = jnp.ones(3), jax.jit(lambda x: 2 * x)
    >>> with count_compilations() as compilations:
    ...     _ = double(x), double(x)
    >>> compilations.num_programs
    1
    """
    counter = Compilations()
    counters = getattr(_counting, "counters", ())
    _counting.counters = (*counters, counter)
    try:
        yield counter
    finally:
        _counting.counters = counters
