"""Numbers computed by others: the authors' implementation of Arbiter, made runnable.

`arbiter_mlp.npz` holds one small Arbiter with a frozen inner network. A: one evaluation with every
gradient; B and C: five steps at the published and at faster learning rates; E: the warm-up.
"""

import functools
import pathlib
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax.hyper_learning._agents import sorted_proposals
from arbiter_jax.hyper_learning._warm_up import hyper_optimizer

AGENT_NAMES = ("p1", "pb1", "p2", "pb2")
NETWORK_NAMES = ("w1", "b1", "w2", "b2")
PRECISIONS = {"float64": 1e-10, "float32": 1e-4}

with np.load(pathlib.Path(__file__).parent / "fixtures" / "arbiter_mlp.npz") as file:
    FIXTURE = dict(file)


def arrays(prefix, names):
    return {name: jnp.asarray(FIXTURE[prefix + name], float) for name in names}


def apply(agent_params, inputs):
    hidden = jax.nn.relu(inputs @ agent_params["p1"] + agent_params["pb1"][None])
    return hidden @ agent_params["p2"] + agent_params["pb2"][None]


AGENT = aj.Agent(lambda key: arrays("init_", AGENT_NAMES), apply)


def network_features(params, inputs):
    return jax.nn.relu(inputs @ params["w1"] + params["b1"][None])


def network_head(params, features):
    return features @ params["w2"] + params["b2"][None]


def response_loss(params, response, meta_batch):
    inputs, labels = meta_batch
    outputs = network_head(params, network_features(params, inputs) * (1 + response[None]))
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


def make(**options):
    return aj.arbiter(AGENT, response_loss, num_features=32, anchor="none", **options)


def start_of(tx, params, case="init_"):
    return tx.init(params)._replace(
        agent_params=arrays(case, AGENT_NAMES),
        response_weights=jnp.asarray(FIXTURE[case + "map"][0], float),
        mixture_logits=jnp.asarray(FIXTURE[case + "alpha"], float),
    )


def inputs_of(step):
    rows = FIXTURE["meta_idx"][step]
    return {
        "agent_inputs": jnp.asarray(FIXTURE["val_x"][step], float),
        "meta_batch": (
            jnp.asarray(FIXTURE["pool_x"][rows], float),
            jnp.asarray(FIXTURE["pool_y"][rows]),
        ),
    }


class Evaluation(NamedTuple):
    """One step of plain gradient descent at rate 1, which shows every gradient."""

    before: aj.ArbiterState
    after: aj.ArbiterState
    updates_are_the_same: bool


@functools.cache
def evaluate(precision):
    with jax.enable_x64(precision == "float64"):
        tx = make(agent_optimizer=optax.sgd(1.0), mixture_optimizer=optax.sgd(1.0))
        params = arrays("init_", NETWORK_NAMES)
        # The network moves to its place in this very step: w* is what counts.
        updates = jax.tree.map(lambda x: 0.5 * x, params)
        before = start_of(tx, jax.tree.map(lambda x: 0.5 * x, params))
        result, after = jax.jit(tx.update)(updates, before, updates, **inputs_of(0))
        same = all(np.array_equal(result[name], updates[name]) for name in updates)
        return Evaluation(before, after, same)


@functools.cache
def five_steps(precision):
    """Five steps of Adam on the inputs of steps 0 to 4, for any two learning rates: one program."""
    del precision  # it is that of the caller

    @jax.jit
    def run(rates, inputs):
        agent_optimizer, mixture_optimizer = map(hyper_optimizer, rates)
        tx = make(agent_optimizer=agent_optimizer, mixture_optimizer=mixture_optimizer)
        params = arrays("init_", NETWORK_NAMES)
        zeros = jax.tree.map(jnp.zeros_like, params)

        def step(state, inputs):
            _, state = tx.update(zeros, state, params, **inputs)
            return state, state

        return jax.lax.scan(step, start_of(tx, params), inputs)[1]

    return run


@functools.cache
def run(case, precision):
    """The states after each of the five steps."""
    with jax.enable_x64(precision == "float64"):
        inputs = jax.tree.map(lambda *x: jnp.stack(x), *(inputs_of(step) for step in range(5)))
        states = five_steps(precision)(tuple(FIXTURE[f"{case}_lrs"]), inputs)
        return [jax.tree.map(lambda x, t=t: x[t], states) for t in range(5)]


