"""All controls and rules of one case of part B, each control at its own best peak rate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments import _runner
from experiments._run_cache import RunCache
from experiments.fewer_steps import cases, decays, programs

BASELINE = "constant"
SHORTER = "constant, 95% of the examples"
LARGER = "larger constant, as many steps"
SHAPE = "constant, best shape of decay"
SHUFFLED = "sizes of seesaw, shuffled"
FLOOR = "noise floor, constant rate"
CRITICAL = "8 x critical"  # prefix of the rows at that size, which have a baseline of their own
CONTROLS = (SHORTER, LARGER, SHAPE, SHUFFLED, FLOOR)
SHAPES = (0.5, 0.75)  # exponents of the decay, besides the baseline's 1
LARGEST_BRANCH = 32  # over B0, when the critical size is measured
MIN_STEPS = 48  # of the baseline at 8 times the critical size


def best_rate(loss_at: Callable[[float], float], start: float, max_tries: int = 7) -> float:
    """The peak rate with the least loss, on the grid of doublings around `start`.

    The search ends when both neighbors of the best rate are worse.
    """
    found: dict[int, float] = {}

    def loss(i):
        if i not in found:
            found[i] = float(np.nan_to_num(loss_at(start * 2.0**i), nan=np.inf))
        return found[i]

    best = 0
    while len(found) < max_tries:
        lowest = min((best, best - 1, best + 1), key=loss)
        if lowest == best:
            break
        best = lowest
    return start * 2.0 ** min(found, key=lambda i: found[i])


def file_of(folder: str, task: str, optimizer: str) -> str:
    """Where the finished runs of a task and an optimizer are kept; "" if they are not."""
    return str(Path(folder) / f"{task}_{optimizer}.jsonl") if folder else ""


def run_cases(
    found: list[cases.Case], config: Any, show: Callable[[str], Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Everything of some cases of one task and one optimizer: (rows, windows)."""
    rows, windows = [], []
    cache = RunCache(file_of(config.runs, found[0].task, found[0].optimizer))
    for case in found:
        more = _Comparison(case, config, cache, show)
        rows += more.run()
        windows += more.windows
    # Each program maps some memory, and the number of mappings is limited.
    programs.forget_programs()
    return rows, windows


