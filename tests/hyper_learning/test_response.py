"""The published meta-objective: which examples count, which parameters, and at what cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arbiter_jax as aj
from tests.arbiter_runs import NUM_META, compiled, make, problem, response_loss, step, trace


def test_the_response_is_that_of_the_new_parameters():
    params, grads, signals = problem()
    before, state = step()
    inputs, labels = signals["meta_batch"]
    size = int(state.meta_batch_size)
    new_params = jax.tree.map(np.add, params, grads)
    losses = response_loss(
        new_params, before.response_weights * state.mixture, (inputs[:size], labels[:size])
    )
    assert 0 < size < NUM_META
    np.testing.assert_allclose(state.meta_loss, losses.mean(), rtol=1e-5)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 0.0, 1e30])
def test_padding_contributes_exactly_zero(garbage):
    update, start = compiled()
    params, grads, signals = problem()
    _, expected = update(grads, start, params, **signals)
    size = int(expected.meta_batch_size)
    inputs, labels = (x.copy() for x in signals["meta_batch"])
    inputs[size:] = garbage
    labels[size:] = -1
    _, state = update(grads, start, params, **(signals | {"meta_batch": (inputs, labels)}))
    for a, b in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(state.num_skipped) == 0
    inputs[size - 1] = garbage  # the last one that counts
    _, state = update(grads, start, params, **(signals | {"meta_batch": (inputs, labels)}))
    assert float(state.meta_loss) != float(expected.meta_loss) or int(state.num_skipped) == 1


@pytest.mark.slow
def test_a_small_meta_batch_is_clipped_and_counted():
    update, start = compiled()
    params, grads, signals = problem()
    few = jax.tree.map(lambda x: x[:10], signals["meta_batch"])
    _, state = update(grads, start, params, agent_inputs=signals["agent_inputs"], meta_batch=few)
    assert int(state.meta_batch_size) == 32  # what was proposed, not what there was
    assert int(state.num_clipped) == 1
    new_params = jax.tree.map(np.add, params, grads)
    losses = response_loss(new_params, start.response_weights * state.mixture, few)
    np.testing.assert_allclose(state.meta_loss, losses.mean(), rtol=1e-5)
    _, state = update(grads, state, params, **signals)
    assert int(state.num_clipped) == 1


@pytest.mark.slow
def test_only_the_forward_pass_of_the_body_is_computed():
    width, depth, rows = 256, 4, 128

    def body(params, inputs):
        for weight in params["body"]:
            inputs = jax.nn.relu(inputs @ weight)
        return inputs

    def big_response_loss(params, response, meta_batch):
        inputs, labels = meta_batch
        outputs = (body(params, inputs) * (1 + response[None])) @ params["head"]
        return (outputs[:, 0] - labels) ** 2

    rng = np.random.default_rng(0)
    params = {"body": [rng.normal(size=(width, width)).astype(np.float32)] * depth}
    params["head"] = rng.normal(size=(width, 1)).astype(np.float32)
    meta_batch = (rng.normal(size=(rows, width)).astype(np.float32), np.ones(rows, np.float32))
    agent = aj.mlp_agent((width,), hidden_sizes=(4,))
    tx = aj.arbiter(agent, big_response_loss, num_features=width)
    signals = {"agent_inputs": meta_batch[0][:4], "meta_batch": meta_batch}

    flops = lambda compiled: compiled.cost_analysis()["flops"]
    lowered = jax.jit(tx.update).lower(params, tx.init(params), params, **signals)
    hyper = flops(lowered.compile())
    nothing = jnp.zeros(width)
    mean_loss = lambda params: jnp.mean(big_response_loss(params, nothing, meta_batch))
    forward = flops(jax.jit(mean_loss).lower(params).compile())
    both = flops(jax.jit(jax.value_and_grad(mean_loss)).lower(params).compile())
    # One matrix product a layer forward; two backward, but for the inputs of the first layer.
    assert both / forward == pytest.approx((3 * depth - 1) / depth, rel=0.05)
    assert hyper / both == pytest.approx(depth / (3 * depth - 1), rel=0.1)
    assert hyper / forward == pytest.approx(1.0, rel=0.1)
    # The matrix products of the body, one a layer, with the weights as they stand and none across.
    weight = f"tensor<{width}x{width}xf32>"
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert sum(weight in line for line in products) == depth
    assert not any(
        "transpose" in line and weight in line for line in lowered.as_text().splitlines()
    )


# Other losses


def update_with(loss, **extra):
    """(state before, state after) one update with another response loss."""
    params, grads, signals = problem()
    tx = make(loss)
    start = tx.init(params)
    return start, jax.jit(tx.update)(grads, start, params, **signals, **extra)[1]


def test_the_model_state_reaches_the_response_loss():
    def loss_with_state(params, response, meta_batch, model_state):
        return response_loss(params, response, meta_batch) + model_state["shift"]

    (_, expected), (_, state) = step(), update_with(loss_with_state, model_state={"shift": 2.0})
    np.testing.assert_allclose(state.meta_loss, expected.meta_loss + 2, rtol=1e-6)
    np.testing.assert_allclose(state.mixture_logits, expected.mixture_logits, atol=1e-7)


@pytest.mark.slow
def test_a_weighted_response_loss_is_a_weighted_mean():
    weights = np.zeros(NUM_META, np.float32)
    weights[3] = 5.0
    before, state = update_with(lambda *args: aj.WeightedLoss(response_loss(*args), weights))
    params, grads, signals = problem()
    losses = response_loss(
        jax.tree.map(np.add, params, grads),
        before.response_weights * state.mixture,
        signals["meta_batch"],
    )
    np.testing.assert_allclose(state.meta_loss, losses[3], rtol=1e-5)


# What it refuses


@pytest.mark.parametrize("num_features", [1, 2, 5, 7, 64])
def test_num_features_that_does_not_fit_is_named(num_features):
    message = rf"num_features must be the width of the head's input, got {num_features}"
    with pytest.raises(ValueError, match=message):
        trace(make(num_features=num_features), *problem())


@pytest.mark.parametrize("head", ["matrix", "none"])
def test_a_head_with_one_input_takes_one_feature(head):
    def loss(params, response, meta_batch):
        features = jax.nn.relu(meta_batch[0] @ params["w1"][:, :1]) * (1 + response[None, :])
        return jnp.sum(features @ params["w2"][:1] if head == "matrix" else features, axis=1)

    params, grads, signals = problem()
    tx = make(loss, num_features=1)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params, **signals)
    assert int(state.num_skipped) == 0


@pytest.mark.parametrize(
    "loss",
    [
        lambda params, response, meta_batch: jnp.mean(response_loss(params, response, meta_batch)),
        lambda params, response, meta_batch: response_loss(params, response, meta_batch)[:5],
    ],
)
def test_a_response_loss_that_is_not_per_example(loss):
    with pytest.raises(ValueError, match=r"must return one loss per example, shape \(64,\)"):
        trace(make(loss), *problem())


@pytest.mark.parametrize(
    "meta_batch", [(), (np.zeros((0, 4)), np.zeros(0)), (np.zeros((5, 4)), np.zeros(4))]
)
def test_an_empty_or_ragged_meta_batch_is_refused(meta_batch):
    params, grads, signals = problem()
    with pytest.raises(ValueError, match=r"data must "):
        trace(make(), params, grads, signals | {"meta_batch": meta_batch})
