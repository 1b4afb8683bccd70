"""The claims of `short_horizon_bias`: each with what a run measured and whether it holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from arbiter_jax import metrics
from experiments import _runner
from experiments.short_horizon_bias import descent


def row(claim: str, measured: str, holds: Any, **values: Any) -> dict[str, Any]:
    """The row of one claim."""
    return {"method": claim, "measured": measured, "holds": bool(holds), **values}


def _spread(values: Any, digits: int = 2) -> str:
    low, high = np.min(values), np.max(values)
    return f"{low:.{digits}g} to {high:.{digits}g}"


def toy(schedules: Any, ratios: Any, without_noise: Any, config: Any) -> Iterator[dict[str, Any]]:
    """Claims on the noisy quadratic: greedy rates against optimal ones."""
    yield row(
        "toy: where all curvatures are equal, greedy is optimal",
        f"ratio {ratios.condition[0]:.5f}",
        abs(ratios.condition[0] - 1) < 1e-4,
        ratio=ratios.condition[0],
    )
    alone, both, reference = without_noise.values()
    yield row(
        "toy: without noise, greedy with momentum is conjugate gradient",
        f"losses {both:.6f}, {reference:.6f}; rate alone {alone / both:.2f} times worse",
        abs(both / reference - 1) < 1e-4 and alone > both,
        ratio=alone / both,
    )
    for suffix, what in (("", "a rate"), (", momentum", "rate and momentum")):
        if "greedy" + suffix not in schedules:
            continue
        greedy, optimal = (
            schedules[name + suffix].excess_loss[-1] for name in ("greedy", "optimal")
        )
        yield row(
            f"toy: with noise, greed in {what} costs a factor of 2",
            f"greedy {greedy:.4f}, optimal {optimal:.4f}, ratio {greedy / optimal:.3f}",
            greedy > 2 * optimal,
            greedy=greedy,
            optimal=optimal,
        )
    middle = len(schedules["greedy"].learning_rates) // 2
    rates = [schedules[name].learning_rates[middle] for name in ("greedy", "optimal")]
    yield row(
        "toy: half-way, the greedy rate is at most a third of the optimal",
        f"greedy {rates[0]:.3f}, optimal {rates[1]:.3f}",
        3 * rates[0] <= rates[1],
        greedy=rates[0],
        optimal=rates[1],
    )
    if config.horizons:
        yield row(
            "toy: greed costs more, the longer the run",
            f"ratio {_spread(ratios.horizon, 3)}, {config.horizons[0]} to {config.horizons[-1]} steps",
            np.all(np.diff(ratios.horizon) > 0),
            ratios=ratios.horizon,
        )
    # No rate moves directions flatter than 1 / steps, so nothing can be lost there.
    felt = [c <= config.sweep_steps for c in config.conditions]
    yield row(
        f"toy: greed costs more, the worse the conditioning, up to {config.sweep_steps}",
        f"ratio {_spread(ratios.condition[felt], 3)}; at {config.conditions[-1]:g} "
        f"{ratios.condition[-1]:.2f}",
        np.all(np.diff(ratios.condition[felt]) > 0),
        ratios=ratios.condition,
    )
    top = int(np.argmax(ratios.noise))
    yield row(
        "toy: greed costs most at medium noise, nothing where noise rules",
        f"ratio {ratios.noise[0]:.2f}, up to {ratios.noise[top]:.2f} at {config.noises[top]:g}, "
        f"{ratios.noise[-1]:.3f}",
        0 < top < len(ratios.noise) - 1 and ratios.noise[-1] < 1.05,
        ratios=ratios.noise,
    )
    if config.look_aheads:
        yield row(
            "toy: a longer look-ahead leads from greedy to optimal",
            f"ratio {ratios.look_ahead[0]:.2f} to {ratios.look_ahead[-1]:.3f}, "
            f"{config.look_aheads[0]} to {config.look_aheads[-1]} steps ahead",
            np.all(np.diff(ratios.look_ahead) < 0) and ratios.look_ahead[-1] < 1.05,
            ratios=ratios.look_ahead,
        )


def batch_sizes(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Claims on the noisy quadratic: batch sizes at equal examples."""
    losses = {name: schedule.excess_loss[-1] for name, schedule in found.items()}
    yield row(
        "batch size: at equal examples, greed ends above the optimum",
        f"greedy {losses['greedy']:.4f}, optimal {losses['optimal']:.4f}, "
        f"ratio {losses['greedy'] / losses['optimal']:.1f}",
        losses["greedy"] > 2 * losses["optimal"],
        **losses,
    )
    yield row(
        "batch size: greed ends above even the best constant size",
        f"size {found['best constant'].batch_sizes[0]:.1f}: {losses['best constant']:.4f}",
        losses["greedy"] > losses["best constant"],
    )
    middle = len(found["greedy"].batch_sizes) // 2
    sizes = [found[name].batch_sizes[middle] for name in ("greedy", "optimal")]
    yield row(
        "batch size: half-way, the greedy size is above the optimal",
        f"greedy {sizes[0]:.1f}, optimal {sizes[1]:.1f}",
        sizes[0] > sizes[1],
    )
    path = [losses[name] for name in losses if name.startswith("look")] + [losses["optimal"]]
    yield row(
        "batch size: a longer look-ahead leads to the optimum",
        " > ".join(f"{x:.3g}" for x in path),
        np.all(np.diff(path) < 0),
    )


