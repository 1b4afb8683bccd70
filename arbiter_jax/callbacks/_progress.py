"""One line that shows how far a run is: by rich in a terminal, by tqdm in a notebook."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import time
import warnings
from typing import Any, Protocol

import jax

from arbiter_jax.training import RunStart, TrainState, WindowRecord

_EVERY = 0.1  # seconds between two updates of the line
_MEMORY = 20.0  # seconds of windows that the speed is the mean of, at most


def progress(description: str = "training") -> Progress:
    """Shows how far a run is in one line, which is gone when it ends.

    The line has the examples seen and the budget, the batch size, the loss, the latest evaluation, the
    examples per second and the time left. It is written to stderr, below what the program prints,
    and updated after a window, at most ten times a second. Speed and time left include
    everything between two windows, except for windows that were compiled.

    It is shown in a notebook by tqdm and in a terminal by rich. It is silent if stderr is not a
    terminal, if ``TERM=dumb``, in continuous integration (``CI`` is set), under pytest, and on every
    process but the first. ``fit`` shows it unless you pass ``progress=False``; pass this callback to
    name the run. A run inside another has a line of its own; for several seeds, the line has the sum
    of their examples, the mean loss and the range of batch sizes.

    Args:
      description: Text at the beginning of the line.

    Returns:
      A callback for :func:`arbiter_jax.fit`; put it after ``evaluate``.

    Raises:
      ImportError: If rich, or tqdm in a notebook, is not installed.
      ValueError: If `description` is not text.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(6))
    >>> result = aj.fit(lambda w, batch: (w - batch) ** 2, jnp.zeros(()), tx, aj.Data(jnp.ones(50)),
    ...     num_examples=100, callbacks=aj.callbacks.progress("constant 6"))
    """
    if not isinstance(description, str):
        raise ValueError(f"description must be text, got {description!r}.")
    package = "tqdm" if _is_notebook() else "rich"
    if not _is_installed(package):
        raise ImportError(
            f'callbacks.progress needs {package}: pip install "arbiter-jax[progress]".'
        )
    return Progress(description)


def default_progress(callbacks: tuple[Any, ...], required: bool) -> tuple[Progress, ...]:
    """The display of a run whose callbacks include none: empty unless it can be shown."""
    if any(isinstance(callback, Progress) for callback in callbacks):
        return ()
    if required:
        return (progress(),)
    if not _is_watched() or not _is_installed("tqdm" if _is_notebook() else "rich"):
        return ()
    return (Progress("training"),)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # hidden in sys.modules
        return False


def _is_notebook() -> bool:
    """Whether this is the kernel of a notebook."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)  # there in every kernel
    shell = get_ipython() if get_ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def _is_watched() -> bool:
    """Whether this is a notebook, or a terminal outside tests and CI."""
    if os.environ.get("CI") or "PYTEST_CURRENT_TEST" in os.environ:
        return False
    if _is_notebook():
        return True
    try:
        return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "")
    except (AttributeError, ValueError):  # none, or closed
        return False


class _Line(Protocol):
    """Where the state of a run is displayed."""

    def update(self, num_examples: int, parts: list[str]) -> None: ...

    def close(self) -> None: ...


class Progress:
    """The callback of :func:`progress`."""

    def __init__(self, description: str):
        self._description = description
        self._line: _Line | None = None

    def begin(self, start: RunStart) -> None:
        """Shows the line."""
        self.close()
        self._end, self._seen = start.end, start.num_examples
        self._records: list[WindowRecord | None] = [None] * (start.num_seeds or 1)
        self._evaluation: dict[str, float] = {}
        self._shown, self._last = -math.inf, time.perf_counter()
        self._examples, self._seconds = 0.0, 0.0
        if not _is_watched() or jax.process_index() > 0 or self._seen >= self._end:
            return
        open_line = _Tqdm if _is_notebook() else _rich_line
        self._line = open_line(self._description, self._seen, self._end)

    def __call__(self, record: Any, state: TrainState) -> None:
        """Shows where the run is after a window."""
        del state
        if self._line is None:
            return
        records = record if isinstance(record, list) else [record]
        now, new = time.perf_counter(), [r for r in records if r is not None]
        examples = sum(r.num_steps * r.batch_size for r in new)
        self._seen += examples
        self._records = [r or old for r, old in zip(records, self._records, strict=True)]
        for r in new:
            self._evaluation |= r.evaluation
        if not any(r.num_compilations for r in new):
            self._examples += examples
            self._seconds += now - self._last
            if self._seconds > _MEMORY:
                self._examples, self._seconds = self._examples / 2, self._seconds / 2
        self._last = now
        if now - self._shown >= _EVERY or self._seen >= self._end:
            self._shown = now
            self._line.update(self._seen, self._parts())

    def close(self) -> None:
        """Takes the line away."""
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def _parts(self) -> list[str]:
        """What the line says besides the examples, the most important first."""
        records = [r for r in self._records if r is not None]
        sizes = sorted({r.batch_size for r in records})
        loss = sum(r.loss for r in records) / len(records)
        batch = f"batch {sizes[0]}" + (f"-{sizes[-1]}" if len(sizes) > 1 else "")
        left = speed = []
        if self._seconds > 0 and self._examples > 0 and not isinstance(self._line, _Tqdm):
            per_second = self._examples / self._seconds
            left = [f"{_duration(max(0, self._end - self._seen) / per_second)} left"]
            speed = [f"{_short(per_second)}/s"]
        evaluation = [f"{name} {value:.4g}" for name, value in self._evaluation.items()]
        return [batch, f"loss {loss:.4g}", *left, *evaluation, *speed]


