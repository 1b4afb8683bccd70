"""Whatever the signals: sizes stay in range, states stay finite, bad steps change nothing.

Each rule is compiled once, as a scan over a fixed number of steps; Hypothesis fills in the signals.
"""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arbiter_jax as aj
from arbiter_jax import schedulers
from arbiter_jax.objectives import Persistence
from tests.rules import RULES, usual_in_ci

LOW, HIGH, START, NUM_STEPS = 5, 300, 20, 6
LIMITS = {"min_batch_size": LOW, "max_batch_size": HIGH, "initial_batch_size": START}

READS = {name: case.reads for name, case in RULES.items() if case.reads}
COLUMNS = (*aj.GradStats._fields, "value", "grad", "step_seconds")
COLUMNS += ("gradient_noise", "update_noise", "meta")

# Ordinary numbers, the edges of float32, and what is not a number.
AWKWARD = [0.0, 1.0, -1.0, 1e-38, 3e38, -3e38, 1e-45, np.inf, -np.inf, np.nan]
number = st.one_of(
    st.sampled_from(AWKWARD), st.floats(-100.0, 1000.0, width=32), st.floats(width=32)
)
table = st.lists(
    st.lists(number, min_size=len(COLUMNS), max_size=len(COLUMNS)),
    min_size=NUM_STEPS,
    max_size=NUM_STEPS,
).map(lambda rows: np.asarray(rows, np.float32))


def signals_of(row: jax.Array) -> dict[str, object]:
    named = dict(zip(COLUMNS, row, strict=True))
    stats = aj.GradStats(*(named[field] for field in aj.GradStats._fields))
    return {
        "value": named["value"],
        "grad_stats": stats,
        "grad": named["grad"],
        "step_seconds": named["step_seconds"],
        "gradient_noise": named["gradient_noise"],
        "update_noise": named["update_noise"],
        "meta_batch": jnp.full(4, named["meta"]),
        "persistence": Persistence(jnp.float32(1), jnp.float32(1)),
    }


@functools.cache
def trajectory(name: str):
    """A compiled run: the states before and after every step, stacked."""
    rule = RULES[name].make(**LIMITS)

    def step(state, row):
        signals = signals_of(row)
        updates, after = rule.update(signals["grad"], state, jnp.zeros(()), **signals)
        return after, (updates, state, after)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(rows):
        return jax.lax.scan(step, rule.init(jnp.zeros(())), rows)[1]

    return run


