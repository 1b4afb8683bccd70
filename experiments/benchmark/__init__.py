"""What the engine costs: ratios of step times, each measured in interleaved pairs within one run.

Claim: hyper-learning adds one forward pass of the network's body to a plain step, and the engine adds
nothing to a hand-written scan.
Every step is also compared with its floor: a forward and backward pass alone, in a scan (`floor.py`).
Command: python -m experiments.benchmark; with `--config device`, what training costs on this device;
with `--compare torch`, the same steps in PyTorch as well; with `--only "first step"`, the time until a
program can run, of more networks.
Time: about twelve minutes on two cores; at most five on one accelerator.
Expected: every ratio at most its bar on an idle machine.
Measured: 29 of 45 ratios within their bar; LeNet with Arbiter 1.55 plain steps (bar 1.50). All numbers:
README.md in this folder.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np

from arbiter_jax import plotting
from experiments import _runner
from experiments.benchmark import device, floor, rows, torch_steps
from experiments.benchmark.row import Row


@dataclasses.dataclass(frozen=True)
class Config:
    pairs: int = _runner.flag(15, "measured pairs per row")
    window: int = _runner.flag(50, "training steps per measurement")
    batch_size: int = 64
    statistics_batch_size: int = _runner.flag(256, "batch size of the rows on noise statistics")
    subset_batch_size: int = _runner.flag(128, "batch size of the rows on subset selection")
    only: str = _runner.flag("", "run only the rows whose name contains this text")
    compare: str = _runner.flag(
        "none", "another library whose steps are measured as well", ("none", "torch")
    )
    on_device: bool = _runner.flag(
        False, "measure training on this device instead, with shapes of its own"
    )


CONFIGS = {
    "smoke": Config(pairs=1, window=2, only="MLP, p"),
    "default": Config(),
    "paper": Config(pairs=51),
    "device": Config(pairs=7, on_device=True),
}


def run(config: Config) -> _runner.Results:
    if config.on_device:
        return device.run(config)
    if config.compare == "torch":
        torch_steps.load()  # fails now, and not after all other rows
    results = _runner.Results(extra={"config": config, "works": {}, "floors": {}})
    chosen = lambda row: config.only in row.name and (config.only or not row.only_by_name)
    cases = [row for row in rows.build(config) if chosen(row)]
    if not cases:
        raise _runner.UsageError(f"--only must be part of the name of a row, got {config.only!r}.")
    for case in cases:
        _measure(case, config, results)
    return results


def _measure(case: Row, config: Config, results: _runner.Results) -> None:
    """Runs the pairs of a row, each with the floor under it."""
    programs = list(case.make())
    work = case.work() if case.work else None
    if work:
        programs.append(floor.timed_work(work, work.window or config.window))
    if case.pairs is None:
        for program in programs:  # compile
            program()
    num_pairs = min(config.pairs, case.pairs or config.pairs)
    times = np.array([[program() for program in programs] for _ in range(num_pairs)])
    low, median, high = np.quantile(times[:, 0] / times[:, 1], [0.25, 0.5, 0.75])
    row = {
        "method": case.name,
        "ratio": median,
        "quartiles": (low, high),
        "milliseconds": np.median(times[:, 0]),
        "reference_milliseconds": np.median(times[:, 1]),
    }
    if case.bar is not None:
        row["bar"] = case.bar
    if work:
        row["floor"] = work.name
        row["floor_milliseconds"] = np.median(times[:, 2])
        row["ratio_to_floor"] = np.median(times[:, 0] / times[:, 2])
        results.extra["works"][work.name] = work
        results.extra["floors"].setdefault(work.name, []).extend(times[:, 2])
    if case.note:
        row["note"] = case.note()
    results.rows.append(row)
    print(f"{case.name}: {median:.3f}", file=sys.stderr, flush=True)
    names = ("milliseconds", "reference_milliseconds", "floor_milliseconds")
    results.windows += [
        {"method": case.name, "pair": i, **dict(zip(names, each, strict=False))}
        for i, each in enumerate(times)
    ]


def table(results: _runner.Results):
    from rich.console import Group
    from rich.text import Text

    config, extra = results.extra["config"], results.extra
    if config.on_device:
        return device.table(results)
    number = lambda row, name, digits: f"{row[name]:.{digits}f}" if name in row else "-"
    cells = [
        [
            row["method"],
            number(row, "ratio", 3),
            "{:.3f}-{:.3f}".format(*row["quartiles"]),
            number(row, "bar", 2),
            ("yes" if row["ratio"] <= row["bar"] else "no") if "bar" in row else "-",
            number(row, "ratio_to_floor", 2),
            number(row, "milliseconds", 3),
            number(row, "reference_milliseconds", 3),
        ]
        for row in results.rows
    ]
    notes = [f"{row['method']}: {row['note']}" for row in results.rows if "note" in row]
    floors = floor.describe(extra["works"], extra["floors"])
    memory = "memory: of the intermediate results of the compiled program, in MB instead of ms."
    last = [memory] if any("memory" in row["method"] for row in results.rows) else []
    ratios = _runner.make_table(
        f"ratios of step times, median of {config.pairs} interleaved pairs, B = {config.batch_size}",
        ["what", "ratio", "quartiles", "bar", "met", "to the floor", "ms", "ms (reference)"],
        cells,
    )
    return Group(ratios, *(Text(line) for line in [*floors, *notes, *last]))


def plot(results: _runner.Results, output: Path) -> None:
    drawn = [row for row in results.rows if "quartiles" in row]
    fig, ax = plotting.figure(size=(8.5, 0.42 * len(drawn) + 1.2))
    for y, row in enumerate(reversed(drawn)):
        low, high = row["quartiles"]
        ax.plot([low, high], [y, y], color=plotting.COLORS[0], linewidth=3, alpha=0.5)
        ax.plot(
            row["ratio"], y, "o", color=plotting.COLORS[0], label="measured" if y == 0 else None
        )
        if "bar" not in row:
            continue
        ax.plot(
            row["bar"],
            y,
            "|",
            color=plotting.COLORS[1],
            markersize=16,
            markeredgewidth=2,
            label="bar" if y == 0 else None,
        )
    ax.set_yticks(range(len(drawn)), [row["method"] for row in reversed(drawn)])
    ax.tick_params(axis="y", labelsize=8)
    ax.set_xlabel("ratio of step times: median and quartiles over the pairs")
    fig.legend(loc="outside right upper", frameon=False, fontsize=8)
    fig.savefig(output / "benchmark.png")