@functools.cache
def warm_up(precision, max_steps=10_000):
    with jax.enable_x64(precision == "float64"):
        return jax.jit(
            lambda agent_params, alpha, inputs: aj.warm_up(
                AGENT,
                agent_params,
                alpha,
                inputs,
                batch_size=64,
                min_batch_size=8,
                max_batch_size=512,
                max_steps=max_steps,
            )
        )(
            arrays("E_init_", AGENT_NAMES),
            jnp.asarray(FIXTURE["E_init_alpha"], float),
            inputs_of(0)["agent_inputs"],
        )


def assert_close(actual, expected, precision, tolerance=None):
    tolerance = PRECISIONS[precision] if tolerance is None else tolerance
    assert actual.dtype == precision
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# A: one evaluation

A_TOLERANCE = {"float64": 1e-12, "float32": 1e-4}


@pytest.mark.slow
@pytest.mark.parametrize("precision", A_TOLERANCE)
def test_fixture_a_forward(precision):
    tolerance = A_TOLERANCE[precision]
    with jax.enable_x64(precision == "float64"):
        agent_params = arrays("init_", AGENT_NAMES)
        inputs = inputs_of(0)["agent_inputs"]
        logits, proposals = jax.jit(
            lambda params: (apply(params, inputs), sorted_proposals(AGENT, params, inputs))
        )(agent_params)
        assert_close(logits, FIXTURE["A_agent_logits"], precision, tolerance)
        assert_close(proposals, FIXTURE["A_samples"], precision, tolerance)
        weights = jax.nn.softmax(jnp.asarray(FIXTURE["init_alpha"], float))
        assert_close(weights, FIXTURE["A_weights"], precision, tolerance)
        sizes = aj.to_batch_size(proposals, 8, 512)
        np.testing.assert_array_equal(sizes, FIXTURE["A_sample_batch_sizes"])
    after = evaluate(precision).after
    assert_close(after.proposals, FIXTURE["A_samples"], precision, tolerance)
    assert_close(after.mixture, FIXTURE["A_s"], precision, tolerance)
    assert_close(after.meta_loss, FIXTURE["A_F"], precision, tolerance)
    assert int(after.meta_batch_size) == FIXTURE["A_B"]


