"""What each correction of the noise floor earns: the rule without it, paired by seed.

Command: python -m experiments.noise_rules.corrections --runs FILE [--tasks ...] [--cases ...]

It replaces constants and functions inside arbiter_jax, so it belongs to the commit it is in. All
variants share a program: what is left out is read from the state. The runs are appended to the file,
and not repeated; ``--show`` prints the table of those that are there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from arbiter_jax import schedulers
from arbiter_jax.objectives import _noise_floor as floor
from arbiter_jax.schedulers import _from_objective as rule
from experiments import _methods, _training
from experiments.noise_rules import cases

MANY = 2**30
GREEDY = "expected_gain "
COLUMNS = ("test_loss", "validation_loss", "num_steps", "num_examples")
#: Name of a case: (optimizer, rate, initial size). The two larger rates of each optimizer.
CASES = {
    f"{kind} {rate:g}": (kind, rate, 64)
    for kind, rates in cases.OPTIMIZERS.items()
    for rate in rates[1:]
}
CASES |= {
    f"{name} from {start}": (kind, rate, start)
    for name, (kind, rate, _) in CASES.items()
    for start in (8, 512)
} | {GREEDY + name: case for name, case in CASES.items()}

#: What can be left out.
PARTS = (
    "(14)",
    "(15)",
    "(16)",
    "(17)",
    "20 steps measured",
    "larger first batches",
    "windows of 5",
    "a 50th per window",
    "max_change",
)
VARIANTS: dict[str, tuple[str, ...]] = {
    "as it is": (),
    **{f"without {part}": (part,) for part in PARTS},
    "without all of these": PARTS,
    "without (14), (15), (16), (17)": PARTS[:4],
    "without the other five": PARTS[4:],
    "without 20 measured, windows of 5": ("20 steps measured", "windows of 5"),
}


class Switched(NamedTuple):
    """State of a rule without some of its parts."""

    inner: Any
    keeps: dict[str, jax.Array]  # bool[] each
    persistence: jax.Array  # k


@contextlib.contextmanager
def _only(keeps: dict[str, Any], persistence: Any):
    """The rule with the parts that it keeps, while it is traced."""
    number = lambda part, value, without: jnp.where(keeps[part], value, without)
    slope, extrapolated, size = floor.log_time_slope, floor.size_for_end, floor._floor_size
    limited = rule._limited_change

    def log_time_slope(state):
        return jnp.where(keeps["(14)"], slope(state), state.training.value())

    def size_for_end(batch_size, num_steps, left):
        return jnp.where(keeps["(16)"], extrapolated(batch_size, num_steps, left), batch_size)

    def floor_size(config, state):
        least = number("(17)", config.optimal_loss, -math.inf)
        return size(dataclasses.replace(config, optimal_loss=least), state)

    def limited_change(size, applied, max_change, low, high):
        return limited(size, applied, number("max_change", max_change, 1e6), low, high)

    patches = (
        (floor, "log_time_slope", log_time_slope),
        (floor, "size_for_end", size_for_end),
        (floor, "_floor_size", floor_size),
        (floor, "_persistence", lambda config, signals: persistence),
        (floor, "_MAX_CORRECTION", number("(15)", floor._MAX_CORRECTION, 1.0)),
        (rule, "_limited_change", limited_change),
        (rule, "_NUM_MEASURED_STEPS", number("20 steps measured", 20, 0)),
        (rule, "_INITIAL_BATCHES_PER_BUDGET", number("larger first batches", 800, MANY)),
        (rule, "_EARLY_WINDOW", number("windows of 5", 5, MANY)),
        (rule, "_WINDOWS_PER_BUDGET", number("a 50th per window", 50, 1)),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        yield


def switched(inner, left_out: tuple[str, ...], persistence: float):
    """A rule without some of its parts, as a transformation."""
    unknown = set(left_out) - set(PARTS)
    assert not unknown, unknown

    def init_fn(params):
        keeps = {part: jnp.array(part not in left_out) for part in PARTS}
        with _only(keeps, persistence):
            return Switched(inner.init(params), keeps, jnp.asarray(persistence, float))

    def update_fn(updates, state, params=None, **extra_args):
        with _only(state.keeps, state.persistence):
            updates, new = inner.update(updates, state.inner, params, **extra_args)
        return updates, state._replace(inner=new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _transformation(task: str, share: float, case: str, left_out: tuple[str, ...]):
    made, (kind, rate, start) = cases.definition(task, share), CASES[case]
    loss_fn = made.task.losses.loss_fn
    limits = {"max_batch_size": made.max_batch_size, "initial_batch_size": start}
    if case.startswith(GREEDY):
        made_rule = schedulers.expected_gain(
            loss_fn, persistence=cases.persistence(kind, power=2), **limits
        )
    else:  # the persistence is not the one that is used
        made_rule = schedulers.noise_floor(
            loss_fn, num_examples=made.num_examples, persistence=2.0, **limits
        )
    base = cases.optimizer(kind, made.scale * rate, "constant", made.num_examples)
    return optax.chain(base, switched(made_rule, left_out, cases.persistence(kind)))


@functools.cache
def _program(task: str, share: float, case: str):
    return _transformation(task, share, case, ())


def _one(task: str, share: float, case: str, label: str, seed: int) -> dict[str, Any]:
    made = cases.definition(task, share)
    # Rate and momentum lie in the state.
    program = "adam 0.0015" if "adam" in case else "momentum 0.03"
    if case.startswith(GREEDY):
        program = GREEDY + ("sgd 0.1" if "sgd" in case else program)
    tx = _program(task, share, program)
    begin = lambda seed, learning_rate: _transformation(task, share, case, VARIANTS[label])
    row, _, _ = _training.train(
        made.task,
        "noise_floor",
        _methods.Method(tx, begin),
        seed=seed,
        num_examples=made.num_examples,
        window=20,
        learning_rate=made.scale * CASES[case][1],
    )
    return row


def _run(config, path: Path) -> None:
    done = {_key(row) for row in _rows(path)}
    for seed in config.seeds:
        for task, share in zip(config.tasks, config.shares, strict=True):
            for case in config.cases:
                for label in config.variants:
                    row = {"task": task, "case": case, "variant": label, "seed": seed}
                    row["share"] = share
                    if _key(row) in done:
                        continue
                    began = time.perf_counter()
                    made = _one(task, share, case, label, seed)
                    row |= {column: made[column] for column in COLUMNS}
                    row["seconds"] = time.perf_counter() - began
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")


def _key(row) -> tuple:
    return tuple(row[k] for k in ("task", "case", "variant", "seed", "share"))


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# 97.5% points of Student's t with 1, 2, ... degrees of freedom.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


def _percent(values: list[float]) -> str:
    if len(values) < 2:
        return "" if not values else f"{values[0]:+.2f}"
    n = len(values)
    t = _T[n - 2] if n - 2 < len(_T) else 2.05
    half = t * statistics.stdev(values) / math.sqrt(n)
    return f"{statistics.mean(values):+.2f} ± {half:.2f}"


def _show(path: Path) -> None:
    rows = {_key(row): row for row in _rows(path)}
    columns = sorted({(k[0], k[1]) for k in rows})
    print("| | " + " | ".join(" ".join(c) for c in columns) + " | all | steps |")
    print("|---" * (len(columns) + 3) + "|")
    for label in VARIANTS:
        cells, every, steps = [], [], []
        for column in columns:
            found = []
            for key, row in rows.items():
                own = rows.get((key[0], key[1], "as it is", *key[3:]))
                if (key[0], key[1]) == column and key[2] == label and own is not None:
                    found.append(100 * (row["test_loss"] / own["test_loss"] - 1))
                    steps.append(row["num_steps"] / own["num_steps"])
            cells.append(_percent(found))
            every += found
        if every:
            ratio = math.exp(statistics.mean(math.log(s) for s in steps))
            print(f"| {label} | " + " | ".join(cells) + f" | {_percent(every)} | {ratio:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--tasks", nargs="+", default=["fashion_mnist", "language"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.5])
    parser.add_argument("--cases", nargs="+", default=list(CASES)[:6])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    config = parser.parse_args()
    if not config.show:
        _run(config, config.runs)
    _show(config.runs)


if __name__ == "__main__":
    main()
