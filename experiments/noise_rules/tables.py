"""The table of :mod:`experiments.noise_rules`: rows are compared, counted, shown and drawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from arbiter_jax import plotting
from experiments import _runner
from experiments.noise_rules import cases


def mean(rows: list[dict], field: str = "test_loss") -> float:
    """The mean over seeds; infinite if one diverged, so that it can be compared."""
    return float(np.mean([np.nan_to_num(row[field], nan=np.inf) for row in rows]))


def judge(rows: list[dict]) -> list[dict[str, Any]]:
    """One record per case: the best constant sizes, and the outcome of each rule and start."""
    records = []
    rows = [row for row in rows if row.get("part") == "table"]
    for (task, kind, rate), group in _runner.by(
        rows, "task_name", "optimizer", "case_rate"
    ).items():
        constants = [row for row in group if row["method"] == "constant"]
        found = _runner.by(constants, "decay", "start")
        fixed = {key: runs for key, runs in found.items() if key[0] == "constant"}
        best = min(fixed, key=lambda key: mean(fixed[key]))
        chosen = min(fixed, key=lambda key: mean(fixed[key], "validation_loss"))
        decayed = min(found, key=lambda key: mean(found[key]))
        record = {
            "case": cases.Case(task, kind, rate),
            "constant": (best[1], mean(found[best])),
            "chosen": (chosen[1], mean(found[chosen])),
            "decayed": (*decayed, mean(found[decayed]), mean(found[decayed], "num_steps")),
            "rules": {},
        }
        ruled = _runner.by([row for row in group if row["method"] != "constant"], "method", "start")
        held = [key for key in ruled if key[0] == cases.HINDSIGHT]
        for key in sorted(held, key=lambda key: mean(ruled[key]))[1:]:
            del ruled[key]
        for (name, start), runs in ruled.items():
            record["rules"][name, start] = {
                "over_constant": mean(runs) / mean(found[best]) - 1,
                "over_chosen": mean(runs) / mean(found[chosen]) - 1,
                "over_decayed": mean(runs) / mean(found[decayed]) - 1,
                "steps": mean(runs, "num_steps") / mean(found[decayed], "num_steps"),
                "num_steps": mean(runs, "num_steps"),
            }
        records.append(record)
    return records


def counted(records: list[dict], task: str | None = None) -> list[list[str]]:
    """One line per rule: in which shares of the cases (case and start) it meets each criterion."""
    lines = []
    for name in (*cases.NOISE_RULES, cases.HINDSIGHT):
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
        chosen = np.array([o["over_chosen"] for o in outcomes])
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
                f"{100 * np.mean(chosen < 0):.0f}",
                f"{100 * np.mean(near):.0f}",
                f"{100 * np.mean(cheap):.0f}",
            ]
        )
    return lines


def tables(rows: list[dict], config: Any) -> list[Any]:
    """The table of all cases, and the table of counts."""
    records = judge(rows)
    cells = []
    for record in records:
        case, (size, loss) = record["case"], record["constant"]
        chosen_size, chosen_loss = record["chosen"]
        decay, decayed_size, decayed_loss, decayed_steps = record["decayed"]
        outcome = lambda name, record=record: record["rules"].get((name, config.middle))
        against = lambda name, outcome=outcome: (
            f"{100 * outcome(name)['over_constant']:+.1f}" if outcome(name) else "-"
        )
        spread = [
            o["over_constant"] for (name, _), o in record["rules"].items() if name == "noise_floor"
        ]
        floor = outcome("noise_floor")
        held = [
            f"{100 * o['over_constant']:+.1f} ({start:g})"
            for (name, start), o in record["rules"].items()
            if name == cases.HINDSIGHT
        ]
        cells.append(
            [
                f"{case.task}, {case.optimizer} {case.learning_rate:g}",
                f"{loss:.4f} ({size})",
                f"{chosen_loss:.4f} ({chosen_size})",
                f"{decayed_loss:.4f} ({decayed_size}, {decay})",
                f"{100 * min(spread):+.1f} to {100 * max(spread):+.1f}" if spread else "-",
                f"{floor['num_steps']:,.0f} / {decayed_steps:,.0f}" if floor else "-",
                *map(against, cases.NOISE_RULES[1:]),
                *(held or ["-"]),
            ]
        )
    listed = _runner.make_table(
        f"mean test loss, {len(config.seeds)} seeds, equal examples within a task",
        [
            *("case", "best constant", "chosen", "with decay", "noise floor %", "steps"),
            *cases.NOISE_RULES[1:],
            cases.HINDSIGHT,
        ],
        cells,
        "best constant: test loss of the best constant size at a constant rate (its size); chosen: of "
        "the one with the lowest\nvalidation loss of those tried; with decay: of the best size with "
        "the best of constant rate, cosine and decay in\nthe last fifth. noise floor: mean test loss "
        "over that of the best constant size, lowest and highest of the starts\n"
        f"{', '.join(map(str, config.starts))}; the other rules from {config.middle}. "
        "steps: of the noise floor / of the best\nsize with decay. noise_floor uses validation "
        "examples as well, noise_floor_training does not.\nbest_held: of five sizes around the best "
        "constant one, held and grown likewise, the one with the lowest test\nloss in hindsight "
        "(its size): what a rule of this form could reach.",
    )
    lines = [line for task in (*config.tasks, None) for line in counted(records, task)]
    columns = ["rule", "cases", "below %", "within 1%", "mean %", "median %", "worst %"]
    columns += ["diverged", "below chosen %", "within 2% of decay", "and 60% of steps"]
    counts = _runner.make_table(
        "how often, over all cases and starts",
        columns,
        lines,
        "below, within, mean (of those that did not diverge), median, worst: test loss against the "
        "best constant size\nat a constant rate, which is known afterwards; below chosen: against the "
        "one chosen by validation loss.\nwithin 2% of decay: of the best size with the "
        "best decay; and that in at most 60% of its steps.\nAll in % of the cases or of the loss.",
    )
    return [listed, counts]


def plot(results: _runner.Results):
    """Above, what each rule gains or loses in every case; below, the sizes of the noise floor."""
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
    held = [o for r in records for (rule, _), o in r["rules"].items() if rule == cases.HINDSIGHT]
    if len(held) == len(records):
        values = [100 * outcome["over_constant"] for outcome in held]
        top.plot(ticks, values, "_", color="0.1", ms=11, mew=1.2, label=cases.HINDSIGHT)
    top.axhline(0, color="0.4", lw=0.8)
    top.set_yscale("symlog", linthresh=10)
    top.set_ylabel("test loss over that of the\nbest constant size [%]")
    labels = [
        f"{r['case'].task}, {r['case'].optimizer} {r['case'].learning_rate:g}" for r in records
    ]
    top.set_xticks(ticks, labels, rotation=90, fontsize=6)
    top.legend(frameon=False, fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1))
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
    if bottom.get_legend_handles_labels()[0]:  # the noise floor was among the rules
        bottom.legend(frameon=False, fontsize=8, ncols=5)
    return fig
