"""How long an optimizer goes on applying a gradient: measured, for every kind of chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import schedulers
from arbiter_jax.objectives import impulse_response, measure_persistence

PARAMS = {
    "body": {"kernel": jnp.ones((7, 3)), "bias": jnp.zeros(3)},
    "head": {"kernel": jnp.ones((3, 9)), "bias": jnp.zeros(9)},
}
MOMENTUM = optax.sgd(0.1, momentum=0.9)
TEN = (10, (1 - 0.9**2) ** -0.5)
WEIGHTS = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)


# The sum of the impulse response, and the root of its energy


@pytest.mark.parametrize(
    ("tx", "displacement", "deviation"),
    [
        (optax.sgd(0.1), 1, 1),
        (MOMENTUM, *TEN),
        (optax.sgd(0.1, momentum=0.99), 100, (1 - 0.99**2) ** -0.5),
        (optax.chain(optax.clip_by_global_norm(1e3), optax.sgd(0.1, momentum=0.5)), 2, 0.75**-0.5),
        (optax.adam(1e-3), *TEN),
        (optax.adam(1e-3, b1=0.0), 1, 1),
    ],
)
def test_impulse_response(tx, displacement, deviation):
    assert impulse_response(tx, num_steps=2000) == pytest.approx(displacement, rel=0.01)
    assert impulse_response(tx, power=2) == pytest.approx(deviation, rel=0.01)


def test_impulse_response_of_few_steps():
    assert impulse_response(MOMENTUM, num_steps=2) == pytest.approx(1.9)
    assert impulse_response(MOMENTUM, num_steps=2, power=2) == pytest.approx((1 + 0.81) ** 0.5)


# Chains as they are used


CHAINS = {
    "sgd": (optax.sgd(0.1), (1, 1)),
    "momentum": (MOMENTUM, TEN),
    # 1 + m, m^2, m^3, ...: the sum is that of momentum, the first step larger.
    "nesterov": (optax.sgd(0.1, momentum=0.9, nesterov=True), (10 / 1.9, 1.3988)),
    "adam": (optax.adam(1e-3), TEN),
    "schedule": (optax.adamw(optax.cosine_decay_schedule(1e-3, 10_000)), TEN),
    "schedule that ends early": (
        optax.sgd(optax.piecewise_constant_schedule(0.1, {90: 0.0}), momentum=0.9),
        TEN,
    ),
    "clipped": (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), TEN),
    "decay of some": (optax.adamw(1e-3, mask=WEIGHTS), TEN),
    "every 4th": (optax.MultiSteps(MOMENTUM, 4), TEN),
    "if finite": (optax.apply_if_finite(MOMENTUM, 3), TEN),
    "injected": (optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9), TEN),
    "plateau": (optax.chain(MOMENTUM, optax.contrib.reduce_on_plateau()), TEN),
    "frozen": (
        optax.multi_transform(
            {"train": MOMENTUM, "freeze": optax.set_to_zero()},
            {"body": "freeze", "head": "train"},
        ),
        TEN,
    ),
    "labels by rank": (
        optax.multi_transform(
            {"w": MOMENTUM, "b": optax.sgd(0.2, momentum=0.9)},
            lambda params: jax.tree.map(lambda x: "w" if x.ndim > 1 else "b", params),
        ),
        TEN,
    ),
    "nothing": (optax.set_to_zero(), (1, 1)),
    "our rules": (
        optax.chain(
            MOMENTUM,
            aj.scale_by_batch_size(32),
            schedulers.shadow(schedulers.cabs(0.1)),
            schedulers.hysteresis(schedulers.noise_floor(num_examples=1000)),
        ),
        TEN,
    ),
    "arbiter": (
        optax.chain(
            MOMENTUM,
            aj.arbiter(aj.mlp_agent((3,)), objective=aj.noise_response("noise_floor")),
        ),
        TEN,
    ),
    "autowu": (optax.chain(MOMENTUM, aj.autowu(10, 6), schedulers.constant(8)), TEN),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_measured(name):
    tx, (displacement, deviation) = CHAINS[name]
    found = measure_persistence(tx, PARAMS)
    assert found.displacement.dtype == found.deviation.dtype == np.float32
    assert found.displacement == pytest.approx(displacement, rel=0.03)
    assert found.deviation == pytest.approx(deviation, rel=0.03)


@pytest.mark.parametrize(
    ("tx", "why"),
    [
        (optax.lbfgs(), "TypeError: .*'value_fn'"),
        (optax.lion(1e-3), "its updates have no derivative"),
        (optax.stateless(lambda u, p: jax.tree.map(lambda x: jnp.log(x * 0), u)), "not finite"),
    ],
)
def test_what_cannot_be_followed_is_refused(tx, why):
    message = rf"persistence of the optimizer could not be measured \(.*{why}.*persistence=1 / \(1"
    with pytest.raises(ValueError, match=message):
        measure_persistence(tx, PARAMS)


def test_it_is_measured_once():
    calls = []

    def update(updates, state, params=None):
        calls.append(None)
        return updates, state

    tx = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    first = measure_persistence(tx, PARAMS)
    num_calls = len(calls)
    larger = jax.tree.map(lambda x: jnp.ones([2 * n for n in x.shape]), PARAMS)
    under_jit = []
    jax.jit(lambda params: under_jit.append(measure_persistence(tx, params)))(larger)
    assert under_jit == [first]  # numbers, and no tracers
    assert len(calls) == num_calls > 0


def test_layers_of_one_kind_are_measured_once():
    seen = []

    def init(params):
        seen.append(len(jax.tree.leaves(params)))
        return optax.EmptyState()

    watched = optax.GradientTransformation(
        init, lambda updates, state, params=None: (updates, state)
    )
    layer = {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}
    params = {"layers": [layer] * 5, "block_1": layer, "block_2": layer, "head": {"kernel": layer}}
    measure_persistence(watched, params)
    assert seen[0] == 3 * 2
    # Labels have the structure of all parameters.
    labels = {**jax.tree.map(lambda _: "a", params), "block_1": "b"}
    parts = {"a": optax.chain(watched, MOMENTUM), "b": optax.set_to_zero()}
    found = measure_persistence(optax.multi_transform(parts, labels), params)
    assert found.displacement == pytest.approx(10, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be an integer >= 1"),
        ({"power": 3}, "power must be one of"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        impulse_response(MOMENTUM, **options)
