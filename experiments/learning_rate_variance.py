"""The variance of the hypergradient against the batch size, and what it does to a learnt rate.

Claim (arXiv:2205.08231, section 3): larger batches, and so Arbiter, reduce the variance of
meta-optimisation. First, at fixed points of training, Var(h) of h = g_t . g_{t-1} against B: it
falls as 1/B given g_{t-1}, as a/B + b/B^2 where both are sampled, faster for look-ahead
hypergradients; the mean of h moves with B as well. Then `sgd_hd` at fixed sizes, with Arbiter, and
with a growing schedule, at equal examples, beside plain SGD at constant rates.
Command: python -m experiments.learning_rate_variance
Time: see README.md.
Expected: a slope near -1 given g_{t-1}, steeper ones where both gradients are sampled (not yet
established here); less variance does not remove the short-horizon bias: the rate that a constant one
would need stays out of reach at every batch size.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax

import arbiter_jax as aj
from arbiter_jax import metrics, plotting, progress, schedulers
from experiments import _hypergradients, _methods, _runner


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "digits"
    model: str = "mlp"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    sizes: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)  # at which the variance is measured
    num_draws: int = 500
    look_ahead: int = 5
    pretraining_epochs: float = 5.0  # up to the fixed point
    epochs: float = 30.0
    window: int = 20
    learning_rate: float = 0.05
    hypergradient_learning_rate: float = 0.01
    constant_rates: tuple[float, ...] = (0.05, 0.2, 0.5)  # of plain SGD, for comparison
    min_batch_size: int = 8
    max_batch_size: int = 512
    initial_batch_size: int = 32
    fixed_sizes: tuple[int, ...] = (32, 256)
    quick: bool = False  # no Arbiter, no schedule, no plain SGD


CONFIGS = {
    "smoke": Config(
        seeds=(0,), sizes=(4, 16), num_draws=50, epochs=1.0, fixed_sizes=(32,), quick=True
    ),
    "default": Config(),
    "paper": Config(dataset="fashion_mnist", num_draws=2000, look_ahead=20, epochs=20.0),
}


def _trainings(task, config: Config):
    """name -> Method: plain SGD at constant rates, and sgd_hd under the rules."""
    num_examples = config.epochs * task.num_train
    limits = _methods._limits(config)
    small, large = config.initial_batch_size, config.max_batch_size
    # From the initial to the largest size in factors of 4, at equal shares of the examples.
    stages = 1 + int(np.log(large / small) / np.log(4))
    growing = optax.exponential_decay(small, num_examples / stages, 4, staircase=True)
    schedule = schedulers.from_schedule(
        growing, of="num_examples", min_batch_size=small, max_batch_size=large
    )

    def method(rule, rate: float = config.learning_rate, meta_rate=None, shared=None):
        meta_rate = config.hypergradient_learning_rate if meta_rate is None else meta_rate
        make = lambda rule, rate=rate: optax.chain(aj.sgd_hd(rate, meta_rate), rule)
        start = lambda seed, learning_rate: make(rule(seed))
        return _methods.Method(shared or make(rule(0)), start)

    fixed = lambda size: lambda seed: schedulers.constant(size)
    arbiter = _methods._arbiter(task, config, limits)
    learnt, plain = method(fixed(small)).tx, method(fixed(small), meta_rate=0.0).tx
    methods = {f"HD, B = {size}": method(fixed(size), shared=learnt) for size in config.fixed_sizes}
    if not config.quick:
        methods["HD, arbiter"] = method(lambda seed: arbiter(seed, None))
        methods["HD, growing"] = method(lambda seed: schedule)
        for rate in config.constant_rates:  # sgd_hd at beta = 0 is SGD, and still reports h
            methods[f"SGD {rate:g}, B = {small}"] = method(fixed(small), rate, 0.0, plain)
    return methods


def run(config: Config) -> _runner.Results:
    task = _runner.make_task(config.dataset, config.model)
    results = _runner.Results(extra={"config": config, "measured": [], "trained": [], "fits": {}})
    methods = _trainings(task, config)
    with progress.live() as display:

        def train(name: str, method: _methods.Method, seed: int, epochs: float):
            num_examples = int(epochs * task.num_train)
            return _runner.train(
                task,
                name,
                method,
                seed=seed,
                learning_rate=config.learning_rate,
                num_examples=num_examples,
                window=config.window,
                callbacks=[display(f"{name}, seed {seed}", num_examples)],
            )

        first = next(iter(methods.values()))
        for seed in config.seeds:
            row, _, fit = train("fixed point", first, seed, config.pretraining_epochs)
            found = _hypergradients.measure(
                task.losses.loss_fn,
                fit.state.params,
                task.data.train,
                jax.random.PRNGKey(seed),
                learning_rate=config.learning_rate,
                sizes=config.sizes,
                num_draws=config.num_draws,
                look_ahead=config.look_ahead,
            )
            for kind, numbers in found.items():
                results.extra["measured"].append({**row, "method": kind, **numbers})
        for name, method in methods.items():
            for seed in config.seeds:
                row, windows, fit = train(name, method, seed, config.epochs)
                row["train_loss"] = metrics.evaluate(
                    task.losses.predict, task.per_example_loss, fit.state.params, task.dataset.train
                ).loss
                rate = fit.steps("learning_rate")
                row |= {"largest_rate": rate.max(), "final_rate": rate[-1]}
                for window, record in zip(windows, fit.history, strict=True):
                    h = record.info.logged["hypergradient"]
                    window |= {"mean_h": float(h.mean()), "variance_h": float(h.var())}
                    window["learning_rate"] = float(record.info.logged["learning_rate"][-1])
                late = [w for w in windows if w["num_examples"] > row["num_examples"] / 2]
                for field in ("mean_h", "variance_h"):
                    row[field] = float(np.median([w[field] for w in late]))
                results.extra["trained"].append(row)
                results.windows.extend(windows)
                results.extra["fits"][name, seed] = fit
    results.rows = results.extra["measured"] + results.extra["trained"]
    return results


def table(results: _runner.Results):
    from rich.console import Group

    config, ends = results.extra["config"], (0, -1)
    rows = [
        [
            kind,
            _runner.interval(group, "slope", 2),
            f"{np.median([row['b'] / row['a'] for row in group]):.1f}",
            *(f"{np.mean([row['variances'][i] for row in group]):.2e}" for i in ends),
            *(f"{np.mean([row['means'][i] for row in group]):+.3f}" for i in ends),
        ]
        for kind, group in _runner.by(results.extra["measured"], "method").items()
    ]
    sizes = [f"B = {config.sizes[i]}" for i in ends]
    fixed_point = _runner.make_table(
        f"{config.dataset}, {config.model}: the hypergradient at a fixed point, {config.num_draws} "
        f"draws, {len(config.seeds)} seeds",
        ["h", "slope", "b/a", *(f"{what}, {b}" for what in ("variance", "mean") for b in sizes)],
        rows,
        "slope: of log variance in log B. b/a: of the fit a/B + b/B^2, the size where both are equal "
        "(median). A larger B\nmoves the mean of h as well: the rate that h drives to is another.",
    )
    rows = [
        [
            name,
            _runner.interval(group, "largest_rate", 3),
            _runner.interval(group, "final_rate", 4),
            f"{np.mean([row['variance_h'] for row in group]):.1e}",
            f"{np.mean([row['mean_h'] for row in group]):+.1e}",
            _runner.interval(group, "train_loss", 4),
            _runner.interval(group, "test_loss", 4),
            _runner.interval(group, "test_accuracy", 2, scale=100),
            f"{np.mean([row['num_steps'] for row in group]):,.0f}",
        ]
        for name, group in _runner.by(results.extra["trained"], "method").items()
    ]
    columns = ["method", "largest rate", "final rate", "var h", "mean h", "training loss"]
    trained = _runner.make_table(
        f"{config.epochs:g} epochs of examples each, HD: sgd_hd from "
        f"{config.learning_rate:g}, beta {config.hypergradient_learning_rate:g}",
        [*columns, "test loss", "test accuracy %", "steps"],
        rows,
        "± half-width of the 95% interval over seeds. var h, mean h: within a window of "
        f"{config.window} steps, median of the second half.\nThey depend on where the rate led. Less "
        "variance does not remove the short-horizon bias: compare the losses of plain SGD.",
    )
    return Group(fixed_point, trained)


def plot(results: _runner.Results, output: Path) -> None:
    config, fits = results.extra["config"], results.extra["fits"]
    fig, (left, right) = plotting.figure(1, 2, size=(10.0, 4.0))
    groups = _runner.by(results.extra["measured"], "method").items()
    for color, (kind, group) in zip(plotting.COLORS, groups, strict=False):
        variance = np.exp(np.mean([np.log(row["variances"]) for row in group], axis=0))
        slope = np.mean([row["slope"] for row in group])
        left.loglog(config.sizes, variance, "o-", color=color, label=f"{kind}: slope {slope:.2f}")
        means = np.array([row["means"] / abs(row["means"][-1]) for row in group])
        right.semilogx(config.sizes, means.mean(0), "o-", color=color, label=kind)
        right.fill_between(config.sizes, means.min(0), means.max(0), color=color, alpha=0.13, lw=0)
    left.set(ylabel="variance of h (geometric mean over seeds)")
    right.set(ylabel=f"mean of h / |mean at B = {config.sizes[-1]}|: mean, range")
    for ax in (left, right):
        ax.set_xlabel("batch size [examples]")
        ax.set_xticks(config.sizes, [str(size) for size in config.sizes])
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=8)
    fig.savefig(output / "variance.png")

    fig, axes = plotting.figure(1, 2, size=(10.0, 4.0))
    names = list(dict.fromkeys(name for name, _ in fits))
    for color, name in zip(plotting.COLORS, names, strict=False):
        for i, seed in enumerate(config.seeds):
            fit = fits[name, seed]
            seen, label = np.cumsum(fit.steps("batch_size")), None if i else name
            axes[0].semilogy(seen, fit.steps("learning_rate"), color=color, lw=0.9, label=label)
        group = [w for w in results.windows if w["method"] == name]
        seen, variance = np.transpose([(w["num_examples"], w["variance_h"]) for w in group])
        axes[1].loglog(seen, variance, ".", color=color, ms=3, alpha=0.7)
    axes[0].set(xlabel="training examples seen", ylabel="learning rate", ylim=(1e-3, 1))
    axes[1].set(xlabel="training examples seen", ylabel=f"variance of h in {config.window} steps")
    fig.legend(loc="outside right upper", frameon=False, fontsize=8)
    fig.savefig(output / "learning_rates.png")
    limits = (config.min_batch_size, config.max_batch_size)
    hd = {key: fit for key, fit in fits.items() if key[0].startswith("HD")}
    plotting.batch_sizes(hd, limits, title=config.dataset).savefig(output / "batch_sizes.png")
    plotting.losses(fits, title=config.dataset).savefig(output / "loss_curves.png")


if __name__ == "__main__":
    _runner.main("learning_rate_variance", CONFIGS, run, plot, table, __doc__.splitlines()[0])
