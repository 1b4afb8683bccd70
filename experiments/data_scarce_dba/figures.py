"""Figures of :mod:`experiments.data_scarce_dba`: how fast, how many examples, and which."""

from __future__ import annotations

from typing import Any

import numpy as np

from arbiter_jax import plotting, subset_selection

NAMES = {"": "all examples", "signal_to_noise": "signal to noise"}


def _split(method: str) -> tuple[str, str]:
    optimizer, _, metric = method.partition("_")
    return optimizer, metric


def _colors(methods) -> dict[str, str]:
    found = dict.fromkeys(_split(method)[1] for method in methods)
    return dict(zip(found, plotting.COLORS, strict=False))


def convergence(curves: dict, rows: list[dict], config: Any):
    """Training loss against steps, against the number of selected examples, and against time."""
    problems = list(dict.fromkeys(key[:2] for key in curves))
    colors = _colors(key[2] for key in curves)
    fig, axes = plotting.figure(
        len(problems), 3, size=(12.5, 3.1 * len(problems) + 0.5), squeeze=False, sharey="row"
    )
    for (name, regime, method), run in curves.items():
        optimizer, metric = _split(method)
        mine = [
            r for r in rows if (r["dataset"], r["regime"], r["method"]) == (name, regime, method)
        ]
        steps = config.window * np.arange(1, run.train_loss.shape[1] + 1)
        chosen = np.cumsum(run.fraction.mean(axis=(0, 2))) * config.window * config.batch_size
        seconds = steps / config.num_steps * mine[0]["seconds"]
        loss = np.exp(np.log(run.train_loss + 1e-8).mean(axis=0))
        style = {"color": colors[metric], "ls": "-" if optimizer == "adam" else (0, (3, 1.5))}
        label = f"{optimizer}, {NAMES.get(metric, metric)}"
        for ax, x in zip(
            axes[problems.index((name, regime))], (steps, chosen, seconds), strict=True
        ):
            ax.plot(x, loss, lw=1.4, label=label, **style)
    for row, (name, regime) in zip(axes, problems, strict=True):
        row[0].set_ylabel(f"{name}, {regime}\ntraining loss")
        for ax in row:
            ax.set_yscale("log")
            ax.set_ylim(bottom=1e-4)
            ax.set_xlim(left=0)
    evaluations = f"steps [{config.batch_size} gradient evaluations]"
    for ax, label in zip(
        axes[-1],
        (evaluations, "examples chosen, mean over layers", "CPU seconds per run"),
        strict=True,
    ):
        ax.set_xlabel(label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    fig.suptitle("Geometric mean over the seeds, each method at its best rate", fontsize=10)
    return fig


def _grid(curves: dict, **shared: bool):
    """One panel per problem and selecting method: (figure, axes, [(ax, run), ...])."""
    runs = {key: run for key, run in curves.items() if _split(key[2])[1]}
    problems = list(dict.fromkeys(key[:2] for key in runs))
    methods = list(dict.fromkeys(key[2] for key in runs))
    size = (2.1 * len(methods) + 1.8, 2.2 * len(problems) + 0.6)
    fig, axes = plotting.figure(
        len(problems), len(methods), size, squeeze=False, sharey=True, **shared
    )
    for ax, method in zip(axes[0], methods, strict=True):
        ax.set_title(method.replace("_", " "), fontsize=9)
    for row, problem in zip(axes, problems, strict=True):
        row[0].set_ylabel(", ".join(problem), fontsize=9)
    panels = [(axes[problems.index(k[:2]), methods.index(k[2])], run) for k, run in runs.items()]
    return fig, axes, panels


def _legend(fig: Any, axes: Any) -> Any:
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8, title="layer")
    return fig


def fractions(curves: dict, config: Any):
    """The share of the batch that each layer selects over time: mean and range over the seeds."""
    fig, axes, panels = _grid(curves, sharex=True)
    for ax, run in panels:
        steps = config.window * np.arange(1, run.fraction.shape[1] + 1)
        for g, layer in enumerate(subset_selection.group_names(run.params)):
            share, color = run.fraction[:, :, g], plotting.COLORS[g]
            ax.plot(steps, share.mean(axis=0), color=color, lw=1.5, label=layer)
            ax.fill_between(steps, share.min(0), share.max(0), color=color, alpha=0.15, lw=0)
        ax.set_ylim(0, 1.03)
    for ax in axes[-1]:
        ax.set_xlabel("steps", fontsize=9)
    fig.suptitle("Share of the batch that a layer chooses", fontsize=10)
    return _legend(fig, axes)


def examples(curves: dict):
    """How often an example is selected against how hard it is, for the first seed."""
    fig, axes, panels = _grid(curves)
    for ax, run in panels:
        hard = run.difficulty[0] + 1e-6
        for g, layer in enumerate(subset_selection.group_names(run.params)):
            color = plotting.COLORS[g]
            ax.scatter(hard, run.rate[0, g], s=6, alpha=0.6, lw=0, color=color, label=layer)
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter("")
        ax.set_ylim(-0.03, 1.03)
    for ax in axes[-1]:
        ax.set_xlabel("mean loss", fontsize=9)
    fig.suptitle("How often an example is chosen when it is drawn, one point each", fontsize=10)
    return _legend(fig, axes)
