"""Losses and batch sizes of runs over the examples seen: each method is a line, the mean over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arbiter_jax import _validate
from arbiter_jax.plotting._figures import (
    COLORS,
    MOST_LABELS,
    _check_limits,
    _size_axis,
    _thousands,
    figure,
    label_ends,
)

# Each method has a marker of its own, because gray prints lose the colors.
_MARKERS = "os^Dv<>P"
_NUM_MARKERS = 7  # per line
_FALL = 10  # losses that span a larger factor are drawn on a logarithmic axis


def runs(fits: Mapping[Any, Any], limits: tuple[int, int] | None = None, title: str = "") -> Any:
    """Plots training loss and batch size against training examples, one above the other.

    Each method is a line with its name at the end: the mean over its seeds, as in
    :func:`arbiter_jax.plotting.losses` and :func:`arbiter_jax.plotting.batch_sizes`.

    Args:
      fits: {method: FitResult}, of one key or of several; or {(method, seed): FitResult}. At most 8
        methods; runs without a window are left out.
      limits: Smallest and largest batch size of the axis; None for the range of what is drawn.
      title: Title of the figure.

    Returns:
      The figure.

    Raises:
      ValueError: If there is nothing to draw, or an argument is out of range.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(8))
    >>> loss_fn = lambda w, batch: (w - batch) ** 2 / 2
    >>> result = aj.fit(loss_fn, jnp.zeros(()), tx, aj.Data(jnp.ones(50)), num_examples=100)
    >>> fig = aj.plotting.runs({"constant_8": result})
    >>> [ax.get_ylabel() for ax in fig.axes]
    ['training loss', 'batch size [examples]']
    """
    groups = _methods(fits)
    if len(groups) > MOST_LABELS:
        raise ValueError(f"fits must hold at most {MOST_LABELS} methods, got {len(groups)}.")
    limits = _limits(groups, limits)
    fig, (top, bottom) = figure(2, 1, size=(7.0, 5.6), sharex=True)
    places = lambda ax: {method: (ax, i) for i, method in enumerate(groups)}
    _draw_losses(groups, places(top), num_points=60)
    _draw_sizes(groups, places(bottom), limits)
    _thousands(bottom)
    bottom.set_xlim(left=0)
    top.set_ylabel("training loss")
    top.set_title(title, fontsize=10)
    for ax in (top, bottom):
        label_ends(ax)
    return fig


def batch_sizes(
    fits: Mapping[Any, Any], limits: tuple[int, int] | None = None, title: str = ""
) -> Any:
    """Plots batch size against training examples: thin lines are seeds, thick ones their mean.

    The mean is the geometric one, because the axis is logarithmic. Each method has a line with its
    name at the end, or a panel of its own if there are more than 8.

    Args:
      fits: {method: FitResult}, of one key or of several; or {(method, seed): FitResult}. Runs
        without a window are left out.
      limits: Smallest and largest batch size of the axis; None for the range of what is drawn.
      title: Title of the figure.

    Returns:
      The figure.

    Raises:
      ValueError: If there is nothing to draw, or an argument is out of range.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(8))
    >>> loss_fn = lambda w, batch: (w - batch) ** 2 / 2
    >>> result = aj.fit(loss_fn, jnp.zeros(()), tx, aj.Data(jnp.ones(50)), num_examples=100)
    >>> fig = aj.plotting.batch_sizes({"constant_8": result}, limits=(4, 16))
    >>> [label.get_text() for label in fig.axes[0].get_yticklabels()]
    ['4', '8', '16']
    """
    groups = _methods(fits)
    if len(groups) > MOST_LABELS:  # constant sizes need no panels
        groups = {k: v for k, v in groups.items() if not k.startswith("constant")} or groups
    limits = _limits(groups, limits)
    fig, places = _places(groups)
    _draw_sizes(groups, places, limits)
    _finish(fig, places, "batch size [examples]", title)
    return fig


def losses(fits: Mapping[Any, Any], title: str = "", num_points: int = 120) -> Any:
    """Plots training loss against training examples: the mean over seeds and their range.

    Each method has a line with its name at the end, or a panel of its own if there are more than 8.
    The axis begins at zero, or is logarithmic if the means span more than a factor of 10.

    Args:
      fits: {method: FitResult}, of one key or of several; or {(method, seed): FitResult}. Runs
        without a window are left out.
      title: Title of the figure.
      num_points: Number of points per curve; each is the mean over the nearby steps.

    Returns:
      The figure.

    Raises:
      ValueError: If there is nothing to draw, or an argument is out of range.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(8))
    >>> loss_fn = lambda w, batch: (w - batch) ** 2 / 2
    >>> result = aj.fit(loss_fn, jnp.zeros(()), tx, aj.Data(jnp.ones(50)), num_examples=100)
    >>> fig = aj.plotting.losses({"constant_8": result}, title="one run")
    >>> fig.axes[0].get_title(), fig.axes[0].get_ylabel()
    ('one run', 'training loss')
    """
    num_points = _validate.integer(num_points=num_points, minimum=1)
    groups = _methods(fits)
    fig, places = _places(groups)
    _draw_losses(groups, places, num_points)
    _finish(fig, places, "training loss", title)
    return fig


def _methods(fits: Any) -> dict[str, list[Any]]:
    """{method: runs of one key with at least one step}, or an error that says what is expected."""
    names = list(fits) if isinstance(fits, Mapping) else []
    if not isinstance(fits, Mapping) or not all(
        isinstance(name, str) or (isinstance(name, tuple) and len(name) == 2) for name in names
    ):
        raise ValueError(
            "fits must be a dict {method: FitResult} or {(method, seed): FitResult}, got "
            f"{type(fits).__name__}{f' with keys {names}' if names else ''}."
        )
    groups: dict[str, list[Any]] = {}
    for name, fit in fits.items():
        history = fit.history
        several = bool(history) and isinstance(history[0], list)
        members = [fit.of_seed(i) for i in range(len(history))] if several else [fit]
        members = [member for member in members if member.history]
        if members:
            groups.setdefault(name if isinstance(name, str) else name[0], []).extend(members)
    if not groups:
        raise ValueError(
            f"fits must hold at least one run of at least one window, got {len(fits)} without any."
        )
    return groups


def _limits(groups: Mapping[str, list[Any]], limits: Any) -> tuple[int, int]:
    if limits is not None:
        _check_limits(limits)
        return limits
    drawn = [record.batch_size for group in groups.values() for f in group for record in f.history]
    low, high = (np.log2(max(1, size)) for size in (min(drawn), max(drawn)))
    return 2 ** int(np.floor(low)), 2 ** max(int(np.ceil(high)), int(np.floor(low)) + 1)


def _label(method: str) -> str:
    return method.replace("_", " ")


def _style(method: str, index: int, num_points: int) -> dict[str, Any]:
    """How the mean of a method is drawn: constant sizes are thin and dashed."""
    constant = method.startswith("constant")
    every = max(1, num_points // _NUM_MARKERS)
    # The markers of two methods do not stand at the same examples; those of neighbors are far apart.
    offset = (3 * index % MOST_LABELS * every // MOST_LABELS + every // 4) % every
    return {
        "color": COLORS[index],
        "linestyle": (0, (4, 2)) if constant else "-",
        "linewidth": 1.3 if constant else 2.0,
        "marker": _MARKERS[index],
        "markersize": 4.5,
        "markevery": (offset, every),
        "label": _label(method),
        # A thin dashed line on a thick one that coincides with it leaves both visible.
        "zorder": (4 if constant else 3) - 0.01 * index,
    }


def _draw_sizes(
    groups: Mapping[str, list[Any]],
    places: Mapping[str, tuple[Any, int]],
    limits: tuple[int, int],
) -> None:
    for method, group in groups.items():
        ax, index = places[method]
        paths = [
            (
                np.array([0, *(record.num_examples for record in fit.history)]),
                np.array([record.batch_size for record in fit.history]),
            )
            for fit in group
        ]
        paths = paths[:1] if method.startswith("constant") else paths
        end = min(edges[-1] for edges, _ in paths)
        grid = np.linspace(0, end, 400)
        mean = np.exp(np.mean([np.log(_at(grid, *path)) for path in paths], axis=0))
        ax.plot(grid, mean, drawstyle="steps-post", **_style(method, index, len(grid)))
        for edges, sizes in paths if len(paths) > 1 else ():
            ax.stairs(sizes, edges, color=COLORS[index], baseline=None, linewidth=0.6, alpha=0.6)
        _size_axis(ax, limits)


def _at(examples: np.ndarray, edges: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The size of the window that each number of examples lies in."""
    window = np.searchsorted(edges, examples, side="right") - 1
    return sizes[np.clip(window, 0, len(sizes) - 1)]


