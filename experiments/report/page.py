"""The page: what was compared, tables, curves. One HTML file that needs nothing else."""

from __future__ import annotations

import datetime
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments import _runner
from experiments.report import curves
from experiments.report.runs import PROBLEM, SETTINGS, Source

# Columns of the first table, in this order, each if a run has it: header, scale, digits.
LOSSES = {
    "test_loss": ("test loss", 1, 4),
    "test_accuracy": ("test accuracy [%]", 100, 2),
    "validation_loss": ("validation loss", 1, 4),
    "loss": ("training loss of the last window", 1, 4),
}
COUNTS = {
    "num_steps": ("steps", 0),
    "num_examples": ("examples", 0),
    "seconds": ("time [s]", 1),
    "num_compilations": ("programs compiled", 0),
    "num_nonfinite": ("steps that were not finite", 0),
}

# Nothing may be loaded, whatever the names in the results say.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto;
  padding: 0 16px 48px; max-width: 1080px; }
h1 { font-size: 1.5em; margin: 1em 0 .2em; }
h2 { font-size: 1.15em; margin: 1.8em 0 .4em; }
h3 { font-size: 1em; margin: 1.2em 0 .2em; }
p { margin: .4em 0; max-width: 48em; }
code { font-family: ui-monospace, monospace; font-size: .92em; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4em 0; }
th, td { padding: 3px 14px 3px 0; text-align: right; vertical-align: bottom; }
td { white-space: nowrap; }
th { font-weight: 600; border-bottom: 1px solid #444; }
th:first-child, td:first-child, .text { text-align: left; }
tbody tr:nth-child(even) { background: #f5f5f5; }
summary { cursor: pointer; margin: .6em 0; }
.note { color: #555; }
.command { max-width: none; }
"""


def render(sources: Sequence[Source], command: str) -> str:
    """The text of the page."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError('A report needs plotly: pip install "arbiter-jax[report]".') from error

    experiment = next((source.experiment for source in sources if source.experiment), "")
    title = f"Runs of {experiment}" if experiment else "Runs"
    made = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    results, drawn = _results(sources), _curves(sources)
    return "".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n",
            f"<script>{get_plotlyjs()}</script>\n" if drawn else "",
            f"</head>\n<body>\n<h1>{html.escape(title)}</h1>\n",
            f'<p class="note command">{made}, <code>{html.escape(command)}</code></p>\n',
            results,
            "<h2>Curves</h2>\n",
            drawn or '<p class="note">These runs have no curves of loss or batch size.</p>\n',
            _settings(sources),
            _all_runs(sources, opened=not results),
            "</body>\n</html>\n",
        ]
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], num_texts: int = 1) -> str:
    """A table of texts, whose first columns are aligned at the left; escapes everything."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=text' if i < num_texts else ''}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>\n" for row in rows)
    head = f"<thead><tr>{line(columns, 'th')}</tr></thead>"
    return f'<div class="wide"><table>\n{head}\n<tbody>\n{body}</tbody></table></div>\n'


def labels(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to call each run: its method, and every setting that differs between runs of its method.

    Args:
      runs: Each with "method", "source" and some of PROBLEM and SETTINGS.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault(str(run.get("method", "")), []).append(run)
    names = ("source", *SETTINGS)
    differing: dict[str, list[str]] = {}
    for method, group in groups.items():
        kept = differing[method] = []
        for name in names:  # each that separates runs which those before it do not
            if _num_values(group, [*kept, name]) > _num_values(group, kept):
                kept.append(name)

    def label(run: Mapping[str, Any]) -> str:
        method = str(run.get("method", ""))
        words = [method or "run"]
        for name in differing[method]:
            value = str(run.get(name, ""))
            words.append(
                value if name in ("source", "decay") else f"{name.replace('_', ' ')} {value}"
            )
        return ", ".join(words)

    return [label(run) for run in runs]


def _num_values(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> int:
    return len({tuple(str(run.get(name)) for name in names) for run in runs})


def _results(sources: Sequence[Source]) -> str:
    rows = [{"source": source.label, **row} for source in sources for row in source.rows]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    problem = [name for name in PROBLEM if any(isinstance(row.get(name), str) for row in rows)]
    for label, row in zip(labels(rows), rows, strict=True):
        key = (label, *(str(row.get(name, "")) for name in problem))
        groups.setdefault(key, []).append(row)
    losses = {k: v for k, v in LOSSES.items() if any(_finite(row.get(k)) for row in rows)}
    counts = {k: v for k, v in COUNTS.items() if any(_finite(row.get(k)) for row in rows)}
    if not any((row.get("num_nonfinite") or 0) > 0 for row in rows):
        counts.pop("num_nonfinite", None)
    if not losses and not counts:
        return ""
    sizes = any(row.get("batch_sizes") for row in rows)
    lines = []
    for key, group in groups.items():
        cells = [*key, str(len(group))]
        cells += [_interval(group, field, *how) for field, (_, *how) in losses.items()]
        cells += [_mean(group, field, digits) for field, (_, digits) in counts.items()]
        if sizes:
            last = [{"size": row["batch_sizes"][-1]} for row in group if row.get("batch_sizes")]
            cells.append(_mean(last, "size", 0))
        lines.append(cells)
    columns = ["method", *(name.replace("_", " ") for name in problem), "runs"]
    columns += [name for name, *_ in (*losses.values(), *counts.values())]
    columns += ["last batch size"] if sizes else []
    note = (
        "Means over runs, ± half-width of the 95% interval (Student's t). In parentheses: of how many "
        "runs, if some have no number or one that is not finite. Time is as measured by each run."
    )
    return (
        f"<h2>Results</h2>\n{table(columns, lines, 1 + len(problem))}<p class='note'>{note}</p>\n"
    )


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _interval(rows: Sequence[Mapping[str, Any]], field: str, scale: float, digits: int) -> str:
    kept = [row for row in rows if _finite(row.get(field))]
    if not kept:
        return "-"
    return _runner.interval(kept, field, digits, scale) + _share(kept, rows)


def _mean(rows: Sequence[Mapping[str, Any]], field: str, digits: int) -> str:
    kept = [row for row in rows if _finite(row.get(field))]
    if not kept:
        return "-"
    mean = sum(row[field] for row in kept) / len(kept)
    return f"{mean:,.{digits}f}" + _share(kept, rows)


def _share(kept: Sequence[Any], rows: Sequence[Any]) -> str:
    return f" ({len(kept)} of {len(rows)})" if len(kept) < len(rows) else ""


def _curves(sources: Sequence[Source]) -> str:
    """The figures, or "" if no run has a curve."""
    found = [(source.label, curve) for source in sources for curve in source.curves]
    names = labels([{**curve.settings, "source": label} for label, curve in found])
    made = curves.figures([(name, curve) for name, (_, curve) in zip(names, found, strict=True)])
    if not made:
        return ""
    parts = [
        "<p>Click a name to hide its lines, double-click it to hide all others. Drag to zoom, "
        "double-click to zoom out. Thin lines are seeds, thick ones their mean. A gap is a loss that "
        "was not finite.</p>\n<noscript><p>The curves need JavaScript.</p></noscript>\n"
    ]
    for title, figure, num_hidden in made:
        parts.append(f"<h3>{html.escape(title)}</h3>\n" if title else "")
        if num_hidden:
            parts.append(
                f'<p class="note">{num_hidden} methods are hidden at first: click their names.</p>\n'
            )
        parts.append(figure + "\n")
    return "".join(parts)


def _settings(sources: Sequence[Source]) -> str:
    """Versions and flags of each folder: those that differ, and all."""
    folders = [source for source in sources if source.experiment]
    if not folders:
        return ""
    records = [{**source.versions, **source.config} for source in folders]
    names = dict.fromkeys(name for record in records for name in record)
    lines = {n: [n, *(_text(record.get(n, "")) for record in records)] for n in names}
    columns = ["setting", *(source.label for source in folders)]
    num_texts = len(columns)
    differing = [line for line in lines.values() if len(set(line[1:])) > 1]
    parts = ["<h2>Settings</h2>\n"]
    if differing:
        parts.append(f"<p>Different:</p>\n{table(columns, differing, num_texts)}")
    elif len(folders) > 1:
        parts.append("<p>All folders have the same settings and versions.</p>\n")
    everything = table(columns, lines.values(), num_texts)
    parts.append(f"<details><summary>All settings and versions</summary>\n{everything}</details>\n")
    return "".join(parts)


def _all_runs(sources: Sequence[Source], opened: bool) -> str:
    """Every run with all its columns that are one number or text."""
    rows = [
        ({"folder": source.label} if len(sources) > 1 else {}) | row
        for source in sources
        for row in source.rows
    ]
    scalar = lambda value: isinstance(value, str | int | float | bool)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns = [name for name in columns if any(scalar(row.get(name)) for row in rows)]
    cells = [
        [_text(row.get(name)) if scalar(row.get(name)) else "-" for name in columns] for row in rows
    ]
    num_texts = sum(name in ("folder", "method") for name in columns[:2])
    return (
        f"<h2>Every run</h2>\n<details{' open' if opened else ''}><summary>All columns of "
        f"{len(rows)} run{'s' if len(rows) > 1 else ''}</summary>\n"
        f"{table([c.replace('_', ' ') for c in columns], cells, num_texts)}</details>\n"
    )


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.5g}" if abs(value) < 1e5 else f"{value:,.0f}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return str(value)
