"""The curves: one Plotly figure per problem, with panels of loss and batch size over one axis."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from arbiter_jax.plotting import COLORS
from experiments.report.runs import AXES, PROBLEM, Curve

# Told apart without color as well: the dash changes first, then both, then the marker alone.
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")
MAX_POINTS = 400  # of a curve; a longer one is averaged
MAX_LINES = 16  # that are shown at first
PANELS = {"loss": "training loss", "batch_size": "batch size [examples]"}
# On a logarithmic axis.
TICKS = {
    "loss": [float(f"{digit}e{power}") for power in range(-9, 10) for digit in (1, 2, 5)],
    "batch_size": [2**k for k in range(31)],
}

Labeled = Sequence[tuple[str, Curve]]  # of one method: (label, curve)


def figures(labeled: Labeled) -> list[tuple[str, str, int]]:
    """(title, HTML, number of hidden methods) of each figure; the HTML needs Plotly's JavaScript."""
    problems: dict[tuple[Any, ...], list[tuple[str, Curve]]] = {}
    for label, curve in labeled:
        values = [curve.settings[name] for name in PROBLEM if curve.settings.get(name)]
        problems.setdefault((curve.axis, *values), []).append((label, curve))
    made = []
    for i, ((_, *names), mine) in enumerate(problems.items()):
        fig, num_methods = _figure(mine)
        text = fig.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=f"curves-{i}",
            default_height=f"{fig.layout.height}px",
            config={
                "displaylogo": False,
                "responsive": True,
                "modeBarButtonsToAdd": ["v1hovermode"],
                "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
            },
        )
        made.append((", ".join(names), text, max(0, num_methods - MAX_LINES)))
    return made


def _figure(labeled: Labeled) -> tuple[Any, int]:
    """A figure of one problem, and the number of its methods."""
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    groups: dict[str, list[Curve]] = {}
    for label, curve in labeled:
        groups.setdefault(label, []).append(curve)
    panels = [
        name for name in PANELS if any(getattr(curve, name) is not None for _, curve in labeled)
    ]
    fig = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.05)
    for i, (label, curves) in enumerate(groups.items()):
        style = {
            "line": {
                "color": COLORS[i % len(COLORS)],
                "dash": DASHES[i % len(DASHES)],
                "width": 2.2,
            },
            "marker": {"symbol": MARKERS[i % len(MARKERS)], "size": 7, "maxdisplayed": 8},
        }
        shared = {
            "legendgroup": str(i),
            "name": html.escape(label, quote=False),
            "visible": True if i < MAX_LINES else "legendonly",
        }
        named = False
        for row, panel in enumerate(panels, 1):
            for trace in _traces(curves, panel, style):
                shown = {"showlegend": not named and trace["mode"] != "lines"}
                named |= shown["showlegend"]
                fig.add_trace(graph_objects.Scatter(**trace, **shared, **shown), row=row, col=1)
    _set_layout(fig, panels, AXES[labeled[0][1].axis], len(groups))
    return fig, len(groups)


def _traces(curves: Sequence[Curve], panel: str, style: Mapping[str, Any]):
    """Yields each seed, thin if there are several, and then their mean."""
    drawn = [(c, *thinned(c, panel)) for c in curves if getattr(c, panel) is not None]
    several = len(drawn) > 1
    shape = {"shape": "hv"} if panel == "batch_size" else {}
    number = "%{y:,.0f}" if panel == "batch_size" else "%{y:.4g}"
    for curve, x, y in drawn:
        seed = html.escape(curve.settings.get("seed", ""), quote=False)
        note = f", seed {seed}" if seed and several else ""
        yield {
            "x": x,
            "y": y,
            "mode": "lines" if several else "lines+markers",
            "line": {
                **style["line"],
                **shape,
                **({"dash": "solid", "width": 1} if several else {}),
            },
            "marker": style["marker"],
            "opacity": 0.3 if several else 1.0,
            "hovertemplate": f"{number} after %{{x:,.0f}}<extra>%{{fullData.name}}{note}</extra>",
        }
    if several:
        x, y = mean([(x, y) for _, x, y in drawn], steps=panel == "batch_size")
        yield {
            "x": x,
            "y": y,
            "mode": "lines+markers",
            "line": {**style["line"], **shape},
            "marker": style["marker"],
            "hovertemplate": (
                f"{number} after %{{x:,.0f}}<extra>%{{fullData.name}}, mean of {len(drawn)}</extra>"
            ),
        }


