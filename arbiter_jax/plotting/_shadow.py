"""What watching rules would have chosen, a line for each."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from arbiter_jax import _validate
from arbiter_jax.plotting._figures import (
    COLORS,
    DASHES,
    MOST_LABELS,
    _check_limits,
    _check_metrics,
    _size_axis,
    _thousands,
    figure,
    label_ends,
)

_PREFIX = "shadow/"
_APPLIED = "applied"


def shadow(
    run: Any,
    limits: tuple[int, int] | None = None,
    title: str = "",
    *,
    batch_sizes: int | Sequence[int] | None = None,
    num_points: int = 200,
) -> Any:
    """Plots what the rules in :func:`arbiter_jax.schedulers.shadow` would have chosen in a run.

    Each rule is a line that is labeled with its name and its size at the end; the applied size is
    black. Lines that coincide can be told apart: those below are wider.

    Args:
      run: FitResult of a run with shadows in its chain; or for your own loop a sequence with
        an entry ``{name: size}`` per step, from :func:`arbiter_jax.schedulers.shadow_batch_sizes`.
      limits: Smallest and largest batch size of the axis; None for the range of what is drawn.
      title: Title of the figure.
      batch_sizes: Examples of each step of your own loop, one number or a sequence; None
        if `run` is a FitResult, which has them. Without them the horizontal axis counts steps.
      num_points: The most points of a line; each is the median over neighboring steps.

    Returns:
      The figure.

    Raises:
      ValueError: If there is nothing to draw, or an argument is out of range.

    >>> import arbiter_jax as aj
    >>> records = [{"norm_test": 32, "noise_floor": 16}, {"norm_test": 64, "noise_floor": 24}]
    >>> fig = aj.plotting.shadow(records, batch_sizes=48)
    >>> [text.get_text() for text in fig.axes[0].texts]
    ['norm_test 64', 'applied 48', 'noise_floor 24']
    """
    if limits is not None:
        _check_limits(limits)
    num_points = _validate.integer(num_points=num_points, minimum=2)
    sizes, applied = _of_records(run, batch_sizes) if _is_records(run) else _of_fit(run)
    num_steps = len(next(iter(sizes.values())))
    seen = np.arange(1, num_steps + 1) if applied is None else np.cumsum(applied)
    chunks = np.array_split(np.arange(num_steps), min(num_steps, num_points))
    medians = lambda x: np.array([np.median(x[chunk]) for chunk in chunks])
    lines = {name: medians(x) for name, x in sizes.items()}
    names = sorted(lines, key=lambda name: lines[name][-1], reverse=True)
    seen = medians(seen)
    if applied is not None:
        lines[_APPLIED] = medians(applied)
    if limits is None:
        drawn = np.log2(np.maximum(1, np.concatenate(list(lines.values()))))
        limits = (2 ** int(np.floor(drawn.min())), 2 ** int(np.ceil(drawn.max())))
    fig, ax = figure()
    # Not black, which is the applied size's.
    colors = itertools.cycle(color for color in COLORS if color != "#000000")
    styles = zip(np.linspace(2.6, 1.2, len(names)), itertools.cycle(DASHES), colors, strict=False)
    label = lambda name: f"{name} {lines[name][-1]:.0f}"
    if applied is not None:
        ax.plot(seen, lines[_APPLIED], label=label(_APPLIED), color="black", lw=3.8, zorder=2)
    for z, (name, (width, dash, color)) in enumerate(zip(names, styles, strict=False)):
        style = {"lw": width, "ls": dash, "color": color, "zorder": 2.1 + 0.01 * z}
        ax.plot(seen, lines[name], label=label(name), **style)
    for line in ax.lines if len(chunks) == 1 else ():  # one point makes no line
        line.set(marker="o", clip_on=False)
    _size_axis(ax, limits)
    _thousands(ax)
    if applied is None:
        ax.set_xlabel("steps")
    ax.set_xlim(left=0, right=seen[-1])
    ax.set_title(title, fontsize=10)
    if len(ax.lines) <= MOST_LABELS:
        label_ends(ax)
    else:
        fig.legend(loc="outside right upper", frameon=False, fontsize=8)
    return fig


def _is_records(run: Any) -> bool:
    return (
        isinstance(run, Iterable) and not hasattr(run, "history") and not isinstance(run, Mapping)
    )


def _of_fit(fit: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """{name: size at each step} and the examples of each step."""
    _check_metrics(fit, lambda name: name.startswith(_PREFIX), "arbiter_jax.schedulers.shadow")
    names = [name for name in fit.history[0].info.metrics if name.startswith(_PREFIX)]
    sizes = {name.removeprefix(_PREFIX): np.asarray(fit.per_step(name), float) for name in names}
    return sizes, np.asarray(fit.per_step("batch_size"), float)


def _of_records(
    records: Iterable[Any], batch_sizes: Any
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """{name: size at each step} and the examples of each step of your own loop, None if unknown."""
    records = list(records)
    named = [set(record) if isinstance(record, Mapping) else set() for record in records]
    if not records or not named[0] or any(names != named[0] for names in named):
        raise ValueError(
            "run must be a FitResult or a sequence of one {name: size} per step, each with the same "
            "names, as aj.schedulers.shadow_batch_sizes(opt_state) returns them, got "
            f"{len(records)} entries{f', the first one {records[0]!r}' if records else ''}."
        )
    sizes = {name: _sizes([record[name] for record in records], name) for name in records[0]}
    if batch_sizes is None:
        return sizes, None
    applied = _sizes(batch_sizes, "batch_sizes")
    if applied.ndim > 1 or applied.shape not in ((), (len(records),)):
        raise ValueError(
            f"batch_sizes must be one number, or one for each of the {len(records)} steps, got shape "
            f"{list(applied.shape)}."
        )
    return sizes, np.broadcast_to(applied, (len(records),))


def _sizes(values: Any, name: str) -> np.ndarray:
    """The values as floats, or a ValueError if one is no size."""
    try:
        sizes = np.asarray(
            [float(x) for x in values] if isinstance(values, list) else values, float
        )
    except (TypeError, ValueError):
        sizes = np.asarray(np.nan)
    if not (np.isfinite(sizes) & (sizes >= 0)).all():
        raise ValueError(
            f"{name} must be finite sizes >= 0, one for each step, got {_validate.shown(values)}."
        )
    return sizes
