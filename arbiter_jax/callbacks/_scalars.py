"""The numbers of a window, by name: what csv, log and tensorboard write."""

from __future__ import annotations

from typing import Any

import numpy as np

from arbiter_jax.training import RunStart, WindowRecord

FIELDS = (
    "window_index",
    "num_examples",
    "num_steps",
    "batch_size",
    "bucket_size",
    "loss",
    "seconds",
    "examples_per_second",
    "num_compilations",
)


def scalars(record: WindowRecord) -> dict[str, float | int]:
    """One window as a flat dict: the fields of its record, its metrics, its evaluations.

    A metric that is one number per step is there as its mean over the window. Where two have the same
    name, the field comes before the evaluation, and that before the metric.
    """
    examples = record.num_steps * record.batch_size
    speed = examples / record.seconds if record.seconds > 0 else float("nan")
    fields = record._asdict() | {"examples_per_second": speed}
    found: dict[str, Any] = {name: fields[name] for name in FIELDS}
    for name, value in record.evaluation.items():
        found.setdefault(name, value)
    for name, values in record.info.metrics.items():
        values = np.asarray(values)
        if values.ndim == 1 and values.dtype != object:
            found.setdefault(name, float(np.mean(values.astype(np.float64))))
    return found


def check_one_run(name: str, start: RunStart) -> None:
    """Raises a ValueError if a callback that takes one record is given those of several seeds."""
    if start.num_seeds is not None:
        raise ValueError(
            f"callbacks.{name} must be given the windows of one run, got those of "
            f"{start.num_seeds} seeds: run the seeds one after the other, or read the history of "
            "result.of_seed(i)."
        )
