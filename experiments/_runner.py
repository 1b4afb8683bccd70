"""What every experiment shares on the command line: flags, output folder, tables, files.

An experiment is a module with a frozen dataclass `Config`, a dict `CONFIGS` of them, and three
functions: `run(config) -> Results`, `table(results)` and `plot(results, output)`. Its flags are the
fields of its `Config`, see :mod:`experiments._flags`.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax

import arbiter_jax as aj
from arbiter_jax import metrics
from experiments._flags import UsageError, flag, parse
from experiments._program_cache import use_program_cache

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder go unnoticed
    fcntl = None

__all__ = [
    "Results",
    "UsageError",
    "by",
    "complain",
    "difference",
    "flag",
    "interval",
    "main",
    "make_table",
    "moved_into",
    "print_table",
    "versions",
    "write",
]


@dataclasses.dataclass
class Results:
    """What an experiment returns: one row per training run, one record per window, and extras."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    windows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # for figures; not written

    def __post_init__(self):
        _begun.append(self)


_begun: list[Results] = []  # what an interrupted experiment had finished: its rows are kept


def main(
    name: str,
    configs: Mapping[str, Any],
    run: Callable[[Any], Results],
    plot: Callable[[Results, Path], None],
    table: Callable[[Results], Any],
    description: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Runs an experiment from the command line: flags, run, files, figures, table.

    Exit status: 2 for wrong usage; 1 if the results could not be written or drawn, and then the table
    has been printed all the same; 130 after an interrupt. Each is one line on standard error.
    """
    try:
        config, output = parse(name, configs, description, sys.argv[1:] if argv is None else argv)
        use_program_cache()
        with _claimed(name, output):
            results = _run_or_keep(name, config, run, output)
            failure = None
            try:
                with moved_into(output) as folder:
                    write(name, config, results, folder)
                with moved_into(output) as folder:
                    plot(results, folder)
            except OSError as error:
                failure = f"{_not_written(output, error)}; see the table."
            except ImportError as error:  # no matplotlib; the files without figures are written
                failure = str(error)
            print_table(table(results))
            if failure is not None:
                raise SystemExit(complain(name, failure, 1))
            names = sorted(p.name for p in output.iterdir() if not p.name.startswith("."))
            print(f"Written to {output}/: {', '.join(names)}")
    except (UsageError, ValueError, ImportError) as error:
        # A bad value that only the library can detect (a range, a path) is bad usage too.
        raise SystemExit(complain(name, str(error), 2)) from None
    except KeyboardInterrupt as error:
        kept = str(error) or "no further files were written"
        raise SystemExit(complain(name, f"interrupted; {kept}.", 130)) from None


def complain(name: str, message: str, status: int) -> int:
    """Prints a message as one line on standard error, and returns the exit status."""
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return status


def _not_written(output: Path, error: OSError) -> str:
    return f"the results could not be written to {str(output)!r}: {error.strerror or error}"


def _run_or_keep(name: str, config: Any, run: Callable[[Any], Results], output: Path) -> Results:
    """Runs; where that ends early, the finished rows are kept in unfinished.json, for a run may take
    hours. The files of an earlier run stay as they are.
    """
    _begun.clear()
    try:
        return run(config)
    except BaseException as error:
        rows = [row for results in _begun for row in results.rows]
        kept = "no run had been finished"
        if rows:
            kept = f"{len(rows)} finished rows are in {output / 'unfinished.json'}"
            try:
                with moved_into(output) as folder:
                    _write_summary(name, config, rows, folder / "unfinished.json")
            except OSError as failure:
                kept = _not_written(output, failure)
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(kept) from None
        if rows:
            print(f"{name}: {kept}.", file=sys.stderr)
        raise


@contextlib.contextmanager
def _claimed(name: str, output: Path) -> Iterator[None]:
    """Makes the output folder, and keeps all other runs out of it until the end."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as probe:
            probe.write(b"x")  # a full disk is noticed now and not after hours
            probe.flush()
        with contextlib.ExitStack() as stack:
            if fcntl is not None:
                # The system gives the lock back when the process ends, however it ends.
                folder = os.open(output, os.O_RDONLY)
                stack.callback(os.close, folder)
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _check_owner(name, output)
            claim = stack.pop_all()
    except BlockingIOError:
        raise UsageError(
            f"--output must be a folder of its own, but another run is writing to {str(output)!r}."
        ) from None
    except OSError as error:
        raise UsageError(
            f"--output must be a folder that can be written to, got {str(output)!r}: "
            f"{error.strerror}."
        ) from None
    with claim:
        yield


def _check_owner(name: str, output: Path) -> None:
    """Raises if the folder holds the results of another experiment."""
    summary = output / "summary.json"
    if not summary.exists():
        return
    try:
        owner = json.loads(summary.read_text())["experiment"]
    except (ValueError, TypeError, KeyError, RecursionError):
        owner = "something else"
    if owner != name:
        raise UsageError(
            f"--output must be a folder of its own, but {str(summary)!r} holds the results of {owner}."
        )


@contextlib.contextmanager
def moved_into(output: Path) -> Iterator[Path]:
    """A temporary folder whose files are moved to `output` at the end: none is ever half there."""
    with tempfile.TemporaryDirectory(dir=output, prefix=".") as folder:
        yield Path(folder)
        for path in sorted(Path(folder).iterdir()):
            os.replace(path, output / path.name)


def versions() -> dict[str, str]:
    """The versions of everything that the numbers depend on."""
    return {
        "arbiter_jax": aj.__version__,
        "jax": jax.__version__,
        "optax": optax.__version__,
        "flax": flax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.machine()} {jax.devices()[0].platform}",
    }


