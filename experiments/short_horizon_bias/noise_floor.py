"""The noise floor of `short_horizon_bias`: its rule on the noisy quadratic, where the optimum is known.

The equations are those of NOISE.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arbiter_jax import noisy_quadratic, plotting
from arbiter_jax.objectives import FloorConfig, final_size, size_for_end
from experiments.short_horizon_bias import claims
from experiments.short_horizon_bias import quadratic as toy

LEARNING_RATE = 0.5
SHARES = (0.075, 0.15, 0.3, 0.6, 1.2)
HOLDS, GROWTHS = (0.2, 0.4, 0.6, 0.8), (2, 4, 8, 16, 32, 64)


def _ends(problem: Any, num_examples: float, schedules: np.ndarray) -> np.ndarray:
    """The excess loss along each of many schedules, float[S, J + 1]."""
    follow = lambda sizes: (
        noisy_quadratic.rollout_batch_sizes(problem, sizes, num_examples, LEARNING_RATE).excess_loss
    )
    return np.asarray(_mapped(follow, jnp.asarray(schedules)))


def _mapped(function: Any, rows: jax.Array) -> jax.Array:
    return jax.jit(lambda rows: jax.lax.map(function, rows))(rows)


def _doubled(held: Any, past: np.ndarray, growth: float) -> np.ndarray:
    """A held size, and what becomes of it after a share `past` of the time to grow by doublings."""
    stages = max(1, math.ceil(math.log2(growth)))
    return held * growth ** (np.clip(np.floor(past * stages) + 1, 0, stages) / stages)


def _averages(losses: np.ndarray, steps: np.ndarray) -> tuple[float, float]:
    """Of the losses, with weights t and t^3: Eq. 9."""
    t = np.geomspace(1, steps[-1], 400)
    loss = np.interp(np.log(t), np.log(steps), losses)
    mean = lambda a: np.sum(loss * t ** (a + 1)) / np.sum(t ** (a + 1))
    return mean(1), mean(3)


def follow_rule(
    problem: Any,
    num_examples: float,
    num_segments: int,
    share: float,
    hold: float = FloorConfig.hold_until,
    growth: float = FloorConfig.final_growth,
) -> np.ndarray:
    """The sizes that :func:`arbiter_jax.schedulers.noise_floor` decides on, its averages exact."""
    segment = num_examples / num_segments
    bent = 1 / (1 - LEARNING_RATE * problem.curvature / 2)  # Eq. 15
    spread = problem.curvature**2 * problem.noise_variance
    noise = float(LEARNING_RATE * jnp.sum(bent * spread) / 4)
    run = jax.jit(
        lambda sizes: (
            noisy_quadratic.rollout_batch_sizes(
                problem, sizes, num_examples, LEARNING_RATE
            ).excess_loss
        )
    )
    sizes, held = np.ones(num_segments), 1.0
    for j in range(1, num_segments):
        losses = np.asarray(run(jnp.asarray(sizes)))[: j + 1]
        steps = 1 + np.cumsum([0, *segment / sizes[:j]])
        size, left = held, num_examples - j * segment
        if j < hold * num_segments:
            older, recent = _averages(losses, steps)
            size = noise / (share * 16 * max(older - recent, 1e-9))  # Eq. 10
            size = float(size_for_end(size, steps[-1], left))  # Eq. 16
            size = held = max(size, noise / losses[-1])  # Eq. 17
        else:
            in_force = max(held, 1.0)
            growing = {"noise_share": share, "final_growth": growth}
            size = final_size(held, in_force, steps[-1], left, **growing)
            size = max(held, size)  # Eq. 12
        sizes[j:] = np.clip(size, 1, segment)
    return sizes


def measure(num_examples: float, dimensions: int = 400, num_segments: int = 40) -> dict[str, Any]:
    """For one budget: schedules by name, their losses, and the final loss for each share."""
    problem, segment = toy.harmonic(dimensions), num_examples / num_segments
    run = (problem, num_examples, LEARNING_RATE)
    optimal = noisy_quadratic.optimal_batch_sizes(*run, num_segments=num_segments)
    greedy = noisy_quadratic.greedy_batch_sizes(*run, num_segments=num_segments)
    grid = np.geomspace(1, segment, 40)
    constants = np.outer(grid, np.ones(num_segments))
    share_seen = np.arange(num_segments) / num_segments
    settings = [(size, hold, growth) for size in grid for hold in HOLDS for growth in GROWTHS]
    grown = [
        np.clip(_doubled(size, (share_seen - hold) / (1 - hold), growth), 1, segment)
        for size, hold, growth in settings
    ]
    rules = [follow_rule(problem, num_examples, num_segments, share) for share in SHARES]
    found = {"optimum": np.asarray(optimal.batch_sizes), "greedy": np.asarray(greedy.batch_sizes)}
    for name, schedules in (("best constant", constants), ("best held, then grown", grown)):
        best = int(np.argmin(_ends(problem, num_examples, np.array(schedules))[:, -1]))
        found[name] = np.array(schedules)[best]
    found["noise floor"] = rules[SHARES.index(FloorConfig.noise_share)]
    losses = _ends(problem, num_examples, np.array(list(found.values())))
    return {
        "sizes": found,
        "losses": dict(zip(found, losses, strict=True)),
        "shares": _ends(problem, num_examples, np.array(rules))[:, -1],
    }


def rows(found: dict[float, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The claims."""
    for budget, numbers in found.items():
        ends = {name: float(loss[-1]) for name, loss in numbers["losses"].items()}
        yield claims._row(
            f"noise floor, {budget:,.0f} examples: between the optimum and the best constant size",
            ", ".join(f"{name} {loss:.4f}" for name, loss in ends.items()),
            ends["optimum"] <= ends["noise floor"] < ends["best constant"],
            **ends,
        )
    budget, numbers = next(iter(found.items()))
    shares = dict(zip(SHARES, numbers["shares"], strict=True))
    yield claims._row(
        f"noise floor, {budget:,.0f} examples: every share is within 30% of the best one",
        ", ".join(f"{share:g}: {loss:.4f}" for share, loss in shares.items()),
        max(shares.values()) < 1.3 * min(shares.values()),
        shares=numbers["shares"],
    )


def plot(found: dict[float, dict[str, Any]], path: Path) -> None:
    """Sizes and losses of the schedules, a row for each budget."""
    fig, axes = plotting.figure(len(found), 2, size=(9.5, 3.2 * len(found) + 0.5), squeeze=False)
    for (left, right), (budget, numbers) in zip(axes, found.items(), strict=True):
        for color, (name, sizes) in zip(plotting.COLORS, numbers["sizes"].items(), strict=False):
            edges = np.linspace(0, budget, len(sizes) + 1)
            left.stairs(sizes, edges, baseline=None, color=color, label=name, lw=1.5)
            right.semilogy(edges, numbers["losses"][name], color=color, lw=1.5)
        left.set_yscale("log", base=2)
        left.set_ylabel("batch size [examples]")
        right.set_ylabel("excess loss")
    for ax in axes[-1]:
        ax.set_xlabel("examples seen")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    fig.savefig(path)
