"""Arbiter on four kinds of task: classification, regression, language modeling, an autoencoder.

Claim (arXiv:2205.08231, title and section 1): hyper-learning chooses batch sizes whatever the task.
LeNet classifies digits with augmentation inside the scan; a perceptron predicts the progression of
diabetes; a small transformer models English characters, with a loss per token; and an autoencoder that
was not written for this library (`attach`) compresses digits to eight numbers. The control is a
constant batch size at equal examples.
Command: python -m experiments.tasks [--tasks language] [--seeds 0 1 2 3 4]
Time: 7 minutes on one core.
Expected: every loss falls with every seed. Arbiter's test loss equals that of its control up to the
noise, except for the autoencoder: larger batches, fewer steps of Adam, and a loss 4% higher.
Measured: 24 of 24 runs fell; R² of the autoencoder .767 against .777. All numbers: tasks.md.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax

import arbiter_jax as aj
from arbiter_jax import metrics, plotting
from experiments import _methods, _runner, _training
from experiments._problems import DEFINITIONS, Definition


@dataclasses.dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = _runner.flag(tuple(DEFINITIONS), "tasks to train", tuple(DEFINITIONS))
    seeds: tuple[int, ...] = (0, 1, 2)
    share: float = _runner.flag(1.0, "share of each task's own number of epochs")
    window: int = 20
    min_batch_size: int = 8
    initial_batch_size: int = 32
    control: bool = _runner.flag(True, "also run a constant batch size")
    small: bool = _runner.flag(False, "use networks that compile in a second")


CONFIGS = {
    # From 48 the batch size stays in its bucket, which saves compiling one more program per task.
    "smoke": Config(
        seeds=(0,), share=0.05, window=10, initial_batch_size=48, control=False, small=True
    ),
    "default": Config(),
    "paper": Config(seeds=(0, 1, 2, 3, 4), share=3.0, window=100),
}


def _rules(definition: Definition, config: Config) -> dict[str, _methods.Method]:
    """{name: method}: Arbiter, and a constant batch size."""
    size = config.initial_batch_size

    def arbiter(seed):
        return aj.arbiter(
            definition.agent,
            definition.task.losses.response_loss,
            num_features=definition.task.model.num_features,
            min_batch_size=config.min_batch_size,
            max_batch_size=definition.max_batch_size,
            initial_batch_size=size,
            window=config.window,
            seed=seed,
        )

    def method(rule):
        start = lambda seed=0, learning_rate=None: optax.chain(definition.optimizer, rule(seed))
        return _methods.Method(start(), start)

    rules = {"arbiter": method(arbiter)}
    if config.control:
        rules[f"constant_{size}"] = method(lambda seed: aj.schedulers.constant(size))
    return rules


def run(config: Config) -> _runner.Results:
    results = _runner.Results(extra={"config": config, "fits": {}, "states": {}})
    definitions = results.extra["definitions"] = {
        name: DEFINITIONS[name](config.small) for name in config.tasks
    }
    for name, definition in definitions.items():
        task = definition.task
        num_examples = int(config.share * definition.epochs * task.num_train)
        for rule, method in _rules(definition, config).items():
            for seed in config.seeds:
                row, windows, fit = _training.train(
                    task,
                    rule,
                    method,
                    seed=seed,
                    learning_rate=float("nan"),  # the task's own
                    num_examples=num_examples,
                    window=config.window,
                    callbacks=[aj.callbacks.progress(f"{name}, {rule}, seed {seed}")],
                    transform_batch=definition.transform_batch,
                )
                row["task"] = name
                row["validation_loss_at_start"] = _validation_loss_at_start(task, seed)
                loss = fit.per_step("loss")
                row["training_loss_at_start"] = float(np.mean(loss[: config.window]))
                row["training_loss"] = float(np.mean(loss[-config.window :]))
                row["score"] = definition.score(row)
                row["score_name"] = definition.score_name
                results.rows.append(row)
                results.windows.extend({"task": name, **window} for window in windows)
                results.extra["fits"][name, rule, seed] = fit.history
                results.extra["states"][name, rule, seed] = fit.state
    return results


def _validation_loss_at_start(task: _training.Task, seed: int) -> float:
    model_key, _ = jax.random.split(jax.random.PRNGKey(seed))
    params, model_state = task.model.init(model_key)
    return metrics.evaluate(
        task.losses.predict, task.per_example_loss, params, task.dataset.validation, model_state
    ).loss


def fell(row: dict) -> bool:
    """Whether both the training loss and the validation loss of a run fell."""
    return (
        row["training_loss"] < row["training_loss_at_start"]
        and row["validation_loss"] < row["validation_loss_at_start"]
    )


def table(results: _runner.Results):
    config = results.extra["config"]
    rows = []
    groups = _runner.by(results.rows, "task", "method")
    for (task, method), group in groups.items():
        control = groups.get((task, f"constant_{config.initial_batch_size}"), group)
        mean = lambda field, group=group: float(np.mean([row[field] for row in group]))
        rows.append(
            [
                f"{task}, {method}",
                f"{_runner.interval(group, 'score', 3)} {group[0]['score_name']}",
                f"{mean('training_loss_at_start'):.2f} -> {mean('training_loss'):.2f}",
                f"{mean('validation_loss_at_start'):.2f} -> {mean('validation_loss'):.2f}",
                f"{sum(map(fell, group))} of {len(group)}",
                _runner.difference(group, control),
                f"{np.mean([np.mean(row['batch_sizes'][-3:]) for row in group]):,.0f}",
                f"{mean('seconds'):.1f}",
            ]
        )
    return _runner.make_table(
        f"four tasks, {len(config.seeds)} seeds, equal examples within a task",
        [
            "task, method",
            "test score",
            "training loss",
            "validation loss",
            "fell",
            "vs control",
            "final batch",
            "seconds",
        ],
        rows,
        "training loss: mean of the first window's steps -> mean of the last's; validation loss: "
        "before -> after. fell: runs\nwhose training and validation losses both fell. vs control: "
        "difference of the test losses, paired by seed. ± half-\nwidth of the 95% interval over seeds. "
        "final batch: mean of the last three windows. seconds: per\nrun, including compilation.",
    )


def plot(results: _runner.Results, output: Path) -> None:
    config, fits = results.extra["config"], results.extra["fits"]
    size = (3.4 * len(config.tasks) + 0.6, 5.4)
    fig, axes = plotting.figure(2, len(config.tasks), size=size, sharex="col", squeeze=False)
    for column, name in enumerate(config.tasks):
        top, bottom = axes[:, column]
        rules = dict.fromkeys(rule for task, rule, _ in fits if task == name)
        for color, rule in zip(plotting.COLORS, rules, strict=False):
            for i, seed in enumerate(config.seeds):
                history = fits[name, rule, seed]
                ends = np.array([record.num_examples for record in history]) / 1000
                style = {"color": color, "lw": 1.1, "label": rule if i == 0 else None}
                # A shortened last window has fewer steps, and so a noisier mean.
                whole = [record.num_steps == config.window for record in history]
                losses = np.array([record.loss for record in history])
                top.plot(ends[whole], losses[whole], alpha=0.8, **style)
                sizes = [record.batch_size for record in history]
                edges = np.concatenate([[0], ends])
                bottom.stairs(sizes, edges, baseline=None, alpha=0.8, **style)
        top.set_title(name, fontsize=10)
        top.set_yscale("log")
        bottom.set_yscale("log", base=2)
        low, high = config.min_batch_size, results.extra["definitions"][name].max_batch_size
        ticks = [2**k for k in range(int(np.log2(low)), int(np.log2(high)) + 1)]
        bottom.set_yticks(ticks, [str(tick) for tick in ticks])
        bottom.set_ylim(low / 1.15, high * 1.15)
        bottom.set_xlabel("training examples seen [thousands]")
    axes[0, 0].set_ylabel("training loss, mean of a window")
    axes[1, 0].set_ylabel("batch size [examples]")
    axes[0, 0].legend(frameon=False, fontsize=8)
    fig.savefig(output / "tasks.png")
    if "autoencoder" in config.tasks:
        _plot_reconstructions(results).savefig(output / "reconstructions.png")


def _plot_reconstructions(results: _runner.Results):
    config = results.extra["config"]
    task = results.extra["definitions"]["autoencoder"].task
    state = results.extra["states"]["autoencoder", "arbiter", config.seeds[0]]
    images = task.dataset.test[0][:12]
    restored = task.losses.predict(state.params, images)
    fig, axes = plotting.figure(2, len(images), size=(9.0, 2.0))
    for row, (label, pictures) in enumerate({"test image": images, "restored": restored}.items()):
        for ax, picture in zip(axes[row], pictures, strict=True):
            ax.imshow(picture[..., 0], cmap="gray_r", vmin=images.min(), vmax=images.max())
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            ax.spines[:].set_visible(False)
        axes[row, 0].set_ylabel(label, fontsize=8)
    fig.suptitle("digits compressed to eight numbers, trained with Arbiter", fontsize=9)
    return fig


if __name__ == "__main__":
    _runner.main("tasks", CONFIGS, run, plot, table, __doc__.splitlines()[0])
