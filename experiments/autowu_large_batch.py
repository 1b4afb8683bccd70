"""AutoWU, which needs no tuning, against tuned learning-rate schedules at large batch sizes.

Claim (arXiv:2107.05855, section 4): the rate that AutoWU finds within one run does as well as tuned
schedules, up to very large batches. Here a constant rate, cosine decay, and a linear warm-up with
cosine decay are tuned at every batch size: a grid of rates is run with the first seed, and the best
is chosen by validation accuracy, never by test accuracy. Images of 28 x 28 are halved to 14 x 14.

As published, the network has batch normalization, the optimizers decay the weights by .1, and a run
has 100 epochs or more. AutoWU's warm-up continues until the loss has risen for three epochs, at rates
that blow up the weights, and only weight decay or normalization shrinks them again. The fewer the
epochs, the higher the rate gets in these three: it grows by 10^(10 / epochs) in each. On the
validation split of digits LAMB needed the weight decay, and AdamP the batch normalization.
`--network plain --weight-decay 0 --epochs 60` shows the failure.
Command: python -m experiments.autowu_large_batch [--dataset fashion_mnist]
Time: 2 minutes on digits, 7.5 minutes on Fashion-MNIST.
Expected: on digits within half a point of the best tuned baseline at every batch size. Without weight
decay, on the plain network and in 60 epochs, LAMB at batch 1,024 ends at 11% against 96%.
Measured: on digits -.33 to +.66 points from the best baseline; on Fashion-MNIST -5.00 with LAMB at
batch 8,192. All numbers: autowu_large_batch.md.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import arbiter_jax as aj
from arbiter_jax import metrics, models, plotting
from experiments import _learning_rates, _methods, _runner, _training

OPTIMIZERS = {"lamb": optax.lamb, "adamp": aj.adamp}
NETWORKS = ("batch_norm", "layer_norm", "plain")


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "digits"
    network: str = _runner.flag("batch_norm", "how the hidden layer is normalized", NETWORKS)
    weight_decay: float = _runner.flag(0.1, "weight decay of the optimizer")
    optimizers: tuple[str, ...] = _runner.flag(
        ("lamb", "adamp"), "optimizers to run", tuple(OPTIMIZERS)
    )
    batch_sizes: tuple[int, ...] = _runner.flag(
        (), "batch sizes, in examples; 256 and 1024 on digits, else 256, 2048 and 8192 if not given"
    )
    learning_rates: tuple[float, ...] = _runner.flag(
        (), "grid of rates for the baselines; .001 to .256 in factors of 4 if not given"
    )
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    epochs: int = _runner.flag(0, "epochs of a run; 0: 200 on digits, else 100")
    hidden_size: int = 64
    small: bool = _runner.flag(True, "cut images of 28 x 28 to 8,192 examples of 14 x 14")


CONFIGS = {
    "smoke": Config(
        optimizers=("lamb",), batch_sizes=(256,), learning_rates=(0.03,), seeds=(0,), epochs=6
    ),
    "default": Config(),
    "paper": Config(
        dataset="fashion_mnist",
        batch_sizes=tuple(2**k for k in range(8, 14)),
        epochs=200,
        hidden_size=512,
        small=False,
    ),
}
RATES = (0.001, 0.004, 0.016, 0.064, 0.256)
METHODS = (*_learning_rates.KINDS, "autowu")


class _Network(nnx.Module):
    """A perceptron with one hidden layer, normalized or not."""

    def __init__(self, config: Config, num_inputs: int, num_classes: int, rngs: nnx.Rngs):
        size = config.hidden_size
        # A bias before a normalization would have no effect.
        plain = config.network == "plain"
        self.hidden = nnx.Linear(num_inputs, size, use_bias=plain, rngs=rngs)
        if config.network == "batch_norm":
            self.norm = nnx.BatchNorm(size, momentum=0.9, rngs=rngs)
        else:
            self.norm = (lambda x: x) if plain else nnx.LayerNorm(size, rngs=rngs)
        self.head = nnx.Linear(size, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits, float[M, num_classes]."""
        return self.head(nnx.relu(self.norm(self.hidden(x.reshape(x.shape[0], -1)))))