def _draw_losses(
    groups: Mapping[str, list[Any]], places: Mapping[str, tuple[Any, int]], num_points: int
) -> None:
    every = [fit for group in groups.values() for fit in group]
    smallest = min(float(np.sum(fit.per_step("batch_size"))) for fit in every)
    edges = np.linspace(0, smallest, num_points + 1)
    center = (edges[:-1] + edges[1:]) / 2
    curves = {k: np.array([_binned(fit, edges) for fit in group]) for k, group in groups.items()}
    means = np.array([mine.mean(0) for mine in curves.values()])
    means = means[np.isfinite(means)]
    logarithmic = means.size and means.min() > 0 and means.max() > _FALL * means.min()
    for method, mine in curves.items():
        ax, index = places[method]
        if len(groups) > MOST_LABELS:
            for other in curves.values():
                ax.plot(center, other.mean(0), color="#cccccc", linewidth=0.6, label="_other")
        ax.plot(center, mine.mean(0), **_style(method, index, num_points))
        if len(mine) > 1:
            color = COLORS[index]
            ax.fill_between(center, mine.min(0), mine.max(0), color=color, alpha=0.13, lw=0)
    for ax in {ax for ax, _ in places.values()}:
        if logarithmic:
            ax.set_yscale("log")
        elif means.size and means.min() >= 0:
            ax.set_ylim(bottom=0)


