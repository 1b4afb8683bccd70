"""Reads what is compared: folders of experiments and files of ``aj.callbacks.csv``."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments._runner import UsageError

# Columns that say what was run. Problems have figures of their own; settings are part of a label if
# they differ between runs of one method.
PROBLEM = ("task", "task_name", "dataset", "regime", "model", "optimizer")
SETTINGS = ("learning_rate", "case_rate", "decay", "start")
# What progress is measured in: the first column that a file has.
AXES = {
    "num_examples": "training examples seen",
    "step": "training steps",
    "num_steps": "training steps",
}
LOSSES = ("loss", "train_loss")


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run, a point per window."""

    settings: Mapping[str, str]  # of PROBLEM, SETTINGS, "method" and "seed": those that it has
    axis: str  # the name of a column in AXES
    ends: np.ndarray  # float[W], of the windows, in units of the axis
    loss: np.ndarray | None  # float[W], the mean of each window; nan if there is none
    batch_size: np.ndarray | None  # float[W]


@dataclasses.dataclass
class Source:
    """One folder or file."""

    path: Path
    label: str
    experiment: str = ""  # empty for a file of callbacks.csv
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    curves: list[Curve] = dataclasses.field(default_factory=list)


def read(paths: Sequence[Path]) -> list[Source]:
    """Reads all sources, or raises a UsageError in one sentence."""
    sources = [
        (_file if path.is_file() else _folder)(path, label)
        for path, label in zip(paths, _labels(paths), strict=True)
    ]
    names = list(dict.fromkeys(s.experiment for s in sources if s.experiment))
    if len(names) > 1:
        raise UsageError(
            f"A report compares runs of one experiment, got {' and '.join(names)}: write one for each."
        )
    return sources


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ."""
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise UsageError(f"{str(paths[i])!r} is given more than once.")
    parts = [(path.with_suffix("") if path.suffix == ".csv" else path).parts for path in resolved]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in resolved]


def _folder(path: Path, label: str) -> Source:
    summary_path = path / "summary.json"
    if not path.exists():
        raise UsageError(f"{str(path)!r} does not exist.")
    if not summary_path.is_file():
        raise UsageError(
            f"{str(path)!r} has no summary.json: name a folder that an experiment has finished, or a "
            "file of aj.callbacks.csv."
        )
    try:
        summary = json.loads(summary_path.read_text(encoding="utf-8"))
        name, config, versions = summary["experiment"], summary["config"], summary["versions"]
        rows = [{str(k): v for k, v in row.items()} for row in summary["rows"]]
        fine = isinstance(name, str) and all(isinstance(m, dict) for m in (config, versions))
    except OSError as error:
        raise _unreadable(summary_path, error) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fine = False
    if not fine:
        raise UsageError(f"{str(summary_path)!r} is not the summary of an experiment.")
    if not rows:
        raise UsageError(f"{str(summary_path)!r} has no runs.")
    metrics = path / "metrics.csv"
    curves = _curves(_table(metrics)) if metrics.is_file() else []
    return Source(path, label, name, config, versions, rows, curves)


def _file(path: Path, label: str) -> Source:
    """A file of callbacks.csv: one run, whose results are those of its last window."""
    records = _table(path)
    needed = {"window_index", "num_examples", "num_steps", "batch_size", "loss"}
    if not needed <= set(records[0]):
        raise UsageError(f"{str(path)!r} was not written by aj.callbacks.csv.")
    curves = _curves([{**record, "method": label} for record in records])
    if len(curves) != 1:
        raise UsageError(f"{str(path)!r} holds {len(curves)} runs instead of one.")
    last, known = records[-1], (*needed, "bucket_size", "seconds", "examples_per_second")
    evaluated = {k: _number(v) for k, v in last.items() if k not in known and v not in (None, "")}
    row = {
        "method": label,
        "loss": _number(last["loss"]),
        **{k: v for k, v in evaluated.items() if k != "num_compilations"},
        "num_steps": sum(_number(r["num_steps"]) for r in records),
        "num_examples": _number(last["num_examples"]),
        "seconds": sum(_number(r.get("seconds", "")) for r in records),
        "num_compilations": sum(_number(r.get("num_compilations", "")) for r in records),
        "batch_sizes": curves[0].batch_size.tolist(),
    }
    return Source(path, label, rows=[row], curves=curves)


def _table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, a half-written last one left out; another damaged one is an error."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            lines = [(row, reader.line_num) for row in reader]
    except OSError as error:
        raise _unreadable(path, error) from None
    except (UnicodeDecodeError, csv.Error):
        raise UsageError(f"{str(path)!r} is not a CSV file.") from None
    is_whole = lambda row: None not in row and None not in row.values()
    if lines and not is_whole(lines[-1][0]):
        lines.pop()
    if not lines:
        raise UsageError(f"{str(path)!r} has no rows.")
    columns = lines[0][0]
    axis = [name for name in AXES if name in columns][:1]
    for row, line in lines:
        if not is_whole(row):
            raise UsageError(
                f"{str(path)!r} has a damaged row in line {line}, with more or fewer cells than the "
                "first line: remove it."
            )
        for name in (*axis, *LOSSES, "batch_size"):
            if row.get(name) and not _is_number(row[name]):
                raise UsageError(
                    f"{str(path)!r} has a damaged row in line {line}, whose {name} is no number, "
                    f"{row[name]!r}: remove it."
                )
    return [row for row, _ in lines]


def _unreadable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{str(path)!r} cannot be read: {error.strerror or error}.")


def _is_number(text: str) -> bool:
    return text.strip().lower() in ("nan", "-nan", "+nan") or not math.isnan(_number(text))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _curves(records: Sequence[Mapping[str, str]]) -> list[Curve]:
    """The runs of a file with a row per window; none if it has no progress or nothing to draw."""
    columns = records[0]
    axis = next((name for name in AXES if name in columns), None)
    loss = next((name for name in LOSSES if name in columns), None)
    if axis is None or (loss is None and "batch_size" not in columns):
        return []

    def column(run: Sequence[Mapping[str, str]], name: str | None) -> np.ndarray | None:
        if name not in columns:
            return None
        values = np.array([_number(record[name]) for record in run])
        values[~np.isfinite(values)] = np.nan
        return values

    curves = []
    for run in _split(records, axis):
        ends = column(run, axis)
        assert ends is not None
        values = column(run, loss), column(run, "batch_size")
        if np.isfinite(ends).all() and any(v is not None and np.isfinite(v).any() for v in values):
            names = [name for name in ("method", "seed", *PROBLEM, *SETTINGS) if name in columns]
            # The rate of some experiments changes from window to window: no setting.
            fixed = {n: run[0][n] for n in names if len({record[n] for record in run}) == 1}
            curves.append(Curve(fixed, axis, ends, *values))
    return curves


def _split(
    records: Sequence[Mapping[str, str]], axis: str
) -> Iterator[Sequence[Mapping[str, str]]]:
    """Yields the rows of each run: another begins where a name changes or progress goes back."""
    names = [n for n in ("method", "seed", "decay", *PROBLEM) if n in records[0]]
    start = 0
    for i in range(1, len(records) + 1):
        if i < len(records):
            before, now = records[i - 1], records[i]
            if all(before[n] == now[n] for n in names) and (
                _number(now[axis]) > _number(before[axis])
            ):
                continue
        yield records[start:i]
        start = i
