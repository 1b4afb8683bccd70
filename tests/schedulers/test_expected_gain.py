"""Expected gain as a rule: the size that it finds, and when it measures."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import schedulers

CURVATURE = jnp.array([1.0, 0.2])
INPUTS = jax.random.normal(jax.random.PRNGKey(0), (64, 2))
EIGHT = {"min_batch_size": 8, "max_batch_size": 8}


def quadratic_loss(w, batch):
    return 0.5 * jnp.sum(CURVATURE[None] * (w[None] - batch) ** 2, axis=1)


def make(**options):
    return schedulers.expected_gain(quadratic_loss, **{"persistence": 1.0} | options)


@functools.cache
def hundred_steps():
    """A compiled run on a quadratic with the true noise; b* = 2 q / A0 is the second result."""
    limits = {"min_batch_size": 2, "max_batch_size": 4096}
    rule, w, rate = make(measure_every=1, **limits), jnp.array([0.05, -0.04]), 0.3
    spread = jnp.array([1.0, 2.0])

    def step(state, key):
        size = aj.get_batch_size(state)
        noise = (CURVATURE * spread)[None] * jax.random.normal(key, (2, 2)) / jnp.sqrt(size)
        updates = -rate * (CURVATURE * w + noise[0])
        signals = {"update_noise": -rate * noise[1], "meta_batch": jnp.zeros((4, 2))}
        return rule.update(updates, state, w, **signals)[1], None

    bend = 0.5 * rate**2 * jnp.sum(CURVATURE**3 * w**2)
    noise = rate**2 * jnp.sum(CURVATURE**3 * spread**2)
    best = noise / (rate * jnp.sum((CURVATURE * w) ** 2) - bend)
    return rule, jax.jit(lambda state, keys: jax.lax.scan(step, state, keys)[0]), best


@pytest.mark.parametrize("start", [8, 64, 512, 2048])
def test_finds_the_scale_from_any_start(start):
    rule, run, best = hundred_steps()
    state = rule.init(None)._replace(batch_size=jnp.int32(start))
    state = run(state, jax.random.split(jax.random.PRNGKey(start), 100))
    assert best / 2.5 < int(state.batch_size) < 2.5 * best


def test_measures_at_every_tenth_step():
    rule = make(measure_every=10, initial_batch_size=32)

    def step(state, t):
        validation = jnp.full((4, 2), t * 0.01)
        signals = {"update_noise": 0.1 * jnp.ones(2), "meta_batch": validation}
        state = rule.update(-jnp.ones(2), state, jnp.ones(2), **signals)[1]
        return state, state.statistics.num_examples

    _, counts = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(60)))(rule.init(None))
    measured = (np.flatnonzero(np.diff(counts, prepend=0))).tolist()
    assert measured == [*range(20), 20, 30, 40, 50]


# In training


def fit(*rules, num_examples=320, **options):
    tx, data = optax.chain(optax.sgd(0.1), *rules), aj.Data(INPUTS, INPUTS)
    run = functools.partial(aj.fit, num_examples=num_examples, window=40, **options)
    return run(quadratic_loss, jnp.ones(2), tx, data)


@pytest.mark.slow
def test_steps_that_do_not_measure_train_alike():
    """Every tenth step: the same training, and no step is skipped."""
    states = [fit(make(measure_every=every, **EIGHT)).state for every in (1, 10)]
    chex.assert_trees_all_close(states[0].params, states[1].params, rtol=1e-5)
    for state, num_measurements in zip(states, (40, 20 + 2), strict=True):
        assert int(state.opt_state[1].statistics.num_examples) == 8 * num_measurements
        assert int(state.opt_state[1].num_skipped) == 0


@pytest.mark.slow
def test_a_shadow_with_another_interval_is_no_matter():
    """Each measures at its own steps."""
    states = []
    for every in (3, 5):
        watched = schedulers.shadow(make(measure_every=every, **EIGHT), name="other")
        states.append(fit(watched, make(measure_every=3, **EIGHT)).state)
    for state in states:
        assert int(state.opt_state[2].num_skipped) == 0
        measured = int(state.opt_state[2].statistics.num_examples)
        assert measured == 8 * (20 + 7)  # 21, 24, ... 39
    chex.assert_trees_all_close(states[0].params, states[1].params, rtol=1e-5)
    (watched,) = states[1].opt_state[1].watched.values()
    assert int(watched.statistics.num_examples) == 8 * (20 + 4)  # 20, 25, 30, 35


@pytest.mark.slow
def test_the_budget_of_fit_changes_nothing():
    """A greedy rule does not plan: windows and first sizes are those of a rule without a budget."""
    result = fit(make(max_batch_size=16), num_examples=64_000, callbacks=[lambda *_: True])
    assert result.history[0].num_steps == 40  # the caller's
    assert int(result.state.opt_state[1].batch_size) < 64_000 // 800
