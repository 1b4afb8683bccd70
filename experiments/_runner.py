"""What every experiment shares on the command line: flags, output folder, tables, files.

An experiment is a module with a frozen dataclass `Config`, a dict `CONFIGS` of them, and three
functions: `run(config) -> Results`, `table(results)` and `plot(results, output)`. Its flags are the
fields of its `Config`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import platform
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax

import arbiter_jax as aj
from arbiter_jax import metrics


@dataclasses.dataclass
class Results:
    """What an experiment returns: one row per training run, one record per window, and extras."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    windows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # for figures; not written


class UsageError(Exception):
    """A wrong flag, data set or configuration: one line on standard error, exit status 2."""


# Help for flags that mean the same in every experiment; a field made by `flag` has its own.
COMMON_HELP = {
    "dataset": "name of a data set of arbiter_jax.datasets",
    "model": "mlp, lenet, vgg11 or wrn_16_4",
    "methods": "which batch-size rules to run",
    "seeds": "one run per seed",
    "epochs": "training examples of a run, in epochs",
    "window": "training steps between two decisions",
    "learning_rate": "of the optimizer",
    "learning_rates": "of the optimizer; one run per rate",
    "momentum": "of SGD",
    "min_batch_size": "smallest batch size, in examples",
    "max_batch_size": "largest batch size, in examples",
    "initial_batch_size": "batch size to start from, in examples",
    "batch_size": "in examples",
    "hidden_size": "units of a hidden layer",
    "num_steps": "training steps of a run",
    "num_examples": "training examples that are used",
}


def flag(default: Any, help: str) -> Any:
    """A field of a `Config`: its default, and the help text of its flag."""
    return dataclasses.field(default=default, metadata={"help": help})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(message)


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any) -> None:
    name = "--" + field.name.replace("_", "-")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    kind: dict[str, Any] = {"type": hint}
    if origin is tuple:
        kind = {"type": arguments[0], "nargs": "+"}
    elif hint is bool:
        kind = {"action": argparse.BooleanOptionalAction}
    text = field.metadata.get("help") or COMMON_HELP[field.name]
    parser.add_argument(name, default=None, help=text.replace("%", "%%"), **kind)


def parse(name: str, configs: Mapping[str, Any], description: str, argv: Sequence[str]) -> Any:
    """Returns (config, output): the configuration and the output folder that the flags ask for."""
    parser = _Parser(prog=f"python -m experiments.{name}", description=description)
    parser.add_argument(
        "--config",
        default="default",
        choices=sorted(configs),
        help="the values of all flags that are not given",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results") / name,
        metavar="DIR",
        help="folder for summary.json, metrics.csv and the figures",
    )
    config_class = type(configs["default"])
    hints = typing.get_type_hints(config_class)
    fields = [field for field in dataclasses.fields(config_class) if field.init]
    for field in fields:
        _add_flag(parser, field, hints[field.name])
    flags = vars(parser.parse_args(argv))
    changes = {f.name: flags[f.name] for f in fields if flags[f.name] is not None}
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    return dataclasses.replace(configs[flags["config"]], **changes), flags["output"]


def main(
    name: str,
    configs: Mapping[str, Any],
    run: Callable[[Any], Results],
    plot: Callable[[Results, Path], None],
    table: Callable[[Results], Any],
    description: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Runs an experiment from the command line: flags, run, files, figures, table."""
    try:
        config, output = parse(name, configs, description, sys.argv[1:] if argv is None else argv)
        _check_writable(output)
        results = run(config)
    except (UsageError, ValueError, ImportError) as error:
        # A bad value that only the library can detect (a range, a path) is bad usage too.
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; no results were written.", file=sys.stderr)
        raise SystemExit(130) from None
    write(name, config, results, output)
    plot(results, output)
    print_table(table(results))
    print(f"Written to {output}/: {', '.join(sorted(p.name for p in output.iterdir()))}")


def _check_writable(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"--output must be a folder that can be written to, got {str(output)!r}: "
            f"{error.strerror}."
        ) from None


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
    summary = {
        "experiment": name,
        "config": _plain(dataclasses.asdict(config)),
        "versions": versions(),
        "rows": _plain(results.rows),
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    columns = list(dict.fromkeys(key for record in results.windows for key in record))
    with (output / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns or ["method", "seed"])
        writer.writeheader()
        writer.writerows(results.windows)


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
