"""The part of :mod:`experiments.feasibility` for the rules that measure noise.

Their objective depends on the batch size, so the schedule should follow the dynamics of training:
the learning rate, but neither the range nor the start.
"""

from __future__ import annotations

import functools
import types
from pathlib import Path
from typing import Any

import numpy as np

import arbiter_jax as aj
from arbiter_jax import objectives, plotting
from experiments import _methods, _runner, _training

METHODS = ("noise_floor", "expected_gain", "arbiter_noise_response")
BASE = {"high": 512, "rate": 0.03, "start": 64}
CASES: dict[str, dict[str, Any]] = {
    "8-512": {},
    "8-256": {"high": 256},
    "8-2048": {"high": 2048},
    "rate 0.01": {"rate": 0.01},
    "rate 0.1": {"rate": 0.1},
    "start 8": {"start": 8},
    "start 512": {"start": 512},
}
GROUPS = {
    "range": ("8-256", "8-512", "8-2048"),
    "learning rate": ("rate 0.01", "8-512", "rate 0.1"),
    "start": ("start 8", "8-512", "start 512"),
}
POINTS = 200  # equally spaced in the budget, at which sizes are compared
# Share of the budget after which the noise floor may grow.
HELD = objectives.FloorConfig.hold_until


def run(task: _training.Task, config: Any) -> dict[tuple[str, str, int], np.ndarray]:
    """The applied size at equal shares of the budget: {(method, case, seed): float[POINTS]}."""
    num_examples = int(config.noise_epochs * task.num_train)
    make = functools.partial(
        _methods.optimizer, momentum=config.momentum, decay="constant", num_examples=num_examples
    )
    paths = {}
    for name in (name for name in config.methods if name in METHODS):
        programs: dict[int, _methods.Method] = {}
        for case, change in CASES.items():
            given = BASE | change
            settings = types.SimpleNamespace(
                window=20,
                momentum=config.momentum,
                epochs=config.noise_epochs,
                min_batch_size=8,
                max_batch_size=given["high"],
                initial_batch_size=given["start"],
            )
            method = _methods.build(name, task, settings, make, given["rate"])
            program = programs.setdefault(given["high"], method)
            for seed in config.seeds:
                _, _, fit = _training.train(
                    task,
                    f"{name}, {case}",
                    program._replace(start=method.start),
                    seed=seed,
                    learning_rate=given["rate"],
                    num_examples=num_examples,
                    window=settings.window,
                    callbacks=[aj.callbacks.progress(f"{name}, {case}, seed {seed}")],
                )
                ends = np.array([record.num_examples for record in fit.history])
                sizes = np.array([record.batch_size for record in fit.history], float)
                at = np.searchsorted(ends, (np.arange(POINTS) + 0.5) / POINTS * num_examples)
                paths[name, case, seed] = sizes[np.minimum(at, len(sizes) - 1)]
    return paths


WIDTH = POINTS // 20  # of the moving average


def _mean(paths: dict, name: str, case: str) -> np.ndarray:
    """The geometric mean over seeds, smoothed over a twentieth of the budget."""
    logs = np.mean([np.log(p) for (n, c, _), p in paths.items() if (n, c) == (name, case)], 0)
    return np.exp(_smooth(logs))


