"""One style for all figures: an empty figure, axes with units, labels at the ends of lines."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from arbiter_jax import _validate

# The palette of Okabe and Ito, which color-blind readers can distinguish.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
# Lines next to each other differ in their dashes, because gray prints lose the colors.
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (2, 1)), (0, (7, 1.5, 1.5, 1.5)))
MOST_LABELS = len(COLORS)  # at the ends of the lines; more of them go into a legend or panels
_LINE_HEIGHT = 0.16  # of such a label of 8 points, in inches


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

    >>> from arbiter_jax import plotting
    >>> fig, axes = plotting.figure(num_columns=2, size=(8.0, 3.0), sharey=True)
    >>> axes.shape, fig.get_size_inches().tolist()
    ((2,), [8.0, 3.0])
    """
    fig = _figure_class()(figsize=size, dpi=150, layout="constrained")
    axes = fig.subplots(num_rows, num_columns, **kw)
    for ax in np.ravel(axes):
        ax.grid(True, color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return fig, axes


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


def label_ends(ax: Any, fontsize: float = 8) -> None:
    """Writes the label of each line at its end in place of a legend, moved apart if they would overlap.

    Labels stand to the right of the axes. Call it when the limits of the axes are final.

    Args:
      ax: Axes of matplotlib. Lines without a label are left out.
      fontsize: Size of the labels, in points, > 0. A label may have several lines of text.

    Raises:
      ValueError: If `fontsize` is out of range.

    >>> from arbiter_jax import plotting
    >>> fig, ax = plotting.figure()
    >>> for name, end in {"constant": 32, "seesaw": 256}.items():
    ...     _ = ax.plot([0, 1], [32, end], label=name)
    >>> plotting.label_ends(ax)
    >>> [text.get_text() for text in ax.texts]
    ['seesaw', 'constant']
    """
    _validate.greater(0, fontsize=fontsize)
    lines = [line for line in ax.lines if not line.get_label().startswith("_")]
    places = []
    for line in lines:
        (where,) = np.nonzero(np.isfinite(line.get_xydata()).all(axis=1))
        if where.size:
            x, y = line.get_xydata()[where[-1]]
            inside = (np.clip(x, *ax.get_xlim()), np.clip(y, *ax.get_ylim()))
            height = ax.transAxes.inverted().transform(ax.transData.transform(inside))[1]
            places.append((height, inside, line))
    places.sort(key=lambda place: place[0], reverse=True)
    num_rows = ax.get_subplotspec().get_gridspec().nrows if ax.get_subplotspec() else 1
    most = max((line.get_label().count("\n") + 1 for line in lines), default=1)
    label_height = most * _LINE_HEIGHT * fontsize / 8
    gap = label_height / (0.8 * ax.figure.get_size_inches()[1] / num_rows)
    heights = _apart([height for height, _, _ in places], gap)
    for (_, end, line), height in zip(places, heights, strict=True):
        ax.annotate(
            line.get_label(),
            xy=end,
            xytext=(1.035, height),
            xycoords="data",
            textcoords="axes fraction",
            va="center",
            fontsize=fontsize,
            color=line.get_color(),
            arrowprops={
                "arrowstyle": "-",
                "color": line.get_color(),
                "lw": 0.6,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Descending heights, moved as little as needed to be a gap apart: down, then up from the end."""
    found = list(map(float, heights))
    for i in range(1, len(found)):
        found[i] = min(found[i], found[i - 1] - gap)
    if found:
        found[-1] = max(found[-1], 0.0)
    for i in reversed(range(len(found) - 1)):
        found[i] = max(found[i], found[i + 1] + gap)
    return found
