"""The figure of the README: the same examples and network, three ways to choose the batch size.

Claim (ours, a picture of `fewer_steps` and `noise_rules`): a cosine decay at a constant batch size,
`seesaw` with the same schedule, and `noise_floor` at a constant rate end near the same test loss, and
the last two take far fewer steps. It tunes nothing: the peak rate is that of the baseline in
`fewer_steps`.
Command: python -m experiments.three_ways [--dataset digits]
Time: 4 CPU minutes. Needs `apt-get install dataset-fashion-mnist`.
Expected: test losses within 2% of each other, in about half of the steps.
Measured: .331, .330 and .330 after 6,000, 3,298 and 2,497 steps (3 seeds). All numbers: three_ways.md.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import arbiter_jax as aj
from arbiter_jax import plotting, schedulers
from experiments import _runner, _training


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "fashion_mnist"
    hidden_size: int = 256
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: float = 4.0
    learning_rate: float = 0.02
    momentum: float = 0.9
    batch_size: int = _runner.flag(32, "constant batch size, and the one that seesaw starts from")
    max_batch_size: int = 512
    every: int = _runner.flag(5, "windows of 10 steps between two evaluations on the test split")


CONFIGS = {
    "smoke": Config(dataset="digits", hidden_size=16, seeds=(0,), epochs=2, every=1),
    "default": Config(),
    "paper": Config(seeds=(0, 1, 2, 3, 4)),
}

CONSTANT, SEESAW, FLOOR = "constant, cosine decay", "seesaw, same cosine", "noise floor, no decay"
STYLES = {
    CONSTANT: {"color": "#555555", "linestyle": (0, (4, 2))},
    SEESAW: {"color": plotting.COLORS[0], "linestyle": "-"},
    FLOOR: {"color": plotting.COLORS[1], "linestyle": (0, (1, 1))},
}


def _chains(task: _training.Task, config: Config, num_examples: int) -> dict[str, Any]:
    """The three chains; what they have in common is the network, the data and the peak rate."""
    schedule = optax.cosine_decay_schedule(config.learning_rate, num_examples)
    unscaled = optax.sgd(1.0, momentum=config.momentum)
    constant = optax.chain(
        unscaled,
        aj.learning_rate.scale_by_schedule(schedule),
        schedulers.constant(config.batch_size),
    )
    seesaw = aj.seesaw(
        unscaled,
        schedule,
        num_examples=num_examples,
        batch_size=config.batch_size,
        max_batch_size=config.max_batch_size,
    )
    floor = schedulers.noise_floor(
        task.losses.loss_fn, min_batch_size=8, max_batch_size=config.max_batch_size
    )
    optimizer = optax.sgd(config.learning_rate, momentum=config.momentum)
    return {CONSTANT: constant, SEESAW: seesaw, FLOOR: optax.chain(optimizer, floor)}


def run(config: Config) -> _runner.Results:
    results = _runner.Results(extra={"config": config})
    task = _training.make_task(config.dataset, "mlp", (config.hidden_size,))
    num_examples = int(config.epochs * task.num_train)
    for name, tx in _chains(task, config, num_examples).items():
        for seed in config.seeds:
            row, curve = _train(task, tx, name, seed, num_examples, config)
            results.rows.append(row)
            results.windows += curve
    return results


def _train(
    task: _training.Task, tx: Any, name: str, seed: int, num_examples: int, config: Config
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run: its row of the table, and the points of its curve."""
    model_key, run_key = jax.random.split(jax.random.key(seed))
    params, _ = task.model.init(model_key)
    test = aj.callbacks.evaluate(
        task.losses.predict, task.per_example_loss, task.dataset.test, config.every, name="test"
    )
    result = aj.fit(
        task.losses.loss_fn,
        params,
        tx,
        task.data,
        num_examples=num_examples,
        window=10,
        key=run_key,
        callbacks=[test],
    )
    shared = {"method": name, "seed": seed}
    curve = [
        {
            **shared,
            "num_examples": record.num_examples,
            "batch_size": record.batch_size,
            "test_loss": record.evaluation["test/loss"],
        }
        for record in result.history
        if record.evaluation
    ]
    row = {
        **shared,
        "test_loss": curve[-1]["test_loss"],
        "num_steps": int(result.state.num_steps),
        "num_examples": int(result.state.num_examples),
    }
    return row, curve


def table(results: _runner.Results):
    groups = _runner.by(results.rows, "method")
    baseline = groups[CONSTANT]
    steps = lambda group: float(np.mean([row["num_steps"] for row in group]))
    cells = [
        [
            name,
            _runner.interval(group, "test_loss", 4),
            _runner.difference(group, baseline),
            f"{steps(group):,.0f}",
            f"{steps(group) / steps(baseline):.2f}",
        ]
        for name, group in groups.items()
    ]
    config = results.extra["config"]
    return _runner.make_table(
        f"{config.dataset}, {results.rows[0]['num_examples']:,} examples, {len(config.seeds)} seeds",
        ["batch size", "test loss", "vs constant", "steps", "share of the steps"],
        cells,
    )


def plot(results: _runner.Results, output: Path) -> None:
    draw(results).savefig(output / "three_ways.png")


def draw(results: _runner.Results) -> Any:
    """Test loss and batch size over examples: the mean over seeds, and each run thin behind it."""
    fig, axes = plotting.figure(1, 2, size=(10.0, 3.4))
    groups = _runner.by(results.windows, "method", "seed")
    end = results.rows[0]["num_examples"] / 1000
    grid = np.linspace(0, end, 200)
    for ax, field in zip(axes, ("test_loss", "batch_size"), strict=True):
        for name, style in STYLES.items():
            runs = np.array(
                [
                    _resampled(curve, field, grid)
                    for (method, _), curve in groups.items()
                    if method == name
                ]
            )
            mean = runs.mean(0) if field == "test_loss" else np.exp(np.log(runs).mean(0))
            ax.plot(grid, runs.T, color=style["color"], linewidth=0.6, alpha=0.3)
            steps = np.mean([row["num_steps"] for row in results.rows if row["method"] == name])
            ax.plot(grid, mean, linewidth=2.0, label=f"{name}\n{steps:,.0f} steps", **style)
        ax.set(xlim=(0, end), xlabel="training examples seen [thousands]")
    losses = [point["test_loss"] for point in results.windows]
    axes[0].set(ylabel="test loss", ylim=(0, np.quantile(losses, 0.97)))
    axes[1].set_yscale("log", base=2)
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].set(ylabel="batch size [examples]")
    plotting.label_ends(axes[1], fontsize=10)
    return fig


def _resampled(curve: list[dict[str, Any]], field: str, grid: np.ndarray) -> np.ndarray:
    seen = [point["num_examples"] / 1000 for point in curve]
    return np.interp(grid, seen, [point[field] for point in curve])


if __name__ == "__main__":
    _runner.main("three_ways", CONFIGS, run, plot, table, __doc__.splitlines()[0])
