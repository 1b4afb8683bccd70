"""Hysteresis: it waits, ignores small changes, splits large ones."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import schedulers
from tests.problems import proposing


def follow(rule, num_steps, window=1):
    """The applied size at each step, if decisions are applied every `window` steps."""
    update = jax.jit(lambda state, size: rule.update(None, state, batch_size=size)[1])
    state, sizes = rule.init(None), []
    for t in range(num_steps):
        if t % window == 0:
            size = aj.get_batch_size(state)
        sizes.append(int(size))
        state = update(state, size)
    return sizes


def test_hysteresis_limits_the_factor():
    rule = schedulers.hysteresis(proposing(10, 1000), dwell=1, max_factor=3, tolerance=0)
    assert follow(rule, 7) == [10, 10, 30, 90, 270, 810, 1000]
    rule = schedulers.hysteresis(proposing(100, 3), dwell=1, max_factor=3, tolerance=0)
    assert follow(rule, 6) == [100, 100, 34, 12, 4, 3]


def test_hysteresis_ignores_changes_within_the_band():
    rule = lambda p: schedulers.hysteresis(proposing(100, p), dwell=1, tolerance=0.25)
    assert [follow(rule(p), 3)[-1] for p in (79, 80, 125, 126)] == [79, 100, 100, 126]


@pytest.mark.parametrize("window", [1, 2, 5])
def test_dwells(window):
    """Sizes that change at every step, read every `window` steps: none is left before 4 steps."""
    proposals = np.random.default_rng(0).integers(8, 512, 40)
    rule = schedulers.hysteresis(proposing(*map(int, proposals)), dwell=4, tolerance=0)
    sizes = follow(rule, 40, window)
    changes = np.flatnonzero(np.diff(sizes)) + 1
    assert len(changes) >= 4
    assert min(np.diff([0, *changes])) >= 4


@pytest.mark.parametrize("window", [1, 3])
def test_one_factor_per_change(window):
    proposals = np.random.default_rng(1).integers(1, 600, 60)
    rule = schedulers.hysteresis(
        proposing(*map(int, proposals)), dwell=1, max_factor=1.5, tolerance=0
    )
    sizes = follow(rule, 60, window)
    for before, after in itertools.pairwise(sizes):
        assert after <= max(1.5 * before, before + 1)
        assert after >= min(before / 1.5, before - 1)


def test_the_rule_inside_gets_the_applied_size():
    """SimiGrad multiplies the applied size: with its own proposals instead it would run away."""
    given = aj.GradStats(*jnp.array([0.5, 40.0, 32.0, 1.75, 0.2, 3.0]))
    rule = schedulers.hysteresis(
        schedulers.simigrad(decide_every=1, factor=3.0, initial_batch_size=32), dwell=100
    )
    state = rule.init(None)
    for _ in range(10):
        _, state = rule.update(None, state, grad_stats=given)  # a loop of one's own
    assert int(state.batch_size) == 32
    assert int(state.rule.batch_size) == 96


def test_hysteresis_takes_a_chain():
    inner = optax.chain(optax.sgd(0.5), proposing(10, 1000))
    tx = schedulers.hysteresis(inner, dwell=1)
    updates, state = tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))
    assert updates.tolist() == [-0.5, -0.5]
    assert int(aj.get_batch_size(state)) == 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedulers.hysteresis(64), "rule must be an optax gradient transformation"),
        (lambda: schedulers.hysteresis(schedulers.constant(8), dwell=0), "dwell must be an int"),
        (lambda: schedulers.hysteresis(schedulers.constant(8), max_factor=1), "max_factor must be"),
        (lambda: schedulers.hysteresis(schedulers.constant(8), tolerance=-1), "tolerance must be"),
        (lambda: schedulers.hysteresis(optax.sgd(0.1)).init(None), "found none"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
