"""Hysteresis steadies, shadow watches."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import base, schedulers


def proposing(*sizes):
    """A rule whose proposals are given: sizes[t] after step t, the last one for ever."""
    table = jnp.asarray([sizes[0], *sizes])
    return schedulers.from_schedule(lambda t: table[jnp.minimum(t, len(sizes))])


def follow(rule, num_steps, window=1):
    """The size in force at each step, where decisions are applied every `window` steps."""
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


def test_hysteresis_tells_the_rule_inside_the_size_in_force():
    """SimiGrad multiplies the size in force: told its own proposals instead, it would run away."""
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


def test_wrappers_pass_the_needs_of_the_rule_on():
    for wrap in (schedulers.hysteresis, schedulers.shadow):
        state = wrap(schedulers.cabs(0.1)).init(None)
        assert base.requests(state).signals == {"value", "grad_stats"}


@pytest.mark.parametrize("acting", [lambda: schedulers.constant(64), lambda: optax.identity()])
def test_never_acts(acting):
    tx = optax.chain(acting(), schedulers.shadow(proposing(10, 1000)))
    state = tx.init(None)
    for _ in range(3):
        assert len(base.requests(state).rules) == len(base.requests(acting().init(None)).rules)
        _, state = tx.update(None, state)
    assert int(schedulers.shadow_batch_sizes(state)["schedule"]) == 1000


def test_many_shadows_in_one_chain():
    given = aj.GradStats(*jnp.array([0.5, 40.0, 32.0, 1.75, 0.2, 3.0]))
    tx = optax.chain(
        schedulers.constant(64),
        schedulers.shadow(schedulers.gradient_noise_scale()),
        schedulers.shadow(schedulers.norm_test(eta=0.5), name="strict"),
        schedulers.shadow(schedulers.norm_test(eta=1.0), name="loose"),
        schedulers.shadow(schedulers.adadamp(initial_batch_size=32)),
    )
    state = tx.init(None)
    _, state = tx.update(None, state, value=1.0, grad_stats=given, batch_size=20)
    sizes = {name: int(size) for name, size in schedulers.shadow_batch_sizes(state).items()}
    assert sizes == {"gradient_noise_scale": 80, "strict": 92, "loose": 23, "adadamp": 32}
    assert list(sizes) == ["gradient_noise_scale", "strict", "loose", "adadamp"]
    assert int(aj.get_batch_size(state)) == 64


def test_a_shadow_sees_the_size_in_force_not_its_own():
    """Its decisions are never applied: a rule that multiplies must not compound them."""
    given = aj.GradStats(*jnp.array([0.5, 40.0, 32.0, 1.75, 0.2, 3.0]))
    rule = schedulers.shadow(schedulers.simigrad(decide_every=1, initial_batch_size=8))
    for told in ({"batch_size": 32}, {}):  # without it, the 32 examples of the statistics count
        state = rule.init(None)
        for _ in range(5):
            _, state = rule.update(None, state, grad_stats=given, **told)
        assert int(schedulers.shadow_batch_sizes(state)["simigrad"]) == 48


def test_shadow_values_for_the_log():
    """One entry a shadow, whatever the rule inside would log by itself."""
    state = schedulers.shadow(schedulers.gradient_noise_scale(), name="noise").init(None)
    assert list(state.metrics) == ["shadow/noise"]
    assert int(state.metrics["shadow/noise"]) == 8


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (schedulers.constant(8), "constant"),
        (schedulers.cabs(0.1), "cabs"),
        (schedulers.adadamp(), "adadamp"),
        (schedulers.dive_batch(10), "dive_batch"),
        (schedulers.goodput(), "goodput"),
        (schedulers.gradient_noise_scale(), "gradient_noise_scale"),
        (schedulers.inner_product_test(), "inner_product_test"),
        (schedulers.norm_test(), "norm_test"),
        (schedulers.simigrad(), "simigrad"),
        (schedulers.hysteresis(schedulers.cabs(0.1)), "hysteresis"),
    ],
)
def test_default_names(rule, name):
    state = schedulers.shadow(rule).init(jnp.zeros(()))
    assert list(schedulers.shadow_batch_sizes(state)) == [name]


def test_two_shadows_of_one_name_are_refused():
    watched = schedulers.shadow(schedulers.constant(8))
    with pytest.raises(ValueError, match="two shadows are called 'constant'"):
        schedulers.shadow_batch_sizes(optax.chain(watched, watched).init(None))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedulers.hysteresis(64), "rule must be an optax gradient transformation"),
        (lambda: schedulers.shadow(None), "rule must be an optax gradient transformation"),
        (lambda: schedulers.shadow(schedulers.constant(8), name=""), "name must be a string"),
        (lambda: schedulers.hysteresis(schedulers.constant(8), dwell=0), "dwell must be an int"),
        (lambda: schedulers.hysteresis(schedulers.constant(8), max_factor=1), "max_factor must be"),
        (lambda: schedulers.hysteresis(schedulers.constant(8), tolerance=-1), "tolerance must be"),
        (lambda: schedulers.hysteresis(optax.sgd(0.1)).init(None), "found none"),
        (lambda: schedulers.shadow(optax.sgd(0.1)).init(None), "found none"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