def _task(config: Config) -> _training.Task:
    task = _training.make_task(config.dataset, "mlp", (config.hidden_size,))
    loaded = task.dataset
    if config.small and loaded.input_shape[0] == 28:
        halve = lambda x: sum(x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
        for name in ("train", "validation", "test"):
            inputs, labels = (x[:8_192] for x in getattr(loaded, name))
            loaded = loaded._replace(**{name: (halve(inputs), labels)})
    shape = loaded.train[0].shape[1:]
    net = models.attach(
        lambda rngs: _Network(config, math.prod(shape), loaded.num_classes, rngs),
        "head",
        jax.ShapeDtypeStruct((1, *shape), jnp.float32),
    )
    data = jax.tree.map(jnp.asarray, aj.Data(loaded.train, loaded.validation))
    losses = models.make_losses(net, task.per_example_loss)
    return dataclasses.replace(task, dataset=loaded, data=data, model=net, losses=losses)


def run(config: Config) -> _runner.Results:
    small = config.dataset == "digits"
    config = dataclasses.replace(config, epochs=config.epochs or (200 if small else 100))
    results, task = _runner.Results(extra={"config": config, "rates": {}}), _task(config)
    # An epoch must have at least one step: the 1,146 training examples of digits allow 1,024.
    sizes = config.batch_sizes or ((256, 1024) if small else (256, 2048, 8192))
    for size in [s for s in sizes if s <= task.num_train]:
        for optimizer in config.optimizers:
            columns = {
                "dataset": config.dataset,
                "optimizer": optimizer,
                "batch_size": size,
            }
            _compare(config, task, columns, results)
    return results


def _compare(config, task, columns: dict[str, Any], results) -> None:
    """All runs of one optimizer at one batch size: the grid, the tuned baselines, AutoWU."""
    size = columns["batch_size"]
    optimizer = OPTIMIZERS[columns["optimizer"]](1.0, weight_decay=config.weight_decay)
    steps_per_epoch = task.num_train // size
    num_steps = steps_per_epoch * config.epochs

    def start(kind: str, seed: int = 0, learning_rate: float = 0.0):
        if kind == "autowu":
            rate = aj.autowu(steps_per_epoch, config.epochs, seed=seed)
        else:
            rate = _learning_rates.scale_by_rates(kind, learning_rate, num_steps)
        return optax.chain(optimizer, rate, aj.schedulers.constant(size))

    def train(kind: str, tx: Any, rate: float, seed: int) -> dict[str, Any]:
        row, windows, fit = _training.train(
            task,
            kind,
            _methods.Method(tx, lambda **changes: start(kind, **changes)),
            seed=seed,
            learning_rate=rate,
            num_examples=num_steps * size,
            window=steps_per_epoch * max(1, config.epochs // 10),
            callbacks=[aj.callbacks.progress(" ".join(map(str, (*columns.values(), kind))))],
            **columns,
        )
        validation = metrics.evaluate(
            task.losses.predict,
            task.per_example_loss,
            fit.state.params,
            task.dataset.validation,
            fit.state.model_state,
        )
        rates, phase = fit.per_step("learning_rate"), fit.history[-1].info.metrics.get("phase")
        row |= {"validation_accuracy": validation.accuracy, "selected": kind == "autowu"}
        row |= {"steps_per_epoch": steps_per_epoch, "peak_learning_rate": float(rates.max())}
        if phase is not None:  # both are logged as they are after the step
            end = int(np.argmax(fit.per_step("phase") > 0))
            row |= {"warm_up_share": (end + 1) / num_steps, "found_learning_rate": rates[end]}
            results.extra["rates"][(*columns.values(), seed)] = rates
        results.rows.append(row)
        results.windows.extend(windows)
        return row

    shared = start("constant")
    for kind in METHODS[:-1]:
        grid = config.learning_rates or RATES
        tried = [train(kind, shared, rate, config.seeds[0]) for rate in grid]
        best = max(tried, key=lambda row: (row["validation_accuracy"], -row["validation_loss"]))
        best["selected"] = True
        for seed in config.seeds[1:]:
            train(kind, shared, best["learning_rate"], seed)["selected"] = True
    automatic = start("autowu")
    for seed in config.seeds:
        train("autowu", automatic, math.nan, seed)


def _cells(results: _runner.Results):
    """(dataset, optimizer, batch size) -> method -> the rows of its seeds, as tuned."""
    rows = [row for row in results.rows if row["selected"]]
    cells = _runner.by(rows, "dataset", "optimizer", "batch_size")
    return {cell: _runner.by(group, "method") for cell, group in cells.items()}


def table(results: _runner.Results):
    from rich.console import Group

    config = results.extra["config"]
    accuracies, automatic = [], []
    for (_, optimizer, size), methods in _cells(results).items():
        mean = lambda kind, field, of=methods: np.mean([row[field] for row in of[kind]])
        best = max(METHODS[:-1], key=lambda kind: mean(kind, "validation_accuracy"))
        highest = max(mean(kind, "test_accuracy") for kind in METHODS[:-1])
        pairs = zip(methods["autowu"], methods[best], strict=True)
        deltas = [{"delta": a["test_accuracy"] - b["test_accuracy"]} for a, b in pairs]
        accuracy = {k: _runner.interval(methods[k], "test_accuracy", 2, 100) for k in METHODS}
        rates = {k: f" @{methods[k][0]['learning_rate']:g}" for k in METHODS[:-1]}
        within = mean("autowu", "test_accuracy") >= mean(best, "test_accuracy") - 0.005
        cell = f"{optimizer}, {size}"
        accuracies.append(
            [
                cell,
                *(accuracy[k] + rates.get(k, "") + "*" * (k == best) for k in METHODS),
                _runner.interval(deltas, "delta", 2, 100),
                "yes" if within else "NO",
            ]
        )
        automatic.append(
            [
                cell,
                f"{methods['autowu'][0]['steps_per_epoch']}",
                f"{mean('autowu', 'peak_learning_rate'):.3f}",
                f"{mean('autowu', 'found_learning_rate'):.3f}",
                f"{mean('autowu', 'warm_up_share'):.2f}",
                f"{100 * (mean('autowu', 'test_accuracy') - highest):+.2f}",
            ]
        )
    grid = ", ".join(f"{rate:g}" for rate in config.learning_rates or RATES)
    compared = _runner.make_table(
        f"{config.dataset}, {config.network}, {config.epochs} epochs, weight decay "
        f"{config.weight_decay:g}, {len(config.seeds)} seeds: test accuracy %",
        ["optimizer, batch", *METHODS, "autowu - *", "within .5"],
        accuracies,
        "± half-width of the 95% interval over seeds. @: the rate that the first seed's validation "
        f"accuracy chose, of\n{grid}. *: the best baseline by mean validation accuracy.\n"
        "autowu - *: points, paired by seed. within .5: whether AutoWU's mean is at most half a "
        "point below that of *.",
    )
    found = _runner.make_table(
        "what AutoWU found",
        ["optimizer, batch", "steps/epoch", "peak rate", "found", "warm-up", "- highest"],
        automatic,
        "peak rate: the largest of the run. found: where the decay starts.\nwarm-up: share of all "
        "steps. Means over seeds. - highest: points,\nfrom the highest of the baselines' mean test "
        "accuracies.",
    )
    return Group(compared, found)


def plot(results: _runner.Results, output: Path) -> None:
    cells = _cells(results)
    panels = list(dict.fromkeys(cell[:2] for cell in cells))
    size = (1 + 3.6 * len(panels), 3.8)
    pictures = [
        plotting.figure(1, len(panels), size=size, squeeze=False, sharey=True) for _ in range(2)
    ]
    (accuracy, left), (trajectory, right) = pictures
    for panel, ax, bx in zip(panels, left[0], right[0], strict=True):
        mine = {cell[2]: methods for cell, methods in cells.items() if cell[:2] == panel}
        for i, (kind, color) in enumerate(zip(METHODS, plotting.COLORS, strict=False)):
            scores = [[100 * row["test_accuracy"] for row in m[kind]] for m in mine.values()]
            mean, error = np.transpose([metrics.mean_and_interval(s) for s in scores])
            x = np.array(list(mine)) * 1.03 ** (i - 1.5)
            ax.errorbar(x, mean, error, color=color, marker="o", ms=3, capsize=2, label=kind)
        ax.set_xscale("log", base=2)
        ax.set(title=", ".join(panel), xlabel="batch size [examples]")
        ax.set_xticks(list(mine), [str(s) for s in mine])
        for color, s in zip(plotting.COLORS, mine, strict=False):
            runs = [v for key, v in results.extra["rates"].items() if key[:3] == (*panel, s)]
            for i, rates in enumerate(runs):
                epochs = (1 + np.arange(len(rates))) / mine[s]["autowu"][0]["steps_per_epoch"]
                bx.plot(epochs, rates, color=color, lw=1, label=None if i else f"batch {s}")
        bx.set(title=", ".join(panel), xlabel="epochs", yscale="log", ylim=(1e-5, 1.2))
        bx.legend(frameon=False, fontsize=7.5)
    left[0, 0].set_ylabel("test accuracy [%]: mean, 95% interval")
    left[0, 0].legend(frameon=False, fontsize=7.5)
    right[0, 0].set_ylabel("AutoWU's learning rate")
    accuracy.savefig(output / "accuracy.png")
    trajectory.savefig(output / "learning_rates.png")


if __name__ == "__main__":
    _runner.main("autowu_large_batch", CONFIGS, run, plot, table, __doc__.splitlines()[0])
