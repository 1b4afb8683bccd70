"""Figures of runs: batch sizes, losses, and the proposals of an agent. Needs matplotlib.

Every function returns a ``matplotlib.figure.Figure`` that is independent of pyplot and its backend:
save it with ``savefig``, or put it in the last line of a notebook cell to display it.
"""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from arbiter_jax import _validate
from arbiter_jax.hyper_learning import to_batch_size

# The palette of Okabe and Ito, which color-blind readers can distinguish.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


@functools.cache
def _figure_class() -> Any:
    """A subclass of matplotlib's Figure that notebooks display as an image."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'Figures need matplotlib: pip install "arbiter-jax[plotting]".'
        ) from error

    class NotebookFigure(Figure):
        # IPython calls this for figures that pyplot, and so its inline backend, does not know.
        def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
            file = io.BytesIO()
            self.savefig(file, format="png")
            width, height = self.get_size_inches()
            # In CSS pixels, 96 per inch: the image itself has more, for sharp screens.
            return file.getvalue(), {"width": round(96 * width), "height": round(96 * height)}

    return NotebookFigure


def figure(
    num_rows: int = 1, num_columns: int = 1, size: tuple[float, float] = (7.0, 4.2), **kw: Any
) -> tuple[Any, Any]:
    """Makes an empty figure in the style of this library, and its axes.

    Args:
      num_rows: Number of rows of axes.
      num_columns: Number of columns of axes.
      size: Width and height, in inches.
      **kw: Options of ``Figure.subplots``.

    Returns:
      (figure, axes): a single Axes, or an array of them if there is more than one.

    Raises:
      ImportError: If matplotlib is not installed.
    """
    fig = _figure_class()(figsize=size, dpi=150, layout="constrained")
    axes = fig.subplots(num_rows, num_columns, **kw)
    for ax in np.ravel(axes):
        ax.grid(True, color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return fig, axes


def _runs(fits: Any) -> dict[tuple[str, int], Any]:
    """The runs that have a step at least, or an error that says what is expected."""
    if not isinstance(fits, Mapping) or not all(
        isinstance(name, tuple) and len(name) == 2 for name in fits
    ):
        raise ValueError(
            f"fits must be a dict {{(method, seed): FitResult}}, got {type(fits).__name__}"
            f"{f' with keys {list(fits)}' if isinstance(fits, Mapping) else ''}."
        )
    runs = {name: fit for name, fit in fits.items() if fit.history}
    if not runs:
        raise ValueError(
            f"fits must hold at least one run of at least one window, got {len(fits)} without any."
        )
    return runs


def _check_limits(limits: Any) -> None:
    if not isinstance(limits, Sequence) or len(limits) != 2:
        raise ValueError(f"limits must be (smallest, largest) batch size, got {limits!r}.")
    _validate.batch_size_range(*limits)


def _check_metrics(fit: Any, found: Callable[[str], bool], origin: str) -> None:
    """Raises unless the run reports what is to be drawn."""
    if not hasattr(fit, "history"):
        raise ValueError(f"fit must be a FitResult, got {type(fit).__name__}.")
    metrics = fit.history[0].info.metrics if fit.history else ()
    if not any(map(found, metrics)):
        raise ValueError(
            f"fit must be a run with {origin} in its chain, got one of {len(fit.history)} windows that "
            f"reports {', '.join(metrics) or 'nothing'}."
        )


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


def _label(method: str) -> str:
    return method.replace("_", " ")


def _methods(fits: Mapping[tuple[str, int], Any]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for (method, _), fit in fits.items():
        groups.setdefault(method, []).append(fit)
    return groups


def batch_sizes(
    fits: Mapping[tuple[str, int], Any], limits: tuple[int, int], title: str = ""
) -> Any:
    """Plots batch size against training examples, with one line per seed.

    Each method has a color, or a panel of its own if there are more methods than colors.

    Args:
      fits: {(method, seed): FitResult}; runs without a window are left out.
      limits: Smallest and largest batch size.
      title: Title of the figure.

    Returns:
      The figure.

    Raises:
      ValueError: If there is nothing to draw, or an argument is out of range.
    """
    _check_limits(limits)
    groups = _methods(_runs(fits))
    if len(groups) > len(COLORS):  # constant sizes need no panels
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
            label = _label(method) if i == 0 else None
            ax.stairs(sizes, edges, color=color, baseline=None, label=label, alpha=0.85, **style)
        _size_axis(ax, limits)
    _finish(fig, places, "batch size [examples]", title)
    return fig


def _places(methods: Mapping[str, Any]) -> tuple[Any, dict[str, tuple[Any, str]]]:
    """The axes and color of each method: one panel for all if there are enough colors."""
    if len(methods) <= len(COLORS):
        fig, ax = figure()
        return fig, {method: (ax, color) for method, color in zip(methods, COLORS, strict=False)}
    rows = -(-len(methods) // 4)
    fig, axes = figure(rows, 4, size=(11.0, 1.9 * rows + 0.6), sharex=True, sharey=True)
    for ax in axes.ravel()[len(methods) :]:
        ax.remove()
    for ax in fig.axes[-4:]:  # the lowest panel of each column, also above a removed one
        ax.tick_params(labelbottom=True)
    return fig, {m: (ax, COLORS[0]) for m, ax in zip(methods, fig.axes, strict=True)}


def _finish(fig: Any, places: Mapping[str, tuple[Any, str]], ylabel: str, title: str) -> None:
    many = len(fig.axes) > 1
    for method, (ax, _) in places.items():
        _thousands(ax)
        ax.set_xlim(left=0)
        if many:
            ax.set(xlabel="", ylabel="")
            ax.set_title(_label(method), fontsize=9)
    if many:
        fig.suptitle(title, fontsize=10)
        fig.supxlabel("training examples seen", fontsize=9)
        fig.supylabel(ylabel, fontsize=9)
    else:
        fig.axes[0].set_title(title, fontsize=10)
        fig.axes[0].set_ylabel(ylabel)
        fig.legend(loc="outside right upper", frameon=False, fontsize=8)


def losses(fits: Mapping[tuple[str, int], Any], title: str = "", num_points: int = 120) -> Any:
    """Plots training loss against training examples: the mean over seeds and their range.

    Each method has a color, or a panel of its own if there are more methods than colors.

    Args:
      fits: {(method, seed): FitResult}; runs without a window are left out.
      title: Title of the figure.
      num_points: Number of points per curve; each is the mean over the nearby steps.

    Returns:
      The figure.

    Raises:
      ValueError: If there is nothing to draw, or an argument is out of range.
    """
    num_points = _validate.integer(num_points=num_points, minimum=1)
    fits = _runs(fits)
    smallest = min(float(np.sum(fit.per_step("batch_size"))) for fit in fits.values())
    edges = np.linspace(0, smallest, num_points + 1)
    center = (edges[:-1] + edges[1:]) / 2
    groups = _methods(fits)
    curves = {k: np.array([_binned(fit, edges) for fit in group]) for k, group in groups.items()}
    fig, places = _places(groups)
    for method, mine in curves.items():
        ax, color = places[method]
        if len(groups) > len(COLORS):
            for other in curves.values():
                ax.plot(center, other.mean(0), color="#cccccc", linewidth=0.6)
        style = {"linestyle": (0, (4, 2))} if method.startswith("constant") else {}
        ax.plot(center, mine.mean(0), color=color, label=_label(method), linewidth=1.5, **style)
        if len(mine) > 1:
            ax.fill_between(center, mine.min(0), mine.max(0), color=color, alpha=0.13, lw=0)
        ax.set_yscale("log")
    _finish(fig, places, "training loss", title)
    return fig


def _binned(fit: Any, edges: np.ndarray) -> np.ndarray:
    """Mean loss between neighboring edges, interpolated linearly where no step ends."""
    sizes, loss = fit.per_step("batch_size"), fit.per_step("loss")
    seen = np.cumsum(sizes)
    index = np.digitize(seen, edges) - 1
    inside = (index >= 0) & (index < len(edges) - 1)
    weight = np.bincount(index[inside], sizes[inside], minlength=len(edges) - 1)
    total = np.bincount(index[inside], (sizes * loss)[inside], minlength=len(edges) - 1)
    filled = weight > 0
    if not filled.any():
        return np.full(len(weight), np.nan)
    center = (edges[:-1] + edges[1:]) / 2
    return np.interp(center, center[filled], total[filled] / weight[filled])


def proposals(fit: Any, limits: tuple[int, int], title: str = "") -> Any:
    """Plots the proposals of an agent, their mixture, its weights, and the applied batch size.

    Args:
      fit: FitResult of a run with :func:`arbiter_jax.arbiter`.
      limits: Smallest and largest batch size.
      title: Title of the figure.

    Returns:
      The figure.

    Raises:
      ValueError: If there is nothing to draw, or an argument is out of range.
    """
    _check_limits(limits)
    _check_metrics(fit, lambda name: name == "proposals", "arbiter_jax.arbiter")
    fig, (top, bottom) = figure(2, 1, size=(7.0, 6.0), sharex=True, height_ratios=[2, 1])
    seen = np.cumsum(fit.per_step("batch_size"))
    logits = fit.per_step("proposals")
    sizes = np.asarray(to_batch_size(logits, *limits))
    mixture = np.asarray(to_batch_size(fit.per_step("mixture"), *limits))
    weights = fit.per_step("mixture_weights") - 1 / logits.shape[1]
    for n, color in zip(range(logits.shape[1]), itertools.cycle(COLORS), strict=False):
        label = f"proposal {n + 1}"
        top.plot(seen, sizes[:, n], color=color, linewidth=0.9, alpha=0.8, label=label)
        bottom.plot(seen, 1e3 * weights[:, n], color=color, linewidth=1.0)
    top.plot(seen, mixture, color="black", linewidth=1.1, label="mixture (meta batch)")
    edges = np.concatenate([[0], [record.num_examples for record in fit.history]])
    chosen = [record.batch_size for record in fit.history]
    style = {"color": "#555555", "linewidth": 2.4, "zorder": 5, "label": "applied batch size"}
    top.stairs(chosen, edges, baseline=None, **style)
    _size_axis(top, limits)
    bottom.set_ylabel(f"mixture weight\n- 1/{logits.shape[1]} [1e-3]")
    _thousands(bottom)
    top.set_xlim(left=0)
    top.set_title(title, fontsize=10)
    top.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return fig
