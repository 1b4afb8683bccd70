"""What a row of :mod:`experiments.benchmark` measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from experiments.benchmark import floor
from experiments.benchmark.networks import Timed


class Row(NamedTuple):
    """A ratio of two numbers that are measured one after the other, again and again."""

    name: str
    bar: float | None
    make: Callable[[], tuple[Timed, Timed]]  # what is measured, and its reference
    # The work of a step, where the reference is one: the floor under both.
    work: Callable[[], floor.Work] | None = None
    pairs: int | None = None  # at most so many, and no run before them; None: those of the config
    note: Callable[[], str] | None = None  # what else is known after the last pair
    only_by_name: bool = False  # takes minutes: runs only where `--only` asks for it
