"""Every factory inside `optax.inject_hyperparams`: each number works traced, or is refused by name."""

import functools
import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax.base import as_count
from tests.factories import RATES, Case, signals
from tests.rules import (
    LIMITS,
    NOT_RULES,
    NUM_FEATURES,
    grads_at,
    loss_fn,
    params_like,
    response_loss,
)

S, L = aj.schedulers, aj.learning_rate
OBJECTIVE = aj.objectives.noise_floor(num_examples=4_000, persistence=1.5)
AGENT = aj.mlp_agent((NUM_FEATURES,), hidden_sizes=(4,))


def rule(factory, *static, **arguments):
    return Case(factory, LIMITS | arguments, static)


PLAN = {"boundaries": (100, 200), "dataset_size": 4_000, "factor": 2.0}
COST = {"step_cost": 3.0, "measure_every": 1}
RULES = {
    "adabatch": rule(S.adabatch, dataset_size=64, epochs=1.5),
    "adadamp": rule(S.adadamp, decay=0.5),
    "cabs": rule(S.cabs, learning_rate=0.1, decay=0.5),
    "constant": Case(S.constant, LIMITS),
    "dive_batch": rule(S.dive_batch, dataset_size=64, delta=1.0),
    "expected_gain": rule(S.expected_gain, "loss_fn", loss_fn=loss_fn, persistence=1.5, **COST),
    "from_objective": rule(S.from_objective, objective=OBJECTIVE, **COST),
    "from_schedule": rule(S.from_schedule, "schedule", schedule=lambda step: 20.0 * (step + 1)),
    "goodput": rule(S.goodput, decay=0.5),
    "gradient_noise_scale": rule(S.gradient_noise_scale, decay=0.5, scale=0.7),
    "hysteresis": Case(S.hysteresis, {"rule": S.norm_test(**LIMITS)}),
    "inner_product_test": rule(S.inner_product_test, decay=0.5),
    "noise_floor": rule(S.noise_floor, num_examples=4_000, persistence=1.5, **COST),
    "norm_test": rule(S.norm_test, decay=0.5),
    "seesaw": Case(
        S.seesaw,
        {
            "schedule": optax.linear_schedule(1.0, 0.0, 100),
            "num_examples": 400,
            "batch_size": 32,
            "max_batch_size": 64,
        },
        ("schedule", "num_examples", "batch_size", "max_batch_size", "trade"),
    ),
    "shadow": Case(S.shadow, {"rules": S.norm_test(**LIMITS)}),
    "simigrad": rule(S.simigrad, decide_every=2),
    "smith": rule(S.smith, **PLAN),
}
ARBITERS = {
    "arbiter": rule(
        aj.arbiter,
        "response_loss",
        "num_features",
        agent=AGENT,
        response_loss=response_loss,
        num_features=NUM_FEATURES,
        window=2,
    ),
    "arbiter_noise": rule(aj.arbiter, agent=AGENT, objective=OBJECTIVE, window=2),
}
CASES = RULES | ARBITERS | RATES
# Another value of an argument: by default half of it, which suits what lies in [0, 1).
OTHER = {
    "batch_size": 64,
    "channel_axis": 0,
    "dataset_size": 32,
    "dwell": 2,
    "epochs": 0.25,
    "exponent": 1.0,
    "factor": 4.0,
    "final_growth": 64.0,
    "hyper_every": 2,
    "initial_batch_size": 48,
    "max_batch_size": 40,
    "max_change": 1.25,
    "max_factor": 1.5,
    "max_growth": 3.0,
    "max_learning_rate": 0.15,
    "measure_every": 3,
    "min_batch_size": 24,
    "min_improvement": 2.0,
    "min_learning_rate": 0.05,
    "momentum": 0.5,
    "num_examples": 800,
    "optimal_loss": -0.5,
    "persistence": 2.5,
    "reference": 8,
    "seed": 1,
    "window": 3,
}
NUMBER = re.compile(r"\b(int|float|ScalarOrSchedule)\b")  # in an annotation


def arguments_of(case):
    parameters = inspect.signature(case.factory).parameters.values()
    return {p.name: case.arguments.get(p.name, p.default) for p in parameters}


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def traced_of(case):
    numbers = [name for name, value in arguments_of(case).items() if is_number(value)]
    return [name for name in numbers if name not in case.static]


