"""The figures of `short_horizon_bias`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from arbiter_jax import plotting
from experiments.short_horizon_bias import descent

GREEDY, OPTIMAL, AHEAD = plotting.COLORS[1], plotting.COLORS[0], plotting.COLORS[2]


def _legend_above(fig: Any, ax: Any, columns: int) -> None:
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(
        handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=8
    )


def schedules(found: dict[str, Any], path: Path) -> None:
    """Learning rate, momentum and loss of the greedy and the optimal schedules."""
    fig, axes = plotting.figure(1, 3, size=(11.0, 3.6))
    for name, schedule in found.items():
        color = GREEDY if name.startswith("greedy") else OPTIMAL
        style = {"color": color, "ls": "--" if "momentum" in name else "-", "lw": 1.4}
        step = 1 + np.arange(len(schedule.learning_rates))
        axes[0].plot(step, schedule.learning_rates, label=name, **style)
        if "momentum" in name:
            axes[1].plot(step, schedule.momenta, **style)
        axes[2].plot(np.arange(len(step) + 1), schedule.excess_loss, **style)
    axes[0].set(ylabel="learning rate", yscale="log", ylim=(1e-3, 3))
    axes[1].set(ylabel="momentum", ylim=(-0.03, 1.03))
    axes[2].set(ylabel="excess loss", yscale="log")
    for ax in axes:
        ax.set_xlabel("step")
    _legend_above(fig, axes[0], 4)
    fig.savefig(path)


def ratios(config: Any, found: Any, path: Path) -> None:
    """The cost of a short look-ahead, against horizon, conditioning, noise and look-ahead."""
    fig, axes = plotting.figure(1, 4, size=(12.0, 3.2))
    panels = (
        ("steps of the run", config.horizons, found.horizon),
        ("condition number", config.conditions, found.condition),
        ("noise variance x curvature", config.noises, found.noise),
        (
            f"look-ahead [steps of {config.look_ahead_steps}]",
            config.look_aheads,
            found.look_ahead,
        ),
    )
    for ax, (label, x, y) in zip(axes, panels, strict=True):
        ax.set(xlabel=label)
        if not len(x):
            continue
        ax.semilogx(x, y, "o-", color=AHEAD if "look" in label else GREEDY, ms=4)
        ax.axhline(1.0, color="black", lw=0.8, ls=":")
        ax.set_ylim(0, 1.08 * max(y))
    axes[0].set_ylabel("greedy loss / optimal loss")
    axes[3].set_ylabel("loss / optimal loss")
    fig.savefig(path)


def batch_sizes(config: Any, found: dict[str, Any], path: Path) -> None:
    """Batch sizes and losses of the schedules at equal examples."""
    fig, (left, right) = plotting.figure(1, 2, size=(9.5, 3.8))
    shades = iter(np.linspace(0.35, 1.0, len(config.segment_look_aheads)))
    edges = np.linspace(0, config.num_examples, config.num_segments + 1)
    for name, schedule in found.items():
        style = {"color": {"greedy": GREEDY, "optimal": OPTIMAL}.get(name, AHEAD), "lw": 1.5}
        if name == "best constant":
            style = {"color": "black", "ls": ":", "lw": 1.3}
        if name.startswith("look"):
            style["alpha"] = next(shades)
        left.stairs(schedule.batch_sizes, edges, baseline=None, label=name, **style)
        right.semilogy(edges, schedule.excess_loss, **style)
    left.set_yscale("log", base=2)
    left.set(xlabel="examples seen", ylabel="batch size [examples]")
    right.set(xlabel="examples seen", ylabel="excess loss")
    _legend_above(fig, left, 4)
    fig.savefig(path)


def offline(config: Any, net: Any, found: dict[int, Any], path: Path) -> None:
    """The schedules that each horizon learns, and training with them."""
    fig, (left, right) = plotting.figure(1, 2, size=(9.5, 3.8))
    for color, (horizon, runs) in zip(plotting.COLORS, found.items(), strict=False):
        steps = np.arange(config.offline_steps)
        rates = [
            descent.effective(learned, steps, net) for learned in zip(*runs["learned"], strict=True)
        ]
        for i, rate in enumerate(rates):
            label = None if i else f"T = {horizon}"
            left.semilogy(1 + steps, rate, color=color, lw=1.0, alpha=0.8, label=label)
        width = max(1, config.offline_steps // 100)
        losses = runs["losses"][:, : len(steps) // width * width]
        smooth = losses.reshape(len(losses), -1, width).mean(-1)
        x = width * (0.5 + np.arange(smooth.shape[1]))
        right.semilogy(x, smooth.mean(0), color=color, lw=1.5)
        right.fill_between(x, smooth.min(0), smooth.max(0), color=color, alpha=0.15, lw=0)
    left.set(xlabel="training step", ylabel="learned effective learning rate", ylim=(1e-8, 10))
    right.set(xlabel="training step", ylabel="batch loss: mean and range of the seeds")
    _legend_above(fig, left, len(found))
    fig.savefig(path)


def online(config: Any, found: dict[str, Any], path: Path) -> None:
    """Training at the best manual rate, and with meta-descent starting from it."""
    fig, (left, right) = plotting.figure(1, 2, size=(9.5, 3.8))
    steps = 1 + np.arange(config.online_steps)
    named = (("manual", "best manual rate", OPTIMAL), ("adjusted", "online meta-descent", GREEDY))
    for name, label, color in named:
        for i, rates in enumerate(found[name]["rates"]):
            left.semilogy(steps, rates, color=color, lw=1.0, label=None if i else label)
        width = max(1, config.online_steps // 100)
        losses = found[name]["losses"]
        losses = losses[:, : losses.shape[1] // width * width]
        smooth = losses.reshape(len(losses), -1, width).mean(-1)
        x = width * (0.5 + np.arange(smooth.shape[1]))
        right.semilogy(x, smooth.mean(0), color=color, lw=1.5)
        right.fill_between(x, smooth.min(0), smooth.max(0), color=color, alpha=0.15, lw=0)
    left.set(xlabel="training step", ylabel="effective learning rate")
    right.set(xlabel="training step", ylabel="batch loss: mean and range of the seeds")
    _legend_above(fig, left, 2)
    fig.savefig(path)


def surface(
    config: Any, net: Any, grid: Any, losses: Any, found: dict[int, Any], path: Path
) -> None:
    """The meta-objective of every horizon over the schedules, and where meta-descent went."""
    rates, decays = grid
    fig, axes = plotting.figure(
        1, len(losses), size=(1.0 + 3.0 * len(losses), 3.6), sharey=True, squeeze=False
    )
    for ax, horizon, values in zip(axes[0], config.horizons, losses, strict=True):
        # Show a run that diverged like one that never left the start.
        values = np.log10(np.clip(np.nan_to_num(values, nan=np.inf), None, np.log(10)))
        ax.grid(False)
        mesh = ax.contourf(rates, decays, values, levels=14, cmap="viridis")
        low = np.unravel_index(np.argmin(values), values.shape)
        for rate, decay in _paths(found[horizon], net) if horizon in found else ():
            ax.plot(rate, decay, color="white", lw=0.9, alpha=0.9)
            ax.plot(rate[-1], decay[-1], "o", color="white", mec="black", ms=4)
        ax.plot(rates[low[1]], decays[low[0]], "*", color=GREEDY, mec="black", ms=11)
        ax.set(xscale="log", yscale="log", title=f"T = {horizon}", xlabel="initial effective rate")
        ax.set(xlim=rates[[0, -1]], ylim=decays[[0, -1]])
        fig.colorbar(mesh, ax=ax, format="%.1f", pad=0.02).ax.tick_params(labelsize=7)
    axes[0, 0].set_ylabel("decay exponent")
    fig.suptitle(
        "log10 of the training loss after T steps; star: lowest of the grid; white: meta-descent, "
        "a dot where it ends",
        fontsize=9,
    )
    fig.savefig(path)


def _paths(runs: dict[str, Any], net: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    history = zip(*runs["history"], strict=True)
    return [(descent.effective(h, 0, net), np.asarray(h[2])) for h in history]
