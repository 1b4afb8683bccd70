"""Part B of :mod:`experiments.fewer_steps`: what is trained on a case, with few compiled programs."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import arbiter_jax as aj
from arbiter_jax import schedulers
from experiments import _methods, _training
from experiments._learning_rates import scale_by_table
from experiments.fewer_steps import decays
from experiments.fewer_steps.cases import EXPONENTS, Case, Rule, definition, make_optimizer

GROWTH = 16  # the largest size over B0
NUM_WINDOWS = 200  # of a run whose size changes, at least
NUM_SIZES = 100 * NUM_WINDOWS  # entries of a table of sizes
WINDOW = 20  # steps of a window, at most
FLAT = 512  # a step of up to so many examples takes the same time on an accelerator


class SizesState(NamedTuple):
    """State of :func:`sizes_by_table`."""

    batch_size: jax.Array  # shape=(), dtype=int32
    min_batch_size: jax.Array  # shape=(), dtype=int32
    max_batch_size: jax.Array  # shape=(), dtype=int32
    window_steps: jax.Array  # shape=(), dtype=int32, which see a 200th of the budget
    sizes: jax.Array  # shape=(NUM_SIZES,), dtype=int32
    total: jax.Array  # shape=(), dtype=float32, the budget
    reference: jax.Array  # shape=(), dtype=float32, B0
    exponent: jax.Array  # shape=(), dtype=float32, p


def sizes_by_table(
    sizes: np.ndarray, num_examples: int, reference: int = 1, exponent: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Sizes by the share of the budget, and the rate that goes with them: (B / reference)^exponent.

    All of it lies in the state: one program for constant sizes, shuffled ones, and every plan of
    `seesaw`, which does the same with numbers that are constants of its program.

    Args:
      sizes: int[NUM_SIZES].
      num_examples: The budget.
      reference: B0.
      exponent: p.
    """

    def window_steps(size, total):
        return jnp.maximum(total / NUM_WINDOWS / size, 1).astype(jnp.int32)

    def init_fn(params):
        del params
        table = jnp.asarray(sizes, jnp.int32)
        total, base, power = (jnp.float32(x) for x in (num_examples, reference, exponent))
        steps = window_steps(table[0], total)
        return SizesState(table[0], table.min(), table.max(), steps, table, total, base, power)

    def update_fn(
        updates, state, params=None, *, num_examples=0, batch_size=0, probe=None, **extra_args
    ):
        del params, extra_args
        if probe is not None:
            return updates, state
        rate = jnp.power(jnp.maximum(batch_size, 1) / state.reference, state.exponent)
        updates = jax.tree.map(lambda u: rate.astype(u.dtype) * u, updates)
        seen = (num_examples + batch_size) / state.total
        size = state.sizes[jnp.clip((seen * NUM_SIZES).astype(jnp.int32), 0, NUM_SIZES - 1)]
        steps = window_steps(size, state.total)
        return updates, state._replace(batch_size=size, window_steps=steps)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class Experiment:
    """All that is trained on one case, with as few compiled programs as can be.

    Rates, decays, budgets and sizes lie in the state of one transformation. The runs of
    `arbiter_jax.seesaw` itself are the default one and those that measure.
    """

    def __init__(self, case: Case, share: float):
        """Defines the case; nothing is trained yet."""
        self.case, self.share = case, share
        self.made = definition(case.task, share)
        self.num_examples, self.batch_size = self.made.num_examples, self.made.batch_size

    @property
    def exponent(self) -> float:
        """The library's default for this optimizer."""
        return float(EXPONENTS[self.case.optimizer][0])

    def plan(self, rule: Rule, batch_size: int | None = None) -> schedulers.BatchSchedule:
        """What `seesaw` will do."""
        size = batch_size or self.batch_size
        return schedulers.seesaw_schedule(
            self._schedule(self.num_examples),
            num_examples=self.num_examples,
            batch_size=size,
            max_batch_size=GROWTH * size,
            trade=rule.trade,
            doubling=rule.doubling,
        )

    def num_steps(self, rule: Rule) -> int:
        """How many steps `seesaw` takes."""
        return self.plan(rule).num_steps(self.num_examples, window=WINDOW)

    def _schedule(self, num_examples: int) -> optax.Schedule:
        return decays.with_warm_up(self.case.decay, num_examples)

    def controlled(
        self,
        name: str,
        *,
        seed: int,
        rate: float,
        batch_size: int | None = None,
        power: float = 1.0,
        budget: float = 1.0,
        **options: Any,
    ):
        """A run at a constant size: (row, windows, fit).

        Args:
          name: Of the method.
          seed: Of the run.
          rate: The peak.
          batch_size: B0 if None.
          power: Of the decay: alpha^power.
          budget: Share of the budget.
          **options: Passed to `train`.
        """
        total = int(budget * self.num_examples)
        shape = decays.sampled(self._schedule(total), total) ** power
        sizes = sizes_by_table(np.full(NUM_SIZES, batch_size or self.batch_size), total)
        return self._tabled(name, shape, sizes, seed, rate, total, **options)

    def planned(
        self, name: str, rule: Rule, *, seed: int, rate: float, batch_size: int | None = None
    ):
        """A run with the sizes and rates of `seesaw`, from tables: (row, windows, fit)."""
        total, size = self.num_examples, batch_size or self.batch_size
        plan = self.plan(rule, size)
        sizes = _sizes_at(plan, _cells(total))
        shape = decays.sampled(self._schedule(total), total)
        tabled = sizes_by_table(sizes, total, size, float(rule.exponent))
        return self._tabled(name, shape, tabled, seed, rate, total)

    def shuffled(self, name: str, rule: Rule, *, seed: int, rate: float):
        """The sizes of `seesaw` in random order, its rates in theirs: (row, windows, fit)."""
        total, plan = self.num_examples, self.plan(rule)
        counts = np.linspace(0, total - 1, decays.NUM_RATES)
        grown = _sizes_at(plan, counts) / self.batch_size
        shape = decays.sampled(self._schedule(total), total) * grown ** float(rule.exponent)
        windows = np.random.default_rng(seed).permutation(_windows(plan, total))
        ends = np.cumsum(windows[:, 0] * windows[:, 1])
        at = np.searchsorted(ends, _cells(total), side="right")
        sizes = windows[np.minimum(at, len(windows) - 1), 0]
        return self._tabled(name, shape, sizes_by_table(sizes, total), seed, rate, total)

    def _tabled(self, name, shape, sizes, seed, rate, total, **options):
        optimizer = make_optimizer(self.case.optimizer, self.batch_size, self.exponent)

        def begin(seed, learning_rate):
            return optax.chain(optimizer, scale_by_table(learning_rate * shape, total), sizes)

        tx = _control_program(self.case.task, self.case.optimizer)
        return self._train(name, tx, begin, seed, rate, total, **options)

    def seesaw(
        self, name: str, rule: Rule, *, seed: int, rate: float, batch_size: int | None = None
    ):
        """A run of `arbiter_jax.seesaw`: (row, windows, fit)."""

        def begin(seed, learning_rate):
            return _seesaw(
                self.case, self.share, rule, batch_size or self.batch_size, learning_rate
            )

        tx = _seesaw_program(self.case, self.share, rule, batch_size or self.batch_size)
        return self._train(name, tx, begin, seed, rate, self.num_examples)

    def noise_floor(self, name: str, *, seed: int, rate: float):
        """A run at a constant rate: (row, windows, fit)."""

        def begin(seed, learning_rate):
            return _noise_floor(self.case, self.share, learning_rate)

        tx = _noise_floor_program(self.case._replace(decay=""), self.share)
        return self._train(name, tx, begin, seed, rate, self.num_examples)

    def _train(self, name, tx, begin, seed, rate, total, **options):
        row, windows, fit = _training.train(
            self.made.task,
            name,
            _methods.Method(tx, begin),
            seed=seed,
            num_examples=total,
            window=WINDOW,
            learning_rate=rate,
            task_name=self.case.task,
            optimizer=self.case.optimizer,
            decay=self.case.decay,
            **options,
        )
        row["time"] = sum(max(1.0, r.batch_size / FLAT) * r.num_steps for r in fit.history)
        return row, windows, fit

    def critical_size(self, rate: float, largest: int) -> dict[str, Any]:
        """The critical batch size half way of the baseline, by branching.

        Args:
          rate: The peak rate of the baseline.
          largest: Size of the largest branch, over B0.
        """
        task, losses = self.made.task, self.made.task.losses
        tx = _control_program(self.case.task, self.case.optimizer)
        shape = decays.sampled(self._schedule(self.num_examples), self.num_examples)
        start = optax.chain(
            make_optimizer(self.case.optimizer, self.batch_size, self.exponent),
            scale_by_table(rate * shape, self.num_examples),
            sizes_by_table(np.full(NUM_SIZES, self.batch_size), self.num_examples),
        )
        params, model_state = task.model.init(jax.random.PRNGKey(0))
        half_way = aj.fit(
            losses.loss_fn,
            params,
            tx,
            task.data,
            num_examples=self.num_examples,
            stop_at=self.num_examples // 2,
            window=WINDOW,
            state=aj.init_state(params, start, jax.random.PRNGKey(1), model_state),
        )
        found = aj.measure_critical_batch_size(
            losses.loss_fn,
            half_way.state,
            tx,
            task.data,
            max_batch_size=largest * self.batch_size,
            batch_size=self.batch_size,
            exponent=self.exponent,
        )
        return found._asdict()


