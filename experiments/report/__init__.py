"""One HTML page that compares runs: tables, and curves of loss and batch size to hover and zoom.

Command: python -m experiments.report results/standalone_scheduler [more folders or CSV files]

Reads the results of experiments and the files of ``aj.callbacks.csv``. The page holds everything
that it needs, Plotly's JavaScript included (5 MB), and opens without a network.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import _flags, _runner
from experiments.report import page, runs


def parse(argv: Sequence[str]) -> tuple[list[Path], Path]:
    """Returns (paths, output): what to compare, and the page to write."""
    parser = _flags.Parser(prog="python -m experiments.report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="Folder that an experiment has written, or a file of aj.callbacks.csv.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="The page, a file that ends in .html; it may exist. Default: report.html.",
    )
    flags = parser.parse_args(argv)
    if flags.output.suffix != ".html" or flags.output.is_dir():
        raise _runner.UsageError(
            f"--output must be a file that ends in .html, got {str(flags.output)!r}."
        )
    return flags.paths, flags.output


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the page. Wrong usage is one line on standard error, exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        paths, output = parse(argv)
        sources = runs.read(paths)
        command = shlex.join(["python", "-m", "experiments.report", *argv])
        _write(output, page.render(sources, command))
    except (_runner.UsageError, ImportError) as error:
        raise SystemExit(_runner.complain("report", str(error), 2)) from None
    print(f"Written to {output}")


def _write(output: Path, text: str) -> None:
    """Writes the whole file or nothing."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _runner.moved_into(output.parent) as folder:
            (folder / output.name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise _runner.UsageError(
            f"--output must be a file that can be written, got {str(output)!r}: "
            f"{error.strerror or error}."
        ) from None
