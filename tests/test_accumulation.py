"""Rules under `optax.MultiSteps`: examples are counted, and an update is as large as its calls.

An update of four calls of B examples is compared with one call of 4 B: the same schedule at the
same number of examples, the same size of an update, the same learning rate.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax.base import as_count
from tests.problems import grad_stats
from tests.rules import LIMITS, RULES, grads_at, params_like, signals_at, usual_in_ci

S = aj.schedulers
K, CALL = 4, 8
QUARTER = {name: size // K for name, size in LIMITS.items()}
SCHEDULES = ("adabatch", "from_schedule", "smith")

# What no rule measures: a schedule decides on the size of a call.
limits_of = lambda name, k: LIMITS if name in SCHEDULES or k == 1 else QUARTER


def accumulating(tx, k):
    """`optax.MultiSteps` that takes extra arguments."""
    every_kth = optax.MultiSteps(tx, k)
    return optax.GradientTransformationExtraArgs(every_kth.init, every_kth.update)


def signals_of_call(seed, k):
    """What one call of k sees of an update: the noise of its gradient is that of fewer examples."""
    signals, root = signals_at(seed), k**0.5
    signals["gradient_noise"] = jax.tree.map(lambda x: x * root, signals["gradient_noise"])
    signals["update_noise"] = jax.tree.map(lambda x: x / root, signals["update_noise"])
    signals["step_seconds"] = signals["step_seconds"] / k
    return signals | {"batch_size": jnp.int32(CALL * K // k)}


@functools.cache
def sizes_after_updates(name, k, start=0, accumulates=True, **more):
    """The decision after every update, of k calls, and what the rule has counted."""
    rule = RULES[name].make(**limits_of(name, k))
    tx = accumulating(rule, k) if accumulates else rule
    state, seen, sizes = tx.init(params_like()), start, []
    update = jax.jit(lambda g, s, signals: tx.update(g, s, params_like(), **signals, **more)[1])
    for t in range(6):
        for _ in range(k):
            signals = signals_of_call(t, k) | {"num_examples": as_count(seen)}
            state = update(grads_at(t), state, signals)
            seen += CALL * K // k
        sizes.append(int(aj.get_batch_size(state)))
    return sizes, state


@pytest.mark.slow
@pytest.mark.parametrize("name", usual_in_ci(sorted(RULES)))
def test_one_call_per_update_is_no_accumulation(name):
    assert sizes_after_updates(name, 1)[0] == sizes_after_updates(name, 1, accumulates=False)[0]


@pytest.mark.parametrize("name", usual_in_ci(sorted(RULES)))
def test_an_accumulated_update_is_as_large(name):
    sizes, expected = sizes_after_updates(name, K)[0], sizes_after_updates(name, 1)[0]
    if name in SCHEDULES:
        assert sizes == expected
    else:  # within the rounding of a call
        assert np.max(np.abs(K * np.array(sizes) - expected)) <= K, (sizes, expected)


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [False, True])
def test_a_change_comes_at_its_number_of_examples(accumulated):
    rule = S.from_schedule(lambda n: jnp.where(n < 400, 25, 50), count="num_examples")
    tx, seen = accumulating(optax.chain(optax.sgd(0.01), rule), 4), 0
    state = tx.init(jnp.zeros(()))
    while int(aj.get_batch_size(state)) == 25:
        more = {"num_accumulated": seen % 100} if accumulated else {}
        _, state = tx.update(jnp.ones(()), state, batch_size=25, num_examples=seen, **more)
        seen += 25
    assert seen == 400


# In the loop


def loss_fn(w, batch):
    return (w - batch) ** 2 / 2


def run(tx, num_steps, data=None, bucket_size=8, state=None, window=None):
    """A window of so many steps."""
    state = aj.init_state(jnp.zeros(()), tx, jax.random.PRNGKey(0)) if state is None else state
    data = jnp.linspace(-1.0, 3.0, 64) if data is None else data
    return aj.run_window(
        state,
        aj.Data(data),
        num_steps,
        loss_fn=loss_fn,
        tx=tx,
        bucket_size=bucket_size,
        window=window or num_steps,
    )


class SeenState(NamedTuple):
    ledger: aj.base.Count
    size: jax.Array  # shape=(), dtype=int32, of the last update
    requires = ("grad_stats",)


def recorder():
    """Keeps the size of the last update as the rules read it."""

    def update_fn(updates, state, params=None, **signals):
        update = aj.base.applied_update(state, **signals)
        return updates, SeenState(update.ledger, update.size)

    init_fn = lambda params: SeenState(as_count(0), jnp.int32(0))
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@pytest.mark.slow
def test_the_learning_rate_knows_the_size_of_an_update():
    """At the first update as well, and for every power of two between the calls."""
    for k in (1, 2, 4):
        tx = optax.chain(optax.sgd(0.01), S.constant(8), aj.scale_by_batch_size(8))
        state, _ = run(accumulating(tx, k), k)
        assert float(state.opt_state.inner_opt_state[2].learning_rate) == k
        state, _ = run(accumulating(tx, k), k, state=state)
        assert float(state.opt_state.inner_opt_state[2].learning_rate) == k


@pytest.mark.slow
def test_an_own_loop_knows_the_size_from_the_ledger():
    tx = accumulating(optax.chain(optax.sgd(0.01), aj.scale_by_batch_size(8)), 4)
    state, rates = tx.init(jnp.zeros(())), []
    for step in range(8):
        counts = {"batch_size": 8, "num_examples": 2**31 - 80 + 8 * step}
        if step < 4:  # a new chain in the middle of a run knows no update to start from
            counts["num_accumulated"] = 8 * step
        _, state = tx.update(jnp.ones(()), state, **counts)
        rates.append(float(state.inner_opt_state[1].learning_rate))
    assert rates == [1, 1, 1, 4, 4, 4, 4, 4]


@pytest.mark.slow
def test_a_new_chain_within_a_run_knows_no_update():
    """A chain that replaces another in the middle of a run has not seen the calls before it."""
    tx = accumulating(optax.chain(optax.sgd(0.01), S.constant(8), recorder()), 4)
    state, _ = run(tx, 6)  # ends within an update
    state = state._replace(opt_state=tx.init(state.params))
    state, _ = run(tx, 4, state=state)
    assert int(state.opt_state.inner_opt_state[2].size) == 32
    assert int(state.num_examples) == 80


@pytest.mark.slow
def test_a_rule_beside_multi_steps_sees_every_call():
    """A rule that is not inside `optax.MultiSteps` is updated with each micro-batch."""
    tx = optax.chain(accumulating(optax.sgd(0.01), 4), S.constant(8), recorder())
    for num_steps in (1, 4, 6):
        state, _ = run(tx, num_steps)
        assert int(state.opt_state[2].size) == 8


def test_a_size_that_changes_within_an_update():
    sizes = jnp.array([8, 8, 2, 2])
    rule = S.from_schedule(lambda t: sizes[t])
    tx = optax.chain(accumulating(optax.chain(optax.sgd(0.01), recorder()), 4), rule)
    state = None
    for _ in range(4):  # a decision is applied by the next window
        state, _ = run(tx, 1, state=state)
    assert int(state.opt_state[0].inner_opt_state[1].size) == 8 + 8 + 2 + 2


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("k", [1, 4])
def test_a_skipped_batch_belongs_to_no_update(k, outside):
    chain = optax.chain(optax.sgd(0.01), S.constant(8), recorder())
    if outside:
        tx = optax.apply_if_finite(accumulating(chain, k), 5)
    else:  # MultiSteps never forgets what is not finite: it may skip by itself
        every_kth = optax.MultiSteps(chain, k, should_skip_update_fn=optax.skip_not_finite)
        tx = optax.GradientTransformationExtraArgs(every_kth.init, every_kth.update)
    state, made = aj.init_state(jnp.zeros(()), tx, jax.random.PRNGKey(0)), []
    for step in range(2 * k + 1):
        value = jnp.nan if step == 1 else 2.0
        state, _ = run(tx, 1, data=jnp.full(64, value), state=state)
        inner = state.opt_state.inner_state if outside else state.opt_state
        made.append(int((inner.inner_opt_state)[2].size))
    assert made[-1] == 8 * k
    assert int(state.num_examples) == 8 * (2 * k + 1)
    assert float(state.progress) == 2


# Progress


def with_adascale(k, around=lambda tx: tx):
    return around(accumulating(optax.chain(optax.sgd(0.01), S.constant(8), aj.adascale(4)), k))


def adascale_of(state):
    found = [
        node
        for node in jax.tree.leaves(
            state, is_leaf=lambda x: isinstance(x, aj.learning_rate.AdaScaleState)
        )
        if isinstance(node, aj.learning_rate.AdaScaleState)
    ]
    return found[0]


@pytest.mark.parametrize("k", [1, 4])
def test_the_ledgers_progress_is_that_of_adascale(k):
    state, _ = run(with_adascale(k), 22)
    own = adascale_of(state.opt_state)
    assert int(own.num_updates) == 22 // k
    np.testing.assert_allclose(state.progress, own.progress, rtol=1e-6)
    assert float(own.progress) > 22 // k


@pytest.mark.slow
def test_progress_without_a_gain_counts_updates():
    for make, expected in (
        (lambda tx: tx, 22),
        (lambda tx: accumulating(tx, 4), 5),
        (lambda tx: optax.apply_if_finite(accumulating(tx, 4), 3), 5),
        (lambda tx: optax.apply_if_finite(tx, 3), 22),
    ):
        state, _ = run(make(optax.chain(optax.sgd(0.01), S.constant(8))), 22)
        assert float(state.progress) == expected


@pytest.mark.parametrize("with_gain", [False, True])
def test_a_skipped_batch_makes_no_progress(with_gain):
    gain = (aj.adascale(4),) if with_gain else ()
    tx = optax.apply_if_finite(optax.chain(optax.sgd(0.01), S.constant(8), *gain), 5)
    state = aj.init_state(jnp.zeros(()), tx, jax.random.PRNGKey(0))
    for value in (1.0, jnp.nan, 1.0, jnp.nan):
        state, _ = run(tx, 1, data=jnp.linspace(0, 1, 64) * value, state=state)
    assert (int(state.num_steps), int(state.num_examples)) == (4, 32)
    if with_gain:
        np.testing.assert_allclose(state.progress, adascale_of(state.opt_state).progress, rtol=1e-6)
        assert 2 <= float(state.progress) <= 4
    else:
        assert float(state.progress) == 2


@pytest.mark.slow
def test_progress_does_not_stand_still():
    """Beyond 2^24, where 1 no longer adds to a float32."""
    tx = optax.chain(optax.sgd(0.01), S.constant(8), aj.adascale(8))
    state = aj.init_state(jnp.zeros(()), tx, jax.random.PRNGKey(0))
    far = lambda x: jnp.full_like(x, 2**24)
    own = state.opt_state[2]._replace(progress=far(state.progress))
    state = state._replace(progress=far(state.progress), opt_state=(*state.opt_state[:2], own))
    state, _ = run(tx, 100, state=state)
    assert float(state.progress) == 2**24 + 100
    assert float(state.opt_state[2].progress) == 2**24 + 100


# Counts beyond 32 bits


@pytest.mark.parametrize("start", [2**31 - 100, 2**32 - 100, 2**33])
def test_the_ledger_goes_on_beyond_32_bits(start):
    tx = optax.chain(optax.sgd(0.01), S.from_schedule(lambda n: 8, count="num_examples"))
    tx = accumulating(tx, 4)
    state = aj.init_state(jnp.zeros(()), tx, jax.random.PRNGKey(0))
    state, _ = run(tx, 100, state=state._replace(num_examples=as_count(start)))
    assert int(state.num_examples) == start + 800
    assert int(state.opt_state.inner_opt_state[1].count) == start + 800


@pytest.mark.slow
@pytest.mark.parametrize("start", [2**31 - 100, 2**33])
@pytest.mark.parametrize(
    "name", usual_in_ci(sorted(set(RULES) - {*SCHEDULES, "noise_floor", "seesaw"}))
)
def test_measured_rules_do_not_see_where_a_run_stands(name, start):
    """`num_accumulated` says that the first update is no larger than others."""
    there = sizes_after_updates(name, 1, start=start, num_accumulated=0)[0]
    assert there == sizes_after_updates(name, 1)[0]


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, K])
def test_a_budget_beyond_32_bits_is_used_up_alike(k):
    """The rule grows at the end of it, of which it has seen the same share."""
    sizes = []
    for scale in (1, 2**24):
        rule = S.noise_floor(num_examples=1000 * scale, persistence=1.0, **QUARTER)
        tx, found = accumulating(rule, k), []
        state = tx.init(params_like())
        update = jax.jit(lambda g, s, signals, tx=tx: tx.update(g, s, params_like(), **signals)[1])
        for t in range(20):
            for call in range(k):
                counts = {"num_examples": as_count(scale * (45 * t + call)), "batch_size": 8}
                counts["num_accumulated"] = jnp.int32(8 * call)
                state = update(grads_at(t % 6), state, signals_of_call(t % 6, k) | counts)
            found.append(rule_state := state.inner_opt_state)
        seen = float(rule_state.statistics.num_examples / rule_state.statistics.budget)
        np.testing.assert_allclose(seen, 0.86, atol=0.01 if scale == 1 else 0.006)
        sizes.append([int(s.batch_size) for s in found])
    assert all(len(set(found)) > 1 for found in sizes)


def test_an_epoch_may_hold_more_than_a_float_can_count():
    """Eight more than 2^30 is 2^30 in float32."""
    rule = S.dive_batch(2**30 + 64, delta=1e-9, min_batch_size=8)
    stats = grad_stats(8.0, variance_trace=1e12, batch_sq_norm=1.0)
    state = rule.init(jnp.zeros(()))._replace(num_examples=as_count(2**30))
    for step in range(8):
        assert int(state.num_examples) == 2**30 + 8 * step
        _, state = rule.update(jnp.ones(()), state, grad_stats=stats, batch_size=8)
    assert int(state.num_examples) == 0
