"""Figures of a run: the batch size, what an agent proposes, the loss. Needs matplotlib.

Every function returns a ``matplotlib.figure.Figure`` that belongs to no window: save it, or show it
as the last line of a notebook cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arbiter_jax.hyper_learning import to_batch_size

# Okabe and Ito's palette: told apart by colour-blind readers, and in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def figure(
    num_rows: int = 1, num_columns: int = 1, size: tuple[float, float] = (7.0, 4.2), **kw: Any
) -> tuple[Any, Any]:
    """An empty figure of the house style and its axes.

    Args:
      num_rows: Rows of axes.
      num_columns: Columns of axes.
      size: Width and height, in inches.
      **kw: As for ``Figure.subplots``.

    Returns:
      (figure, axes); one Axes for a single one, an array otherwise.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'Figures need matplotlib: pip install "arbiter-jax[experiments]".'
        ) from error
    fig = Figure(figsize=size, dpi=150, layout="constrained")
    axes = fig.subplots(num_rows, num_columns, **kw)
    for ax in np.ravel(axes):
        ax.grid(True, color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return fig, axes


def _size_axis(ax: Any, limits: tuple[int, int]) -> None:
    ax.set_yscale("log", base=2)
    ax.set_ylim(limits[0] / 1.15, limits[1] * 1.15)
    low, high = (round(np.log2(limit)) for limit in limits)
    ticks = [2.0**k for k in range(low, high + 1)]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_ylabel("batch size [examples]")


def _thousands(ax: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x else "0"))
    ax.set_xlabel("training examples seen")


