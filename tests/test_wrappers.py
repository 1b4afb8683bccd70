"""Every rule inside optax's wrappers: the same decisions as outside, or one sentence at `init`."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import arbiter_jax as aj
from arbiter_jax import base
from tests.factories import RATES, signals
from tests.rules import ARBITERS, LIMITS, RULES, grads_at, params_like, signals_at, usual_in_ci

NUM_CALLS = 4
CASES = RULES | ARBITERS
# What reads parameters, updates or signals that are like them.
READS_TREES = {
    "arbiter",
    "arbiter_noise_response",
    "dive_batch",
    "expected_gain",
    "from_objective",
    "noise_floor",
}
GROUPS = {"w": "moved", "b": "frozen"}


def in_a_group(tx):
    return optax.multi_transform({"moved": tx, "frozen": optax.set_to_zero()}, GROUPS)


def in_an_empty_group(tx):
    return optax.multi_transform(
        {"moved": optax.sgd(0.1), "none": tx}, {"w": "moved", "b": "moved"}
    )


def multi_steps(tx):
    every_second = optax.MultiSteps(tx, 2)
    return optax.GradientTransformationExtraArgs(every_second.init, every_second.update)


MASKS = {
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
    "multi_transform": in_a_group,
}
WRAPPERS = MASKS | {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda rate: tx)(rate=0.1),
    "MultiSteps": multi_steps,
}
OTHERS = {
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step >= 0),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0),
    "empty group": in_an_empty_group,
    "named_chain": lambda tx: optax.named_chain(("optimizer", optax.sgd(0.1)), ("rule", tx)),
    "schedule_free": lambda tx: optax.contrib.schedule_free(optax.chain(optax.sgd(0.1), tx), 0.1),
}


@functools.cache
def make(name):
    return CASES[name].make(**LIMITS)


def run(tx, num_calls=NUM_CALLS, every=1):
    """The state after some calls, or after the last of every few with the mean of their gradients."""
    params, mean = params_like(), lambda *xs: sum(xs) / every
    with jax.disable_jit():  # else each condition compiles a program that runs once
        state = tx.init(params)
        for call in range(every - 1, num_calls, every):
            grads = jax.tree.map(mean, *(grads_at(call - i) for i in range(every)))
            _, state = tx.update(grads, state, params, **signals_at(call))
    return state


@functools.cache
def alone(name, num_calls, every=1):
    """The state of the rule by itself."""
    return base.requests(run(make(name), num_calls, every)).rules[0]


def traced(tx, all_signals=signals_at):
    """The types of the state after a scan, in which they may not change."""
    update = base.with_extra_args(tx).update

    def run(params):
        def step(state, _):
            return update(grads_at(0), state, params, **all_signals(0))[1], None

        return jax.lax.scan(step, tx.init(params), None, length=NUM_CALLS)[0]

    return jax.eval_shape(run, params_like())


def is_one_sentence(error):
    text = str(error)
    return "\n" not in text and text.endswith(".") and len(text) < 400


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(
    name=st.sampled_from(sorted(CASES)),
    chain=st.lists(st.sampled_from(sorted(WRAPPERS)), min_size=1, max_size=3),
)
def test_any_chain_trains_or_refuses_at_init(name, chain):
    tx = make(name)
    for wrapper in chain:
        tx = WRAPPERS[wrapper](tx)
    if name in READS_TREES and set(chain) & set(MASKS):
        with pytest.raises(ValueError, match="must see all parameters") as refusal:
            tx.init(params_like())
        assert is_one_sentence(refusal.value)
        return
    traced(tx)
    (found,) = base.requests(run(tx)).rules
    expected = alone(name, NUM_CALLS, 2 ** chain.count("MultiSteps"))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wrapper", sorted(OTHERS))
@pytest.mark.parametrize("name", usual_in_ci(sorted(set(CASES) - READS_TREES)))
def test_other_wrappers_change_no_decision(name, wrapper):
    tx = OTHERS[wrapper](make(name))
    traced(tx)
    chex.assert_trees_all_close(base.requests(run(tx, 2)).rules[0], alone(name, 2), rtol=1e-4)


@pytest.mark.parametrize("wrapper", sorted(set(OTHERS) - {"empty group"}))
@pytest.mark.parametrize("name", usual_in_ci(sorted(READS_TREES)))
def test_rules_that_read_trees_trace_in_others(name, wrapper):
    traced(OTHERS[wrapper](make(name)))


@pytest.mark.parametrize("name", sorted(READS_TREES))
def test_group_without_parameters_is_refused(name):
    with pytest.raises(ValueError, match="must see all parameters"):
        in_an_empty_group(make(name)).init(params_like())


def test_wrapped_rules_refuse_by_their_own_name():
    inner = aj.schedulers.noise_floor(num_examples=400)
    for rule in (aj.schedulers.hysteresis(inner), aj.schedulers.shadow(inner)):
        with pytest.raises(ValueError, match=r"^noise_floor must see all parameters, got only "):
            in_a_group(rule).init(params_like())


def test_mask_that_lets_all_through_is_none():
    tx = optax.masked(make("noise_floor"), {"w": True, "b": True})
    chex.assert_trees_all_close(base.requests(run(tx, 2)).rules[0], alone("noise_floor", 2))


def test_a_rule_in_each_group_has_no_batch_size():
    """Two groups of parameters with a rule each do not agree on one."""
    rules = {"moved": make("cabs"), "frozen": make("norm_test")}
    state = optax.multi_transform(rules, GROUPS).init(params_like())
    with pytest.raises(ValueError, match=r"exactly one .* found (CABS|NormTest)State, "):
        aj.get_batch_size(state)


def test_flattened_parameters_are_named():
    tx = optax.flatten(make("expected_gain"))
    with pytest.raises(ValueError, match=r"^gradient_noise must have the structure of the updates"):
        traced(tx)


@pytest.mark.parametrize("name", sorted(RATES))
@pytest.mark.parametrize("wrapper", sorted(WRAPPERS | OTHERS))
def test_learning_rates_trace_in_every_wrapper(name, wrapper):
    case = RATES[name]
    traced((WRAPPERS | OTHERS)[wrapper](case.factory(**case.arguments)), signals)


@pytest.mark.parametrize("name", ["adam_hd", "adamp", "sgd_hd"])
def test_optimizer_of_a_group_moves_it_as_alone(name):
    case = RATES[name]
    tx, params, grads = case.factory(**case.arguments), params_like(), grads_at(0)
    state, group = tx.init({"w": params["w"]}), in_a_group(tx)
    group_state = group.init(params)
    for _ in range(3):
        expected, state = tx.update({"w": grads["w"]}, state, {"w": params["w"]})
        found, group_state = group.update(grads, group_state, params)
        assert jnp.array_equal(found["w"], expected["w"])
        assert found["b"] == 0


def test_message_says_where_the_rule_belongs():
    tx = optax.masked(aj.schedulers.dive_batch(64), {"w": True, "b": False})
    with pytest.raises(ValueError, match=re.escape("chain it after that transformation, not")):
        tx.init(params_like())
