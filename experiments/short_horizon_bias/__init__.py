"""Short-horizon bias: what a look-ahead of a few steps does to learning rates and batch sizes.

Claim (arXiv:1803.02021): meta-optimization over a short horizon chooses rates that are far too small,
on a noisy quadratic where both optima are known exactly, and on a network, offline and online. The
same holds for batch sizes, which grow too early under a greedy rule, but not under the noise floor.
Every line of the table is a claim, what this run measured, and whether the claim holds.
Command: python -m experiments.short_horizon_bias [--config smoke|paper]
Time: 10 minutes.
Expected: every claim of the default config holds. Online, the rate keeps falling because Adam restarts
at every meta step, as in the published code, and so steps by the sign; with `--no-reset-meta-state` it
remembers the large derivatives of the start, and the rate stays at about a quarter.
Measured: greedy rates end at an excess loss of 9.1526, optimal ones at 4.0022. All numbers: README.md
in this folder.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from experiments import _runner
from experiments.short_horizon_bias import claims, descent, figures
from experiments.short_horizon_bias import noise_floor as noise
from experiments.short_horizon_bias import quadratic as toy

PARTS = ("toy", "batch_sizes", "noise_floor", "offline", "online", "surface")
SURFACE = ((0.01, 5.0), (0.05, 50.0))  # initial effective rates, decay exponents


@dataclasses.dataclass(frozen=True)
class Config:
    parts: tuple[str, ...] = _runner.flag(PARTS, "parts to run", PARTS)
    dataset: str = "digits"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    hidden_size: int = 100
    batch_size: int = 10
    num_examples: int = 1500
    time_constant: float = _runner.flag(500.0, "time constant of the rate's decay, in steps")
    noise_budgets: tuple[float, ...] = _runner.flag(
        (2_000.0, 20_000.0), "budgets on the quadratic, in examples"
    )
    horizons: tuple[int, ...] = _runner.flag((20, 100, 500, 2000), "offline look-aheads, in steps")
    meta_steps: tuple[int, ...] = _runner.flag((400, 200, 80, 60), "meta steps for each horizon")
    offline_rate: float = _runner.flag(0.05, "offline: Adam's rate, on the logarithms")
    offline_steps: int = _runner.flag(2000, "training steps with a learned schedule")
    online_steps: int = _runner.flag(4000, "online: training steps")
    online_rate: float = _runner.flag(0.01, "online: Adam's rate")
    meta_every: int = _runner.flag(10, "online: training steps per meta step")
    reset_meta_state: bool = _runner.flag(True, "online: restart Adam, as in the published code")
    manual_rates: tuple[float, ...] = _runner.flag(
        (0.1, 0.2, 0.3, 0.5, 0.7, 1.0), "effective rates; online meta-descent starts at the best"
    )
    surface_points: int = _runner.flag(12, "grid points along each axis of the surface")
    quick: bool = _runner.flag(False, "small quadratics")


CONFIGS = {
    "smoke": Config(
        parts=("toy", "offline"),
        seeds=(0,),
        hidden_size=20,
        num_examples=200,
        horizons=(5,),
        meta_steps=(5,),
        offline_steps=50,
        quick=True,
    ),
    "default": Config(),
    "paper": Config(
        dataset="mnist",
        batch_size=100,
        num_examples=60_000,
        time_constant=5000.0,
        horizons=(100, 1000, 5000, 20_000),
        meta_steps=(5000, 5000, 5000, 5000),
        offline_rate=0.01,
        offline_steps=20_000,
        online_steps=50_000,
        surface_points=24,
    ),
}


def _toy_config(config: Config) -> toy.ToyConfig:
    if not config.quick:
        return toy.ToyConfig()
    return toy.ToyConfig(
        dimensions=20,
        num_steps=20,
        momenta=(False,),
        horizons=(),
        conditions=(1.0, 30.0),
        sweep_steps=40,
        noises=(0.1, 10.0),
        look_aheads=(),
        num_examples=200,
        num_segments=8,
        segment_look_aheads=(1,),
    )


def run(config: Config) -> _runner.Results:
    if len(config.horizons) != len(config.meta_steps):
        raise _runner.UsageError(
            f"--meta-steps must have one number for each of the {len(config.horizons)} horizons, "
            f"got {len(config.meta_steps)}."
        )
    results, small = _runner.Results(extra={"config": config}), _toy_config(config)
    extra, rows = results.extra, results.rows
    if "toy" in config.parts:
        extra["toy"] = schedules, ratios = toy.schedules(small), toy.ratios(small)
        rows.extend(claims.toy(schedules, ratios, toy.without_noise(small), small))
    if "batch_sizes" in config.parts:
        extra["batch_sizes"] = toy.batch_sizes(small)
        rows.extend(claims.batch_sizes(extra["batch_sizes"]))
    if "noise_floor" in config.parts:
        extra["noise_floor"] = {budget: noise.measure(budget) for budget in config.noise_budgets}
        rows.extend(noise.rows(extra["noise_floor"]))
    if set(config.parts) & {"offline", "online", "surface"}:
        net = extra["net"] = descent.network(
            config.dataset,
            config.hidden_size,
            config.num_examples,
            config.batch_size,
            config.time_constant,
        )
    if "offline" in config.parts:
        extra["offline"] = {
            horizon: descent.offline(
                net, config.seeds, horizon, number, config.offline_steps, config.offline_rate
            )
            for horizon, number in zip(config.horizons, config.meta_steps, strict=True)
        }
        rows.extend(claims.offline(extra["offline"], net, config.offline_steps))
    if "online" in config.parts:
        extra["online"] = descent.online(
            net,
            config.seeds,
            config.manual_rates,
            config.online_steps,
            config.meta_every,
            config.online_rate,
            config.reset_meta_state,
        )
        rows.extend(claims.online(extra["online"], config.manual_rates, config.online_steps))
    if "surface" in config.parts:
        grid = tuple(np.geomspace(*ends, config.surface_points) for ends in SURFACE)
        extra["surface"] = grid, descent.surface(net, config.seeds[0], config.horizons, *grid)
        at = (extra["surface"][1], grid, config.horizons, config.offline_steps, net)
        rows.extend(claims.surface(*at))
    results.windows = [*_records(extra, config)]
    return results


def _records(extra: dict[str, Any], config: Config):
    """Yields rows of metrics.csv: rates and losses along every schedule, a few per run."""
    for name, schedule in extra.get("toy", ({}, None))[0].items():
        columns = (schedule.learning_rates, schedule.momenta, schedule.excess_loss[1:])
        for step, (rate, momentum, loss) in enumerate(zip(*columns, strict=True), 1):
            yield {"method": f"toy, {name}", "seed": "", "step": step, "learning_rate": rate,
                   "momentum": momentum, "loss": loss}  # fmt: skip
    for horizon, runs in extra.get("offline", {}).items():
        for i, seed in enumerate(config.seeds):
            for step in range(0, len(runs["history"][0][i]), 5):
                rate, momentum, decay = (field[i, step] for field in runs["history"])
                yield {"method": f"offline, T = {horizon}", "seed": seed, "step": step,
                       "learning_rate": rate, "momentum": momentum, "decay": decay}  # fmt: skip
    for name in ("manual", "adjusted") if "online" in extra else ():
        runs = extra["online"][name]
        for i, seed in enumerate(config.seeds):
            for step in range(0, config.online_steps, max(1, config.online_steps // 200)):
                yield {"method": f"online, {name}", "seed": seed, "step": step,
                       "learning_rate": runs["rates"][i, step] * (1 - runs["momenta"][i, step]),
                       "momentum": runs["momenta"][i, step],
                       "loss": runs["losses"][i, step]}  # fmt: skip


def table(results: _runner.Results):
    from rich.console import Group

    config, extra = results.extra["config"], results.extra
    rows = [
        [row["method"], row["measured"], "yes" if row["holds"] else "NO"] for row in results.rows
    ]
    listed = _runner.make_table(
        f"short-horizon bias: noisy quadratic; {config.dataset}, {len(config.seeds)} seeds",
        ["claim", "measured", "holds"],
        rows,
        "ratio: excess loss at the end, of greedy over optimal. With several seeds, a claim holds if "
        "it holds for every seed.",
    )
    tables = [listed]
    if "offline" in extra:
        cells = claims.offline_table(extra["offline"], extra["net"], config.offline_steps)
        tables.append(
            _runner.make_table(
                f"offline meta-descent, then {config.offline_steps:,} steps with what it learned",
                ["look-ahead", "meta steps", "first rate", "decay", "last rate", "training loss"],
                cells,
                "rates: effective, lowest and highest seed. training loss: over all examples, at\n"
                "the end, ± half-width of the 95% interval over seeds.",
            )
        )
    if "online" in extra:
        tables.append(
            _runner.make_table(
                f"online: training loss after {config.online_steps:,} steps",
                ["from", "meta-descent", *(f"rate {rate:g}" for rate in config.manual_rates)],
                [claims.online_cells(extra["online"], config.manual_rates)],
                "rate: effective, left alone; then as for meta-descent, exponential decay in the "
                "second half.",
            )
        )
    return Group(*tables)


def plot(results: _runner.Results, output: Path) -> None:
    extra, config = results.extra, results.extra["config"]
    small, net = _toy_config(config), extra.get("net")
    if "toy" in extra:
        figures.schedules(extra["toy"][0], output / "toy_schedules.png")
        figures.ratios(small, extra["toy"][1], output / "toy_ratios.png")
    if "batch_sizes" in extra:
        figures.batch_sizes(small, extra["batch_sizes"], output / "batch_sizes.png")
    if "noise_floor" in extra:
        noise.plot(extra["noise_floor"], output / "noise_floor.png")
    if "offline" in extra:
        figures.offline(config, net, extra["offline"], output / "offline.png")
    if "online" in extra:
        figures.online(config, extra["online"], output / "online.png")
    if "surface" in extra:
        learned = extra.get("offline", {})
        figures.surface(config, net, *extra["surface"], learned, output / "surface.png")
