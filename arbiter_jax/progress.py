"""A live progress line in the terminal: batch size, loss and speed of the current run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from arbiter_jax import _validate


@contextlib.contextmanager
def live(enabled: bool = True) -> Iterator[Callable[..., Callable[[Any, Any], None]]]:
    """Shows the progress of runs in one line that is updated after every window.

    Needs ``rich``, which is in the extra "experiments".

    Args:
      enabled: If False, nothing is shown and rich is not needed.

    Yields:
      ``start(description, num_examples) -> callback``. Call it at the start of each run and pass
      the callback to :func:`arbiter_jax.fit`.

    Raises:
      ImportError: If rich is not installed.
      ValueError: From ``start``, if `num_examples` is not an integer >= 1: it is called before
        :func:`arbiter_jax.fit`, which gets what it returns.

    >>> with live(enabled=False) as start:
    ...     callback = start("constant 64", num_examples=1000)
    """
    if not enabled:

        def start_nothing(description: str, num_examples: int) -> Callable[[Any, Any], None]:
            del description
            _validate.integer(num_examples=num_examples, minimum=1)
            return lambda record, state: None

        yield start_nothing
        return
    try:
        from rich import progress
    except ImportError as error:
        raise ImportError(
            'The progress display needs rich: pip install "arbiter-jax[experiments]".'
        ) from error

    columns = (
        progress.TextColumn("{task.description:<28}"),
        progress.BarColumn(bar_width=24),
        progress.TaskProgressColumn(),
        progress.TextColumn("batch {task.fields[batch_size]:>5}"),
        progress.TextColumn("loss {task.fields[loss]:>7.4f}"),
        progress.TextColumn("{task.fields[speed]:>9,.0f} examples/s"),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, transient=True) as display:

        def start(description: str, num_examples: int) -> Callable[[Any, Any], None]:
            num_examples = _validate.integer(num_examples=num_examples, minimum=1)
            for task in display.task_ids:  # show only the current run
                display.remove_task(task)
            task = display.add_task(
                description, total=num_examples, batch_size="-", loss=float("nan"), speed=0.0
            )

            def callback(record: Any, state: Any) -> None:
                del state
                display.update(
                    task,
                    completed=record.num_examples,
                    batch_size=record.batch_size,
                    loss=record.loss,
                    speed=record.num_steps * record.batch_size / record.seconds,
                )

            return callback

        yield start
