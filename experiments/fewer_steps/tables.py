"""The tables and figures of :mod:`experiments.fewer_steps`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from arbiter_jax import metrics, plotting
from experiments import _runner
from experiments.fewer_steps import cases, compare

PER_TABLE = 4  # cases side by side
STANDARD_ERRORS = 2.3  # of the test for non-inferiority
LARGE = f"{compare.CRITICAL}: {compare.BASELINE}"
CLIPPED = 8.0  # %, the upper edge of the figure


class Outcome(NamedTuple):
    """What a method did in a case, against its baseline, paired by seed."""

    over: np.ndarray  # [seeds], test loss over the baseline's, in %
    share: float  # of the baseline's steps
    time: float  # the same on a machine on which a step of up to 512 examples takes the same time
    row: dict[str, Any]  # of the first seed

    @property
    def mean(self) -> float:
        """The mean over seeds, infinite if one diverged."""
        return float(np.mean(np.nan_to_num(self.over, nan=np.inf)))


def judge(rows: list[dict[str, Any]]) -> dict[cases.Case, dict[str, Outcome]]:
    """{case: {method: outcome}}; rows from 8 times the critical size have their own baseline."""
    found: dict[cases.Case, dict[str, Outcome]] = {}
    for key, group in _runner.by(rows, "task_name", "optimizer", "decay").items():
        methods = _runner.by(group, "method")
        outcomes = found[cases.Case(*key)] = {}
        for name, runs in methods.items():
            prefix = f"{compare.CRITICAL}: " if name.startswith(compare.CRITICAL) else ""
            against = {row["seed"]: row for row in methods[prefix + compare.BASELINE]}
            pairs = [(row, against[row["seed"]]) for row in runs]
            ratio = lambda field, pairs=pairs: np.array([a[field] / b[field] for a, b in pairs])
            outcomes[name] = Outcome(
                100 * (ratio("test_loss") - 1),
                float(np.mean(ratio("num_steps"))),
                float(np.mean(ratio("time"))),
                runs[0],
            )
    return found


def cell(outcome: Outcome | None) -> str:
    """Mean and interval of the loss, and the share of the steps."""
    if outcome is None:
        return "-"
    if not np.isfinite(outcome.mean):
        return f"diverges ({outcome.share:.2f})"
    mean, half = metrics.mean_and_interval(outcome.over)
    spread = "" if np.isnan(half) else f" ± {half:.1f}"
    return f"{mean:+.1f}{spread} ({outcome.share:.2f})"


def tables(rows: list[dict[str, Any]]) -> list[Any]:
    """A table of a few cases each, methods as lines; then what became of the claim."""
    found = judge(rows)
    shown = []
    names = list(dict.fromkeys(name for outcomes in found.values() for name in outcomes))
    names.sort(key=lambda name: name.startswith(compare.CRITICAL))
    chosen = list(found.items())
    for i in range(0, len(chosen), PER_TABLE):
        part = chosen[i : i + PER_TABLE]
        lines = [["baseline: test loss", *(_baseline(rows, case) for case, _ in part)]]
        lines += [
            [name, *(cell(outcomes.get(name)) for _, outcomes in part)]
            for name in names
            if name not in (compare.BASELINE, LARGE)
            and any(name in outcomes for _, outcomes in part)
        ]
        if any(LARGE in outcomes for _, outcomes in part):
            sizes = [_large(outcomes.get(LARGE)) for _, outcomes in part]
            lines.append([f"{compare.CRITICAL}: baseline", *sizes])
        shown.append(
            _runner.make_table(
                "B. test loss over that of the same decay at B0, in % (share of its steps)",
                ["", *(", ".join(case) for case, _ in part)],
                lines,
                "Baseline: B0, peak rate, steps. ±: 95% interval over seeds, paired. Every constant\n"
                "size and the noise floor have their own best peak rate of a grid, by validation\n"
                "loss; seesaw has the baseline's. p: exponent of the rate. 8 x critical: from eight\n"
                "times the critical size, over that size constant at its own best rate.",
            )
        )
    return [*shown, _runner.make_table(*_verdict(found))]


def _baseline(rows: list[dict[str, Any]], case: cases.Case) -> str:
    runs = [
        row
        for row in rows
        if (row["task_name"], row["optimizer"], row["decay"]) == tuple(case)
        and row["method"] == compare.BASELINE
    ]
    loss = np.mean([row["test_loss"] for row in runs])
    row = runs[0]
    return f"{loss:.4f} ({row['batch_size']}, {row['learning_rate']:g}, {row['num_steps']:,})"


def _large(outcome: Outcome | None) -> str:
    """The size, and how many times the critical one it is: 8, unless the budget is too small."""
    if outcome is None:
        return "-"
    row = outcome.row
    return (
        f"{row['batch_size']:,} = {row['times']:g} x {row['critical']}, {row['num_steps']:,} steps"
    )


def is_no_worse(over: np.ndarray, margin: float) -> bool:
    """Whether the loss is at most `margin` above, by 2.3 standard errors."""
    error = np.std(over, ddof=1) / np.sqrt(len(over)) if len(over) > 1 else 0.0
    return bool(np.mean(over) + STANDARD_ERRORS * error <= margin)


def _verdict(found: dict[cases.Case, dict[str, Outcome]]) -> tuple[Any, ...]:
    """One line per rule over all cases: what a reader in a hurry reads."""
    lines = []
    names = dict.fromkeys(name for outcomes in found.values() for name in outcomes)
    for name in names:
        if name in (compare.BASELINE, LARGE):
            continue
        ours = [outcomes for outcomes in found.values() if name in outcomes]
        means = np.array([outcomes[name].mean for outcomes in ours])
        ended = means[np.isfinite(means)]
        shapes = [
            outcomes[name].mean - outcomes[compare.SHAPE].mean
            for outcomes in ours
            if compare.SHAPE in outcomes and not name.startswith(compare.CRITICAL)
        ]
        tested = [
            is_no_worse(outcomes[name].over, outcomes[compare.SHORTER].mean)
            for outcomes in ours
            if compare.SHORTER in outcomes and not name.startswith(compare.CRITICAL)
        ]
        lines.append(
            [
                name,
                str(len(ours)),
                f"{np.mean([outcomes[name].share for outcomes in ours]):.2f}",
                f"{np.mean([outcomes[name].time for outcomes in ours]):.2f}",
                f"{ended.mean():+.1f}" if len(ended) else "-",
                f"{means.max():+.1f}",
                f"{np.mean(means <= 1):.0%}",
                f"{np.mean(shapes):+.1f}" if shapes else "-",
                f"{sum(tested)} of {len(tested)}" if tested else "-",
            ]
        )
    columns = ["over all cases", "cases", "steps", "time", "loss, %", "worst", "within 1%"]
    columns += ["over best shape", "no worse than 95%"]
    return (
        "B. what to take from it",
        columns,
        lines,
        "steps: share of the baseline's; time: the same where steps of up to 512 examples take equally "
        "long. loss: mean test loss\nover the baseline's (worst: of the cases). over best shape: "
        "over the constant size with the best power of the decay. no\nworse than 95%: by 2.3 standard "
        "errors no higher than the baseline on 95% of the examples.",
    )


SHORT = {
    compare.BASELINE: "the same decay at B0",
    compare.SHORTER: "95% of the examples",
    compare.LARGER: "larger B",
    compare.SHAPE: "best shape",
    compare.SHUFFLED: "shuffled",
    compare.FLOOR: "noise floor",
}


def front(rows: list[dict[str, Any]]):
    """Steps and loss of every method, a panel per case: the mean, the range of the seeds, the name."""
    found = [(case, outcomes) for case, outcomes in judge(rows).items()][:12]
    width = min(2, len(found))
    height = -(-len(found) // width)
    fig, axes = plotting.figure(height, width, size=(5.2 * width, 3.6 * height), squeeze=False)
    for ax in axes.flat[len(found) :]:
        ax.set_visible(False)
    for ax, (case, outcomes) in zip(axes.flat, found, strict=False):
        _panel(ax, outcomes)
        ax.set_title(", ".join(case), fontsize=9, loc="left")
    return fig


def _panel(ax: Any, outcomes: dict[str, Outcome]) -> None:
    means, ends = [], []
    for name, outcome in outcomes.items():
        if name.startswith(compare.CRITICAL):
            continue
        ours = name.startswith("seesaw")
        # The markers differ as well, because gray prints lose the colors.
        color, marker = (plotting.COLORS[0], "o") if ours else (plotting.COLORS[1], "s")
        if name == compare.BASELINE:
            color, marker = "0.1", "D"
        y = min(outcome.mean, CLIPPED)
        ax.plot(
            outcome.share,
            y,
            marker if y < CLIPPED else "^",
            ms=5,
            color=color,
            zorder=3,
            label=SHORT.get(name, name.removeprefix("seesaw, ")),
        )
        means.append(y)
        seeds = np.minimum(outcome.over, CLIPPED)
        ax.vlines(outcome.share, np.min(seeds), np.max(seeds), color=color, lw=0.8, alpha=0.6)
        ends += [np.min(seeds), np.max(seeds)]
    low, high = min(*ends, *means), max(*ends, *means)
    gap = max(high - low, 1.0)
    low, high = low - 0.15 * gap, high + 0.15 * gap
    ax.set_ylim(low, high)
    ax.axhline(0, color="0.4", lw=0.8)
    ax.set_xlabel("serial steps, share of the baseline's")
    ax.set_ylabel("test loss over the baseline's [%]")
    plotting.label_ends(ax, fontsize=6.5)


def exact(found: dict[str, Any]):
    """The gap against the peak rate, from part A."""
    fig, ax = plotting.figure(size=(5.5, 3.8))
    for i, (trade, group) in enumerate(_runner.by(found["gaps"], "trade").items()):
        rates = np.array([row["peak"] for row in group])
        gaps = 100 * np.abs([row["gap"] for row in group])
        color = plotting.COLORS[i]
        ax.loglog(rates, gaps, "o", ms=5, color=color)
        ax.loglog(rates, gaps[-1] * rates / rates[-1], color=color, lw=0.8)
        # Written out at the rates themselves: the labels of a short logarithmic axis overlap.
        ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
        ax.set_xticks([], minor=True)
        ax.annotate(
            f"trade {trade:g}", (rates[0], gaps[0]), (6, 0), textcoords="offset points", color=color
        )
    ax.set_xlabel("peak rate")
    ax.set_ylabel("|risk of seesaw / of the cosine - 1| [%]")
    ax.set_title("linear regression: dots exact, lines proportional to the rate", fontsize=9)
    ax.margins(x=0.2)
    return fig
