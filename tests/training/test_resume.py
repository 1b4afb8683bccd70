"""Two calls train as one does: what a state and a checkpoint carry from one to the next."""

import functools

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax.training import _fit, no_unfinished_window, resume_state
from tests.rules import usual_in_ci
from tests.training.resume_runs import KINDS, NAMES, arrays, assert_same_run, fit

# Each of these reads other things that have to survive; CI leaves the rest of the matrix out.
IN_CI = {
    ("arbiter", "resident"),
    ("constant", "streamed"),
    ("goodput", "streamed"),
    ("gradient_noise_scale", "batch_norm"),
    ("multi_steps", "resident"),
    ("noise_floor", "resident"),
    ("seesaw", "resident"),
}
MATRIX = [
    pytest.param(name, kind, marks=() if (name, kind) in IN_CI else pytest.mark.exhaustive)
    for kind in KINDS
    for name in NAMES
]


class CrashError(Exception):
    pass


def crash_after(num_windows):
    def callback(record, state):
        if record.window_index + 1 == num_windows:
            raise CrashError

    return callback


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), MATRIX)
def test_a_crashed_run_ends_as_one_that_did_not(name, kind, tmp_path):
    whole = fit(name, kind)
    last = len(whole.history)
    assert last >= 4
    saved = aj.checkpoints(tmp_path, every=2)
    run = lambda after: fit(
        name, kind, checkpoints=saved, resume=True, callbacks=crash_after(after)
    )
    for after in (2, last - 1):  # before the first checkpoint, and in the middle
        with pytest.raises(CrashError):
            run(after)
    assert_same_run(arrays(run(None)), arrays(whole))


@pytest.mark.slow
@pytest.mark.parametrize("name", usual_in_ci(NAMES))
def test_legs_cut_in_a_window_are_one_run(name):
    whole = fit(name, "resident", clock=lambda: 0.0)
    legs, state = [], None
    for stop_at in (35, 97, 211, 333, None):
        legs.append(fit(name, "resident", clock=lambda: 0.0, stop_at=stop_at, state=state))
        state = legs[-1].state
    assert any(leg.history[-1].num_steps < 4 for leg in legs[:-1] if leg.history)
    chex.assert_trees_all_equal(state, whole.state)
    for quantity in ("loss", "batch_size"):
        steps = np.concatenate([leg.per_step(quantity) for leg in legs])
        np.testing.assert_array_equal(steps, whole.per_step(quantity))


SQUARE = lambda w, x: (w - x) ** 2 / 2
DATA = aj.Data(jnp.arange(50, dtype=jnp.float32) / 50)


@functools.cache
def sizes_of_steps(*sizes):
    """A rule that changes its mind at every step; a window has the size that it begins with."""
    table = jnp.asarray(sizes)
    rule = aj.schedulers.from_schedule(
        lambda step: table[step % len(sizes)], min_batch_size=1, max_batch_size=64
    )
    return optax.chain(optax.sgd(0.1), rule)


def run(tx, num_examples=200, **options):
    options = {"window": 4, "key": 1} | options
    return aj.fit(SQUARE, jnp.zeros(()), tx, DATA, num_examples=num_examples, **options)


def sizes(*results):
    return [(r.batch_size, r.bucket_size, r.num_steps) for each in results for r in each.history]


@pytest.mark.slow
def test_a_window_cut_by_a_leg_is_finished():
    """With its size and its bucket, before the rule decides anew; also if it is cut again."""
    tx = sizes_of_steps(8, 3, 20, 1, 5)
    whole = run(tx)
    first = run(tx, stop_at=20)
    assert sizes(first) == [(8, 8, 2)]
    assert [int(x) for x in first.state.unfinished] == [8, 8, 2]
    second = run(tx, stop_at=27, state=first.state)
    assert sizes(second) == [(8, 8, 1)]
    third = run(tx, stop_at=30, state=second.state)
    assert sizes(third) == []
    assert [int(x) for x in third.state.unfinished] == [8, 8, 1]
    rest = run(tx, state=third.state)
    assert sizes(rest) == [(8, 8, 1), *sizes(whole)[1:]]
    chex.assert_trees_all_equal(rest.state, whole.state)
    losses = np.concatenate([leg.per_step("loss") for leg in (first, second, third, rest)])
    np.testing.assert_array_equal(losses, whole.per_step("loss"))


@pytest.mark.slow
def test_a_leg_ends_where_its_window_is_cut():
    """The rule would decide on a size that still fits, but only after the window."""
    tx = sizes_of_steps(16, 1, 1)
    first = run(tx, stop_at=60)
    assert sizes(first) == [(16, 16, 3)]
    assert sizes(first, run(tx, state=first.state))[1] == (16, 16, 1)


@pytest.mark.slow
def test_a_window_cut_by_the_budget_is_left():
    """The rule decides on what is left of it; with a larger budget the window is finished."""
    tx = sizes_of_steps(16, 5, 1)
    short = run(tx, num_examples=39)
    assert sizes(short) == [(16, 16, 2), (1, 1, 4)]
    tx = sizes_of_steps(10)
    short = run(tx, num_examples=65)
    assert sizes(short) == [(10, 16, 4), (10, 16, 2)]
    rest = run(tx, state=short.state)
    assert sizes(rest)[0] == (10, 16, 2)
    chex.assert_trees_all_equal(rest.state, run(tx).state)


@pytest.mark.slow
def test_an_unfinished_window_can_be_dropped():
    tx = sizes_of_steps(8, 3, 20, 1, 5)
    state = run(tx, stop_at=20).state
    state = state._replace(unfinished=no_unfinished_window())
    assert sizes(run(tx, state=state))[0] == (20, 32, 4)


@pytest.mark.slow
def test_a_new_range_drops_an_unfinished_window():
    def tx(high):
        rule = aj.schedulers.gradient_noise_scale(max_batch_size=high, initial_batch_size=high)
        return optax.chain(optax.sgd(0.1), rule)

    state = run(tx(16), stop_at=40).state
    assert [int(x) for x in state.unfinished] == [16, 16, 2]
    assert int(resume_state(state, tx(16)).unfinished.num_steps) == 2
    assert [int(x) for x in resume_state(state, tx(8)).unfinished] == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["goodput", pytest.param("expected_gain", marks=pytest.mark.exhaustive)]
)
def test_the_measured_time_survives_a_leg(kind, monkeypatch):
    """The clock goes on by what a step of the bucket costs: the same, however a window is cut."""
    now = [0.0]

    def run_window(state, data, num_steps, step_seconds, *, bucket_size, **options):
        now[0] += int(num_steps) * (1 + bucket_size / 16)
        given.append(float(step_seconds))
        return original(state, data, num_steps, step_seconds, bucket_size=bucket_size, **options)

    original, given = _fit.run_window, []
    monkeypatch.setattr(_fit, "run_window", run_window)
    clock = lambda: now[0]
    whole = fit(kind, "resident", clock=clock)
    assert np.isnan(given[0])
    assert np.isfinite(given[1:]).all()
    first = fit(kind, "resident", clock=clock, stop_at=330)
    rest = fit(kind, "resident", clock=clock, state=first.state)
    assert first.history[-1].num_steps < 4  # it was cut
    chex.assert_trees_all_equal(rest.state, whole.state)
    assert float(whole.state.step_seconds) > 0


def test_no_rule_asks_so_no_time_is_kept():
    state = run(sizes_of_steps(8), clock=iter(range(1000)).__next__).state
    assert float(state.step_seconds) == 0