def thinned(curve: Curve, panel: str) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of a curve of at most MAX_POINTS + 1 points, from which neighbors are averaged.

    A loss is that of a whole window, so its point is in the middle of the window. A batch size begins
    where its window does, and the last one is repeated where the run ends.
    """
    ends, values = curve.ends, getattr(curve, panel)
    starts = np.concatenate([[0.0], ends[:-1]])
    every = -(-len(ends) // MAX_POINTS)
    first = np.arange(0, len(ends), every)
    if every > 1:
        weights = ends - starts
        values = np.add.reduceat(weights * values, first) / np.add.reduceat(weights, first)
        starts, ends = starts[first], np.append(starts[first[1:]], ends[-1])
    if panel == "batch_size":
        return np.append(starts, ends[-1]), np.append(values, values[-1])
    return (starts + ends) / 2, values


def mean(lines: Sequence[tuple[np.ndarray, np.ndarray]], steps: bool):
    """(x, y) of the mean of several lines where all of them are; nan where one of them is."""
    x = np.unique(np.concatenate([x for x, _ in lines]))
    x = x[(x >= max(x[0] for x, _ in lines)) & (x <= min(x[-1] for x, _ in lines))]
    if len(x) > MAX_POINTS:
        x = x[np.linspace(0, len(x) - 1, MAX_POINTS).round().astype(int)]
    if steps:
        values = [y[np.searchsorted(at, x, side="right") - 1] for at, y in lines]
    else:
        values = [np.interp(x, at, y) for at, y in lines]
    return x, np.mean(values, axis=0)


def _set_layout(fig: Any, panels: Sequence[str], axis: str, num_methods: int) -> None:
    grid = {"gridcolor": "#dddddd", "showgrid": True, "zeroline": False, "linecolor": "#444444"}
    fig.update_xaxes(**grid, ticks="outside", separatethousands=True, rangemode="tozero")
    fig.update_xaxes(title={"text": axis, "standoff": 6}, row=len(panels), col=1)
    for row, panel in enumerate(panels, 1):
        axis_name = f"y{row if row > 1 else ''}"
        drawn = np.concatenate([trace.y for trace in fig.data if trace.yaxis == axis_name])
        scale = "linear" if np.any(drawn <= 0) else "log"  # nan is neither
        fig.update_yaxes(
            **grid,
            type=scale,
            title_text=PANELS[panel],
            tickmode="array" if scale == "log" else "auto",
            tickvals=TICKS[panel],
            ticktext=[
                f"{tick:,}" if panel == "batch_size" else f"{tick:g}" for tick in TICKS[panel]
            ],
            row=row,
            col=1,
        )
    if "loss" in panels:
        scales = [
            {
                "label": f"{scale} loss",
                "method": "relayout",
                "args": [{"yaxis.type": scale, "yaxis.tickmode": mode, "yaxis.autorange": True}],
            }
            for scale, mode in (("log", "array"), ("linear", "auto"))
        ]
        menu = {"type": "buttons", "direction": "right", "buttons": scales, "font": {"size": 11}}
        menu |= {"active": int(fig.layout.yaxis.type == "linear")}
        menu |= {"x": 0, "xanchor": "left", "y": 1.0, "yanchor": "bottom", "pad": {"b": 8}}
        fig.update_layout(updatemenus=[menu])
    fig.update_layout(
        template="none",
        height=320 * len(panels) + 130 + 14 * min(num_methods, 40),
        margin={"l": 70, "r": 12, "t": 68, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#222222"},
        hovermode="closest",
        hoverlabel={"namelength": -1, "bgcolor": "white"},
        legend={
            "orientation": "h",
            "yanchor": "top",
            "y": -0.2 / len(panels),
            "x": 0,
            "itemwidth": 50,
        },
    )