@functools.cache
def injected(name):
    """The compiled update, and the state before the first step and after each."""
    case = CASES[name]
    static = [arg for arg in case.static if arguments_of(case)[arg] is not None]
    tx = optax.inject_hyperparams(case.factory, static_args=static)(**case.arguments)
    # Donated, so that two fields that share a buffer are an error.
    update = jax.jit(
        lambda grads, state, signals: tx.update(grads, state, params_like(), **signals),
        donate_argnames="state",
        compiler_options={"xla_backend_optimization_level": 0},
    )
    states, state = [tx.init(params_like())], tx.init(params_like())
    for step in range(3):
        _, state = update(grads_at(step), state, signals(step))
        states.append(jax.tree.map(np.array, state))
    return lambda grads, state, signals: update(grads, copied(state), signals), states


def copied(state):
    return jax.tree.map(jnp.array, state)


def plain_update(case, state, step, **other):
    """One eager update of the same factory with Python numbers."""
    tx = case.factory(**(case.arguments | other))
    with jax.disable_jit():  # else each condition compiles a program that runs once
        return tx.update(grads_at(step), state, params_like(), **signals(step))


def test_every_factory_has_a_case():
    rules = {name for name in S.__all__ if inspect.isfunction(getattr(S, name))} - set(NOT_RULES)
    rates = {name for name in L.__all__ if inspect.isfunction(getattr(L, name))}
    assert rules == set(RULES)
    assert rates == set(RATES)


# Numbers without a value in a case, with why.
NOT_GIVEN = {
    ("arbiter", "num_features"): "given, but static",
    ("arbiter_noise", "num_features"): "an objective has no features",
    ("constant", "batch_size"): "another name of initial_batch_size",
    ("goodput", "candidates"): "a sequence",
    ("smith", "boundaries"): "a sequence",
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_number_has_a_value(name):
    case = CASES[name]
    for parameter in inspect.signature(case.factory).parameters.values():
        if NUMBER.search(str(parameter.annotation)) and (name, parameter.name) not in NOT_GIVEN:
            assert is_number(arguments_of(case)[parameter.name]), parameter.name


def without_flag(state):
    """The state without a flag that one of an interval of 1, a Python number, does not have."""
    return state._replace(signals_due=None) if hasattr(state, "signals_due") else state


def with_number(state, argument, value):
    """The state as it would be if the argument had had another value: few are kept there."""
    value = jnp.asarray(value, jnp.result_type(getattr(state, argument, 0)))
    if argument in ("min_batch_size", "max_batch_size") and hasattr(state, "batch_size"):
        state = state._replace(**{argument: value})
        size = jnp.clip(state.batch_size, state.min_batch_size, state.max_batch_size)
        return state._replace(batch_size=size)
    if argument == "learning_rate" and isinstance(state, L.AdamPState):
        return state._replace(learning_rate=value)
    if argument == "num_examples" and hasattr(state, "statistics"):
        return state._replace(statistics=state.statistics._replace(budget=as_count(value)))
    if argument == "initial_batch_size" and isinstance(state, S.ConstantState):
        return state._replace(batch_size=value)
    return state


# One of each kind; CI leaves the others out. An agent costs more than these together, and the test of
# changed numbers has one.
FAST = ("adamp", "autowu", "constant", "goodput", "gradient_noise_scale", "smith")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=() if x in FAST else pytest.mark.exhaustive) for x in sorted(CASES)],
)
def test_traced_numbers_give_what_python_numbers_give(name):
    case = CASES[name]
    _, states = injected(name)
    state = case.factory(**case.arguments).init(params_like())
    chex.assert_trees_all_close(without_flag(states[0].inner_state), without_flag(state), rtol=1e-5)
    for step in range(3):
        _, state = plain_update(case, state, step)
        found = states[step + 1].inner_state
        chex.assert_trees_all_equal_shapes_and_dtypes(found, states[0].inner_state)
        chex.assert_trees_all_close(without_flag(found), without_flag(state), rtol=1e-4, atol=1e-6)


