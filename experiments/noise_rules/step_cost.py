"""The part of :mod:`experiments.noise_rules` in which every step has a fixed cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import arbiter_jax as aj
from arbiter_jax import metrics, plotting
from experiments import _runner, _training
from experiments.noise_rules import cases

FLAT = 512  # a step on fewer examples costs as much as one on this many
COSTLY = cases.Case("fashion_mnist", "momentum", 0.03)
BUDGETS = (1.0, 1.5, 2.0, 3.0)  # budgets of the noise floor, in units of the task's examples
COST = 4.0  # cost at which a constant size ends, in units of the task's examples


def _cost(record: Any) -> float:
    return record.num_steps * max(record.batch_size, FLAT)


def _curve(task: _training.Task, total: float, points: int = 20) -> tuple[list, Callable]:
    """Returns (curve, callback): the callback appends (cost, validation loss) to the curve."""
    curve: list[tuple[float, float]] = []
    spent, next_at = [0.0], [total / points]

    def record_loss(record, state):
        spent[0] += _cost(record)
        if spent[0] >= next_at[0]:
            next_at[0] += total / points
            loss = metrics.evaluate(
                task.losses.predict, task.per_example_loss, state.params, task.dataset.validation
            ).loss
            curve.append((spent[0], loss))
        return spent[0] >= total

    return curve, record_loss


def step_cost(config: Any) -> list[dict[str, Any]]:
    """Runs constant sizes and both rules, which are passed the fixed cost of a step."""
    base = cases.definition(COSTLY.task, config.share)
    total, rows = COST * base.num_examples, []
    for size in [2**k for k in range(6, base.max_batch_size.bit_length())]:
        share = config.share * COST * size / max(size, FLAT)
        rows += _curves("constant", size, share, total, config)
    rows += _curves("expected_gain", 64, config.share * COST, total, config)
    for budget in BUDGETS:
        rows += _curves("noise_floor", 64, config.share * budget, np.inf, config)
    return rows


def _curves(name, start, share, total, config) -> list[dict[str, Any]]:
    made, rows = cases.definition(COSTLY.task, share), []
    options = {} if name == "constant" else {"step_cost": float(FLAT)}
    for seed in config.seeds:
        shown = aj.callbacks.progress(f"step cost: {name} {start}, seed {seed}")
        curve, record_loss = _curve(made.task, total)
        row, _, fit = cases.run(
            COSTLY,
            name,
            seed=seed,
            share=share,
            start=start,
            callbacks=[shown, record_loss],
            **options,
        )
        end = (sum(map(_cost, fit.history)), row["validation_loss"])
        rows.append({"part": "step_cost", **row, "share": share, "curve": [*curve, end]})
    if name != "constant":
        cases.forget_programs()
    return rows


def reached(rows: list[dict[str, Any]]) -> tuple[float, dict[str, float]]:
    """Returns (target, {name: cost}): the cost at which each size and rule reaches a target loss.

    The target is the loss at which the best constant size ends. The noise floor needs its budget in
    advance and grows only at the end, so only the ends of its runs count; costs between two budgets
    are interpolated.
    """
    groups = _runner.by(rows, "method", "start", "share")
    curves: dict[str, np.ndarray] = {}
    ends = []
    for (method, start, _), group in groups.items():
        if method == "noise_floor":
            ends.append(np.mean([row["curve"][-1] for row in group], axis=0))
            continue
        shortest = min(len(row["curve"]) for row in group)
        curve = np.mean([row["curve"][:shortest] for row in group], axis=0)
        curves[f"constant {start}" if method == "constant" else method] = curve
    curves["noise_floor"] = np.array(ends)
    target = min(c[-1, 1] for name, c in curves.items() if name.startswith("constant"))
    return target, {name: _crossing(curve, target) for name, curve in curves.items()}


def _crossing(curve: np.ndarray, target: float) -> float:
    """The cost at which a curve first reaches a loss; nan if it never does."""
    below = np.flatnonzero(curve[:, 1] <= target)
    if not len(below):
        return float("nan")
    i = below[0]
    if i == 0:
        return float(curve[0, 0])
    (x0, y0), (x1, y1) = curve[i - 1], curve[i]
    return float(x0 + (x1 - x0) * (y0 - target) / (y0 - y1))


def step_cost_table(rows: list[dict[str, Any]]):
    """The cost to the target loss, in units of the smallest step, and over that of the best size."""
    target, costs = reached(rows)
    best = np.nanmin([cost for name, cost in costs.items() if name.startswith("constant")])
    cells = [
        [name, f"{cost / FLAT:,.0f}", f"{cost / best:.2f}"] if cost == cost else [name, "-", "-"]
        for name, cost in costs.items()
    ]
    return _runner.make_table(
        f"cost to a validation loss of {target:.4f}, where a step costs max({FLAT}, B)",
        ["batch size", f"cost / {FLAT}", "of the best size's"],
        cells,
        f"{COSTLY.task}, momentum .9, rate {COSTLY.learning_rate:g}. The target is the loss at which "
        "the best constant size ends. -: not reached.\nnoise_floor: over budgets of "
        + ", ".join(f"{b:g}" for b in BUDGETS)
        + " times the task's examples, each by its end.",
    )


def plot_step_cost(rows: list[dict[str, Any]]):
    """Validation loss against cost."""
    target, _ = reached(rows)
    fig, ax = plotting.figure(size=(7.0, 4.2))
    for i, ((method, start), group) in enumerate(_runner.by(rows, "method", "start").items()):
        label = f"constant {start}" if method == "constant" else method
        style = {"color": plotting.COLORS[i % len(plotting.COLORS)], "lw": 1.2}
        if method == "noise_floor":
            ends = np.array([row["curve"][-1] for row in group])
            ax.plot(ends[:, 0] / FLAT, ends[:, 1], "o", ms=4, label=f"{label}, ends", **style)
            continue
        for j, row in enumerate(group):
            curve = np.array(row["curve"])
            ax.plot(curve[:, 0] / FLAT, curve[:, 1], label=None if j else label, **style)
    ax.axhline(target, color="0.4", lw=0.8, ls="--")
    ax.set_xlabel(f"cost, in steps of at most {FLAT} examples")
    ax.set_ylabel("validation loss")
    ax.set_ylim(0.9 * target, 1.6 * target)
    ax.legend(frameon=False, fontsize=8, ncols=2)
    return fig
