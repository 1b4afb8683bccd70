"""The proposals of an agent, their mixture, and what was applied."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from arbiter_jax.hyper_learning import to_batch_size
from arbiter_jax.plotting._figures import (
    COLORS,
    DASHES,
    _check_limits,
    _check_metrics,
    _size_axis,
    _thousands,
    figure,
)


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

    >>> import arbiter_jax as aj
    >>> metrics = {"proposals": [[-1.0, 1.0]], "mixture": [0.2], "mixture_weights": [[0.4, 0.6]]}
    >>> metrics = {name: np.array(value) for name, value in metrics.items()}
    >>> info = aj.StepInfo(loss=np.ones(1), batch_size=np.array([20]), metrics=metrics)
    >>> record = aj.WindowRecord(0, 20, 32, 1, 20, 1.0, 0.1, 1, info, {})
    >>> run = aj.FitResult(None, [record], 1, 0, 0.1)  # what `aj.fit` with an agent returns
    >>> fig = aj.plotting.proposals(run, limits=(8, 64))
    >>> [line.get_label() for line in fig.axes[0].lines]
    ['proposal 1', 'proposal 2', 'mixture (meta batch)']
    """
    _check_limits(limits)
    _check_metrics(fit, lambda name: name == "proposals", "arbiter_jax.arbiter")
    fig, (top, bottom) = figure(2, 1, size=(7.0, 6.0), sharex=True, height_ratios=[2, 1])
    seen = np.cumsum(fit.per_step("batch_size"))
    logits = fit.per_step("proposals")
    sizes = np.asarray(to_batch_size(logits, *limits))
    mixture = np.asarray(to_batch_size(fit.per_step("mixture"), *limits))
    weights = fit.per_step("mixture_weights") - 1 / logits.shape[1]
    styles = zip(itertools.cycle(COLORS), itertools.cycle(DASHES), strict=False)
    for n, (color, dash) in zip(range(logits.shape[1]), styles, strict=False):
        label = f"proposal {n + 1}"
        style = {"color": color, "linestyle": dash}
        top.plot(seen, sizes[:, n], linewidth=1.0, alpha=0.8, label=label, **style)
        bottom.plot(seen, 1e3 * weights[:, n], linewidth=1.0, **style)
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
