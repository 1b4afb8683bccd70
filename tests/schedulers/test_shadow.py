"""Shadows: they watch and never decide."""

import jax.numpy as jnp
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import base, schedulers
from tests.problems import proposing


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


def test_a_shadow_sees_the_applied_size_not_its_own():
    """Its decisions are never applied: a rule that multiplies must not compound them."""
    given = aj.GradStats(*jnp.array([0.5, 40.0, 32.0, 1.75, 0.2, 3.0]))
    rule = schedulers.shadow(schedulers.simigrad(decide_every=1, initial_batch_size=8))
    for given_size in (
        {"batch_size": 32},
        {},
    ):  # without it, the 32 examples of the statistics count
        state = rule.init(None)
        for _ in range(5):
            _, state = rule.update(None, state, grad_stats=given, **given_size)
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
        (lambda: schedulers.shadow(None), "rule must be an optax gradient transformation"),
        (lambda: schedulers.shadow(schedulers.constant(8), name=""), "name must be a string"),
        (lambda: schedulers.shadow(optax.sgd(0.1)).init(None), "found none"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