class _Comparison:
    def __init__(self, case: cases.Case, config: Any, cache: RunCache, show: Callable[[str], Any]):
        self.case, self.config, self.cache, self.show = case, config, cache, show
        self.made = programs.Experiment(case, config.share)
        self.rows: list[dict[str, Any]] = []
        self.windows: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        made, config = self.made, self.config
        default = cases.rules(self.case.optimizer)[0]
        center = made.made.rates[self.case.optimizer]
        peak = self.tuned(BASELINE, made.controlled, center)
        self.several(BASELINE, made.controlled, peak)
        if SHORTER in config.controls:
            self.several(SHORTER, made.controlled, peak, budget=0.95)
        if LARGER in config.controls:
            size = round(made.num_examples / made.num_steps(default))
            rate = self.tuned(LARGER, made.controlled, peak, batch_size=size)
            self.several(LARGER, made.controlled, rate, batch_size=size)
        if SHAPE in config.controls:
            self.best_shape(peak)
        if SHUFFLED in config.controls:
            self.several(SHUFFLED, made.shuffled, peak, rule=default)
        if FLOOR in config.controls:
            rate = self.tuned(FLOOR, made.noise_floor, peak / 2)
            self.several(FLOOR, made.noise_floor, rate)
        for rule in cases.rules(self.case.optimizer):
            # The default rule, and what measures, is the library's; the others share a program.
            measures = rule.limit or isinstance(rule.exponent, str)
            own = rule == default or measures
            if measures and not config.measured:
                continue
            self.several(rule.label, made.seesaw if own else made.planned, peak, rule=rule)
        if config.measured:
            self.at_critical(peak, default)
        return self.rows

    def best_shape(self, peak: float) -> None:
        """The constant size with the exponent of the decay that ends lowest on validation."""
        controlled, tried = self.made.controlled, [(1.0, peak)]
        for power in SHAPES:
            tried.append((power, self.tuned(SHAPE, controlled, peak, power=power)))
        loss = lambda item: self.loss(SHAPE, controlled, item[1], power=item[0])
        power, rate = min(tried, key=loss)
        self.several(SHAPE, controlled, rate, power=power)

    def at_critical(self, peak: float, default: cases.Rule) -> None:
        """The default rule and its limit from eight times the critical size, and their baseline."""
        made, config = self.made, self.config
        settings = {**self.case._asdict(), "name": "critical", "rate": peak, "share": config.share}
        self.show(f"{_name(self.case)}: critical size")
        found = self.cache.get_or_make(settings, lambda: made.critical_size(peak, LARGEST_BRANCH))
        size = min(8 * found["batch_size"], made.num_examples // MIN_STEPS)
        times = size / found["batch_size"]
        more = {"critical": found["batch_size"], "times": times}
        start = peak * 2.0 ** round(made.exponent * np.log2(size / made.batch_size) / 2)
        label = f"{CRITICAL}: constant"
        rate = self.tuned(label, made.controlled, start, batch_size=size)
        self.several(label, made.controlled, rate, batch_size=size, columns=more)
        for rule in (default, default._replace(limit=cases.LIMITS[self.case.optimizer])):
            make = made.seesaw if rule.limit else made.planned
            label = f"{CRITICAL}: {rule.label}"
            self.several(label, make, rate, rule=rule, batch_size=size, columns=more)

    def tuned(self, name: str, make: Callable[..., Any], start: float, **options: Any) -> float:
        """The best peak rate of the grid."""
        return best_rate(lambda rate: self.loss(name, make, rate, **options), start)

    def loss(self, name: str, make: Callable[..., Any], rate: float, **options: Any) -> float:
        """The validation loss, of as many seeds as rates are chosen with."""
        seeds = self.config.seeds[: self.config.tuning_seeds]
        return float(
            np.mean([self.one(name, make, rate, s, **options)["validation_loss"] for s in seeds])
        )

    def several(
        self, name: str, make: Callable[..., Any], rate: float, columns: Any = None, **options: Any
    ) -> None:
        """The runs of all seeds, as rows."""
        for seed in self.config.seeds:
            row = self.one(name, make, rate, seed, **options)
            row = {**row, "method": name, "part": "B", "batch_size": options.get("batch_size")}
            row |= {"power": options.get("power", 1.0), **(columns or {})}
            row["batch_size"] = row["batch_size"] or self.made.batch_size
            self.rows.append(row)

    def one(self, name: str, make: Callable[..., Any], rate: float, seed: int, **options: Any):
        """One run, which is not repeated if it is known: its row."""
        told = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
        if told.get("power") == 1.0:  # the baseline by another name
            del told["power"], options["power"]
        settings = {**self.case._asdict(), "run": make.__name__, "seed": seed, "rate": rate}
        settings |= {"share": self.config.share, **told}

        def train():
            self.show(f"{_name(self.case)}: {name}, rate {rate:.3g}, seed {seed}")
            row, windows, _ = make(name, seed=seed, rate=rate, **options)
            drawn = make.__name__ in ("seesaw", "noise_floor") and seed == self.config.seeds[0]
            return row, windows if drawn else []

        row, windows = self.cache.get_or_make(settings, train)
        self.windows += windows
        return row


def _name(case: cases.Case) -> str:
    return ", ".join(case)


def usage(config: Any) -> None:
    """Raises a UsageError if a flag names something unknown."""
    for flag, given, known in (
        ("--tasks", config.tasks, tuple(cases.TASKS)),
        ("--optimizers", config.optimizers, cases.OPTIMIZERS),
        ("--decays", config.decays, tuple(decays.DECAYS)),
        ("--controls", config.controls, CONTROLS),
    ):
        if set(given) - set(known):
            unknown = ", ".join(sorted(set(given) - set(known)))
            raise _runner.UsageError(f"{flag} must be among {', '.join(known)}, got {unknown}.")