def _methods(fits: Mapping[tuple[str, int], Any]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for (method, _), fit in fits.items():
        groups.setdefault(method, []).append(fit)
    return groups


def batch_sizes(
    fits: Mapping[tuple[str, int], Any], limits: tuple[int, int], title: str = ""
) -> Any:
    """Batch size against examples, one colour a method (or a panel, of many), one line a seed.

    Args:
      fits: {(method, seed): FitResult}.
      limits: Smallest and largest batch size.
      title: Title of the figure.
    """
    groups = _methods(fits)
    if len(groups) > len(COLORS):  # a panel each, without those that need none
        groups = {k: v for k, v in groups.items() if not k.startswith("constant")}
    fig, places = _places(groups)
    for method, group in groups.items():
        ax, color = places[method]
        constant = method.startswith("constant")
        for i, fit in enumerate(group[:1] if constant else group):
            ends = np.array([record.num_examples for record in fit.history])
            sizes = np.array([record.batch_size for record in fit.history])
            edges = np.concatenate([[0], ends])
            style = {"linestyle": (0, (4, 2)), "linewidth": 1.2} if constant else {"linewidth": 1.6}
            label = method if i == 0 else None
            ax.stairs(sizes, edges, color=color, baseline=None, label=label, alpha=0.85, **style)
        _size_axis(ax, limits)
    _finish(fig, places, "batch size [examples]", title)
    return fig


def _places(methods: Mapping[str, Any]) -> tuple[Any, dict[str, tuple[Any, str]]]:
    """Where each method is drawn, (axes, color): all in one panel while the colors last."""
    if len(methods) <= len(COLORS):
        fig, ax = figure()
        return fig, {method: (ax, color) for method, color in zip(methods, COLORS, strict=False)}
    rows = -(-len(methods) // 4)
    fig, axes = figure(rows, 4, size=(11.0, 1.9 * rows + 0.6), sharex=True, sharey=True)
    for ax in axes.ravel()[len(methods) :]:
        ax.remove()
    return fig, {m: (ax, COLORS[0]) for m, ax in zip(methods, axes.ravel(), strict=False)}


def _finish(fig: Any, places: Mapping[str, tuple[Any, str]], ylabel: str, title: str) -> None:
    many = len(fig.axes) > 1
    for method, (ax, _) in places.items():
        _thousands(ax)
        ax.set_xlim(left=0)
        if many:
            ax.set(xlabel="", ylabel="")
            ax.set_title(method.replace("_", " "), fontsize=9)
    if many:
        fig.suptitle(title, fontsize=10)
        fig.supxlabel("training examples seen", fontsize=9)
        fig.supylabel(ylabel, fontsize=9)
    else:
        fig.axes[0].set_title(title, fontsize=10)
        fig.axes[0].set_ylabel(ylabel)
        fig.legend(loc="outside right upper", frameon=False, fontsize=8)


def _cycle():
    while True:
        yield from COLORS


def losses(fits: Mapping[tuple[str, int], Any], title: str = "", num_points: int = 120) -> Any:
    """Training loss against examples: mean over the seeds, and their range; a panel each of many.

    Args:
      fits: {(method, seed): FitResult}.
      title: Title of the figure.
      num_points: Points of a curve; each is the mean of the steps around it.
    """
    smallest = min(float(np.sum(fit.per_step("batch_size"))) for fit in fits.values())
    edges = np.linspace(0, smallest, num_points + 1)
    centre = (edges[:-1] + edges[1:]) / 2
    groups = _methods(fits)
    curves = {k: np.array([_binned(fit, edges) for fit in group]) for k, group in groups.items()}
    fig, places = _places(groups)
    for method, mine in curves.items():
        ax, color = places[method]
        if len(groups) > len(COLORS):
            for other in curves.values():
                ax.plot(centre, other.mean(0), color="#cccccc", linewidth=0.6)
        style = {"linestyle": (0, (4, 2))} if method.startswith("constant") else {}
        ax.plot(centre, mine.mean(0), color=color, label=method, linewidth=1.5, **style)
        if len(mine) > 1:
            ax.fill_between(centre, mine.min(0), mine.max(0), color=color, alpha=0.13, lw=0)
        ax.set_yscale("log")
    _finish(fig, places, "training loss", title)
    return fig


def _binned(fit: Any, edges: np.ndarray) -> np.ndarray:
    """Mean loss between the edges; where no step ends in between, the line goes straight on."""
    sizes, loss = fit.per_step("batch_size"), fit.per_step("loss")
    seen = np.cumsum(sizes)
    index = np.digitize(seen, edges) - 1
    inside = (index >= 0) & (index < len(edges) - 1)
    weight = np.bincount(index[inside], sizes[inside], minlength=len(edges) - 1)
    total = np.bincount(index[inside], (sizes * loss)[inside], minlength=len(edges) - 1)
    filled = weight > 0
    centre = (edges[:-1] + edges[1:]) / 2
    return np.interp(centre, centre[filled], total[filled] / weight[filled])


def proposals(fit: Any, limits: tuple[int, int], title: str = "") -> Any:
    """What an agent proposed at every step, the mixture, the decision; and the mixture's weights.

    Args:
      fit: FitResult of a run with :func:`arbiter_jax.arbiter`.
      limits: Smallest and largest batch size.
      title: Title of the figure.
    """
    fig, (top, bottom) = figure(2, 1, size=(7.0, 6.0), sharex=True, height_ratios=[2, 1])
    seen = np.cumsum(fit.per_step("batch_size"))
    logits = fit.per_step("proposals")
    sizes = np.asarray(to_batch_size(logits, *limits))
    mixture = np.asarray(to_batch_size(fit.per_step("mixture"), *limits))
    for n in range(logits.shape[1]):
        label = f"proposal {n + 1}"
        top.plot(seen, sizes[:, n], color=COLORS[n], linewidth=0.9, alpha=0.8, label=label)
        weights = fit.per_step("mixture_weights")[:, n] - 1 / logits.shape[1]
        bottom.plot(seen, 1e3 * weights, color=COLORS[n], linewidth=1.0)
    top.plot(seen, mixture, color="black", linewidth=1.1, label="mixture (meta batch)")
    edges = np.concatenate([[0], [record.num_examples for record in fit.history]])
    chosen = [record.batch_size for record in fit.history]
    top.stairs(chosen, edges, baseline=None, color="#555555", lw=2.4, zorder=5, label="batch size")
    _size_axis(top, limits)
    bottom.set_ylabel(f"mixture weight - 1/{logits.shape[1]}  [1e-3]")
    _thousands(bottom)
    top.set_xlim(left=0)
    top.set_title(title, fontsize=10)
    top.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return fig


def shadows(fit: Any, limits: tuple[int, int], title: str = "") -> Any:
    """What every rule under :func:`arbiter_jax.schedulers.shadow` would have chosen in one run.

    Args:
      fit: FitResult of a run with shadows in its chain.
      limits: Smallest and largest batch size.
      title: Title of the figure.
    """
    fig, ax = figure()
    seen = np.cumsum(fit.per_step("batch_size"))
    names = [name for name in fit.history[0].info.metrics if name.startswith("shadow/")]
    last = {name: float(np.median(fit.per_step(name)[-50:])) for name in names}
    for color, name in zip(
        _cycle(), sorted(names, key=lambda name: last[name], reverse=True), strict=False
    ):
        label = f"{name.removeprefix('shadow/')}: {last[name]:.0f} at the end"
        ax.plot(seen, fit.per_step(name), color=color, linewidth=1.2, label=label)
    ax.plot(seen, fit.per_step("batch_size"), color="black", ls=":", lw=1.2, label="in force")
    _size_axis(ax, limits)
    _thousands(ax)
    ax.set_xlim(left=0)
    ax.set_title(title, fontsize=10)
    fig.legend(loc="outside right upper", frameon=False, fontsize=8)
    return fig
