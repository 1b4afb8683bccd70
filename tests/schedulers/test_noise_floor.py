"""The noise floor as a rule: the sizes that it finds, holds and grows to."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import schedulers
from arbiter_jax.objectives._noise_floor import log_time_slope
from tests.floor_runs import (
    LIMITS,
    NOISE,
    SLOPE,
    TABLE,
    follow,
    grown_by_hand,
    loss_at,
    noise_signals,
    size_by_hand,
)

# The size


def test_equation_10_by_hand():
    run = follow(400, start=32)
    assert run.sizes[-1] == pytest.approx(size_by_hand(), rel=0.03)
    assert float(run.state.statistics.noise) == pytest.approx(NOISE / 4, rel=1e-4)
    assert float(log_time_slope(run.state.statistics)) == pytest.approx(SLOPE, rel=0.03)
    options = {"persistence": 10.0, "noise_share": 0.8}
    more = follow(400, start=32, **options)
    assert more.sizes[-1] == pytest.approx(size_by_hand(**options), rel=0.03)


@pytest.mark.parametrize("budget", [20_000, 2_000_000])
def test_equation_16_counts_with_the_end_of_the_budget(budget):
    run = follow(budget=budget)
    checked = (0.02 * budget < run.seen) & (run.seen < 0.6 * budget) & (run.steps > 100)
    assert np.sum(checked) > 5
    for seen, t, size in zip(*(x[checked][::10] for x in run[:3]), strict=True):
        assert size == pytest.approx(size_by_hand(t=t, left=budget - seen), rel=0.1)
    assert np.all(run.sizes[checked] > 1.05 * size_by_hand())


@pytest.mark.parametrize("cost", [10.0, 1000.0])
def test_equation_11_a_costly_step_has_more_examples(cost):
    b = size_by_hand()
    expected = (b + math.sqrt(b * b + 4 * b * cost)) / 2
    assert follow(300, start=32, step_cost=cost).sizes[-1] == pytest.approx(expected, rel=0.05)


def test_ignores_a_constant():
    """But for rounding: one added to the loss, and to the least that it can be."""
    run = follow(60, start=32)
    for shift in (-4.0, 8.0):
        shifted = follow(60, start=32, shift=shift, optimal_loss=shift)
        np.testing.assert_allclose(shifted.sizes, run.sizes, rtol=0.02)


def test_holds_without_a_budget():
    sizes = follow(1500, start=32).sizes[10:]
    assert max(sizes) <= 1.25 * min(sizes)


def test_a_budget_from_fit_is_one_that_was_given():
    given = follow(num_examples=80_000, budget=80_000, start=64)
    heard = follow(budget=80_000, start=64)
    for a, b in zip(given[:3], heard[:3], strict=True):
        np.testing.assert_array_equal(a, b)
    statistics = given.state.statistics, heard.state.statistics
    assert [int(s.budget) for s in statistics] == [80_000, 0]
    assert [int(s.run_budget) for s in statistics] == [0, 80_000]


def test_the_first_window_waits_for_the_budget():
    steps = lambda **k: int(schedulers.noise_floor(**k, persistence=1.0).init(None).window_steps)
    assert steps() == 1
    assert steps(num_examples=1000) == 2  # a 50th of the budget, in batches of 8
    assert steps(num_examples=10**6) == 1  # first batches are larger than 8
    # Without any, windows are as long as the caller's.
    assert np.diff(follow(200).steps).tolist() == [1, *9 * [20]]


# The start


@pytest.mark.parametrize("start", [8, 64, 512, 2048])
def test_finds_the_scale_from_any_start(start):
    """In a few windows."""
    run = follow(60, start=start, budget=100_000)
    i = int(np.argmax(run.steps >= 26))
    expected = size_by_hand(t=30, left=100_000 - run.seen[i])
    assert expected / 1.6 < run.sizes[i] < expected * 1.6
    assert run.seen[i] <= 0.1 * 100_000
    assert run.seen[1] <= 2048  # one step from the largest start


@pytest.mark.parametrize(("start", "first"), [(2, [2, 8, 32]), (64, [64]), (512, [512, 128])])
def test_first_steps_see_a_fortieth_of_the_budget(start, first):
    """20 batches of an 800th of it at least, reached in windows of a step; then what is wanted.

    The size goes on until the window ends, which is one of 16 steps here.
    """
    run = follow(60, num_examples=80_000, start=start, noise=0.6 * NOISE)
    free = next(i for i, b in enumerate(run.sizes) if i >= len(first) and b != 100)
    assert run.sizes[: len(first)].tolist() == first
    assert 40 < run.sizes[free] < 100
    assert 15 <= run.steps[free] - run.steps[len(first)] <= 32
    # Without a budget it is not known how many examples would be few.
    assert max(follow(60, start=start, noise=0.6 * NOISE).sizes) <= max(start, 64)


def test_first_steps_see_at_most_twice_what_is_wanted():
    run = follow(20, budget=80_000, start=8, noise=0.05 * NOISE)
    wanted = size_by_hand(0.05 * NOISE, t=15, left=80_000)
    assert run.sizes[-1] == pytest.approx(2 * wanted, rel=0.1)
    assert 4 * wanted < 100


def test_no_window_sees_more_than_a_50th_of_the_budget():
    run = follow(budget=100_000, start=64, noise=10 * NOISE)
    seen = np.diff([*run.seen, int(run.state.statistics.num_examples)])
    assert np.all(seen <= np.maximum(100_000 / 50, run.sizes))
    assert np.median(seen[run.sizes < 2000]) > 0.7 * 100_000 / 50  # not one step each


# The end


def held_at(run, budget, hold_until, **options):
    """The size of Eqs. 10 and 16 when growth may begin."""
    seen, t, _ = run.at(hold_until * budget)
    return size_by_hand(t=t, left=budget - seen, **options)


@pytest.mark.parametrize(
    "options", [{}, {"hold_until": 0.8, "final_growth": 8.0}, {"noise_share": 0.8}]
)
def test_equation_12_holds_then_grows(options):
    """As the rest of the budget shrinks."""
    budget, hold = 300_000, options.get("hold_until", 0.6)
    run = follow(budget=budget, **options)
    expected = held_at(run, budget, hold, noise_share=options.get("noise_share", 0.3))
    held = run.sizes[(0.3 * budget < run.seen) & (run.seen < hold * budget)]
    # This loss falls as log t, and Eq. 16 expects t^-1/4 of it, t^-.15 of the noise.
    assert max(held) <= 1.35 * min(held)
    options = {key: value for key, value in options.items() if key != "hold_until"}
    grows = np.flatnonzero(run.seen >= (hold + 0.01) * budget)
    for i in (*grows[:: max(1, len(grows) // 20)], len(run.sizes) - 1):
        grown = grown_by_hand(budget - run.seen[i], run.steps[i], expected, expected, **options)
        assert run.sizes[i] == pytest.approx(max(expected, grown), rel=0.1)
    assert run.sizes[-1] > 4 * held[-1]


def test_equation_12_grows_later_at_the_lower_end():
    """If the applied size is larger than what is wanted, there is less noise to remove."""
    budget, hold, low = 1_500_000, 0.3, round(10 * size_by_hand())
    limits = {"min_batch_size": low, "max_batch_size": 10_000}
    run = follow(budget=budget, hold_until=hold, **limits)
    b = held_at(run, budget, hold)
    begun = run.seen[(run.seen > 0.1 * budget) & (run.sizes > 1.05 * low)][0]
    assert 0.85 * budget < begun  # what is left: 2 share b t, less than .6 / 7 of what was seen
    left = budget - run.seen[-1]
    assert run.sizes[-1] == pytest.approx(grown_by_hand(left, run.steps[-1], b, low), rel=0.15)
    assert run.sizes[-1] < 0.5 * 32 * low


@pytest.mark.slow
def test_final_growth_matters_at_the_very_end_only():
    budget = 300_000
    # With windows of 20 steps the last one may begin anywhere.
    small, large = (follow(budget=budget, final_growth=g, window=1) for g in (32.0, 128.0))
    assert large.at(0.8 * budget)[2] == pytest.approx(small.at(0.8 * budget)[2], rel=0.1)
    assert large.sizes[-1] > 1.5 * small.sizes[-1]


# What it depends on


def steps_of(rule, signals, num_steps):
    """The states after each step of one size."""

    def step(state, t):
        state = rule.update(jnp.ones(()), state, jnp.zeros(()), batch_size=64, **signals(t + 1))[1]
        return state, state

    return jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(num_steps)))(rule.init(None))


def test_the_applied_size_is_not_read_back():
    """The same noise measured at another size leads to the same decision."""
    rule = schedulers.noise_floor(max_change=1e3, persistence=1.0, **LIMITS)

    @jax.jit
    def decide(size):
        def step(state, t):
            signals = {"value": loss_at(t), "batch_size": size} | noise_signals(NOISE / size)
            return rule.update(jnp.ones(()), state, **signals)[1], None

        return aj.get_batch_size(jax.lax.scan(step, rule.init(None), jnp.arange(1, 30))[0])

    decisions = [int(decide(jnp.int32(size))) for size in (16, 64, 256)]
    assert max(decisions) - min(decisions) <= 1


def test_noise_at_another_time_leads_elsewhere():
    """The control: the same statistics, permuted in time, are not the same schedule."""
    falling = lambda t: NOISE * 20 / (20 + t)
    order = np.random.default_rng(0).permutation(500)
    tables = falling(np.arange(1, TABLE + 1)), falling(1 + order[np.arange(1, TABLE + 1) % 500])
    late = [np.mean(follow(400, start=32, measure_every=1, noise=t).sizes[-10:]) for t in tables]
    assert late[1] > 1.5 * late[0]


def test_no_larger_batches_if_noise_goes_with_the_loss():
    """Interpolation: noise in proportion to a loss that falls to zero, whatever its slope was.

    The size at which noise would be all of the loss, and no smaller one: Eq. 17.
    """

    def signals(t):
        loss = jnp.exp(-0.03 * t)
        return {"value": loss} | noise_signals(NOISE * loss / 64)

    _, states = steps_of(schedulers.noise_floor(persistence=1.0, **LIMITS), signals, 300)
    held = states.statistics.held_batch_size
    np.testing.assert_allclose(held[jnp.array([59, 298])], NOISE / 4, rtol=1e-3)


def test_larger_batches_if_more_steps_gain_nothing():
    """A loss at its floor, and noise that is not: the largest size."""
    signals = lambda t: {"value": jnp.float32(0.5)} | noise_signals(NOISE / 64)
    state, _ = steps_of(schedulers.noise_floor(persistence=1.0, **LIMITS), signals, 200)
    assert int(state.batch_size) == 256  # as far as one change goes
    assert float(state.statistics.held_batch_size) > 4096


@pytest.mark.slow
def test_the_persistence_of_an_optimizer_is_measured():
    sgd = optax.sgd(0.1, momentum=0.9)
    run, same = (follow(60, start=32, persistence=k) for k in (sgd, 10.0))
    np.testing.assert_allclose(run.sizes, same.sizes, rtol=0.02)


# Memory


def given_loss(params, batch):
    """A loss function that finds the losses in the batch."""
    del params
    return batch


def size_with_validation(share, measure_every=4, num_steps=400):
    """The held size after a run whose validation loss falls `share` times as fast as the other."""
    rule = schedulers.noise_floor(
        given_loss, measure_every=measure_every, persistence=1.0, initial_batch_size=32, **LIMITS
    )

    def signals(t):
        validation = jnp.full(4, loss_at(t, share * SLOPE), jnp.float32)
        return {"value": loss_at(t), "meta_batch": validation} | noise_signals(NOISE / 64)

    state, _ = steps_of(rule, signals, num_steps - 1)
    return float(state.statistics.held_batch_size), state.statistics


@pytest.mark.parametrize(("share", "factor"), [(1.0, 1), (0.6, 1), (0.25, 2), (0.1, 5)])
def test_equation_14_half_the_progress_may_be_memory(share, factor):
    size, statistics = size_with_validation(share)
    assert size == pytest.approx(factor * size_by_hand(), rel=0.05)
    slope = float(statistics.validation.slope.value())
    assert slope == pytest.approx(share * SLOPE, rel=0.05)


@pytest.mark.parametrize("measure_every", [1, 4, 10])
def test_a_validation_loss_that_rises_buys_no_steps(measure_every):
    size, _ = size_with_validation(-0.1, measure_every=measure_every, num_steps=100)
    assert size > 4096


# In training

INPUTS = jax.random.normal(jax.random.PRNGKey(0), (64, 2))


def quadratic_loss(w, batch):
    return 0.5 * jnp.sum((w[None] - batch) ** 2, axis=1)


@pytest.mark.slow
def test_measures_on_validation_examples_in_training():
    rule = schedulers.noise_floor(quadratic_loss, persistence=1.0, max_batch_size=16)
    tx, data = optax.chain(optax.sgd(0.1), rule), aj.Data(INPUTS, INPUTS + 1)
    assert "meta_batch" in aj.base.requests(tx.init(jnp.ones(2))).signals
    result = aj.fit(quadratic_loss, jnp.ones(2), tx, data, num_examples=800, window=20)
    state = result.state.opt_state[1]
    assert int(state.num_skipped) == 0
    assert int(state.statistics.run_budget) == 800
    measured = state.statistics.validation.slope
    assert int(measured.last) > 0
    assert bool(jnp.isfinite(measured.recent))
    with pytest.raises(ValueError, match=r"data\.validation must be given"):
        aj.fit(quadratic_loss, jnp.ones(2), tx, aj.Data(INPUTS), num_examples=64)


@pytest.mark.slow
def test_adam_and_gradients_that_are_always_zero():
    """A square root has no derivative at zero: the response to zero noise counts as zero."""
    rule = schedulers.noise_floor(num_examples=2000, max_batch_size=16)
    tx = optax.chain(optax.adam(1e-2), rule)
    inputs = jax.random.normal(jax.random.PRNGKey(0), (200, 3)) * jnp.array([[1.0, 1.0, 0.0]])
    labels = inputs @ jnp.ones(3) + jax.random.normal(jax.random.PRNGKey(1), (200,))
    loss_fn = lambda w, batch: (batch[0] @ w - batch[1]) ** 2
    data = aj.Data((inputs, labels))
    result = aj.fit(loss_fn, jnp.zeros(3), tx, data, num_examples=2000, window=20)
    state = result.state.opt_state[1]
    assert int(state.num_skipped) == 0
    assert float(state.statistics.noise) > 0
    chex.assert_tree_all_finite(state)
    assert [record.num_steps for record in result.history[:4]] == [5, 5, 5, 5]


@pytest.mark.slow
def test_momentum_in_the_chain_is_measured():
    """As if its persistence had been given."""
    noises = []
    for persistence in (None, 10.0):
        rule = schedulers.noise_floor(persistence=persistence, max_batch_size=8)
        tx = optax.chain(optax.sgd(0.01, momentum=0.9), rule)
        data = aj.Data(INPUTS)
        result = aj.fit(quadratic_loss, jnp.ones(2), tx, data, num_examples=160, window=20)
        noises.append(float(result.state.opt_state[1].statistics.noise))
    assert noises[0] == pytest.approx(noises[1], rel=1e-4)
    assert noises[0] > 0
