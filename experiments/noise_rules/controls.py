"""The controls of :mod:`experiments.noise_rules`: a rule that is passed other statistics."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import arbiter_jax as aj
from arbiter_jax import objectives, schedulers
from experiments import _methods, _runner, _training
from experiments.noise_rules import cases

# Rates at which the noise floor is not at the lower end of its range in all runs: there, nothing
# could change.
CONTROLLED = (
    cases.Case("fashion_mnist", "momentum", 0.03),
    cases.Case("language", "momentum", 0.1),
    cases.Case("digits", "momentum", 0.1),
)
BINS = 100  # equal parts of the budget, in each of which the statistics of a run are recorded
# Field of an objective's sample -> the metric that replaces it. None: 0, because the recorded noise
# already contains the correction of Eq. 15.
STATISTICS = {
    "noise_floor": {"noise": "noise", "correction": None},
    "expected_gain": {"noiseless_gain": "noiseless_gain", "noise_cost": "noise_cost"},
}


# The control: do the same numbers in another order, or those of another run, do worse?


class Replay(NamedTuple):
    """State of a noise objective that reads a table instead of measuring."""

    statistics: Any  # state of the objective
    table: jax.Array  # shape=(BINS, k), dtype=float, samples by share of the budget


def replay(
    objective: objectives.NoiseObjective, fields: Iterable[str], table: Any, num_examples: int
) -> objectives.NoiseObjective:
    """An objective whose samples come from a table, by share of the budget.

    Args:
      objective: The objective.
      fields: The fields of its samples that the columns of the table replace. The others (the loss of
        validation examples) are measured.
      table: float[BINS, k].
      num_examples: The budget.
    """

    def update(state, sample, measured, batch_size, signals):
        seen = jnp.asarray(signals["num_examples"], float) / num_examples
        row = state.table[jnp.clip(seen * BINS, 0, BINS - 1).astype(jnp.int32)]
        sample = sample._replace(**dict(zip(fields, row, strict=True)))
        return state._replace(
            statistics=objective.update(state.statistics, sample, measured, batch_size, signals)
        )

    return objective._replace(
        init=lambda: Replay(objective.init(), jnp.asarray(table, float)),
        update=update,
        loss=lambda state, *args: objective.loss(state.statistics, *args),
        best=lambda state, *args: objective.best(state.statistics, *args),
    )


def _recorded(fit: Any, name: str, num_examples: int) -> np.ndarray:
    """Returns float[BINS, k]: the running averages of a run, at equal distances in examples."""
    sizes = fit.per_step("batch_size")
    seen = np.cumsum(sizes)[sizes > 0]
    at = np.searchsorted(seen, (np.arange(BINS) + 0.5) / BINS * num_examples)
    at = np.minimum(at, len(seen) - 1)
    column = lambda field: fit.per_step(field)[sizes > 0][at] if field else np.zeros(BINS)
    return np.stack([column(metric) for metric in STATISTICS[name].values()], 1)


def _replayed_chain(name: str, case: cases.Case, share: float, table: np.ndarray):
    """The optimizer of a case and its rule, which reads a table: float[BINS, k]."""
    made = cases.definition(case.task, share)
    loss_fn = made.task.losses.loss_fn
    if name == "noise_floor":
        k = cases.persistence(case.optimizer)
        objective = objectives.noise_floor(loss_fn, num_examples=made.num_examples, persistence=k)
        options = {}
    else:
        k = cases.persistence(case.optimizer, power=2)
        objective = objectives.expected_gain(loss_fn, persistence=k)
        options = {"measure_every": 10, "max_change": 2.0}  # as in schedulers.expected_gain
    rule = schedulers.from_objective(
        replay(objective, STATISTICS[name], table, made.num_examples),
        max_batch_size=made.max_batch_size,
        initial_batch_size=64,
        **options,
    )
    rate = made.scale * case.learning_rate
    optimizer = cases.optimizer(case.optimizer, rate, "constant", made.num_examples)
    return optax.chain(optimizer, rule)


def control(config: Any) -> list[dict[str, Any]]:
    """Runs each rule as it is, and with a table: its own, permuted in time, of other rates."""
    rows = []
    for case in (case for case in CONTROLLED if case.task in config.tasks):
        made = cases.definition(case.task, config.share)
        others = [rate for rate in cases.OPTIMIZERS[case.optimizer] if rate != case.learning_rate]
        for name, fields in STATISTICS.items():
            empty = np.zeros((BINS, len(fields)))
            shared = _replayed_chain(name, case, config.share, empty)
            for seed in config.seeds:

                def measured(case, name=name, seed=seed, made=made):
                    shown = f"control: {case.task}, {name} at {case.learning_rate:g}, seed {seed}"
                    row, _, fit = cases.run(
                        case,
                        name,
                        seed=seed,
                        share=config.share,
                        callbacks=[aj.callbacks.progress(shown)],
                    )
                    return row, _recorded(fit, name, made.num_examples)

                row, table = measured(case)
                rows.append({"part": "control", **row})
                order = np.random.default_rng(seed).permutation(BINS)
                tables = {"replayed": table, "permuted": table[order]}
                for rate in others:
                    tables[f"of rate {rate:g}"] = measured(case._replace(learning_rate=rate))[1]
                for label, table in tables.items():
                    row = _replayed(name, label, case, config.share, table, shared, seed)
                    rows.append({"part": "control", **row})
            cases.forget_programs()
    return rows


def _replayed(name, label, case, share, table, shared, seed) -> dict[str, Any]:
    """The row of a run with a table; `shared` is a chain with the same program."""
    made, tx = cases.definition(case.task, share), _replayed_chain(name, case, share, table)
    return _training.train(
        made.task,
        f"{name}, {label}",
        _methods.Method(shared, lambda **_: tx),
        seed=seed,
        num_examples=made.num_examples,
        window=20,
        learning_rate=made.scale * case.learning_rate,
        task_name=case.task,
        optimizer=case.optimizer,
        case_rate=case.learning_rate,
    )[0]


def control_table(rows: list[dict[str, Any]]):
    """Test losses, and what each replay adds, paired by seed."""
    cells = []
    groups = _runner.by(rows, "task_name", "method")
    for (task, method), group in groups.items():
        own = groups[task, method.split(",")[0]]
        cells.append(
            [
                f"{task}, {method}",
                _runner.interval(group, "test_loss", 4),
                _runner.difference(group, own),
                f"{np.mean([row['num_steps'] for row in group]):,.0f}",
            ]
        )
    return _runner.make_table(
        "the control: statistics of another time, or of another rate",
        ["task, rule", "test loss", "minus its own", "steps"],
        cells,
        "momentum .9, rate "
        + ", ".join(f"{case.learning_rate:g} ({case.task})" for case in CONTROLLED)
        + ". replayed: the rule reads the running averages of its own run as if they were measured, "
        f"at {BINS}\npoints of the budget; permuted: the same numbers in another order; of rate: those "
        "of a run at another learning rate.\n± half-width of the 95% interval over seeds.",
    )


# The same in every case: is it the order in time that matters?


def time_order(config: Any) -> list[dict[str, Any]]:
    """Runs each rule in every case: as it is, with its own table, and with it permuted in time."""
    rows = []
    for task, kind in itertools.product(config.tasks, config.optimizers):
        made = cases.definition(task, config.share)
        for name in (name for name in STATISTICS if name in config.methods):
            shared = None
            for rate in cases.OPTIMIZERS[kind]:
                case = cases.Case(task, kind, rate)
                for seed in config.seeds:
                    shown = f"time order: {task}, {kind} {rate:g}, {name}, seed {seed}"
                    callbacks = [aj.callbacks.progress(shown)]
                    row, _, fit = cases.run(
                        case, name, seed=seed, share=config.share, callbacks=callbacks
                    )
                    rows.append({"part": "time_order", **row})
                    table = _recorded(fit, name, made.num_examples)
                    order = np.random.default_rng(seed).permutation(BINS)
                    shared = shared or _replayed_chain(name, case, config.share, table)
                    for label, used in (("replayed", table), ("permuted", table[order])):
                        row = _replayed(name, label, case, config.share, used, shared, seed)
                        rows.append({"part": "time_order", **row})
        cases.forget_programs()
    return rows


def order_effects(rows: list[dict[str, Any]], name: str, against: str) -> np.ndarray:
    """ln of the test loss of a permuted run over that of another: float[cases], means over seeds."""
    effects = []
    for group in _runner.by(rows, "task_name", "optimizer", "case_rate").values():
        losses = {
            method: np.array([row["test_loss"] for row in runs], float)
            for method, runs in _runner.by(group, "method").items()
        }
        effects.append(np.mean(np.log(losses[f"{name}, permuted"] / losses[against])))
    return np.array(effects)


def time_order_table(rows: list[dict[str, Any]]):
    """The effect of the order in time, per task and over all tasks."""
    cells = []
    tasks = _runner.by(rows, "task_name")
    for name in (name for name in STATISTICS if name in _runner.by(rows, "method")):
        for task, group in (*tasks.items(), ("all", rows)):
            for label, against in (("own", name), ("replayed", f"{name}, replayed")):
                effects = order_effects(group, name, against)
                ended = effects[np.isfinite(effects)]
                percent = [{"effect": 100 * effect} for effect in ended]
                cells.append(
                    [
                        f"{task}, {name}, over {label}",
                        str(len(effects)),
                        _runner.interval(percent, "effect", 2) if percent else "-",
                        f"{100 * np.median(ended):+.2f}" if percent else "-",
                        str(np.sum(ended > 0)),
                        str(len(effects) - len(ended)),
                    ]
                )
    return _runner.make_table(
        "the control in every case: statistics permuted in time",
        ["task, rule", "cases", "mean %", "median %", "worse in", "diverged"],
        cells,
        "100 ln of the test loss with permuted statistics over that of the rule as it is (own), or "
        "with its own\ntable (replayed), paired by seed, a mean over seeds for each case; ± half-width "
        "of the 95% interval over cases.",
    )
