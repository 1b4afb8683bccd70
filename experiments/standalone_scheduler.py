"""Arbiter and every other rule as a stand-alone batch-size scheduler, at equal examples.

Claim (arXiv:2205.08231, section 4): a schedule learned within one run matches fixed batch sizes that
were tuned over many. Here it is compared with every other published rule and with the best constant
size of a grid (which nobody knows in advance), at a constant learning rate and with cosine decay.
Command: python -m experiments.standalone_scheduler [--methods all] [--dataset fashion_mnist]
Time: at most 90 s on two cores on digits, 10 minutes on Fashion-MNIST.
Expected: Arbiter moves toward the middle of its range whatever the task, and does as well as the
constant sizes it passes through.
Measured: test loss on digits .1088 (Arbiter), .1080 (random pick), .1031 (noise floor), .0977
(constant 16), .0939 (the same with cosine decay), .0944 (seesaw from it, in 56% of the steps). All
numbers: standalone_scheduler.md.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import optax

import arbiter_jax as aj
from arbiter_jax import datasets, plotting
from experiments import _methods, _runner, _training

ADAPTIVE = ("arbiter", "random_pick", "noise_floor", "gradient_noise_scale", "cabs")


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "digits"
    model: str = "mlp"
    methods: tuple[str, ...] = _runner.flag(
        (),
        f'rules to run: {_methods.NAMES}; "all" for every one; if none is given, {", ".join(ADAPTIVE)} '
        "and three constant sizes",
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rates: tuple[float, ...] = (0.05,)
    decays: tuple[str, ...] = _runner.flag(
        ("constant",), "decay of the learning rate", ("constant", "cosine")
    )
    momentum: float = 0.9
    epochs: float = _runner.flag(
        0.0, "training examples of a run, in epochs; 0: 30 on digits, else 10"
    )
    window: int = 20
    min_batch_size: int = 8
    max_batch_size: int = 512
    initial_batch_size: int = 64
    augment: bool = _runner.flag(False, "pad, crop and flip images, as is usual for CIFAR-10")
    shadows: bool = _runner.flag(False, "one more run that logs what every rule would choose")
    fewer_steps: bool = _runner.flag(
        True, "also the best constant size with cosine decay, and seesaw from it"
    )


PAPER = Config(
    dataset="cifar10",
    model="vgg11",  # or --model wrn_16_4
    methods=("all",),
    seeds=(0, 1, 2, 3, 4),
    learning_rates=(0.01, 0.05, 0.1),
    decays=("constant", "cosine"),
    epochs=100.0,
    window=100,
    augment=True,
    shadows=True,
)
CONFIGS = {
    "smoke": Config(seeds=(0,), epochs=4.0, methods=("arbiter", "constant_64"), fewer_steps=False),
    "default": Config(),
    "paper": PAPER,
}


def resolve(config: Config) -> Config:
    """Fills in the methods and the epochs, whose defaults depend on the data set."""
    small = config.dataset == "digits"
    constants = ("constant_16", "constant_64", "constant_256") if small else _methods.GRID
    methods = config.methods or (*ADAPTIVE, *constants)
    if methods == ("all",):
        methods = (*_methods.RULES, *_methods.GRID)
    epochs = config.epochs or (30.0 if small else 10.0)
    return dataclasses.replace(config, methods=methods, epochs=epochs)


def _augment(key, batch):
    inputs, labels = batch
    return datasets.pad_crop_flip(key, inputs), labels


def run(config: Config) -> _runner.Results:
    config = resolve(config)
    _methods.check_names(config.methods)
    task = _training.make_task(config.dataset, config.model)
    num_examples = int(config.epochs * task.num_train)
    results = _runner.Results(extra={"config": config, "num_examples": num_examples, "fits": {}})
    for decay in config.decays:
        make_optimizer = functools.partial(
            _methods.optimizer,
            momentum=config.momentum,
            decay=decay,
            num_examples=num_examples,
        )
        for name in config.methods:
            method = None
            for rate in config.learning_rates:
                # All rates share one program, except for CABS, which takes the rate as an argument.
                if method is None or name == "cabs":
                    method = _methods.build(name, task, config, make_optimizer, rate)
                for seed in config.seeds:
                    row, windows, fit = _training.train(
                        task,
                        name,
                        method,
                        seed=seed,
                        learning_rate=rate,
                        num_examples=num_examples,
                        window=config.window,
                        callbacks=[aj.callbacks.progress(f"{name}, seed {seed}")],
                        transform_batch=_augment if config.augment else None,
                        decay=decay,
                    )
                    results.rows.append(row)
                    results.windows.extend(windows)
                    if (decay, rate) == (config.decays[0], config.learning_rates[0]):
                        results.extra["fits"][name, seed] = fit
    if config.fewer_steps:
        _fewer_steps(task, config, num_examples, results)
    if config.shadows:
        results.extra["shadow_fit"] = _shadow_run(task, config, num_examples)
    return results


def _fewer_steps(task, config: Config, num_examples: int, results: _runner.Results) -> None:
    """What most people do, the best constant size with cosine decay, and `seesaw` from it."""
    rate, kept = config.learning_rates[0], results.rows
    constants = [r for r in kept if r["method"].startswith("constant_")]
    constants = [r for r in constants if (r["decay"], r["learning_rate"]) == ("constant", rate)]
    if not constants:
        return
    sizes = _runner.by(constants, "method")
    best = min(sizes, key=lambda name: np.mean([r["validation_loss"] for r in sizes[name]]))
    size = int(best.removeprefix("constant_"))
    make_optimizer = functools.partial(
        _methods.optimizer, momentum=config.momentum, decay="cosine", num_examples=num_examples
    )
    methods = {
        f"{best}, cosine": _methods.build(best, task, config, make_optimizer, rate),
        "seesaw from it": _methods.seesaw_from(size, config, num_examples, rate),
    }
    for name, method in methods.items():
        for seed in config.seeds:
            row, windows, fit = _training.train(
                task,
                name,
                method,
                seed=seed,
                learning_rate=rate,
                num_examples=num_examples,
                window=config.window,
                callbacks=[aj.callbacks.progress(f"{name}, seed {seed}")],
                transform_batch=_augment if config.augment else None,
                decay="cosine",
            )
            results.rows.append(row)
            results.windows.extend(windows)
            results.extra["fits"][name, seed] = fit
    results.extra["fewer_steps"] = tuple(methods)


def _shadow_run(task, config: Config, num_examples: int) -> aj.FitResult:
    rate = config.learning_rates[0]
    optimizer = _methods.optimizer(rate, config.momentum, "constant", num_examples)
    acting = aj.schedulers.constant(config.initial_batch_size)
    tx = optax.chain(optimizer, acting, *_methods.shadows(task, config, rate))
    method = _methods.Method(tx, lambda **_: tx)
    callbacks = [aj.callbacks.progress("every rule, as a shadow")]
    options = {"num_examples": num_examples, "window": config.window, "learning_rate": rate}
    return _training.train(task, "shadow", method, seed=0, callbacks=callbacks, **options)[2]


def oracles(rows: list[dict]) -> dict[float, dict[str, float]]:
    """{learning rate: {decay: mean test loss of the best constant size}}."""
    constants = [row for row in rows if row["method"].startswith("constant")]
    best: dict[float, dict[str, float]] = {}
    for (rate, decay, _), group in _runner.by(
        constants, "learning_rate", "decay", "method"
    ).items():
        loss = float(np.mean([row["test_loss"] for row in group]))
        best.setdefault(rate, {})[decay] = min(loss, best.get(rate, {}).get(decay, np.inf))
    return best


def table(results: _runner.Results):
    config, best = results.extra["config"], oracles(results.rows)
    sweep = len(config.learning_rates) > 1 or len(config.decays) > 1
    rows = []
    groups = _runner.by(results.rows, "learning_rate", "decay", "method").items()
    for (rate, decay, method), group in sorted(groups, key=lambda item: item[0][:2]):
        loss = np.mean([row["test_loss"] for row in group])
        regrets = [
            f"{100 * (loss / best[rate][d] - 1):+.1f}" if d in best.get(rate, {}) else "-"
            for d in config.decays
        ]
        rows.append(
            [
                f"{method}, lr {rate:g}, {decay}" if sweep else method,
                _runner.interval(group, "test_accuracy", 2, scale=100),
                _runner.interval(group, "test_loss", 4),
                *regrets,
                f"{np.mean([row['num_steps'] for row in group]):,.0f}",
                f"{np.mean([np.mean(row['batch_sizes'][-3:]) for row in group]):,.0f}",
                f"{sum(row['num_compilations'] + row['num_cache_hits'] for row in group)}",
                f"{np.mean([row['seconds'] for row in group]):.1f}",
            ]
        )
    taken = ""
    if "fewer_steps" in results.extra:
        cosine, seesaw = (
            [r for r in results.rows if r["method"] == n] for n in results.extra["fewer_steps"]
        )
        over, share = (
            np.mean([r[field] for r in seesaw]) / np.mean([r[field] for r in cosine])
            for field in ("test_loss", "num_steps")
        )
        taken = (
            "\nWhat to take from it: decay the rate, and let seesaw turn that into fewer steps: here "
            f"{share:.0%} of them for {100 * (over - 1):+.1f}% of test loss."
        )
    columns = ["method", "test accuracy %", "test loss"]
    columns += [f"regret %, {decay}" for decay in config.decays]
    columns += ["steps", "final batch", "programs", "seconds/run"]
    return _runner.make_table(
        f"{config.dataset}, {config.model}: {results.extra['num_examples']:,} examples each, "
        f"{len(config.seeds)} seeds",
        columns,
        rows,
        "± half-width of the 95% interval over seeds (Student's t). regret: mean test loss against "
        "that of the best\nconstant size in this table, with the named decay of the learning rate. "
        "final batch: mean of the last three\nwindows. programs: those of the windows of all seeds "
        "together, compiled or read from the cache;\nconstant sizes share theirs, seconds include them."
        + taken,
    )


def plot(results: _runner.Results, output: Path) -> None:
    config, fits = results.extra["config"], results.extra["fits"]
    limits = (config.min_batch_size, config.max_batch_size)
    title = f"{config.dataset}, {config.model}, learning rate {config.learning_rates[0]:g}"
    plotting.batch_sizes(fits, limits, title=title).savefig(output / "batch_sizes.png")
    plotting.losses(fits, title=title).savefig(output / "loss_curves.png")
    if ("arbiter", config.seeds[0]) in fits:
        fit = fits["arbiter", config.seeds[0]]
        title = f"Arbiter, seed {config.seeds[0]}: {title}"
        plotting.proposals(fit, limits, title=title).savefig(output / "proposals.png")
    if "shadow_fit" in results.extra:
        title = f"what each rule would choose, in one run at B = {config.initial_batch_size}"
        plotting.shadow(results.extra["shadow_fit"], limits, title=title).savefig(
            output / "shadows.png"
        )


if __name__ == "__main__":
    _runner.main("standalone_scheduler", CONFIGS, run, plot, table, __doc__.splitlines()[0])