# Each is made as another one is, which CI has, and before a release it has them all.
ALIKE = {
    "expected_gain": "noise_floor",
    "from_objective": "noise_floor",
    "inner_product_test": "norm_test",
    "lamb_in_examples": "adamw_in_examples",
    "scale_by_adam_in_examples": "adamw_in_examples",
    "sgd_hd": "adam_hd",
    "trace_in_examples": "ema_in_examples",
}


# The numbers of the published arbiter are those of the other one.
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        pytest.param(
            name, arg, marks=(pytest.mark.slow, pytest.mark.exhaustive) if name in ALIKE else ()
        )
        for name in sorted(set(CASES) - {"arbiter"})
        for arg in traced_of(CASES[name])
    ],
)
def test_a_changed_number_takes_effect(name, argument):
    case = CASES[name]
    update, states = injected(name)
    before, value = states[2], arguments_of(case)[argument]
    other = OTHER.get(argument, value / 2 if isinstance(value, float) else value + 1)
    kept = jax.tree.map(jnp.asarray, before.hyperparams)
    hyperparams = kept | {argument: jnp.asarray(other, kept[argument].dtype)}
    updates, after = update(grads_at(2), before._replace(hyperparams=hyperparams), signals(2))
    state = with_number(copied(before.inner_state), argument, other)
    expected_updates, expected = plain_update(case, state, 2, **{argument: other})
    expected = with_number(expected, argument, other)
    chex.assert_trees_all_close(updates, expected_updates, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(
        without_flag(after.inner_state), without_flag(expected), rtol=1e-4, atol=1e-6
    )


# Not the losses: optax calls them with a count, before the factory is reached.
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        (name, arg)
        for name in sorted(CASES)
        for arg in CASES[name].static
        if arg not in ("loss_fn", "response_loss")
    ],
)
def test_static_argument_that_is_not_listed(name, argument):
    case = CASES[name]
    listed = [arg for arg in case.static if arg != argument]
    tx = optax.inject_hyperparams(case.factory, static_args=listed)(**case.arguments)
    with pytest.raises(ValueError, match=rf'static_args=\(.*"{argument}"') as refusal:
        tx.init(params_like())
    assert "\n" not in str(refusal.value)


def test_static_arguments_are_named_together():
    tx = optax.inject_hyperparams(L.autowu)(10, 4)
    expected = (
        "steps_per_epoch, num_epochs, max_warmup_fraction, cooldown_fraction, num_tests must be known "
        "while tracing"
    )
    with pytest.raises(ValueError, match=f"^{expected}"):
        tx.init(params_like())


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        (
            S.goodput,
            {"candidates": np.array([16, 32])},
            '^candidates .*static_args=\\("candidates",',
        ),
        (
            lambda boundaries: S.smith(boundaries, 4_000),
            {"boundaries": np.array([100, 200])},
            '^boundaries .*static_args=\\("boundaries",',
        ),
        (S.shadow, {"rules": jnp.ones(())}, "^rules must be a batch-size rule"),
        (aj.mlp_agent, {"input_shape": (3,)}, '^num_proposals .*static_args=\\("num_proposals",'),
    ],
)
def test_traced_structure_is_named(factory, arguments, message):
    tx = optax.inject_hyperparams(factory)(**arguments)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tx.init, params_like())


def test_schedule_of_a_size():
    """Python ints become floats in a schedule; its values are rounded inside a program."""
    sizes = optax.linear_schedule(8, 20, 8)  # 8, 9.5, 11, 12.5
    for tx in (
        optax.inject_hyperparams(S.constant)(sizes),
        optax.inject_hyperparams(S.from_schedule, static_args="schedule")(
            lambda step: 512, max_batch_size=sizes
        ),
    ):
        state, found = tx.init(params_like()), []
        for _ in range(3):
            _, state = jax.jit(tx.update)(grads_at(0), state, params_like())
            found.append(int(aj.get_batch_size(state)))
        assert found == [8, 10, 11]


def test_a_changed_number_in_eager_updates():
    tx = optax.inject_hyperparams(S.gradient_noise_scale)(decay=0.0)
    state = tx.init(params_like())
    stats = aj.GradStats(*map(jnp.asarray, (0.5, 40.0, 32.0, 1.75, 0.2, 3.0)))
    _, state = tx.update(grads_at(0), state, params_like(), grad_stats=stats)
    assert int(aj.get_batch_size(state)) == 80
    state.hyperparams["max_batch_size"] = jnp.asarray(64)
    _, state = tx.update(grads_at(0), state, params_like(), grad_stats=stats)
    assert int(aj.get_batch_size(state)) == 64
    assert int(state.inner_state.max_batch_size) == 64


