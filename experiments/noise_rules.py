"""The rules that measure noise, against every constant size and every usual decay, at equal examples.

Claim (ours; derivation in NOISE.md): held where noise costs a fixed share of the loss still to go,
and grown at the end, a batch size does better than the best constant one, whatever the task, the
optimizer, its rate and the start, with one set of constants.
Command: python -m experiments.noise_rules [--parts table control step_cost] [--tasks ...]
Time: about four hours on one core; `--parts table --tasks digits` 20 minutes. With `--runs FILE` the
runs of the table are kept as they end, and those of the file are not made again.
Expected: below the best constant size where the training set is not learnt by heart (Fashion-MNIST,
text); not where it is (digits, diabetes). Permuted in time, the noise serves the noise floor as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from arbiter_jax import plotting, progress
from experiments import _noise_cases as cases
from experiments import _noise_parts as parts
from experiments import _runner
from experiments._kept import Kept
from experiments._schedules import DECAYS

PARTS = ("table", "control", "step_cost")


@dataclasses.dataclass(frozen=True)
class Config:
    parts: tuple[str, ...] = PARTS
    tasks: tuple[str, ...] = tuple(cases.TASKS)
    optimizers: tuple[str, ...] = tuple(cases.OPTIMIZERS)
    methods: tuple[str, ...] = cases.NOISE_RULES
    seeds: tuple[int, ...] = (0, 1, 2)
    starts: tuple[int, ...] = (16, 64, 256)  # of the rules; of the agent the one in the middle
    share: float = 1.0  # of each task's number of examples
    full_grid: bool = False  # every constant size, and not only those around the best
    runs: str = ""  # a file that keeps the runs of the table: those found in it are not made again

    @property
    def middle(self) -> int:
        """The start of what is run from one start only."""
        return self.starts[len(self.starts) // 2]


CONFIGS = {
    "smoke": Config(
        parts=("table",),
        tasks=("regression",),
        optimizers=("momentum",),
        methods=("noise_floor",),
        seeds=(0,),
        starts=(64,),
        share=0.1,
    ),
    "default": Config(),
    "paper": Config(seeds=(0, 1, 2, 3, 4), share=2.5, full_grid=True),
}


def best_constant(
    losses_at: Callable[[int], list[dict]], sizes: list[int], full: bool
) -> dict[int, list[dict]]:
    """The rows of the sizes that were tried, of a grid in which the loss is taken to have one valley.

    From the middle on, until the sizes on both sides of the best one are worse.
    """
    found: dict[int, list[dict]] = {}
    loss = lambda i: _mean(found[sizes[i]])

    def look(i):
        if 0 <= i < len(sizes) and sizes[i] not in found:
            found[sizes[i]] = losses_at(sizes[i])

    if full:
        for i in range(len(sizes)):
            look(i)
        return found
    best = len(sizes) // 2
    look(best)
    while True:
        look(best - 1)
        look(best + 1)
        known = [i for i in range(len(sizes)) if sizes[i] in found]
        lowest = min(known, key=loss)
        if lowest == best:
            return found
        best = lowest


def run(config: Config) -> _runner.Results:
    _check(config)
    results = _runner.Results(extra={"config": config})
    kept = Kept(config.runs)
    with progress.live() as display:
        if "table" in config.parts:
            for task in config.tasks:
                for kind in config.optimizers:
                    for rate in cases.OPTIMIZERS[kind]:
                        _run_case(cases.Case(task, kind, rate), config, results, kept, display)
                    # A process may map only so many pieces of memory, and each program takes some.
                    cases.forget_programs()
        for name in PARTS[1:]:
            if name in config.parts:
                results.extra[name] = getattr(parts, name)(config, display)
                results.rows += results.extra[name]
    return results


def _check(config: Config) -> None:
    for flag, given, known in (
        ("--parts", config.parts, PARTS),
        ("--tasks", config.tasks, cases.TASKS),
        ("--optimizers", config.optimizers, cases.OPTIMIZERS),
        ("--methods", config.methods, cases.NOISE_RULES),
    ):
        if set(given) - set(known):
            unknown = ", ".join(sorted(set(given) - set(known)))
            raise _runner.UsageError(f"{flag} must be among {', '.join(known)}, got {unknown}.")


def _run_case(case: cases.Case, config: Config, results: _runner.Results, kept, display) -> None:
    made = cases.definition(case.task, config.share)
    sizes = [2**k for k in range(3, made.max_batch_size.bit_length())]

    def several(name: str, start: int, decay: str = "constant") -> list[dict]:
        rows = []
        for seed in config.seeds:
            shown = f"{case.task}, {case.optimizer} {case.learning_rate:g}, {name}, seed {seed}"
            settings = {"seed": seed, "decay": decay, "start": start, "share": config.share}
            drawn = (seed, start) == (config.seeds[0], config.middle) and name in cases.NOISE_RULES

            def make(settings=settings, shown=shown, drawn=drawn):
                callbacks = [display(shown, made.num_examples)]
                row, windows, _ = cases.run(case, name, callbacks=callbacks, **settings)
                return row, windows if drawn else []

            row, windows = kept.get({**case._asdict(), "name": name, **settings}, make)
            rows.append({"part": "table", **row})
            results.windows += windows
        results.rows += rows
        return rows

    for decay in DECAYS:
        best_constant(
            lambda size, decay=decay: several("constant", size, decay), sizes, config.full_grid
        )
    for name in config.methods:
        every_start = name in ("noise_floor", "expected_gain")
        for start in config.starts if every_start else (config.middle,):
            several(name, start)


# What the rows say.


def _mean(rows: list[dict], field: str = "test_loss") -> float:
    """The mean over seeds; infinite where one diverged, for nan is not less than anything."""
    return float(np.mean([np.nan_to_num(row[field], nan=np.inf) for row in rows]))


def judge(rows: list[dict]) -> list[dict[str, Any]]:
    """One record a case: the best constant sizes, and what each rule did from each start."""
    records = []
    rows = [row for row in rows if row.get("part") == "table"]
    for (task, kind, rate), group in _runner.by(
        rows, "task_name", "optimizer", "case_rate"
    ).items():
        constants = [row for row in group if row["method"] == "constant"]
        found = _runner.by(constants, "decay", "start")
        fixed = {key: runs for key, runs in found.items() if key[0] == "constant"}
        best = min(fixed, key=lambda key: _mean(fixed[key]))
        decayed = min(found, key=lambda key: _mean(found[key]))
        record = {
            "case": cases.Case(task, kind, rate),
            "constant": (best[1], _mean(found[best])),
            "decayed": (*decayed, _mean(found[decayed]), _mean(found[decayed], "num_steps")),
            "rules": {},
        }
        for (name, start), runs in _runner.by(
            [row for row in group if row["method"] != "constant"], "method", "start"
        ).items():
            record["rules"][name, start] = {
                "over_constant": _mean(runs) / _mean(found[best]) - 1,
                "over_decayed": _mean(runs) / _mean(found[decayed]) - 1,
                "steps": _mean(runs, "num_steps") / _mean(found[decayed], "num_steps"),
                "num_steps": _mean(runs, "num_steps"),
            }
        records.append(record)
    return records


def counted(records: list[dict], task: str | None = None) -> list[list[str]]:
    """What the numbers to reach ask for: shares of the cases, a case and a start being one."""
    lines = []
    for name in cases.NOISE_RULES:
        outcomes = [
            outcome
            for record in records
            if task in (None, record["case"].task)
            for (method, _), outcome in record["rules"].items()
            if method == name
        ]
        if not outcomes:
            continue
        over = np.array([o["over_constant"] for o in outcomes])
        ended = over[np.isfinite(over)]
        near = [o["over_decayed"] <= 0.02 for o in outcomes]
        cheap = [o["over_decayed"] <= 0.02 and o["steps"] <= 0.6 for o in outcomes]
        lines.append(
            [
                f"{task or 'all'}, {name}",
                str(len(outcomes)),
                f"{100 * np.mean(over < 0):.0f}",
                f"{100 * np.mean(over <= 0.01):.0f}",
                f"{100 * ended.mean():+.1f}" if len(ended) else "-",
                f"{100 * np.median(over):+.1f}",
                f"{100 * over.max():+.1f}",
                str(len(over) - len(ended)),
                f"{100 * np.mean(near):.0f}",
                f"{100 * np.mean(cheap):.0f}",
            ]
        )
    return lines


def table(results: _runner.Results):
    from rich.console import Group

    config, tables = results.extra["config"], []
    if "table" in config.parts:
        tables += _tables(results.rows, config)
    if "control" in config.parts:
        tables.append(parts.control_table(results.extra["control"]))
    if "step_cost" in config.parts:
        tables.append(parts.step_cost_table(results.extra["step_cost"]))
    return Group(*tables)


def _tables(rows: list[dict], config: Config) -> list[Any]:
    records = judge(rows)
    cells = []
    for record in records:
        case, (size, loss) = record["case"], record["constant"]
        decay, decayed_size, decayed_loss, decayed_steps = record["decayed"]
        outcome = lambda name, record=record: record["rules"].get((name, config.middle))
        against = lambda name, outcome=outcome: (
            f"{100 * outcome(name)['over_constant']:+.1f}" if outcome(name) else "-"
        )
        spread = [
            o["over_constant"] for (name, _), o in record["rules"].items() if name == "noise_floor"
        ]
        floor = outcome("noise_floor")
        cells.append(
            [
                f"{case.task}, {case.optimizer} {case.learning_rate:g}",
                f"{loss:.4f} ({size})",
                f"{decayed_loss:.4f} ({decayed_size}, {decay})",
                f"{100 * min(spread):+.1f} to {100 * max(spread):+.1f}" if spread else "-",
                f"{floor['num_steps'] if floor else math.nan:,.0f} / {decayed_steps:,.0f}",
                *map(against, cases.NOISE_RULES[1:]),
            ]
        )
    listed = _runner.make_table(
        f"mean test loss, {len(config.seeds)} seeds, equal examples within a task",
        ["case", "best constant", "with decay", "noise floor %", "steps", *cases.NOISE_RULES[1:]],
        cells,
        "best constant: test loss of the best constant size at a constant rate (its size); with "
        "decay: the same over the best\nof constant rate, cosine and decay in the last fifth. "
        "noise floor: mean test loss over that of the best constant\nsize, lowest and highest of "
        f"the starts {', '.join(map(str, config.starts))}; the other rules from {config.middle}. "
        "steps: of the noise floor / of the best\nsize with decay. noise_floor looks at validation "
        "examples as well, noise_floor_training does not.",
    )
    lines = [line for task in (*config.tasks, None) for line in counted(records, task)]
    columns = ["rule", "cases", "below %", "within 1%", "mean %", "median %", "worst %"]
    columns += ["diverged", "within 2% of decay", "and 60% of steps"]
    counts = _runner.make_table(
        "how often: a case and a start are one",
        columns,
        lines,
        "below, within, mean (of those that did not diverge), median, worst: test loss against the "
        "best constant size\nat a constant rate. within 2% of decay: of the best size with the best "
        "decay; and that in at most 60% of its steps.\nAll in % of the cases or of the loss.",
    )
    return [listed, counts]


def plot(results: _runner.Results, output: Path) -> None:
    if "table" in results.extra["config"].parts:
        _plot_table(results).savefig(output / "noise_rules.png")
    if "step_cost" in results.extra:
        parts.plot_step_cost(results.extra["step_cost"]).savefig(output / "step_cost.png")


def _plot_table(results: _runner.Results):
    """Above what each rule gains or loses in every case, below the sizes that the noise floor takes."""
    records, config = judge(results.rows), results.extra["config"]
    fig, (top, bottom) = plotting.figure(2, 1, size=(9.5, 7.0))
    ticks = np.arange(len(records))
    shown = [name for name in cases.NOISE_RULES if name in config.methods]
    for i, name in enumerate(shown):
        for x, record in zip(ticks, records, strict=True):
            outcomes = [o for (rule, _), o in record["rules"].items() if rule == name]
            values = [100 * o["over_constant"] for o in outcomes]
            if not values:
                continue
            at = x + 0.18 * (i - (len(shown) - 1) / 2)
            style = {"color": plotting.COLORS[i], "zorder": 3}
            top.plot([at, at], [min(values), max(values)], lw=1.2, **style)
            top.plot(at, np.mean(values), "o", ms=4, label=name if x == 0 else None, **style)
            if np.inf in values:  # diverged: at the upper edge
                top.plot(at, 0.97, "^", ms=4, transform=top.get_xaxis_transform(), **style)
    top.axhline(0, color="0.4", lw=0.8)
    top.set_yscale("symlog", linthresh=10)
    top.set_ylabel("test loss over that of the\nbest constant size [%]")
    labels = [
        f"{r['case'].task}, {r['case'].optimizer} {r['case'].learning_rate:g}" for r in records
    ]
    top.set_xticks(ticks, labels, rotation=90, fontsize=6)
    top.legend(frameon=False, fontsize=8, ncols=3)
    groups = _runner.by(results.windows, "method", "task_name", "optimizer", "case_rate")
    for i, task in enumerate(config.tasks):
        floor = (group for key, group in groups.items() if key[:2] == ("noise_floor", task))
        for j, windows in enumerate(floor):
            ends = np.array([window["num_examples"] for window in windows])
            bottom.stairs(
                [window["batch_size"] for window in windows],
                np.concatenate([[0], ends]) / ends[-1],
                baseline=None,
                color=plotting.COLORS[i],
                alpha=0.7,
                lw=1.0,
                label=None if j else task,
            )
    bottom.set_yscale("log", base=2)
    bottom.set_ylabel("batch size of the noise floor\n[examples]")
    bottom.set_xlabel("share of the budget of examples")
    if results.windows:
        bottom.legend(frameon=False, fontsize=8, ncols=5)
    return fig


if __name__ == "__main__":
    _runner.main("noise_rules", CONFIGS, run, plot, table, __doc__.splitlines()[0])