def good_rows() -> np.ndarray:
    row = dict.fromkeys(COLUMNS, 1.0) | {"variance_trace": 40.0, "batch_size": 20.0}
    row |= {"half_cosine": 0.5, "inner_product_variance": 40.0, "step_seconds": 0.01}
    row |= {"update_noise": -0.1}
    return np.asarray([[row[column] for column in COLUMNS]] * NUM_STEPS, np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", usual_in_ci(sorted(RULES)))
@hypothesis.given(rows=table)
def test_stays_in_range(name, rows):
    updates, before, after = trajectory(name)(rows)
    np.testing.assert_array_equal(updates, rows[:, COLUMNS.index("grad")])
    for states in (before, after):
        sizes = np.asarray(aj.get_batch_size(states))
        assert LOW <= sizes.min() <= sizes.max() <= HIGH
        chex.assert_tree_all_finite(states)


@pytest.mark.parametrize("name", sorted(READS))
@hypothesis.given(
    data=st.data(), at=st.integers(0, NUM_STEPS - 1), bad=st.sampled_from([np.nan, np.inf, -np.inf])
)
def test_skips_and_counts(name, data, at, bad):
    """One spoilt step among good ones: it is counted, and nothing else remembers it."""
    field = data.draw(st.sampled_from(READS[name]))
    rows = good_rows()
    rows[at, COLUMNS.index(field)] = bad
    _, before, after = trajectory(name)(rows)
    assert after.num_skipped.tolist() == [int(t >= at) for t in range(NUM_STEPS)]
    expected = jax.tree.map(lambda x: x[at], before)
    found = jax.tree.map(lambda x: x[at], after)
    free = {"num_skipped": 0}
    free |= {"times": 0} if name == "goodput" else {}  # the clock runs whatever the gradient
    free |= {"num_steps": 0} if "num_steps" in found._fields else {}  # likewise
    free |= {"step_cost": 0} if name == "expected_gain" else {}  # likewise
    chex.assert_trees_all_equal(found._replace(**free), expected._replace(**free))


@pytest.mark.parametrize("name", sorted(READS))
def test_one_example_batches_are_skipped(name):
    """No variance can be estimated from one example: those fields are NaN."""
    rows = good_rows()
    nothing = ("variance_trace", "half_cosine", "inner_product_variance", "mean_sq_norm")
    for column in (*nothing, "gradient_noise", "update_noise"):
        rows[2:4, COLUMNS.index(column)] = np.nan
    rows[2:4, COLUMNS.index("batch_size")] = 1.0
    _, _, after = trajectory(name)(rows)
    assert int(after.num_skipped[-1]) == (0 if READS[name] == ("value",) else 2)


@pytest.mark.parametrize("name", sorted(READS))
def test_zero_gradients_carry_no_information(name):
    """Everything 0 (the cosine 0 / 0): the size stays, and averages do not remember it."""
    rows = good_rows()
    rows[3:] = 0.0
    rows[3:, COLUMNS.index("batch_size")] = 20.0
    rows[3:, COLUMNS.index("half_cosine")] = np.nan
    rows[3:, COLUMNS.index("value")] = 1.0
    _, _, after = trajectory(name)(rows)
    sizes = aj.get_batch_size(after).tolist()
    if name == "cabs":  # a loss without noise says something: the smallest size will do
        assert sizes[-1] == LOW
        assert int(after.num_skipped[-1]) == 0
    elif READS[name] == ("value",):  # so does a loss, even one that does not change
        assert int(after.num_skipped[-1]) == 0
        assert sizes == [START] * NUM_STEPS or name != "adadamp"
    else:
        assert sizes[3:] == [sizes[2]] * 3
        assert int(after.num_skipped[-1]) == 3


@pytest.mark.parametrize(
    "name",
    ["cabs", "expected_gain", "gradient_noise_scale", "goodput", "noise_floor", "norm_test"],
)
def test_zero_variance_asks_for_no_more(name):
    rows = good_rows()
    for column in ("variance_trace", "gradient_noise", "update_noise"):
        rows[:, COLUMNS.index(column)] = 0.0
    rows[:, COLUMNS.index("value")] = 1 / np.arange(1, 1 + NUM_STEPS)
    _, _, after = trajectory(name)(rows)
    sizes = aj.get_batch_size(after).tolist()
    expected = START if name in ("norm_test", "goodput") else LOW
    assert sizes[1] == expected
    assert int(after.num_skipped[-1]) == 0
    assert max(sizes) <= START


@functools.partial(jax.jit, static_argnums=(1, 2))
def follow(sizes, factor, tolerance):
    """The applied size, the proposal and the decision at each step, in a loop of one's own."""
    inner = schedulers.from_schedule(lambda t: sizes[t])
    rule = schedulers.hysteresis(inner, dwell=1, max_factor=factor, tolerance=tolerance)

    def step(state, _):
        _, after = rule.update(None, state)
        return after, (state.batch_size, after.rule.batch_size, after.batch_size)

    return jax.lax.scan(step, rule.init(None), length=NUM_STEPS)[1]


@pytest.mark.parametrize(("factor", "tolerance"), [(1.01, 0.0), (2.0, 0.1), (8.0, 1.0)])
@hypothesis.given(
    proposals=st.lists(st.integers(1, 10_000), min_size=NUM_STEPS + 1, max_size=NUM_STEPS + 1)
)
def test_hysteresis_stays_between_size_and_proposal(factor, tolerance, proposals):
    moves = follow(np.asarray(proposals, np.int32), factor, tolerance)
    for before, proposal, after in zip(*(m.tolist() for m in moves), strict=True):
        assert min(before, proposal) <= after <= max(before, proposal)