def test_momentum_that_starts_at_zero_may_grow():
    arguments = {"learning_rate": 0.1, "hypergradient_learning_rate": 0.0}
    tx = optax.inject_hyperparams(L.sgd_hd)(**arguments)
    update, state = jax.jit(tx.update), tx.init(params_like())
    _, state = update(grads_at(0), state, params_like())
    state.hyperparams["momentum"] = jnp.asarray(0.5)
    updates, _ = update(grads_at(1), state, params_like())
    expected = jax.tree.map(lambda a, b: -0.1 * (b + 0.5 * a), grads_at(0), grads_at(1))
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", sorted(CASES))
def test_half_precision_keeps_every_type(name, dtype):
    case = CASES[name]
    half = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    static = [arg for arg in case.static if arguments_of(case)[arg] is not None]
    inject = functools.partial(optax.inject_hyperparams, case.factory, static_args=static)
    tx = inject(hyperparam_dtype=jnp.float32)(**case.arguments)
    state = tx.init(half(params_like()))
    updates, after = jax.eval_shape(
        lambda state: tx.update(half(grads_at(0)), state, half(params_like()), **signals(0)), state
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, half(params_like()))


def test_number_that_half_precision_loses():
    tx = optax.inject_hyperparams(L.adam_hd)(0.1, 0.01)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_like())
    with pytest.raises(ValueError, match=r"^b2 must be in .*hyperparam_dtype=jnp\.float32\.$"):
        tx.init(half)


def test_aggregator():
    aggregating = pytest.importorskip("optax.experimental").aggregating

    def make(factory):
        return aggregating.process(optax.identity(), factory(min_size=2), optax.sgd(0.1))

    rows = jax.tree.map(lambda *xs: jnp.stack(xs), *(grads_at(step) for step in range(4)))
    updates = []
    for factory in (
        aj.dynamic_batch_adaptation,
        optax.inject_hyperparams(aj.dynamic_batch_adaptation),
    ):
        tx = make(factory)
        updates.append(jax.jit(tx.update)(rows, tx.init(params_like()), params_like())[0])
    chex.assert_trees_all_close(*updates, rtol=1e-6)


@pytest.mark.slow
def test_matrices_of_adamp_under_a_traced_axis():
    rng = np.random.default_rng(0)
    weights = {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
    grads = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    columns = weights["w"] / jnp.linalg.norm(weights["w"], axis=0, keepdims=True)
    grads = {"w": grads - columns * jnp.sum(columns * grads, axis=0, keepdims=True)}
    updates = {}
    for axis in (-1, 0):
        arguments = {"learning_rate": 0.1, "weight_decay": 0.1, "channel_axis": axis}
        tx = optax.inject_hyperparams(L.adamp)(**arguments)
        updates[axis], _ = jax.jit(tx.update)(grads, tx.init(weights), weights)
        plain = L.adamp(**arguments)
        expected, _ = plain.update(grads, plain.init(weights), weights)
        chex.assert_trees_all_close(updates[axis], expected, rtol=1e-5)
    assert not jnp.allclose(updates[0]["w"], updates[-1]["w"])


@pytest.mark.slow
def test_fit_takes_a_size_from_its_state():
    """A whole run: the limit that a schedule moves is the size that the loop applies."""
    data = aj.Data((jnp.ones((64, 1)), jnp.zeros(64)))
    rule = optax.inject_hyperparams(S.constant)(optax.piecewise_constant_schedule(8, {4: 2.0}))
    tx = optax.chain(optax.sgd(0.01), rule)
    result = aj.fit(
        lambda params, batch: (batch[0] @ params["w"] - batch[1]) ** 2,
        {"w": jnp.ones(1)},
        tx,
        data,
        num_examples=160,
        window=2,
    )
    assert [record.batch_size for record in result.history][:2] == [8, 8]
    assert result.history[-1].batch_size == 16
