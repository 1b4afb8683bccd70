"""The experiment `fewer_steps`: its exact part, its search for rates, what its tables count."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from experiments import _runner, _training, complement_fixed_schedule
from experiments._learning_rates import scale_by_table
from experiments.fewer_steps import CONFIGS, cases, compare, decays, published, regression, tables

# Part A


def test_recursion_agrees_with_brute_force():
    assert regression.agreement() < 1e-6


def test_gap_is_proportional_to_the_rate():
    rows = [row for row in regression.gaps((0.2, 0.1), time=100.0) if row["trade"] == 1]
    gaps = [row["gap"] for row in rows]
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.1)
    assert abs(gaps[1]) < 0.005
    assert all(row["share"] == pytest.approx(0.5, abs=0.02) for row in rows)


def test_seesaw_fails_beyond_the_critical_size():
    problem, budget = regression.power_law(), 16_384
    shape = decays.half_cosine(budget)

    def over_cosine(size, peak, **options):
        run = lambda **more: regression.train(
            problem, shape, peak=peak, num_examples=budget, batch_size=size, exponent=0.5,
            normalized=True, **more,
        )  # fmt: skip
        return run(trade=1.0, **options).risk / run().risk - 1

    assert abs(over_cosine(2, 0.06)) < 0.02
    assert over_cosine(256, 1.0) > 0.5
    assert over_cosine(256, 1.0, limited=True) < 0.1


# Part B


@pytest.mark.slow
def test_tables_follow_seesaw():
    """Sizes, rates and steps of a plan in the state are those of the library's rule."""
    budget, data = 8_000, aj.Data(jnp.ones(64))
    schedule = decays.with_warm_up("half cosine", budget)
    plan = {"num_examples": budget, "batch_size": 8, "max_batch_size": 128}
    ours = aj.seesaw(optax.sgd(0.1), schedule, exponent=0.75, **plan)
    sizes = aj.schedulers.seesaw_schedule(schedule, **plan)
    counts = budget * (np.arange(cases.NUM_SIZES) + 0.999) / cases.NUM_SIZES
    table = np.array([sizes.batch_size_at(int(n)) for n in counts])
    tabled = optax.chain(
        optax.sgd(0.1),
        scale_by_table(decays.sampled(schedule, budget), budget),
        cases.sizes_by_table(table, budget, 8, 0.75),
    )
    loss_fn = lambda w, batch: (w - batch) ** 2 / 2
    runs = [
        aj.fit(loss_fn, jnp.zeros(()), tx, data, num_examples=budget, window=20)
        for tx in (ours, tabled)
    ]
    ends = [int(run.state.num_steps) for run in runs]
    assert ends[1] == pytest.approx(ends[0], abs=2)
    short = min(ends) - 5
    np.testing.assert_allclose(*(run.per_step("loss")[:short] for run in runs), atol=1e-3)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_shuffled_sizes_are_the_same_ones():
    made = cases.Experiment(cases.Case("digits", "momentum", "half cosine"), 0.1)
    rule = cases.rules("momentum")[0]
    plan = made.plan(rule)
    row = made.shuffled("shuffled", rule, seed=0, rate=0.01)[0]
    assert row["num_steps"] == pytest.approx(made.num_steps(rule), rel=0.03)
    assert set(row["batch_sizes"]) <= set(plan.batch_sizes)
    assert sorted(row["batch_sizes"]) != row["batch_sizes"]


@pytest.mark.parametrize("best", [0.01, 0.1, 0.8])
def test_best_rate_is_inside_the_grid_or_at_its_end(best):
    tried = []

    def loss_at(rate):
        tried.append(rate)
        return math.nan if rate > 10 else math.log(rate / best) ** 2

    found = compare.best_rate(loss_at, 0.1)
    assert max(found / best, best / found) <= math.sqrt(2) + 1e-9
    assert len(tried) == len(set(tried)) <= 8


def test_rows_are_compared_within_their_size():
    def row(method, seed, test_loss, num_steps=100):
        case = {"task_name": "text", "optimizer": "adam", "decay": "linear"}
        return case | {
            "method": method, "seed": seed, "test_loss": test_loss, "num_steps": num_steps,
            "time": num_steps, "batch_size": 8, "learning_rate": 0.1,
        }  # fmt: skip

    rule = cases.rules("adam")[0].label
    rows = [row(compare.BASELINE, 0, 1.0), row(compare.BASELINE, 1, 2.0)]
    rows += [row(compare.SHORTER, 0, 1.02), row(compare.SHORTER, 1, 2.04)]
    rows += [row(rule, 0, 1.01, 50), row(rule, 1, 2.02, 60)]
    rows += [row(f"{compare.CRITICAL}: constant", 0, 4.0, 10) | {"times": 8, "critical": 1}]
    rows += [row(f"{compare.CRITICAL}: {rule}", 0, 6.0, 5)]
    [(case, found)] = tables.judge(rows).items()
    assert case == ("text", "adam", "linear")
    np.testing.assert_allclose(found[rule].over, [1, 1])
    assert found[rule].share == pytest.approx(0.55)
    np.testing.assert_allclose(found[f"{compare.CRITICAL}: {rule}"].over, [50])
    assert tables.cell(found[rule]) == "+1.0 ± 0.0 (0.55)"
    assert tables.is_no_worse(found[rule].over, found[compare.SHORTER].mean)
    assert not tables.is_no_worse(np.array([1.0, 3.0, 2.5]), 2.0)
    printed = [list(column.cells) for column in tables.tables(rows)[-1].columns]
    assert printed[-1][printed[0].index(rule)] == "1 of 1"


def test_wrong_flags_are_named():
    for flag in ("tasks", "optimizers", "decays", "controls"):
        config = cases.dataclasses.replace(CONFIGS["smoke"], **{flag: ("nonsense",)})
        with pytest.raises(_runner.UsageError, match=f"--{flag} must be among .* got nonsense"):
            compare.usage(config)


def test_without_a_limit_it_is_the_fixed_schedule(monkeypatch):
    """What `complement_fixed_schedule` limits is the schedule that it complements."""
    config = complement_fixed_schedule.CONFIGS["smoke"]
    task = _training.make_task("digits", "mlp")
    given = {}
    monkeypatch.setattr(aj, "seesaw", lambda *a, **kw: given.update(kw, decay=a[1]))
    complement_fixed_schedule._limited(task, config, "step")
    del given["exponent"]
    assert given.pop("limit") == "noise_scale"
    plan = aj.schedulers.seesaw_schedule(given.pop("decay"), **given)
    sizes = complement_fixed_schedule._sizes(config, task.num_train, "step")
    assert tuple(zip(plan.starts[1:], plan.batch_sizes[1:], strict=True)) == tuple(
        (pytest.approx(start, abs=1), size) for start, size in sizes
    )


# Part C


@pytest.mark.slow
def test_published_savings_are_predicted_and_met():
    for row in published.run(("quarter cosine", "WSD-20"), 4_000):
        assert row["num_steps"] == row["predicted"]
        assert row["share"] == pytest.approx(row["published"], abs=0.01)