def _plain(value: Any) -> Any:
    """The value in the types of JSON; a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray | jax.Array):
        return [_plain(v) for v in (value if isinstance(value, list | tuple) else value.tolist())]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)


def write(name: str, config: Any, results: Results, output: Path) -> None:
    """Writes summary.json and metrics.csv."""
    _write_summary(name, config, results.rows, output / "summary.json")
    columns = list(dict.fromkeys(key for record in results.windows for key in record))
    with (output / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns or ["method", "seed"])
        writer.writeheader()
        writer.writerows(results.windows)


def _write_summary(name: str, config: Any, rows: Sequence[Any], path: Path) -> None:
    summary = {
        "experiment": name,
        "config": _plain(dataclasses.asdict(config)),
        "versions": versions(),
        "rows": _plain(list(rows)),
    }
    path.write_text(json.dumps(summary, indent=1) + "\n")


def interval(
    rows: Sequence[Mapping[str, Any]], field: str, digits: int = 3, scale: float = 1
) -> str:
    """Formats the mean of a field over the rows and the half-width of its 95% interval."""
    mean, half_width = metrics.mean_and_interval([scale * row[field] for row in rows])
    if math.isnan(half_width):
        return f"{mean:,.{digits}f}"
    return f"{mean:,.{digits}f} ± {half_width:,.{digits}f}"


def difference(rows: Sequence[Mapping[str, Any]], against: Sequence[Mapping[str, Any]]) -> str:
    """Formats the mean difference of two test losses, paired by seed, and its 95% interval."""
    if rows[0]["method"] == against[0]["method"]:
        return "-"
    pairs = zip(rows, against, strict=True)
    deltas = [{"delta": a["test_loss"] - b["test_loss"]} for a, b in pairs]
    return interval(deltas, "delta", 4)


def by(rows: Sequence[dict[str, Any]], *fields: str) -> dict[Any, list[dict[str, Any]]]:
    """Groups rows by one field, or by a tuple of several, in order of appearance."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        key = row[fields[0]] if len(fields) == 1 else tuple(row[f] for f in fields)
        groups.setdefault(key, []).append(row)
    return groups


def print_table(table: Any) -> None:
    """Prints a rich table at its full width, even if the output is not a terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        needed = console.measure(table, options=console.options.update(width=1000)).maximum
        console = Console(width=max(console.width, needed))
    console.print(table)


def make_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = ""
):
    """A rich table: the first column names the row, the others hold numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, caption=caption or None, box=box.SIMPLE_HEAD, caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