@pytest.mark.parametrize("precision", A_TOLERANCE)
def test_fixture_a_response(precision):
    tolerance = A_TOLERANCE[precision]
    with jax.enable_x64(precision == "float64"):
        params, (inputs, labels) = arrays("init_", NETWORK_NAMES), inputs_of(0)["meta_batch"]
        rows = (inputs[: FIXTURE["A_B"]], labels[: FIXTURE["A_B"]])
        weights = jnp.asarray(FIXTURE["init_map"][0], float)

        @jax.jit
        def evaluate_response(mixture):
            meta_loss = lambda s: jnp.mean(response_loss(params, weights * s, rows))
            features = network_features(params, inputs[:4]) * (1 + weights * mixture)[None]
            return meta_loss(0.0), jax.grad(meta_loss)(mixture), network_head(params, features)

        without, slope, outputs = evaluate_response(jnp.asarray(FIXTURE["A_s"], float))
        assert_close(without, FIXTURE["A_F_no_response"], precision, tolerance)
        assert_close(slope, FIXTURE["A_dF_ds"], precision, tolerance)
        assert_close(outputs, FIXTURE["A_net_logits_first4"], precision, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("precision", A_TOLERANCE)
def test_fixture_a_gradients(precision):
    before, after, _ = evaluate(precision)
    tolerance = A_TOLERANCE[precision]
    for name in AGENT_NAMES:
        gradient = before.agent_params[name] - after.agent_params[name]
        assert_close(gradient, FIXTURE[f"A_grad_{name}"], precision, tolerance)
    gradient = before.response_weights - after.response_weights
    assert_close(gradient, FIXTURE["A_grad_map"][0], precision, tolerance)
    gradient = before.mixture_logits - after.mixture_logits
    assert_close(gradient, FIXTURE["A_grad_alpha"], precision, tolerance)
    # None of them is so small that the tolerance would let a zero pass.
    assert min(np.abs(FIXTURE[f"A_grad_{n}"]).max() for n in (*AGENT_NAMES, "map", "alpha")) > 1e-3


def test_fixture_a_leaves_the_updates_as_they_are():
    assert evaluate("float64").updates_are_the_same


# B and C: five steps


@pytest.mark.parametrize("case", ["B", "C"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_fixtures_b_and_c_step_by_step(case, precision):
    for step, state in enumerate(run(case, precision)):
        assert_close(state.mixture, FIXTURE[f"{case}_s"][step], precision)
        assert_close(state.meta_loss, FIXTURE[f"{case}_F"][step], precision)
        assert_close(state.proposals, FIXTURE[f"{case}_samples"][step], precision)
        assert int(state.meta_batch_size) == FIXTURE[f"{case}_B"][step]
        assert int(state.num_clipped) == int(state.num_skipped) == 0


@pytest.mark.parametrize("case", ["B", "C"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("step", [1, 5])
def test_fixtures_b_and_c_parameters(case, precision, step):
    state = run(case, precision)[step - 1]
    for name in AGENT_NAMES:
        assert_close(state.agent_params[name], FIXTURE[f"{case}_step{step}_{name}"], precision)
    assert_close(state.response_weights, FIXTURE[f"{case}_step{step}_map"][0], precision)
    assert_close(state.mixture_logits, FIXTURE[f"{case}_step{step}_alpha"], precision)


@pytest.mark.slow
def test_the_default_optimizers_are_those_of_fixture_b():
    with jax.enable_x64(True):
        tx = make()
        params = arrays("init_", NETWORK_NAMES)
        zeros = jax.tree.map(jnp.zeros_like, params)
        _, state = jax.jit(tx.update)(zeros, start_of(tx, params), params, **inputs_of(0))
    chex.assert_trees_all_close(
        state.agent_params, run("B", "float64")[0].agent_params, rtol=0, atol=1e-14
    )
    np.testing.assert_allclose(
        state.mixture_logits, run("B", "float64")[0].mixture_logits, rtol=0, atol=1e-14
    )


# E: the warm-up


def test_fixture_e_in_float64():
    agent_params, num_steps, mixture = warm_up("float64")
    assert int(num_steps) == FIXTURE["E_steps"] == len(FIXTURE["E_s"])
    assert_close(mixture, FIXTURE["E_s"][-1], "float64")
    for name in AGENT_NAMES:
        assert_close(agent_params[name], FIXTURE[f"E_final_{name}"], "float64")
    assert int(aj.to_batch_size(mixture, 8, 512)) == FIXTURE["E_B"][-1]


@pytest.mark.parametrize("num_steps", [1, 300])
def test_fixture_e_on_the_way(num_steps):
    _, taken, mixture = warm_up("float64", max_steps=num_steps)
    assert int(taken) == num_steps
    assert_close(mixture, FIXTURE["E_s"][num_steps - 1], "float64")


def test_fixture_e_in_float32():
    agent_params, num_steps, mixture = warm_up("float32")
    # The last step is where a batch size passes a limit: one to either side is rounding.
    assert abs(int(num_steps) - int(FIXTURE["E_steps"])) <= 1
    np.testing.assert_allclose(mixture, FIXTURE["E_s"][-1], atol=3e-3)
    _, _, mixture = warm_up("float32", max_steps=500)
    assert_close(mixture, FIXTURE["E_s"][499], "float32")
    for name in AGENT_NAMES:
        np.testing.assert_allclose(agent_params[name], FIXTURE[f"E_final_{name}"], atol=2e-4)


def test_the_target_of_the_warm_up_is_as_published():
    np.testing.assert_allclose(FIXTURE["E_s_target"], np.log((64 - 8) / (512 - 64)), rtol=1e-12)
    distance = np.abs(FIXTURE["E_s"] - FIXTURE["E_s_target"])
    huber = np.where(distance <= 1, distance**2 / 2, distance - 0.5)
    np.testing.assert_allclose(FIXTURE["E_huber"], huber, rtol=1e-10)