def _short(number: float) -> str:
    """A number of examples in at most six letters: 950, 12.3k, 4.56M.

    >>> [_short(n) for n in (7, 950, 12_345, 4_560_000, 999_960)]
    ['7', '950', '12.3k', '4.56M', '1M']
    """
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    """Time as a clock shows it.

    >>> [_duration(s) for s in (5, 65, 3725, 200_000)]
    ['0:05', '1:05', '1:02:05', '2 days 7:33:20']
    """
    minutes, seconds = divmod(round(min(seconds, 1e9)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02}:{seconds:02}" if hours or days else f"{minutes}:{seconds:02}"
    return f"{days} day{'s' * (days > 1)} {clock}" if days else clock


class _Tqdm:
    """A line of tqdm, which measures the speed itself."""

    def __init__(self, description: str, seen: int, end: int):
        with warnings.catch_warnings():  # without ipywidgets it is a line of text
            warnings.simplefilter("ignore")
            from tqdm import auto

        self._bar = auto.tqdm(
            desc=description,
            initial=seen,
            total=end,
            unit=" examples",
            unit_scale=True,
            leave=False,
        )
        self._bar.set_postfix_str("compiling")

    def update(self, num_examples: int, parts: list[str]) -> None:
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update(num_examples - self._bar.n)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


class _Rich:
    """The display in the terminal: a line for each run of this process that goes on now."""

    open: _Rich | None = None

    def __init__(self) -> None:
        from rich import console, progress, table

        terminal = console.Console(stderr=True)
        self.is_wide = terminal.width >= 100
        self.bar_width = 20 if terminal.width >= 130 else 10
        column = lambda field, **options: progress.TextColumn(
            "{task." + field + "}",
            markup=False,
            table_column=table.Column(no_wrap=True, **options),
        )
        self.progress = progress.Progress(
            column("description"),
            progress.BarColumn(bar_width=self.bar_width),
            column("fields[seen]"),
            column("fields[text]", overflow="ellipsis"),
            console=terminal,
            # Nothing is drawn while a window runs: the terminal is free for a debugger.
            auto_refresh=False,
            transient=True,
            # What goes to a file stays there.
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )

    def start(self) -> bool:
        """Whether it can be shown; not if the program has a display of its own."""
        from rich import errors

        try:
            self.progress.start()
        except errors.LiveError:
            return False
        # A process that is killed leaves the terminal as it was.
        self.progress.console.show_cursor(True)
        return True


class _RichLine:
    """The line of one run."""

    def __init__(self, shared: _Rich, description: str, seen: int, end: int):
        self._shared, self._end = shared, end
        most = shared.progress.console.width // 3
        self._name = description if len(description) <= most else description[: most - 1] + "…"
        self._task = shared.progress.add_task(
            self._name, completed=seen, total=end, text="compiling", seen=self._of_budget(seen)
        )

    def _of_budget(self, num_examples: int) -> str:
        unit = " examples" if self._shared.is_wide else ""
        return f"{_short(num_examples)}/{_short(self._end)}{unit}"

    def update(self, num_examples: int, parts: list[str]) -> None:
        progress, seen = self._shared.progress, self._of_budget(num_examples)
        room = progress.console.width - self._shared.bar_width - len(seen) - len(self._name) - 3
        text = parts[0]
        for part in parts[1:]:  # whole parts, as many as fit
            if len(text) + 2 + len(part) <= room:
                text += ", " + part
        progress.update(self._task, completed=num_examples, text=text, seen=seen)
        progress.refresh()

    def close(self) -> None:
        progress = self._shared.progress
        progress.remove_task(self._task)
        if progress.task_ids:
            progress.refresh()
            return
        if _Rich.open is self._shared:
            _Rich.open = None
        progress.stop()


def _rich_line(description: str, seen: int, end: int) -> _RichLine | None:
    """A line in the terminal; None if another part of the program has taken it."""
    is_first = _Rich.open is None
    shared = _Rich.open or _Rich()
    line = _RichLine(shared, description, seen, end)
    if is_first and not shared.start():
        return None
    _Rich.open = shared
    return line