def _smooth(values: np.ndarray) -> np.ndarray:
    padded = np.pad(values, (WIDTH // 2, WIDTH - WIDTH // 2 - 1), mode="edge")
    return np.convolve(padded, np.ones(WIDTH) / WIDTH, mode="valid")


def findings(paths: dict, name: str) -> dict[str, Any]:
    """Measures whether a schedule depends on the range, the learning rate and the start.

    All but `starts` are measured from a tenth of the budget to where the growth starts.

    Returns:
      `range` and `range_median`: ratio of the largest to the smallest size at equal examples over the
      ranges, at points where no run is at the end of its range; `rates`: the mean size at each
      learning rate; `monotone`: in how many of the `seeds` it rises with the rate; `starts`: the
      sizes at a tenth of the budget by start; `starts_apart`: the median ratio of the largest to the
      smallest of them after that.
    """
    lasts = slice(POINTS // 10, int(HELD * POINTS))
    ranges = np.stack([_mean(paths, name, case) for case in GROUPS["range"]])
    highs = np.array([(BASE | CASES[case])["high"] for case in GROUPS["range"]])[:, None]
    seeds = sorted({seed for _, _, seed in paths})
    # Leave out every point whose moving average contains a run, of any seed, at its limit.
    runs = np.stack([[paths[name, case, seed] for case in GROUPS["range"]] for seed in seeds])
    bound = ((runs <= 8.5) | (runs >= 0.95 * highs)).any((0, 1))
    free = _smooth(bound.astype(float)) < 0.5 / WIDTH
    spread = (ranges.max(0) / ranges.min(0))[lasts][free[lasts]]
    sizes = np.array(
        [
            [np.exp(np.mean(np.log(paths[name, case, seed][lasts]))) for seed in seeds]
            for case in GROUPS["learning rate"]
        ]
    )
    starts = np.stack([_mean(paths, name, case) for case in GROUPS["start"]])
    return {
        "range": float(spread.max()) if spread.size else float("nan"),
        "range_median": float(np.median(spread)) if spread.size else float("nan"),
        "rates": sizes.mean(1),
        "monotone": int(np.sum(np.all(np.diff(sizes, axis=0) > 0, axis=0))),
        "seeds": len(seeds),
        "starts": starts[:, POINTS // 10],
        "starts_apart": float(np.median((starts.max(0) / starts.min(0))[lasts])),
    }


def table(paths: dict, config: Any):
    """One row per rule."""
    rows = []
    for name in dict.fromkeys(name for name, _, _ in paths):
        found = findings(paths, name)
        low, middle, high = found["rates"]
        from_8, from_64, from_512 = found["starts"]
        rows.append(
            [
                name,
                f"{found['range_median']:.2f}, {found['range']:.2f}",
                f"{low:.0f} / {middle:.0f} / {high:.0f}",
                f"{found['monotone']} of {found['seeds']}",
                f"{from_8:.0f} / {from_64:.0f} / {from_512:.0f}",
                f"{found['starts_apart']:.2f}",
            ]
        )
    return _runner.make_table(
        f"{config.dataset}, {config.model}: what the schedules of the noise rules depend on",
        [
            "rule",
            "ranges apart: median, most",
            "size at rate .01 / .03 / .1",
            "monotone",
            "from 8 / 64 / 512",
            "starts apart",
        ],
        rows,
        "ranges apart: ratio of the sizes at equal examples over ranges 8-256, 8-512, 8-2048, where "
        "no limit binds, from a tenth\nof the budget to where the growth starts. size: geometric mean "
        "there. monotone: seeds in which it rises with the rate.\nfrom: size at a tenth of the budget, "
        "by where it started; apart: median ratio of the largest to the smallest after that.",
    )


def plot(paths: dict, config: Any, output: Path) -> None:
    """One row of panels per rule: ranges, rates, starts."""
    names = list(dict.fromkeys(name for name, _, _ in paths))
    fig, axes = plotting.figure(
        len(names), 3, size=(11.5, 2.9 * len(names) + 0.4), sharex=True, sharey=True, squeeze=False
    )
    share = (np.arange(POINTS) + 0.5) / POINTS
    for row, name in zip(axes, names, strict=True):
        for ax, (group, members) in zip(row, GROUPS.items(), strict=True):
            for color, case in zip(plotting.COLORS, members, strict=False):
                for i, seed in enumerate(config.seeds):
                    label = None if i else (case if CASES.get(case) else "base")
                    path = paths[name, case, seed]
                    ax.plot(share, path, color=color, lw=1.0, alpha=0.8, label=label)
            ax.set_yscale("log", base=2)
            ax.set_title(f"{name}: {group}", fontsize=9)
            ax.legend(frameon=False, fontsize=7)
        row[0].set_ylabel("batch size [examples]")
    for ax in axes[-1]:
        ax.set_xlabel("share of the examples")
    fig.suptitle(f"{config.dataset}, {config.model}; base: 8-512, rate .03, from 64", fontsize=10)
    fig.savefig(output / "noise_feasibility.png")
