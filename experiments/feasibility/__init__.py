"""Does Arbiter's schedule respond to the dynamics of training?

Claim (arXiv:2205.08231, section 4): the learned schedules differ with learning rate, batch size and
momentum, so the agent perceives the inner dynamics. The tests: a sweep of the *range*, which leaves
the dynamics unchanged, a random-pick control, and an agent that sees noise instead of inputs.
Command: python -m experiments.feasibility
Time: 5 minutes; with the rules that measure noise about 15.
Expected: the mixture goes to the middle of any range, (b_min + b_max) / 2, from above as well as from
below, whatever the learning rate and the momentum.
Measured: 1.02 to 1.07 of the way to the middle in five ranges (.92 from above), .98 with an agent that
sees noise. All numbers: README.md in this folder.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import arbiter_jax as aj
from arbiter_jax import plotting
from experiments import _methods, _runner, _training
from experiments.feasibility import noise_rules

METHODS = ("arbiter", *noise_rules.METHODS)


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "digits"
    model: str = "mlp"
    seeds: tuple[int, ...] = (0, 1, 2)
    num_steps: int = 3000
    learning_rate: float = 0.05
    momentum: float = 0.9
    # In 3,000 steps this rate shows what the published 1e-5 shows in about 10,000.
    agent_learning_rate: float = _runner.flag(1e-4, "learning rate of the agent")
    window: int = 100
    methods: tuple[str, ...] = _runner.flag(METHODS, "rules to run", METHODS)
    noise_epochs: float = _runner.flag(30.0, "epochs of the rules that measure noise")
    quick: bool = _runner.flag(False, "two cases only")


CONFIGS = {
    "smoke": Config(seeds=(0,), num_steps=20, window=10, methods=("arbiter",), quick=True),
    "default": Config(),
    "paper": Config(
        dataset="fashion_mnist",
        seeds=(0, 1, 2, 3, 4),
        num_steps=20_000,
        agent_learning_rate=1e-5,
        noise_epochs=10.0,
    ),
}

BASE = {"low": 8, "high": 512, "start": 64, "rate": None, "momentum": None, "control": ""}


def cases(config: Config) -> dict[str, dict]:
    """{name: settings of the case}; the first word of a name is its group."""
    groups = {
        "range": [
            ("8-256", {"high": 256}),
            ("8-512", {}),
            ("8-1024", {"high": 1024}),
            ("128-256", {"low": 128, "high": 256, "start": 144}),
            ("128-512", {"low": 128, "start": 160}),
        ],
        "learning rate": [(f"{rate:g}", {"rate": rate}) for rate in (0.01, 0.1)],
        "momentum": [("0", {"momentum": 0.0})],
        "start": [("16", {"start": 16}), ("400", {"start": 400})],
        "control": [
            ("agent sees noise", {"control": "noise"}),
            ("random pick", {"control": "random_pick"}),
        ],
    }
    if config.quick:
        groups = {"range": groups["range"], "control": groups["control"]}
    return {
        f"{group} {name}": {**BASE, **change}
        for group, members in groups.items()
        for name, change in members[: 1 if config.quick else None]
    }


def _agent(task: _training.Task, case: dict) -> aj.Agent:
    agent = _methods.agent_for(task)
    if case["control"] != "noise":
        return agent

    def apply(agent_params, inputs):
        # Noise in the shape of the inputs: different for each batch, without information about it.
        bits = jnp.sum(jax.lax.bitcast_convert_type(inputs, jnp.uint32), dtype=jnp.uint32)
        noise = jax.random.normal(jax.random.fold_in(jax.random.PRNGKey(0), bits), inputs.shape)
        return agent.apply(agent_params, noise)

    return agent._replace(apply=apply)


def _method(task: _training.Task, config: Config, case: dict, optimizer) -> _methods.Method:
    agent = _agent(task, case)
    frozen = case["control"] == "random_pick"
    learner = aj.hyper_learning.hyper_optimizer(config.agent_learning_rate)
    rate = config.learning_rate if case["rate"] is None else case["rate"]
    momentum = config.momentum if case["momentum"] is None else case["momentum"]

    def start(seed=0, learning_rate=None):
        rule = aj.arbiter(
            agent,
            task.losses.response_loss,
            num_features=task.model.num_features,
            min_batch_size=case["low"],
            max_batch_size=case["high"],
            initial_batch_size=case["start"],
            window=config.window,
            agent_optimizer=optax.set_to_zero() if frozen else learner,
            mixture_optimizer=optax.set_to_zero() if frozen else None,
            seed=seed,
        )
        return optax.chain(optimizer(learning_rate=rate, momentum=momentum), rule)

    return _methods.Method(start(), start)


def run(config: Config) -> _runner.Results:
    task = _training.make_task(config.dataset, config.model)
    results = _runner.Results(extra={"config": config, "fits": {}})
    if "arbiter" in config.methods:
        _run_arbiter(task, config, results)
    results.extra["paths"] = noise_rules.run(task, config)
    for (method, case, seed), path in results.extra["paths"].items():
        results.rows.append(
            {"method": f"{method}, {case}", "seed": seed, "batch_sizes": path.tolist()}
        )
    return results


def _run_arbiter(task, config: Config, results: _runner.Results) -> None:
    optimizer = optax.inject_hyperparams(optax.sgd)
    programs: dict[tuple, _methods.Method] = {}
    for name, case in cases(config).items():
        method = _method(task, config, case, optimizer)
        # Cases that differ only in their initial state share a program.
        program = programs.setdefault((case["low"], case["high"], case["control"]), method)
        for seed in config.seeds:
            num_examples = config.num_steps * case["high"]
            row, windows, fit = _training.train(
                task,
                name,
                program._replace(start=method.start),
                seed=seed,
                learning_rate=case["rate"] or config.learning_rate,
                num_examples=num_examples,
                window=config.window,
                callbacks=[
                    aj.callbacks.progress(f"{name}, seed {seed}"),
                    lambda record, state: int(state.num_steps) >= config.num_steps,
                ],
            )
            mixture = np.asarray(
                aj.to_batch_size(fit.per_step("mixture"), case["low"], case["high"])
            )
            row |= {
                "middle": (case["low"] + case["high"]) / 2,
                "start": case["start"],
                "end": float(np.mean(mixture[-100:])),
                "weight_spread": float(np.abs(fit.per_step("mixture_weights") - 0.25).max()),
            }
            results.rows.append(row)
            results.windows.extend(windows)
            results.extra["fits"][name, seed] = mixture


def table(results: _runner.Results):
    from rich.console import Group

    config, paths = results.extra["config"], results.extra["paths"]
    tables = [_arbiter_table(results)] if "arbiter" in config.methods else []
    return Group(*tables, *([noise_rules.table(paths, config)] if paths else []))


def _arbiter_table(results: _runner.Results):
    config = results.extra["config"]
    rows = [
        [
            name,
            f"{group[0]['start']}",
            f"{group[0]['middle']:.0f}",
            _runner.interval(group, "end", 0),
            f"{np.mean([_share(row) for row in group]):.2f}",
            f"{max(row['weight_spread'] for row in group):.4f}",
            _runner.interval(group, "test_accuracy", 2, scale=100),
        ]
        for name, group in _runner.by(results.rows, "method").items()
        if "end" in group[0]
    ]
    return _runner.make_table(
        f"{config.dataset}, {config.model}: the mixture after {config.num_steps:,} steps, "
        f"{len(config.seeds)} seeds",
        [
            "case",
            "start",
            "middle",
            "mixture at the end",
            "way to the middle",
            "|weight - 1/4|",
            "test accuracy %",
        ],
        rows,
        "mixture: as a batch size, mean of the last 100 steps. way to the middle: 0 at the start, 1 "
        "in the middle of\nthe range. Base case: range 8-512, learning rate "
        f"{config.learning_rate:g}, momentum {config.momentum:g}, agent's rate "
        f"{config.agent_learning_rate:g}.",
    )


def _share(row: dict) -> float:
    return (row["end"] - row["start"]) / (row["middle"] - row["start"])


def plot(results: _runner.Results, output: Path) -> None:
    if results.extra["paths"]:
        noise_rules.plot(results.extra["paths"], results.extra["config"], output)
    if results.extra["fits"]:
        _plot_arbiter(results, output)


def _plot_arbiter(results: _runner.Results, output: Path) -> None:
    config, mixtures = results.extra["config"], results.extra["fits"]
    all_cases = cases(config)
    panels = {
        "range": "the range",
        "learning rate|momentum|start": "the dynamics, and the start",
        "control": "controls",
    }
    fig, axes = plotting.figure(1, 3, size=(12.5, 4.2), sharey=True)
    for ax, (prefixes, title) in zip(axes, panels.items(), strict=True):
        names = [n for n in all_cases if n.startswith(tuple(prefixes.split("|")))]
        for color, name in zip(plotting.COLORS, names, strict=False):
            case = all_cases[name]
            for i, seed in enumerate(config.seeds):
                ax.plot(mixtures[name, seed], color=color, lw=1.1, label=None if i else name)
            if prefixes == "range":
                ax.axhline((case["low"] + case["high"]) / 2, color=color, ls=":", lw=1.2)
        if prefixes != "range":
            ax.axhline(260, color="#555555", ls=":", lw=1.2)
        ax.set_yscale("log", base=2)
        ticks = [2**k for k in range(3, 11)]
        ax.set_yticks(ticks, [str(tick) for tick in ticks])
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("steps")
        if names:
            ax.legend(frameon=False, fontsize=7.5, loc="lower right")
    axes[0].set_ylabel("mixture as a batch size [examples]")
    fig.suptitle(f"{config.dataset}, {config.model}: dotted, the middle of the range", fontsize=10)
    fig.savefig(output / "feasibility.png")
