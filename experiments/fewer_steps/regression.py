r"""Part A of :mod:`experiments.fewer_steps`: linear regression, where the expected risk is exact.

Inputs are Gaussian with a power-law spectrum, labels have noise. With m_i the second moment of the
error along the i-th eigenvector of the inputs' covariance, eigenvalues l_i, noise variance s^2 and
rate eta, a step of SGD on a batch of B fresh examples gives

    m_i <- (1 - 2 eta l_i + eta^2 l_i^2 (1 + 1 / B)) m_i + eta^2 l_i (sum_j l_j m_j + s^2) / B

because E[x x' M x x'] = 2 L M L + tr(L M) L for Gaussian inputs of covariance L, and the gradient of
a batch is a mean of B of them: off-diagonal moments never reach the diagonal. No sampling, no seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from arbiter_jax import schedulers
from experiments import _runner
from experiments.fewer_steps import decays


class Problem(NamedTuple):
    """A linear regression, in the eigenbasis of its inputs."""

    eigenvalues: np.ndarray  # [d], l
    error: np.ndarray  # [d], second moments of the initial error
    noise: float  # variance of the labels' noise, s^2


class Outcome(NamedTuple):
    """How a run ended."""

    risk: np.ndarray  # expected excess risk, sum_i l_i m_i / 2, in the shape of the peak rate
    num_steps: int
    noise_scales: np.ndarray  # [num_steps, ...], tr S / |G|^2 before each step, in examples
    batch_sizes: np.ndarray  # [num_steps]


def power_law(dimension: int = 64, exponent: float = 1.5, noise: float = 1.0) -> Problem:
    """Eigenvalues i^-exponent, an initial error of 1 in every direction."""
    eigenvalues = np.arange(1, dimension + 1) ** -exponent
    return Problem(eigenvalues, np.ones(dimension), noise)


def risk(problem: Problem, m: np.ndarray) -> np.ndarray:
    """The expected excess risk of moments [..., d]."""
    return m @ problem.eigenvalues / 2


def sgd_step(problem: Problem, m: np.ndarray, rate: Any, batch_size: float) -> np.ndarray:
    """The second moments [..., d] after one step of SGD, with rates [...]."""
    curvature, rate = problem.eigenvalues, np.asarray(rate)[..., None]
    kept = 1 - 2 * rate * curvature + (rate * curvature) ** 2 * (1 + 1 / batch_size)
    spread = (m @ curvature)[..., None] + problem.noise
    return kept * m + rate**2 / batch_size * curvature * spread


def signal_and_noise(problem: Problem, m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E |G|^2 of the full gradient, and tr S of the gradient of one example."""
    curvature = problem.eigenvalues
    signal = m @ curvature**2
    return signal, signal + curvature.sum() * (m @ curvature + problem.noise)


def train(
    problem: Problem,
    schedule: Callable[[Any], Any],
    *,
    peak: Any,
    num_examples: int,
    batch_size: int,
    growth: int = 16,
    trade: float = 0.0,
    exponent: float = 1.0,
    normalized: bool = False,
    limited: bool = False,
) -> Outcome:
    """The exact run of seesaw: a decay of the rate, the share `trade` of which becomes batch size.

    Args:
      problem: The regression.
      schedule: Share of the peak rate by examples seen.
      peak: The largest rate; an array of several gives as many risks.
      num_examples: The budget.
      batch_size: B0.
      growth: The largest size over B0.
      trade: g; 0 is the schedule at B0.
      exponent: p, by which the rate follows the size.
      normalized: Divide the gradient by the root of its mean square, as Adam does to first order.
      limited: Never exceed the noise scale, which is known here.
    """
    plan = schedulers.seesaw_schedule(
        schedule,
        num_examples=num_examples,
        batch_size=batch_size,
        max_batch_size=growth * batch_size,
        trade=trade,
    )
    starts, sizes = np.array(plan.starts), np.array(plan.batch_sizes)
    # The schedule at every count at which a step can begin, all at once.
    shape = np.asarray(schedule(np.arange(num_examples)), float)
    peak = np.asarray(peak, float)
    m = np.broadcast_to(problem.error, (*peak.shape, len(problem.error)))
    seen, taken, scales = 0, [], []
    while True:
        size = int(sizes[np.searchsorted(starts, seen, side="right") - 1])
        signal, noise = signal_and_noise(problem, m)
        if limited:
            size = max(batch_size, min(size, int(noise / signal)))
        if seen + size > num_examples:
            return Outcome(risk(problem, m), len(taken), np.array(scales), np.array(taken))
        rate = peak * shape[seen] * (size / batch_size) ** exponent
        if normalized:
            rate = rate / np.sqrt(signal + noise / size)
        m = sgd_step(problem, m, rate, size)
        seen += size
        taken.append(size)
        scales.append(noise / signal)


