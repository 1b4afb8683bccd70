"""A batch-size schedule as people write it: sizes, and the numbers of examples at which they begin.

It is planned on the host, in Python integers, so that the number of steps of a run is known before
the run.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import optax

from arbiter_jax import _validate
from arbiter_jax.batching._buckets import batch_of_the_rest
from arbiter_jax.schedulers._rate import scale_by_rate

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_PIECE = re.compile(r"(\d+(?:\.\d+)?)([KMBT]?):(\d+(?:\.\d+)?)([KMBT]?)", re.IGNORECASE)
_UNLIMITED = 2**31 - 1


class BatchSchedule(NamedTuple):
    """A plan on the host: which batch size to use after how many examples.

    Made by :func:`parse_schedule`, :func:`seesaw_schedule` or :func:`published_ramp`, accepted by
    :func:`from_schedule`. The unit of a count is whatever one row of a batch is.
    """

    starts: tuple[int, ...]  # in examples, increasing, the first is 0
    batch_sizes: tuple[int, ...]  # in examples, as many
    window_examples: int = _UNLIMITED  # no window sees more than this, or than one batch
    num_examples: int | None = None  # the budget, where the schedule depends on it

    def batch_size_at(self, num_examples: int) -> int:
        """The batch size after so many examples.

        >>> parse_schedule("0:64 100K:128").batch_size_at(100_000)
        128
        """
        seen = _validate.integer(num_examples=num_examples, minimum=0)
        return self.batch_sizes[bisect.bisect_right(self.starts, seen) - 1]

    def unique_batch_sizes(self) -> tuple[int, ...]:
        """All batch sizes, increasing.

        >>> parse_schedule("0:64 100K:128 1M:64").unique_batch_sizes()
        (64, 128)
        """
        return tuple(sorted(set(self.batch_sizes)))

    def num_steps(self, num_examples: int, window: int = 100) -> int:
        """How many steps a run takes: what `aj.fit` will count, exactly.

        Args:
          num_examples: Budget of the run, in examples, an integer >= 1.
          window: T of the run: a new size is taken at the start of a window.

        >>> parse_schedule("0:64 128:128").num_steps(1024, window=1)
        9
        """
        return sum(steps for _, _, steps in self._pieces(num_examples, window))

    def num_examples_at(self, step: int, window: int = 100) -> int:
        """How many examples a run has seen after so many steps.

        Args:
          step: Number of steps, an integer >= 0; in a schedule for a budget at most its number.
          window: T of the run. Without a budget its windows are taken to be whole, as all but the
            last few of a run are.

        >>> parse_schedule("0:64 128:128").num_examples_at(3, window=1)
        256
        """
        left = _validate.integer(step=step, minimum=0)
        # Without a budget, one that so many steps cannot reach.
        unlimited = self.starts[-1] + (left + window) * max(self.batch_sizes)
        for seen, size, steps in self._pieces(self.num_examples or unlimited, window):
            if left <= steps:
                return seen + left * size
            left -= steps
        raise ValueError(
            f"step must be <= {step - left}, the steps of the budget of {self.num_examples} "
            f"examples that the schedule was made for, got {step}."
        )

    def rate_scale(self, scaling: str) -> optax.GradientTransformationExtraArgs:
        """The transformation of the rate that goes with the sizes; a rule never touches updates.

        Args:
          scaling: "linear", a rate proportional to the batch size (SGD), or "sqrt", to its square
            root (Adam). The first size keeps its rate.

        Returns:
          A transformation to chain after the optimizer, which reads `batch_size`.

        >>> scale = parse_schedule("0:64 100K:256").rate_scale("sqrt")
        >>> updates, _ = scale.update({"w": 1.0}, scale.init({"w": 0.0}), batch_size=256)
        >>> float(updates["w"])
        2.0
        """
        _validate.one_of(("linear", "sqrt"), scaling=scaling)
        return scale_by_rate(None, self.batch_sizes[0], 1.0 if scaling == "linear" else 0.5)

    def _pieces(self, num_examples: int, window: int) -> Iterator[tuple[int, int, int]]:
        """(examples before, batch size, steps) of each stretch of windows of one size."""
        end = _validate.integer(num_examples=num_examples, minimum=1)
        window = _validate.integer(window=window, minimum=1)
        seen = num_steps = 0
        while True:
            piece = bisect.bisect_right(self.starts, seen) - 1
            size = self.batch_sizes[piece]
            steps = (end - seen) // size
            if steps < 1:
                size = batch_of_the_rest(size, min(self.batch_sizes), seen, num_steps, end)
                steps = min(size, 1)
            if steps < 1:
                return
            if piece + 1 < len(self.starts):
                length = min(window, self.window_steps(size))
                due = -((seen - self.starts[piece + 1]) // size)  # steps until then, rounded up
                steps = min(steps, -(-due // length) * length)
            yield seen, size, steps
            seen, num_steps = seen + steps * size, num_steps + steps

    def window_steps(self, batch_size: int) -> int:
        """The most steps that a window of this batch size has."""
        return max(1, self.window_examples // batch_size)


Pairs = str | Sequence[tuple[int, int]] | BatchSchedule
"""A schedule of batch sizes in any of its forms."""


def parse_schedule(schedule: Pairs) -> BatchSchedule:
    """Reads a schedule of batch sizes in either of the two forms that are used in the field.

    Args:
      schedule: ``"0:64 100K:128 1.5M:512"``, pairs of a number of examples and a batch size with
        the suffixes K, M, B and T for thousands to trillions; or a list of such pairs of integers.
        A :class:`BatchSchedule` is returned as it is.

    Returns:
      A :class:`BatchSchedule`.

    Raises:
      ValueError: If a pair cannot be read, the first count is not 0, the counts do not increase or
        a size is not an integer >= 1.

    >>> parse_schedule("0:64 100K:128 1.5M:512").starts
    (0, 100000, 1500000)
    >>> parse_schedule([(0, 64), (100_000, 128)]).batch_sizes
    (64, 128)
    """
    if isinstance(schedule, str):
        pairs: Any = [_pair(word) for word in schedule.split()]
    else:
        pairs = schedule
    try:
        if isinstance(schedule, BatchSchedule):  # which may have been made by hand
            pairs = [*zip(schedule.starts, schedule.batch_sizes, strict=True)]
        starts, sizes = zip(*((start, size) for start, size in pairs), strict=True)
    except (TypeError, ValueError):
        raise ValueError(
            "schedule must be pairs of a number of examples and a batch size, at least one, as "
            f"'0:64 100K:128' or [(0, 64), (100_000, 128)], got {schedule!r}."
        ) from None
    most = _validate.LARGEST_COUNT
    starts = tuple(_validate.integer(schedule=s, minimum=0, maximum=most) for s in starts)
    sizes = tuple(_validate.integer(batch_size=s, minimum=1, maximum=_UNLIMITED) for s in sizes)
    if starts[0] != 0 or list(starts) != sorted(set(starts)):
        raise ValueError(
            f"schedule must begin at 0 examples and its counts must increase, got {starts!r}."
        )
    return schedule if isinstance(schedule, BatchSchedule) else BatchSchedule(starts, sizes)


def _pair(word: str) -> tuple[int, int]:
    match = _PIECE.fullmatch(word)
    if match is None:
        raise ValueError(
            "schedule must be pairs such as '100K:128', a number of examples (suffixes K, M, B, T) "
            f"and a batch size, separated by spaces, got {word!r}."
        )
    count, suffix, size, size_suffix = match.groups()
    numbers = []
    for number, factor in ((count, suffix), (size, size_suffix)):
        exact = _scaled(number, _FACTORS[factor.upper()])
        if exact is None:
            raise ValueError(f"schedule must count whole examples, got {word!r}.")
        numbers.append(exact)
    return numbers[0], numbers[1]


def _scaled(number: str, factor: int) -> int | None:
    """A decimal number times a factor in exact arithmetic; None if that is not an integer."""
    whole, _, decimals = number.partition(".")
    digits = int(whole + decimals) * factor
    return None if digits % 10 ** len(decimals) else digits // 10 ** len(decimals)


def published_ramp(name: str, tokens_per_example: int = 1) -> BatchSchedule:
    """The published batch sizes with which a large language model was trained.

    =================  ===========================================================================
    ``"gpt3"``         32K to 3.2M tokens, linearly over the first 12B tokens (the paper says 4 to
                       12B by model size; arXiv:2005.14165)
    ``"olmo_65b"``     2M tokens, doubled every 100B tokens up to 16M (arXiv:2402.00838)
    ``"llama3.1"``     4M tokens, 8M from 252M tokens on, 16M from 2.87T tokens on
                       (arXiv:2407.21783)
    ``"deepseek_v3"``  3,072 to 15,360 sequences of 4,096 tokens, linearly over the first 469B
                       tokens (arXiv:2412.19437; its text says "gradually")
    =================  ===========================================================================

    Args:
      name: One of these.
      tokens_per_example: What one row of a batch holds, an integer >= 1. 1 counts in tokens.

    Returns:
      A :class:`BatchSchedule` in rows.

    Raises:
      ValueError: If the name is not known, or `tokens_per_example` is out of its range.

    >>> published_ramp("llama3.1", tokens_per_example=8_192).unique_batch_sizes()
    (488, 977, 1953)
    """
    tokens = _RAMPS[_validate.one_of(tuple(_RAMPS), name=name)]
    per_row = _validate.integer(tokens_per_example=tokens_per_example, minimum=1)
    rows = [(round(start / per_row), max(1, round(size / per_row))) for start, size in tokens]
    changes = [rows[0]]
    for start, size in rows[1:]:
        if size != changes[-1][1] and start > changes[-1][0]:
            changes.append((start, size))
    return parse_schedule(changes)


def _linear_ramp(first: int, last: int, over: int, pieces: int = 64) -> list[tuple[int, int]]:
    """Pieces of equal length, each of the size that the line has in its middle; then the last."""
    middles = [first + (last - first) * (2 * i + 1) // (2 * pieces) for i in range(pieces)]
    starts = [over * i // pieces for i in range(pieces)]
    return [*zip(starts, middles, strict=True), (over, last)]


_RAMPS = {
    "gpt3": _linear_ramp(32_000, 3_200_000, 12 * 10**9),
    "olmo_65b": [(i * 10**11, 2**i * 2 * 10**6) for i in range(4)],
    "llama3.1": [(0, 4 * 10**6), (252 * 10**6, 8 * 10**6), (2_870 * 10**9, 16 * 10**6)],
    "deepseek_v3": _linear_ramp(3_072 * 4_096, 15_360 * 4_096, 469 * 10**9),
}