def _binned(fit: Any, edges: np.ndarray) -> np.ndarray:
    """Mean loss between neighboring edges, interpolated linearly where no step ends."""
    sizes, loss = fit.per_step("batch_size"), fit.per_step("loss")
    seen = np.cumsum(sizes)
    index = np.searchsorted(edges, seen) - 1  # (left, right]: the last step of a run is in a bin
    inside = index < len(edges) - 1
    weight = np.bincount(index[inside], sizes[inside], minlength=len(edges) - 1)
    total = np.bincount(index[inside], (sizes * loss)[inside], minlength=len(edges) - 1)
    filled = weight > 0
    if not filled.any():
        return np.full(len(weight), np.nan)
    center = (edges[:-1] + edges[1:]) / 2
    return np.interp(center, center[filled], total[filled] / weight[filled])


def _places(methods: Mapping[str, Any]) -> tuple[Any, dict[str, tuple[Any, int]]]:
    """The axes and the style of each method: one panel for all if there are few of them."""
    if len(methods) <= MOST_LABELS:
        fig, ax = figure()
        return fig, {method: (ax, i) for i, method in enumerate(methods)}
    rows = -(-len(methods) // 4)
    fig, axes = figure(rows, 4, size=(11.0, 1.9 * rows + 0.6), sharex=True, sharey=True)
    for ax in axes.ravel()[len(methods) :]:
        ax.remove()
    for ax in fig.axes[-4:]:  # the lowest panel of each column, also above a removed one
        ax.tick_params(labelbottom=True)
    return fig, {m: (ax, 0) for m, ax in zip(methods, fig.axes, strict=True)}


def _finish(fig: Any, places: Mapping[str, tuple[Any, int]], ylabel: str, title: str) -> None:
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
        (ax,) = fig.axes
        ax.set_title(title, fontsize=10)
        ax.set_ylabel(ylabel)
        label_ends(ax)