def best_peak(run: Callable[[np.ndarray], Outcome], grid: np.ndarray) -> tuple[float, Outcome]:
    """The rate of a grid with the least risk, and its run."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = run(grid)
    best = int(np.argmin(np.nan_to_num(found.risk, nan=np.inf)))
    scales = found.noise_scales[:, best]
    return float(grid[best]), found._replace(risk=found.risk[best], noise_scales=scales)


def brute_force(problem: Problem, rates: list[float], sizes: list[int]) -> np.ndarray:
    """The same moments from the full matrix, by quadrature over all inputs and labels of a batch.

    Nothing of the formula above enters: a Gaussian is replaced by three points per dimension with
    the same moments up to the fifth, which a step cannot tell from it, and the basis is rotated.
    Costs 9^(B d): for d = 2 and B of at most 2.
    """
    d = len(problem.eigenvalues)
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0]
    points, weights = np.array([-np.sqrt(3), 0.0, np.sqrt(3)]), np.array([1, 4, 1]) / 6
    grid = np.stack(np.meshgrid(*[points] * (d + 1), indexing="ij"), -1).reshape(-1, d + 1)
    chance = np.prod(
        np.stack(np.meshgrid(*[weights] * (d + 1), indexing="ij"), -1).reshape(-1, d + 1), -1
    )
    x = (grid[:, :d] * np.sqrt(problem.eigenvalues)) @ turned.T
    label = np.sqrt(problem.noise) * grid[:, d]
    moment = turned @ np.diag(problem.error) @ turned.T
    for rate, size in zip(rates, sizes, strict=True):
        after = np.zeros((d, d))
        for which in np.ndindex(*[len(x)] * size):
            rows = list(which)
            keep = np.eye(d) - rate / size * x[rows].T @ x[rows]
            push = rate / size * label[rows] @ x[rows]
            # The error and the noise of the labels are independent, and both have mean zero.
            after += np.prod(chance[rows]) * (keep @ moment @ keep.T + np.outer(push, push))
        moment = after
    return np.diag(turned.T @ moment @ turned)


# The tables

RATES = (0.4, 0.2, 0.1, 0.05)
CRITICAL_MULTIPLES = (1 / 8, 1, 8)
REFERENCE = 16  # the size at which the noise scale is read


def agreement() -> float:
    """The largest relative difference from brute force, over three steps."""
    problem = Problem(np.array([1.0, 0.3]), np.array([1.0, 2.0]), 0.5)
    rates, sizes = [0.4, 0.7, 0.2], [1, 2, 2]
    m = problem.error
    for rate, size in zip(rates, sizes, strict=True):
        m = sgd_step(problem, m, rate, size)
    return float(np.max(np.abs(m / brute_force(problem, rates, sizes) - 1)))


def gaps(rates: tuple[float, ...] = RATES, time: float = 200.0) -> list[dict[str, Any]]:
    """Seesaw's risk over that of the cosine that it replaces, at several peak rates.

    The number of examples is inverse to the rate, so that every run passes through the same time,
    the sum of all rates. The size is the same.
    """
    rows, problem = [], power_law(noise=0.1)
    for rate in rates:
        budget = round(REFERENCE * time / rate)
        shape = decays.half_cosine(budget)
        options = {"peak": rate, "num_examples": budget, "batch_size": REFERENCE}
        cosine = train(problem, shape, **options)
        for trade in (1.0, 0.8):
            ours = train(problem, shape, trade=trade, **options)
            rows.append(
                {
                    "part": "A",
                    "method": "seesaw",
                    "trade": trade,
                    "peak": rate,
                    "num_examples": budget,
                    "risk": float(ours.risk),
                    "gap": float(ours.risk / cosine.risk - 1),
                    "num_steps": ours.num_steps,
                    "share": ours.num_steps / cosine.num_steps,
                }
            )
    return rows


def failures(num_examples: int = 32_768) -> list[dict[str, Any]]:
    """The same at multiples of the critical size, each size at its own best peak rate.

    The critical size is the noise scale in the middle of the cosine from a small size.
    """
    rows, problem, shape = [], power_law(), decays.half_cosine(num_examples)
    for optimizer, exponent, grid in (
        ("SGD", 1.0, 2.0 ** np.arange(-5, 1.1)),
        ("normalized SGD", 0.5, 2.0 ** np.arange(-8, 3.1)),
    ):
        options = {"num_examples": num_examples, "exponent": exponent}
        options["normalized"] = optimizer != "SGD"

        def at(size, trade=0.0, limited=False, *, peak, options=options):
            with np.errstate(over="ignore", invalid="ignore"):
                return train(
                    problem, shape, peak=peak, batch_size=size, trade=trade, limited=limited,
                    **options,
                )  # fmt: skip

        reference = best_peak(lambda peak, at=at: at(REFERENCE, peak=peak), grid)[1]
        critical = float(reference.noise_scales[reference.num_steps // 2])
        for multiple in CRITICAL_MULTIPLES:
            size = max(1, round(multiple * critical))
            peak, cosine = best_peak(lambda peak, at=at, size=size: at(size, peak=peak), grid)
            for trade, limited in ((0.8, False), (1.0, False), (1.0, True)):
                ours = at(size, trade, limited, peak=peak)
                rows.append(
                    {
                        "part": "A",
                        "method": "seesaw, limit" if limited else "seesaw",
                        "optimizer": optimizer,
                        "critical": critical,
                        "multiple": multiple,
                        "batch_size": size,
                        "peak": peak,
                        "trade": trade,
                        "gap": float(ours.risk / cosine.risk - 1),
                        "share": ours.num_steps / cosine.num_steps,
                    }
                )
    return rows


def run(small: bool = False) -> dict[str, Any]:
    """Everything of part A: {"agreement", "gaps", "failures"}."""
    return {
        "agreement": agreement(),
        "gaps": gaps(RATES[:2]) if small else gaps(),
        "failures": failures(4_096 if small else 32_768),
    }


def _percent(value: float) -> str:
    if not np.isfinite(value):
        return "diverges"
    return f"{100 * value:+.3f}" if abs(value) < 0.01 else f"{100 * value:+,.1f}"


def tables(found: dict[str, Any]) -> list[Any]:
    """The two tables of part A."""
    first = _runner.make_table(
        "A. linear regression, exact: seesaw over the cosine that it replaces, by the peak rate",
        ["peak rate", "trade", "steps, share", "risk, %", "the same / rate"],
        [
            [
                f"{row['peak']:g}",
                f"{row['trade']:g}",
                f"{row['share']:.3f}",
                _percent(row["gap"]),
                f"{100 * row['gap'] / row['peak']:+.2f}",
            ]
            for row in found["gaps"]
        ],
        f"SGD, exponent 1, B0 = {REFERENCE}; examples inverse to the rate. The last column is "
        "constant: the gap is proportional to the rate.\n"
        f"Largest relative difference from brute force: {found['agreement']:.1g}.",
    )
    lines = [
        [
            f"{optimizer}, {multiple:g} x critical ({group[0]['batch_size']:,})",
            *(f"{_percent(row['gap'])} ({row['share']:.2f})" for row in group),
        ]
        for (optimizer, multiple), group in _runner.by(
            found["failures"], "optimizer", "multiple"
        ).items()
    ]
    second = _runner.make_table(
        "A. the same at multiples of the critical size: risk in % over the cosine's (steps, share)",
        ["B0", "trade .8", "trade 1", "trade 1, limit = noise scale"],
        lines,
        "Each size at the best of a grid of peak rates for its cosine. Critical: the noise scale\n"
        f"half way of the cosine from B0 = {REFERENCE}. Normalized SGD, with exponent 1/2, is what\n"
        "Adam is to first order. At large sizes the best peak rate is at the edge of\n"
        "stability: a cosine passes it, trade 1 with exponent 1 stays there.",
    )
    return [first, second]