def offline(
    found: dict[int, Any], net: Any, num_steps: int, long_rate: float = 0.03
) -> Iterator[dict[str, Any]]:
    """Claims on offline meta-descent: losses and final rates against the horizon."""
    horizons = list(found)
    losses = np.array([runs["final_loss"] for runs in found.values()])  # [horizon, seed]
    falls = np.all(np.diff(losses, axis=0) < 0, axis=0)
    yield row(
        "offline: the longer the horizon, the lower the final training loss",
        f"for all of {horizons} in {falls.sum()} of {len(falls)} seeds",
        len(horizons) > 1 and falls.all(),
    )
    finals = {T: descent.effective(found[T]["learned"], num_steps, net) for T in horizons}
    short = [T for T in horizons if num_steps >= 20 * T]
    if short:
        rates = np.array([finals[T] for T in short])
        yield row(
            f"offline: T <= {short[-1]} ends below a rate of 1e-6",
            f"{_spread(rates)} at step {num_steps}",
            rates.max() < 1e-6,
            rates=rates,
        )
    rates = finals[horizons[-1]]
    yield row(
        f"offline: T = {horizons[-1]} stays above a rate of {long_rate:g}",
        f"{_spread(rates)} at step {num_steps}",
        rates.min() > long_rate,
        rates=rates,
    )


def offline_table(found: dict[int, Any], net: Any, num_steps: int) -> list[list[str]]:
    """Cells of a table: for every horizon what was learned, and how training with it ends."""
    rows = []
    for horizon, runs in found.items():
        first, last = (descent.effective(runs["learned"], t, net) for t in (0, num_steps))
        losses = [{"loss": x} for x in runs["final_loss"]]
        rows.append(
            [
                f"T = {horizon}",
                f"{len(runs['history'][0][0])}",
                _spread(first),
                _spread(runs["learned"][2]),
                _spread(last),
                _runner.interval(losses, "loss", 4),
            ]
        )
    return rows


def online(found: dict[str, Any], rates: Any, num_steps: int) -> Iterator[dict[str, Any]]:
    """Claims on online meta-descent: what happens to the best manual rate, and to the loss."""
    manual, adjusted = found["manual"], found["adjusted"]
    start = rates[found["best"]]
    share = adjusted["rates"][:, num_steps // 2 - 1] / start
    yield row(
        "online: the best manual rate falls to a sixth or less",
        f"shares of {_spread(share)} of the rate {start:g}",
        share.max() <= 1 / 6,
        shares=share,
    )
    factor = adjusted["final_loss"] / manual["final_loss"]
    yield row(
        "online: the training loss ends 10 times or more higher",
        f"{_spread(factor)} times the {manual['final_loss'].mean():.2g} without",
        factor.min() >= 10,
        factors=factor,
    )


def online_cells(found: dict[str, Any], rates: Any) -> list[str]:
    """Cells of a table: the initial rate and final loss of meta-descent, and of constant rates."""
    groups = [found["adjusted"]["final_loss"], *found["grid"].T]
    cells = ["{:.2g} ± {:.1g}".format(*metrics.mean_and_interval(losses)) for losses in groups]
    return [f"rate {rates[found['best']]:g}", *cells]


def surface(
    losses: np.ndarray, grid: Any, horizons: Any, num_steps: int, net: Any
) -> Iterator[dict[str, Any]]:
    """Claims on the meta-objective itself: where the minimum of its grid lies."""
    rates, decays = grid
    # Over much less than the time constant of the decay, the loss hardly depends on its exponent.
    felt = [net.time_constant <= 5 * T for T in horizons]
    lowest = [np.unravel_index(np.argmin(np.nan_to_num(x, nan=np.inf)), x.shape) for x in losses]
    finals = [
        rates[rate] * (1 + num_steps / net.time_constant) ** -decays[decay]
        for (decay, rate), is_felt in zip(lowest, felt, strict=True)
        if is_felt
    ]
    named = [f"T = {T}" for T, is_felt in zip(horizons, felt, strict=True) if is_felt]
    yield row(
        "surface: a longer look-ahead has its minimum at a larger final rate",
        ", ".join(f"{name}: {x:.1e}" for name, x in zip(named, finals, strict=True)),
        len(finals) > 1 and np.all(np.diff(finals) > 0),
        rates=finals,
    )