def _sizes_at(plan: schedulers.BatchSchedule, counts: np.ndarray) -> np.ndarray:
    return np.array(plan.batch_sizes)[np.searchsorted(plan.starts, counts, side="right") - 1]


def _cells(total: int) -> np.ndarray:
    """Counts at the ends of the cells of a table of sizes: a size begins in the cell it falls in."""
    return total * (np.arange(NUM_SIZES) + 0.999) / NUM_SIZES


def _windows(plan: schedulers.BatchSchedule, total: int) -> np.ndarray:
    """(batch size, steps) of each window of a run by a plan, int[n, 2]."""
    seen, windows = 0, []
    while True:
        size = plan.batch_size_at(seen)
        steps = min(WINDOW, plan.window_steps(size), (total - seen) // size)
        if steps < 1:
            return np.array(windows)
        windows.append((size, steps))
        seen += size * steps


@functools.cache
def _control_program(task: str, kind: str) -> Any:
    size = definition(task).batch_size
    optimizer = make_optimizer(kind, size, float(EXPONENTS[kind][0]))
    rates = scale_by_table(np.ones(decays.NUM_RATES), 1)
    return optax.chain(optimizer, rates, sizes_by_table(np.full(NUM_SIZES, size), 1))


def _seesaw(case: Case, share: float, rule: Rule, batch_size: int, rate: float) -> Any:
    made = definition(case.task, share)
    num_examples = made.num_examples
    power = 0.5 if isinstance(rule.exponent, str) else rule.exponent
    whole = aj.seesaw(
        make_optimizer(case.optimizer, made.batch_size, power),
        decays.with_warm_up(case.decay, num_examples),
        num_examples=num_examples,
        batch_size=batch_size,
        max_batch_size=GROWTH * batch_size,
        exponent=rule.exponent,
        trade=rule.trade,
        doubling=rule.doubling,
        limit=rule.limit,
    )
    return optax.chain(whole, scale_by_table(np.full(2, rate), num_examples))


@functools.cache
def _seesaw_program(case: Case, share: float, rule: Rule, batch_size: int) -> Any:
    return _seesaw(case, share, rule, batch_size, 1.0)


def _noise_floor(case: Case, share: float, rate: float) -> Any:
    made = definition(case.task, share)
    rule = schedulers.noise_floor(
        made.task.losses.loss_fn,
        num_examples=made.num_examples,
        persistence=10.0 if case.optimizer != "sgd" else 1.0,
        max_batch_size=GROWTH * made.batch_size,
        min_batch_size=made.batch_size,  # below it there are no steps to save
        initial_batch_size=made.batch_size,
    )
    optimizer = make_optimizer(case.optimizer, made.batch_size)
    constant = scale_by_table(np.full(2, rate), made.num_examples)
    return optax.chain(optimizer, constant, rule)


@functools.cache
def _noise_floor_program(case: Case, share: float) -> Any:
    return _noise_floor(case, share, 1.0)


def forget_programs() -> None:
    """Drops every compiled program before the next case compiles its own."""
    for cached in (_control_program, _seesaw_program, _noise_floor_program):
        cached.cache_clear()
    jax.clear_caches()
