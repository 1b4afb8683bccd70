"""The same loss in fewer steps: a decay of the learning rate traded for batch size.

Claim (arXiv:2510.14717, arXiv:1711.00489, and ours for the trade, the limit and the exponent): `seesaw`
ends a run that works today at the same loss, after the same examples, in about half of its steps,
as long as its batch size is below the critical one.
Command: python -m experiments.fewer_steps [--config smoke|default|paper] [--runs FOLDER]
Time: about 12 minutes on two cores; `--parts A C` one minute. `--runs FOLDER` keeps what is done.
Expected: within .5% of the cosine in .56 of its steps below the critical size; from 8 times that size
worse, unless the measured noise scale is the limit.
Measured: -.9 to +.3% in .52 of the steps (exponent 1, trade 1; momentum and AdamW, Fashion-MNIST and
text); from a size beyond the critical one +1.1 to +21%. All numbers: the README of this folder.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import sys
from pathlib import Path
from typing import Any

from experiments import _runner
from experiments.fewer_steps import cases, compare, decays, published, regression, tables

PARTS = ("A", "B", "C")


@dataclasses.dataclass(frozen=True)
class Config:
    parts: tuple[str, ...] = _runner.flag(PARTS, "A: exact, B: networks, C: published numbers")
    tasks: tuple[str, ...] = _runner.flag(("fashion_mnist", "text"), ", ".join(cases.TASKS))
    optimizers: tuple[str, ...] = _runner.flag(("momentum", "adamw"), ", ".join(cases.OPTIMIZERS))
    decays: tuple[str, ...] = _runner.flag(("half cosine",), ", ".join(decays.DECAYS))
    controls: tuple[str, ...] = _runner.flag(compare.CONTROLS, "besides the baseline")
    measured: bool = _runner.flag(
        True, "also what measures: limit, exponent, eight times the critical size"
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seeds: int = _runner.flag(1, "how many of the seeds choose a rate, on validation")
    share: float = _runner.flag(1.0, "share of each task's number of examples")
    processes: int = _runner.flag(2, "how many tasks and optimizers run at a time")
    runs: str = _runner.flag("", "folder of finished runs, which are not repeated")


CONFIGS = {
    "smoke": Config(
        tasks=("digits",),
        optimizers=("momentum",),
        controls=(compare.SHORTER,),
        measured=False,
        seeds=(0,),
        share=0.05,
        processes=1,
    ),
    "default": Config(),
    "paper": Config(
        tasks=tuple(cases.TASKS),
        optimizers=cases.OPTIMIZERS,
        decays=tuple(decays.DECAYS),
        seeds=(0, 1, 2, 3, 4),
    ),
}


def run(config: Config) -> _runner.Results:
    if set(config.parts) - set(PARTS):
        raise _runner.UsageError(f"--parts must be among {', '.join(PARTS)}, got {config.parts}.")
    compare.usage(config)
    small = config == CONFIGS["smoke"]
    results = _runner.Results(extra={"config": config})
    if "A" in config.parts:
        results.extra["A"] = regression.run(small)
        results.rows += results.extra["A"]["gaps"] + results.extra["A"]["failures"]
    if "C" in config.parts:
        names = ("quarter cosine",) if small else tuple(published.LEFT)
        results.extra["C"] = published.run(names, 4_000 if small else 32_000)
        results.rows += results.extra["C"]
    if "B" in config.parts:
        if config.runs:
            Path(config.runs).mkdir(parents=True, exist_ok=True)
        for rows, windows in _all_cases(config):
            results.rows += rows
            results.windows += windows
    return results


def _all_cases(config: Config) -> list[Any]:
    """(rows, windows) of each task and optimizer, in their order."""
    groups = [
        [cases.Case(task, optimizer, decay) for decay in config.decays]
        for task in config.tasks
        for optimizer in config.optimizers
    ]
    if config.processes == 1:
        return [compare.run_cases(group, config, _print) for group in groups]
    # Small networks keep one core busy; JAX does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(config.processes, mp_context=context) as pool:
        running = [pool.submit(compare.run_cases, group, config, _print) for group in groups]
        return [future.result() for future in running]


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(results: _runner.Results):
    from rich.console import Group

    shown = []
    if "A" in results.extra:
        shown += regression.tables(results.extra["A"])
    if "C" in results.extra:
        shown.append(published.table(results.extra["C"]))
    rows = [row for row in results.rows if row["part"] == "B"]
    if rows:
        shown += tables.tables(rows)
    return Group(*shown)


def plot(results: _runner.Results, output: Path) -> None:
    rows = [row for row in results.rows if row["part"] == "B"]
    if rows:
        tables.front(rows).savefig(output / "front.png")
    if "A" in results.extra:
        tables.exact(results.extra["A"]).savefig(output / "exact.png")
