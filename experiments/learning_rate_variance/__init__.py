"""The variance of the hypergradient against the batch size, and its effect on a learned rate.

Claim (arXiv:2205.08231, section 3): larger batches, and so Arbiter, reduce the variance of
meta-optimization. First, at fixed points of training, Var(h) of h = g_t . g_{t-1} against B. Then
`sgd_hd` at fixed sizes, with Arbiter, with its noise response, and with a growing schedule, at equal
examples, compared with plain SGD at constant rates.

To first order in the learning rate Var(h) = a / B + b / B^2, and a and b can be computed from the
gradients of single examples (`hypergradients.predict`): slope -1 given g_{t-1}, where b = 0; between
-1 and -2 if both gradients are sampled. The table shows prediction and measurement. At a larger rate
the step between the two gradients matters: h loses rate * g' H g, whose variance falls as B^-2 and
faster, and the slopes get steeper than predicted, beyond -2 for a look-ahead of several steps. The
same term shifts the mean of h by -rate * tr(H Sigma) / B.
Command: python -m experiments.learning_rate_variance
Time: 4 minutes.
Expected: a slope of -1 given g_{t-1}; with both sampled -1.8 at the rate .01, as predicted, and -2.05
at .05; for the look-ahead -1.7 and -2.2. Arbiter's var h is half of that at B = 32, and its rate
decays as soon: the training loss ends 48 times that of SGD at the rate .5. Less variance does not
remove the short-horizon bias.
Measured: slopes -.99 ± .03, -1.79 ± .19 and -1.70 ± .22 at the rate .01. All numbers: README.md in
this folder.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax

import arbiter_jax as aj
from arbiter_jax import metrics, plotting, schedulers
from experiments import _methods, _runner, _training
from experiments.learning_rate_variance import hypergradients


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "digits"
    model: str = "mlp"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    sizes: tuple[int, ...] = _runner.flag(
        (4, 8, 16, 32, 64, 128, 256), "batch sizes at which the variance is measured"
    )
    num_draws: int = _runner.flag(400, "samples at the largest size; more at smaller ones")
    look_ahead: int = _runner.flag(5, "steps of the look-ahead")
    measured_rates: tuple[float, ...] = _runner.flag(
        (0.01, 0.05), "learning rates at which the variance is measured"
    )
    pretraining_epochs: float = _runner.flag(5.0, "epochs up to the fixed point")
    epochs: float = 30.0
    window: int = 20
    learning_rate: float = 0.05
    hypergradient_learning_rate: float = _runner.flag(0.01, "beta of hypergradient descent")
    constant_rates: tuple[float, ...] = _runner.flag((0.05, 0.2, 0.5), "rates of plain SGD")
    min_batch_size: int = 8
    max_batch_size: int = 512
    initial_batch_size: int = 32
    fixed_sizes: tuple[int, ...] = _runner.flag(
        (32, 256), "constant sizes of hypergradient descent"
    )
    quick: bool = _runner.flag(False, "without Arbiter, schedule and plain SGD")


CONFIGS = {
    "smoke": Config(
        seeds=(0,),
        sizes=(4, 16),
        num_draws=50,
        measured_rates=(0.01,),
        epochs=1.0,
        fixed_sizes=(32,),
        quick=True,
    ),
    "default": Config(),
    "paper": Config(dataset="fashion_mnist", num_draws=2000, look_ahead=20, epochs=20.0),
}


def _trainings(task, config: Config):
    """{name: Method}: plain SGD at constant rates, and `sgd_hd` with every rule."""
    num_examples = config.epochs * task.num_train
    limits = _methods.limits(config)
    small, large = config.initial_batch_size, config.max_batch_size
    # From the initial to the largest size in factors of 4, at equal shares of the examples.
    stages = 1 + int(np.log(large / small) / np.log(4))
    growing = optax.exponential_decay(small, num_examples / stages, 4, staircase=True)
    schedule = schedulers.from_schedule(
        growing, count="num_examples", min_batch_size=small, max_batch_size=large
    )

    def method(rule, rate: float = config.learning_rate, meta_rate=None, shared=None):
        meta_rate = config.hypergradient_learning_rate if meta_rate is None else meta_rate
        make = lambda rule, rate=rate: optax.chain(aj.sgd_hd(rate, meta_rate), rule)
        start = lambda seed, learning_rate: make(rule(seed))
        return _methods.Method(shared or make(rule(0)), start)

    fixed = lambda size: lambda seed: schedulers.constant(size)
    arbiter = _methods.arbiter(task, config, limits)
    learned, plain = method(fixed(small)).tx, method(fixed(small), meta_rate=0.0).tx
    methods = {
        f"HD, B = {size}": method(fixed(size), shared=learned) for size in config.fixed_sizes
    }
    if not config.quick:
        noise_response = _methods.RULES["arbiter_noise_response"](task, config, limits)
        methods["HD, arbiter"] = method(lambda seed: arbiter(seed, None))
        methods["HD, noise response"] = method(lambda seed: noise_response(seed, None))
        methods["HD, growing"] = method(lambda seed: schedule)
        for rate in config.constant_rates:  # sgd_hd at beta = 0 is SGD, and still logs h
            methods[f"SGD {rate:g}, B = {small}"] = method(fixed(small), rate, 0.0, plain)
    return methods


def run(config: Config) -> _runner.Results:
    task = _training.make_task(config.dataset, config.model)
    results = _runner.Results(extra={"config": config, "measured": [], "trained": [], "fits": {}})
    methods = _trainings(task, config)

    def train(name: str, method: _methods.Method, seed: int, epochs: float):
        num_examples = int(epochs * task.num_train)
        return _training.train(
            task,
            name,
            method,
            seed=seed,
            learning_rate=config.learning_rate,
            num_examples=num_examples,
            window=config.window,
            callbacks=[aj.callbacks.progress(f"{name}, seed {seed}")],
        )

    first = next(iter(methods.values()))
    for seed in config.seeds:
        row, _, fit = train("fixed point", first, seed, config.pretraining_epochs)
        for rate in config.measured_rates:
            at = (task.losses.loss_fn, fit.state.params, task.data.train)
            options = {
                "key": jax.random.PRNGKey(seed),
                "learning_rate": rate,
                "sizes": config.sizes,
                "look_ahead": config.look_ahead,
            }
            predicted = hypergradients.predict(*at, **options)
            found = hypergradients.measure(*at, **options, num_draws=config.num_draws)
            for kind, numbers in found.items():
                theory = {f"predicted_{k}": v for k, v in predicted[kind].items()}
                results.extra["measured"].append(
                    {**row, "method": kind, "learning_rate": rate, **numbers, **theory}
                )
    for name, method in methods.items():
        for seed in config.seeds:
            row, windows, fit = train(name, method, seed, config.epochs)
            row["train_loss"] = metrics.evaluate(
                task.losses.predict, task.per_example_loss, fit.state.params, task.dataset.train
            ).loss
            rate = fit.per_step("learning_rate")
            row |= {"largest_rate": rate.max(), "final_rate": rate[-1]}
            for window, record in zip(windows, fit.history, strict=True):
                h = record.info.metrics["hypergradient"]
                window |= {"mean_h": float(h.mean()), "variance_h": float(h.var())}
                window["learning_rate"] = float(record.info.metrics["learning_rate"][-1])
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
            f"{kind}, rate {rate:g}",
            _runner.interval(group, "slope", 2),
            _runner.interval(group, "predicted_slope", 2),
            *(f"{np.mean([row['variances'][i] for row in group]):.2e}" for i in ends),
            *(f"{np.mean([row['means'][i] for row in group]):+.3f}" for i in ends),
        ]
        for (kind, rate), group in _runner.by(
            results.extra["measured"], "method", "learning_rate"
        ).items()
    ]
    sizes = [f"B = {config.sizes[i]}" for i in ends]
    fixed_point = _runner.make_table(
        f"{config.dataset}, {config.model}: the hypergradient at a fixed point, "
        f"{len(config.seeds)} seeds",
        ["h", "slope", "predicted", *(f"{w}, {b}" for w in ("variance", "mean") for b in sizes)],
        rows,
        "slope: of log variance in log B. predicted: from the gradients of single examples, to first "
        "order in the rate.\nmean: it changes with B as well, and so does the rate that h leads to.",
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


def _plot_fixed_point(config: Config, axes, groups) -> None:
    size = np.array(config.sizes, float)
    for color, (kind, group) in zip(plotting.COLORS, groups.items(), strict=False):
        mean = lambda values: np.exp(np.mean(np.log(values), axis=0))
        label = f"{kind}: slope {np.mean([row['slope'] for row in group]):.2f}"
        variance = mean([row["variances"] for row in group])
        axes[0].loglog(size, variance, "o-", color=color, ms=4, label=label)
        predicted = mean([r["predicted_a"] / size + r["predicted_b"] / size**2 for r in group])
        axes[0].loglog(size, predicted, ":", color=color, lw=1.6)
        means = np.array([row["means"] / abs(row["means"][-1]) for row in group])
        axes[1].semilogx(size, means.mean(0), "o-", color=color, ms=4)
        axes[1].fill_between(size, means.min(0), means.max(0), color=color, alpha=0.13, lw=0)
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].set_xlabel("batch size [examples]")
    axes[1].set_xticks(config.sizes, [str(size) for size in config.sizes])
    axes[1].minorticks_off()
    axes[1].set_yscale("symlog", linthresh=2.0)


def _plot_trajectories(config: Config, windows, path: Path) -> None:
    """Rate and variance of h: each seed's windows averaged in 30 bins, then over the seeds."""
    fig, axes = plotting.figure(1, 2, size=(10.0, 4.0))
    edges = np.linspace(0, 1 + max(w["num_examples"] for w in windows), 31)
    groups = _runner.by(windows, "method").items()
    for color, (name, group) in zip(plotting.COLORS, groups, strict=False):
        at = np.digitize([w["num_examples"] for w in group], edges) - 1
        for ax, field in zip(axes, ("learning_rate", "variance_h"), strict=True):
            value = np.array([w[field] for w in group], float)
            bins = [
                (np.median if ax is axes[1] else np.mean)(value[at == i]) for i in np.unique(at)
            ]
            ax.plot(edges[1 + np.unique(at)], bins, color=color, lw=1.4, label=name)
    axes[0].set(ylabel="learning rate: mean over seeds", ylim=(0, None))
    axes[1].set(ylabel=f"variance of h in {config.window} steps: median", yscale="log")
    for ax in axes:
        ax.set_xlabel("training examples seen")
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    fig.savefig(path)


def plot(results: _runner.Results, output: Path) -> None:
    config, fits = results.extra["config"], results.extra["fits"]
    rates = config.measured_rates
    fig, axes = plotting.figure(
        2, len(rates), (1 + 4.2 * len(rates), 6.4), squeeze=False, sharex=True
    )
    for column, rate in zip(axes.T, rates, strict=True):
        measured = [row for row in results.extra["measured"] if row["learning_rate"] == rate]
        _plot_fixed_point(config, column, _runner.by(measured, "method"))
        column[0].set_title(f"at the rate {rate:g}; dotted: predicted", fontsize=10)
    axes[0, 0].set_ylabel("variance of h: geometric mean")
    axes[1, 0].set_ylabel(f"mean of h, relative to B = {config.sizes[-1]}")
    fig.savefig(output / "variance.png")

    _plot_trajectories(config, results.windows, output / "learning_rates.png")
    limits = (config.min_batch_size, config.max_batch_size)
    hd = {key: fit for key, fit in fits.items() if key[0].startswith("HD")}
    plotting.batch_sizes(hd, limits, title=config.dataset).savefig(output / "batch_sizes.png")
    plotting.losses(fits, title=config.dataset).savefig(output / "loss_curves.png")
