"""Arbiter as an optax transformation: what it learns, what it decides, what it refuses."""

import functools
import inspect
import itertools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax.hyper_learning._warm_up import hyper_optimizer

NUM_INPUTS, NUM_FEATURES, NUM_CLASSES, NUM_META = 4, 6, 3, 64
AGENT = aj.mlp_agent((NUM_INPUTS,), hidden_sizes=(5,))


def response_loss(params, response, meta_batch):
    inputs, labels = meta_batch
    features = jax.nn.relu(inputs @ params["w1"])
    outputs = (features * (1 + response[None, :])) @ params["w2"]
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


def make(**options):
    defaults = {"num_features": NUM_FEATURES, "window": 100, "max_batch_size": 64}
    defaults["initial_batch_size"] = 32
    return aj.arbiter(AGENT, response_loss, **(defaults | options))


class Problem(NamedTuple):
    params: Any
    grads: Any
    signals: dict[str, Any]


def problem(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)
    params = {"w1": draw(NUM_INPUTS, NUM_FEATURES), "w2": draw(NUM_FEATURES, NUM_CLASSES)}
    grads = jax.tree.map(lambda x: draw(*x.shape), params)
    labels = rng.integers(NUM_CLASSES, size=NUM_META).astype(np.int32)
    meta_batch = (draw(NUM_META, NUM_INPUTS), labels)
    return Problem(params, grads, {"agent_inputs": draw(8, NUM_INPUTS), "meta_batch": meta_batch})


def with_nan(signals, name, leaf=None):
    """The same signals, with one NaN in the first row of one of them."""

    def poison(x):
        x = np.array(x)
        x[0] = np.nan if x.dtype.kind != "i" else x[0]
        return x

    return signals | {name: jax.tree.map(poison, signals[name])}


@functools.cache
def compiled(**options):
    """(transformation, its compiled update, its first state) for hashable options."""
    tx = make(**options)
    return tx, jax.jit(tx.update), tx.init(problem().params)


def trace(tx, params, grads, signals):
    """Raises what an update raises, without a single program for it."""
    state = jax.eval_shape(tx.init, params)
    return jax.eval_shape(tx.update, grads, state, params, **signals)


def run(num_steps, state=None, **options):
    """Some updates on changing data; the state after each."""
    _, update, start = compiled(**options)
    states = [start if state is None else state]
    for step in range(num_steps):
        params, grads, signals = problem(step)
        _, state = update(grads, states[-1], params, **signals)
        states.append(state)
    return states


# The contract


def test_guarantee_3_updates_pass_unchanged():
    _, update, state = compiled()
    params, grads, signals = problem()
    for _ in range(3):
        updates, state = update(grads, state, params, **signals)
        chex.assert_trees_all_equal(updates, grads)


def test_the_first_state():
    state = compiled()[2]
    assert state._fields[:3] == ("agent_params", "mixture_logits", "response_weights")
    chex.assert_shape(state.mixture_logits, (4,))
    chex.assert_shape(state.proposals, (4,))
    chex.assert_shape(state.response_weights, (NUM_FEATURES,))
    assert 0 < float(jnp.abs(state.mixture_logits).max()) < 1e-5
    assert float(jnp.abs(state.response_weights).max()) <= 1
    assert int(state.batch_size) == int(state.meta_batch_size) == 32
    for name in ("batch_size", "meta_batch_size", "window_step", "num_clipped", "num_skipped"):
        field = getattr(state, name)
        assert (field.shape, field.dtype) == ((), jnp.int32)
    assert state.meta_loss.dtype == jnp.float32
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert state.requires == ("agent_inputs", "meta_batch")
    assert set(state.metrics) <= set(state._fields)


def test_response_weights_are_drawn_uniformly_between_minus_one_and_one():
    weights = make(num_features=10_000).init(None).response_weights
    assert -1 <= float(weights.min()) < -0.99
    assert 0.99 < float(weights.max()) <= 1
    assert abs(float(weights.mean())) < 0.03


def test_state_types_are_stable():
    _, update, start = compiled()
    for state in run(3):
        chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    assert update._cache_size() == 1


def test_a_seed_may_be_an_int_or_a_key():
    expected = make(seed=7).init(None)
    chex.assert_trees_all_equal(make(seed=jax.random.PRNGKey(7)).init(None), expected)
    chex.assert_trees_all_equal(make(seed=jax.random.key(7)).init(None), expected)
    other = make(seed=8).init(None)
    assert float(jnp.abs(other.response_weights - expected.response_weights).max()) > 0.1
    assert np.any(other.key != expected.key)


# One hyper-step


def test_the_response_is_that_of_the_parameters_after_the_update():
    params, grads, signals = problem()
    (_, state) = run(1)
    inputs, labels = signals["meta_batch"]
    size = int(state.meta_batch_size)
    new_params = jax.tree.map(np.add, params, grads)
    before = compiled()[2]
    losses = response_loss(
        new_params, before.response_weights * state.mixture, (inputs[:size], labels[:size])
    )
    assert 0 < size < NUM_META
    np.testing.assert_allclose(state.meta_loss, losses.mean(), rtol=1e-5)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 0.0, 1e30])
def test_guarantee_1_padding_contributes_exactly_zero(garbage):
    _, update, start = compiled()
    params, grads, signals = problem()
    _, expected = update(grads, start, params, **signals)
    size = int(expected.meta_batch_size)
    inputs, labels = (x.copy() for x in signals["meta_batch"])
    inputs[size:] = garbage
    labels[size:] = -1
    _, state = update(grads, start, params, **(signals | {"meta_batch": (inputs, labels)}))
    chex.assert_trees_all_equal(state, expected)
    assert int(state.num_skipped) == 0
    inputs[size - 1] = garbage  # the last one that counts
    _, state = update(grads, start, params, **(signals | {"meta_batch": (inputs, labels)}))
    assert float(state.meta_loss) != float(expected.meta_loss) or int(state.num_skipped) == 1


def test_a_meta_batch_smaller_than_the_proposal_is_clipped_and_counted():
    tx, update, start = compiled()
    params, grads, signals = problem()
    few = jax.tree.map(lambda x: x[:10], signals["meta_batch"])
    _, state = update(grads, start, params, agent_inputs=signals["agent_inputs"], meta_batch=few)
    assert int(state.meta_batch_size) == 32  # what was proposed, not what there was
    assert int(state.num_clipped) == 1
    losses = response_loss(
        jax.tree.map(np.add, params, grads), start.response_weights * state.mixture, few
    )
    np.testing.assert_allclose(state.meta_loss, losses.mean(), rtol=1e-5)
    _, state = update(grads, state, params, **signals)
    assert int(state.num_clipped) == 1
    del tx


def test_the_logged_fields_are_those_of_the_step():
    states = run(3)
    for state in states[1:]:
        np.testing.assert_array_equal(state.proposals, np.sort(state.proposals))
        weights = jax.nn.softmax(state.mixture_logits)
        np.testing.assert_allclose(state.mixture_weights, weights, rtol=1e-6)
        assert int(state.meta_batch_size) == int(aj.to_batch_size(state.mixture, 8, 64))
    assert [int(state.window_step) for state in states] == [0, 1, 2, 3]


def test_a_gradient_step_lowers_the_meta_loss():
    # With a fixed network and fixed data, and rates at which something can be seen to happen.
    options = {"agent_optimizer": optax.sgd(0.05), "mixture_optimizer": optax.sgd(0.05)}
    tx = make(**options, anchor="none")
    params, grads, signals = problem()
    update, state, losses = jax.jit(tx.update), tx.init(params), []
    for _ in range(30):
        _, state = update(grads, state, params, **signals)
        losses.append(float(state.meta_loss))
    assert losses[-1] < losses[0] - 0.05


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


# The end of a window


def test_the_window_end_takes_the_proposal_of_the_largest_weight():
    for chosen in range(4):
        _, update, start = compiled(window=2, anchor="none")
        logits = jnp.zeros(4).at[chosen].set(0.1)
        params, grads, signals = problem()
        # Proposals far apart: the last layer of the agent says them, whatever it sees.
        *hidden, last = start.agent_params
        bias = jnp.array([1.0, -3.0, 3.0, -1.0])
        last = {"weight": jnp.zeros_like(last["weight"]), "bias": bias}
        state = start._replace(agent_params=[*hidden, last], mixture_logits=logits)
        _, state = update(grads, state, params, **signals)
        assert int(state.batch_size) == 32
        assert int(state.window_step) == 1
        _, state = update(grads, state, params, **signals)
        expected = aj.to_batch_size(state.proposals, 8, 64)
        assert len(set(expected.tolist())) == 4
        assert int(state.batch_size) == int(expected[chosen])
        assert int(state.window_step) == 0


def test_the_window_end_starts_alpha_over_and_lets_the_rest_go_on():
    states = run(5, window=2)
    tx = make(window=2)
    ends = [states[2], states[4]]
    for state in ends:
        assert 0 < float(jnp.abs(state.mixture_logits).max()) < 1e-5
        fresh = hyper_optimizer(1e-4).init(state.mixture_logits)
        chex.assert_trees_all_equal(state.mixture_opt_state, fresh)
    assert np.any(ends[0].mixture_logits != ends[1].mixture_logits)
    counts = lambda state: [int(x) for x in jax.tree.leaves(state) if x.dtype == jnp.int32]
    assert [counts(s.agent_opt_state) for s in states] == [[n] for n in range(6)]
    assert [counts(s.mixture_opt_state) for s in states] == [[0], [1], [0], [1], [0], [1]]
    del tx


def test_the_offset_outlives_the_window():
    states = run(5, window=2)
    offsets = {float(state.offset) for state in states[1:]}
    assert len(offsets) == 1
    assert offsets != {0.0}


def test_batch_size_changes_only_at_window_ends():
    sizes = [int(state.batch_size) for state in run(6, window=3)]
    assert sizes[0] == sizes[1] == sizes[2]
    assert sizes[3] == sizes[4] == sizes[5]


def test_without_learning_the_pick_is_random():
    # The control of the experiments: both rates zero, so that alpha decides by its first draw.
    nothing = optax.set_to_zero()
    tx = make(window=1, agent_optimizer=nothing, mixture_optimizer=nothing, anchor="none")
    params, grads, signals = problem()
    state = tx.init(params)

    def step(state, _):
        _, state = tx.update(grads, state, params, **signals)
        return state, state.batch_size

    sizes = jax.jit(lambda state: jax.lax.scan(step, state, None, length=400))(state)[1]
    _, counts = np.unique(sizes[1:], return_counts=True)
    # Some of the four proposals may stand for the same size; each is picked a quarter of the time.
    assert len(counts) > 1
    assert np.all(np.abs(counts / 399 * 4 - np.round(counts / 399 * 4)) < 0.5)
    assert counts.min() > 60


# learn_response and hyper_every


def test_learn_response_false_leaves_the_response_weights_as_drawn():
    states = run(2, learn_response=False)
    chex.assert_trees_all_equal(states[-1].response_weights, states[0].response_weights)
    learnt = run(2)
    assert np.any(learnt[-1].response_weights != learnt[0].response_weights)
    # The same draw, and the same first step of the agent.
    chex.assert_trees_all_equal(states[0].response_weights, learnt[0].response_weights)
    chex.assert_trees_all_close(states[1].agent_params, learnt[1].agent_params, rtol=1e-5)
    moments = lambda state: len(jax.tree.leaves(state.agent_opt_state))
    assert moments(states[0]) == moments(learnt[0]) - 2


def test_hyper_every_learns_at_the_first_of_so_many_updates():
    states = run(7, window=5, hyper_every=3)
    same = lambda a, b: all(
        np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )
    learnt = [not same(a.agent_params, b.agent_params) for a, b in itertools.pairwise(states)]
    # Steps 0 and 3 of the first window, step 0 of the second, which begins after five.
    assert learnt == [True, False, False, True, False, True, False]
    for before, after in itertools.pairwise(states):
        if int(after.window_step) in (2, 3):
            clock = {"window_step": after.window_step, "signals_due": after.signals_due}
            chex.assert_trees_all_equal(after, before._replace(**clock))


def test_hyper_every_1_and_more_take_the_same_step_where_one_is_due():
    params, grads, signals = problem()
    results = []
    for options in ({"window": 6}, {"window": 6, "hyper_every": 6}):
        _, update, start = compiled(**options)
        state = update(grads, start, params, **signals)[1]
        results.append(state._replace(signals_due=None))  # whether the next one is
    chex.assert_trees_all_close(*results, rtol=1e-6)


# Anchors


@pytest.mark.parametrize(
    ("limits", "starts"),
    [
        ((8, 512), [*range(8, 512, 37), 63, 64, 65, 511]),
        ((1, 2), [1]),
        ((7, 1000), [7, 8, 500, 999]),
        ((32, 65536), [32, 33, 1000, 40_000, 65_535]),
    ],
)
def test_the_offset_anchor_is_exact(limits, starts):
    tx = make(min_batch_size=limits[0], max_batch_size=limits[1], initial_batch_size=limits[0])
    params, grads, signals = problem()
    update, start = jax.jit(tx.update), tx.init(params)
    for size in starts:
        size = np.int32(size)
        state = start._replace(batch_size=size, meta_batch_size=size, pending_anchor=size)
        _, state = update(grads, state, params, **signals)
        np.testing.assert_allclose(state.mixture, aj.to_logit(size, *limits), rtol=1e-6, atol=1e-6)
        assert int(state.meta_batch_size) == size
        assert int(state.pending_anchor) == 0


@pytest.mark.parametrize("size", [8, 9, 32, 63, 64])
def test_the_first_update_stands_at_the_initial_batch_size(size):
    tx = make(initial_batch_size=size)
    params, grads, signals = problem()
    start = tx.init(params)
    assert int(start.batch_size) == size
    np.testing.assert_allclose(start.mixture, aj.to_logit(size, 8, 64), rtol=1e-6)
    _, state = jax.jit(tx.update)(grads, start, params, **signals)
    np.testing.assert_allclose(state.mixture, aj.to_logit(size, 8, 64), rtol=1e-6, atol=1e-6)
    # The largest size itself has an infinite logit: the agent starts one below.
    assert int(state.meta_batch_size) == min(size, 63)
    assert int(state.batch_size) == size


def test_anchor_none_leaves_the_agent_as_it_is():
    (_, state) = run(1, anchor="none")
    assert float(state.offset) == 0.0
    start = compiled(anchor="none")[2]
    inputs = problem().signals["agent_inputs"]
    raw = np.sort(np.mean(AGENT.apply(start.agent_params, inputs), axis=0))
    np.testing.assert_allclose(state.proposals, raw, rtol=1e-4, atol=1e-6)
    # So does the offset, but for one constant.
    (_, anchored) = run(1)
    np.testing.assert_allclose(anchored.proposals - anchored.offset, raw, rtol=1e-4, atol=1e-5)


def test_anchor_batch_size_starts_over_around_another_size():
    tx, update, _ = compiled(window=4)
    params, grads, signals = problem()
    (*_, state) = run(3, window=4)
    anchored = aj.re_anchor((optax.EmptyState(), state), 50)
    assert isinstance(anchored[0], optax.EmptyState)
    assert int(aj.get_batch_size(anchored)) == 50
    _, after = update(grads, anchored[1], params, **signals)
    np.testing.assert_allclose(after.mixture, aj.to_logit(50, 8, 64), rtol=1e-5)
    assert int(after.meta_batch_size) == int(after.batch_size) == 50
    assert int(after.window_step) == 1
    assert float(after.offset) != float(state.offset)
    # What the agent has learnt stays, alpha and its optimizer start over.
    chex.assert_trees_all_equal(anchored[1].agent_params, state.agent_params)
    chex.assert_trees_all_equal(anchored[1].agent_opt_state, state.agent_opt_state)
    chex.assert_trees_all_equal(anchored[1].response_weights, state.response_weights)
    assert 0 < float(jnp.abs(anchored[1].mixture_logits).max()) < 1e-5
    assert np.any(anchored[1].mixture_logits != state.mixture_logits)
    once = [int(x) for x in jax.tree.leaves(after.mixture_opt_state) if x.dtype == jnp.int32]
    assert once == [1]
    del tx


def test_anchor_batch_size_keeps_what_the_mixture_optimizer_was_told():
    # The state of this one is not all zeros at the start: it holds the learning rate.
    adam = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    tx = make(mixture_optimizer=adam)
    params, grads, signals = problem()
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(2):
        _, state = update(grads, state, params, **signals)
    anchored = aj.re_anchor(state, 50)
    _, after = update(grads, anchored, params, **signals)
    assert float(after.mixture_opt_state.hyperparams["learning_rate"]) == pytest.approx(0.1)
    assert float(jnp.abs(after.mixture_logits - anchored.mixture_logits).max()) > 0.05


def test_anchor_batch_size_keeps_the_shapes_of_vmapped_seeds():
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    states = jax.jit(jax.vmap(lambda key: make(seed=key).init(None)))(keys)
    anchored = jax.jit(aj.re_anchor)(states, 50)
    chex.assert_trees_all_equal_shapes_and_dtypes(anchored, states)
    assert anchored.batch_size.tolist() == [50, 50, 50]
    assert len({tuple(row) for row in anchored.mixture_logits.tolist()}) == 3


def test_anchor_batch_size_needs_an_arbiter():
    with pytest.raises(ValueError, match=r"must hold the state of an aj\.arbiter, found none"):
        aj.re_anchor(optax.sgd(0.1).init({"w": 0.0}), 64)


# Numbers that are not finite


@pytest.mark.parametrize("where", ["agent_inputs", "meta_batch", "params", "updates"])
def test_a_hyper_step_that_meets_a_nan_changes_nothing_but_num_skipped(where):
    _, update, _ = compiled()
    (*_, state) = run(2)
    params, grads, signals = problem(9)
    if where in signals:
        signals = with_nan(signals, where)
    elif where == "params":
        params = params | {"w1": np.full_like(params["w1"], np.nan)}
    else:
        grads = grads | {"w1": np.full_like(grads["w1"], np.inf)}
    updates, after = update(grads, state, params, **signals)
    expected = state._replace(num_skipped=np.int32(1), window_step=state.window_step + 1)
    chex.assert_trees_all_equal(after, expected)
    chex.assert_trees_all_equal(updates, grads)
    # And it goes on where it was.
    params, grads, signals = problem(10)
    _, after = update(grads, after, params, **signals)
    assert int(after.num_skipped) == 1
    chex.assert_tree_all_finite(after)
    assert np.any(after.response_weights != state.response_weights)


def test_a_nan_at_a_window_end_leaves_a_batch_size_within_the_range():
    _, update, start = compiled(window=2)
    params, grads, signals = problem()
    _, state = update(grads, start, params, **signals)
    _, state = update(grads, state, params, **with_nan(signals, "agent_inputs"))
    assert int(state.num_skipped) == 1
    # The decision is that of the last hyper-step that was one.
    assert int(state.batch_size) in aj.to_batch_size(state.proposals, 8, 64).tolist()
    assert int(state.window_step) == 0
    chex.assert_tree_all_finite(state)


def test_nothing_but_nan_keeps_the_initial_batch_size_and_its_anchor():
    _, update, state = compiled(window=2)
    params, grads, signals = problem()
    for _ in range(5):
        _, state = update(grads, state, params, **with_nan(signals, "meta_batch"))
        assert int(state.batch_size) == 32
    assert int(state.num_skipped) == 5
    _, state = update(grads, state, params, **signals)
    np.testing.assert_allclose(state.mixture, aj.to_logit(32, 8, 64), rtol=1e-5)


# Types and ranges


@pytest.mark.parametrize("limits", [(1, 2), (7, 1000)])
def test_batch_size_stays_within_any_range(limits):
    tx = make(
        min_batch_size=limits[0],
        max_batch_size=limits[1],
        initial_batch_size=limits[1],
        window=1,
        agent_optimizer=optax.sgd(10.0),  # far too fast, on purpose
        mixture_optimizer=optax.sgd(10.0),
    )
    update = jax.jit(tx.update)
    state = tx.init(problem().params)
    assert int(state.batch_size) == limits[1]
    for step in range(6):
        params, grads, signals = problem(step)
        _, state = update(grads, state, params, **signals)
        assert limits[0] <= int(state.batch_size) <= limits[1]
        assert limits[0] <= int(state.meta_batch_size) <= limits[1]


def test_parameters_in_bfloat16():
    params, grads, signals = problem(dtype=jnp.bfloat16)
    tx = make()
    start = tx.init(params)
    updates, state = jax.jit(tx.update)(grads, start, params, **signals)
    chex.assert_trees_all_equal(updates, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
    chex.assert_tree_all_finite(state)
    assert int(state.num_skipped) == 0
    assert int(state.meta_batch_size) == 32
    assert state.meta_loss.dtype == jnp.float32
    assert np.any(state.response_weights != start.response_weights)


def test_everything_in_float64():
    with jax.enable_x64(True):
        params, grads, signals = problem(dtype=np.float64)
        tx = make(window=2)
        state = start = tx.init(params)
        update = jax.jit(tx.update)
        for _ in range(3):
            _, state = update(grads, state, params, **signals)
            chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
        floats = [x.dtype for x in jax.tree.leaves(state) if x.dtype.kind == "f"]
        assert set(floats) == {jnp.dtype("float64")}
        assert update._cache_size() == 1


# Company


def test_in_a_chain_it_sees_the_parameters_after_the_whole_update():
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), make())
    params, grads, signals = problem()
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, **signals)
    alone = make()
    _, expected = jax.jit(alone.update)(updates, alone.init(params), params, **signals)
    chex.assert_trees_all_close(state[1], expected, rtol=1e-5)
    assert int(aj.get_batch_size(state)) == 32


def test_in_multi_steps_it_takes_one_step_per_whole_batch():
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.1), make(window=2)), every_k_schedule=2)
    params, grads, signals = problem()
    update, state = jax.jit(tx.update), tx.init(params)
    steps = []
    for _ in range(4):
        updates, state = update(grads, state, params, **signals)
        steps.append(int(state.inner_opt_state[1].window_step))
        assert int(aj.get_batch_size(state)) >= 8
    assert steps == [0, 1, 1, 0]
    np.testing.assert_allclose(updates["w1"], -0.1 * grads["w1"], rtol=1e-5)


def test_in_apply_if_finite_a_bad_gradient_is_no_step_at_all():
    tx = optax.apply_if_finite(optax.chain(optax.sgd(0.1), make()), max_consecutive_errors=3)
    params, grads, signals = problem()
    update, start = jax.jit(tx.update), tx.init(params)
    bad = jax.tree.map(lambda x: np.full_like(x, np.nan), grads)
    updates, state = update(bad, start, params, **signals)
    chex.assert_trees_all_equal(state.inner_state, start.inner_state)
    assert not np.any(updates["w1"])
    _, state = update(grads, state, params, **signals)
    assert int(state.inner_state[1].window_step) == 1
    assert int(aj.get_batch_size(state)) == 32


def test_a_scan_gives_what_a_loop_gives():
    tx = make(window=2)
    params, grads, signals = problem()

    def step(state, _):
        _, state = tx.update(grads, state, params, **signals)
        return state, state.batch_size

    scanned, sizes = jax.jit(lambda state: jax.lax.scan(step, state, None, length=4))(
        tx.init(params)
    )
    _, update, state = compiled(window=2)
    looped = []
    for _ in range(4):
        _, state = update(grads, state, params, **signals)
        looped.append(int(state.batch_size))
    chex.assert_trees_all_close(scanned, state, rtol=1e-4, atol=1e-6)
    assert sizes.tolist() == looped


@pytest.mark.parametrize("hyper_every", [1, 2])
def test_seeds_vmap_to_what_each_of_them_does_alone(hyper_every):
    keys = jax.random.split(jax.random.PRNGKey(5), 3)
    params, grads, signals = problem()

    def three_steps(key):
        tx = make(seed=key, window=2, hyper_every=hyper_every)
        step = lambda state, _: (tx.update(grads, state, params, **signals)[1], None)
        return jax.lax.scan(step, tx.init(params), None, length=3)[0]

    together = jax.jit(jax.vmap(three_steps))(keys)
    compiled_once = jax.jit(three_steps)
    alone = [compiled_once(key) for key in keys]
    alone = jax.tree.map(lambda *x: np.stack(x), *alone)
    chex.assert_trees_all_close(together, alone, rtol=1e-4, atol=1e-5)
    assert len(set(together.mixture.tolist())) == 3
    assert aj.get_batch_size(together).shape == (3,)


def test_the_state_of_a_model_reaches_the_response_loss():
    def loss_with_state(params, response, meta_batch, model_state):
        return response_loss(params, response, meta_batch) + model_state["shift"]

    params, grads, signals = problem()
    states = []
    for loss, extra in ((response_loss, {}), (loss_with_state, {"model_state": {"shift": 2.0}})):
        tx = aj.arbiter(AGENT, loss, num_features=NUM_FEATURES)
        states.append(jax.jit(tx.update)(grads, tx.init(params), params, **signals, **extra)[1])
    np.testing.assert_allclose(states[1].meta_loss, states[0].meta_loss + 2, rtol=1e-6)
    np.testing.assert_allclose(states[1].mixture_logits, states[0].mixture_logits, atol=1e-7)


def test_a_weighted_response_loss_is_a_weighted_mean():
    weights = np.zeros(NUM_META, np.float32)
    weights[3] = 5.0
    weighted = lambda *args: aj.WeightedLoss(response_loss(*args), weights)
    params, grads, signals = problem()
    tx = aj.arbiter(AGENT, weighted, num_features=NUM_FEATURES)
    start = tx.init(params)
    _, state = jax.jit(tx.update)(grads, start, params, **signals)
    losses = response_loss(
        jax.tree.map(np.add, params, grads),
        start.response_weights * state.mixture,
        signals["meta_batch"],
    )
    np.testing.assert_allclose(state.meta_loss, losses[3], rtol=1e-5)


def test_extra_arguments_of_other_transformations_are_ignored():
    _, update, start = compiled()
    params, grads, signals = problem()
    _, expected = update(grads, start, params, **signals)
    _, state = update(grads, start, params, **signals, value=1.0, batch_size=np.int32(5), other=2)
    chex.assert_trees_all_close(state, expected, rtol=1e-6)


# What it refuses


@pytest.mark.parametrize("missing", ["agent_inputs", "meta_batch", "params"])
def test_a_missing_signal_is_a_type_error_that_names_it(missing):
    tx, _, state = compiled()
    params, grads, signals = problem()
    params = None if missing == "params" else params
    signals.pop(missing, None)
    with pytest.raises(TypeError, match=rf"arbiter needs the signal `{missing}`: call update"):
        tx.update(grads, state, params, **signals)


@pytest.mark.parametrize("shape", [(8, 3), (8, 5), (8,), (8, 4, 1), (4,), (7, 4)])
def test_an_agent_of_the_wrong_shape_is_named(shape):
    agent = aj.Agent(lambda key: jnp.zeros(()), lambda params, inputs: jnp.zeros(shape) + params)
    tx = aj.arbiter(agent, response_loss, num_features=NUM_FEATURES)
    params, grads, signals = problem()
    with pytest.raises(ValueError, match=r"\(batch, num_proposals\) = \(8, 4\), got"):
        trace(tx, params, grads, signals)


@pytest.mark.parametrize("num_features", [1, 2, 5, 7, 64])
def test_num_features_that_does_not_fit_the_head_is_named(num_features):
    tx = make(num_features=num_features)
    params, grads, signals = problem()
    message = rf"num_features must be the width of the head's input, got {num_features}"
    with pytest.raises(ValueError, match=message):
        trace(tx, params, grads, signals)


@pytest.mark.parametrize("head", ["matrix", "none"])
def test_a_head_with_one_input_takes_one_feature(head):
    def loss(params, response, meta_batch):
        features = jax.nn.relu(meta_batch[0] @ params["w1"][:, :1]) * (1 + response[None, :])
        return jnp.sum(features @ params["w2"][:1] if head == "matrix" else features, axis=1)

    tx = aj.arbiter(AGENT, loss, num_features=1)
    params, grads, signals = problem()
    _, state = jax.jit(tx.update)(grads, tx.init(params), params, **signals)
    assert int(state.num_skipped) == 0


@pytest.mark.parametrize(
    "loss",
    [
        lambda params, response, meta_batch: jnp.mean(response_loss(params, response, meta_batch)),
        lambda params, response, meta_batch: response_loss(params, response, meta_batch)[:5],
    ],
)
def test_a_response_loss_that_is_not_per_example_is_told_so(loss):
    tx = aj.arbiter(AGENT, loss, num_features=NUM_FEATURES)
    params, grads, signals = problem()
    with pytest.raises(ValueError, match=r"must return one loss per example, shape \(64,\)"):
        trace(tx, params, grads, signals)


@pytest.mark.parametrize(
    "meta_batch", [(), (np.zeros((0, 4)), np.zeros(0)), (np.zeros((5, 4)), np.zeros(4))]
)
def test_an_empty_or_ragged_meta_batch_is_refused(meta_batch):
    tx = make()
    params, grads, signals = problem()
    with pytest.raises(ValueError, match=r"data must "):
        trace(tx, params, grads, signals | {"meta_batch": meta_batch})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"min_batch_size": 128},
            "max_batch_size must be >= min_batch_size, got max_batch_size=64",
        ),
        (
            {"min_batch_size": 64, "initial_batch_size": 64},
            "max_batch_size must be > min_batch_size, got 64 for both",
        ),
        ({"min_batch_size": 0}, "min_batch_size must be an integer >= 1, got 0"),
        ({"min_batch_size": -8}, "min_batch_size must be an integer >= 1, got -8"),
        ({"min_batch_size": 8.0}, "min_batch_size must be an integer >= 1, got 8.0"),
        ({"max_batch_size": "64"}, "max_batch_size must be an integer >= 1, got '64'"),
        ({"initial_batch_size": 7}, "initial_batch_size must be an integer >= 8 and <= 64, got 7"),
        (
            {"initial_batch_size": 65},
            "initial_batch_size must be an integer >= 8 and <= 64, got 65",
        ),
        ({"window": 0}, "window must be an integer >= 1, got 0"),
        ({"window": 10.0}, "window must be an integer >= 1, got 10.0"),
        ({"num_features": 0}, "num_features must be an integer >= 1, got 0"),
        ({"hyper_every": 0}, "hyper_every must be an integer >= 1 and <= 100, got 0"),
        ({"hyper_every": 101}, "hyper_every must be an integer >= 1 and <= 100, got 101"),
        ({"anchor": "warm_up"}, "anchor must be one of 'offset', 'none', got 'warm_up'"),
    ],
)
def test_bad_arguments_are_named_with_value_and_range(options, message):
    defaults = {"num_features": NUM_FEATURES, "max_batch_size": 64, "window": 100}
    with pytest.raises(ValueError, match=message):
        aj.arbiter(AGENT, response_loss, **(defaults | options))


def test_the_signature_is_the_public_contract():
    parameters = inspect.signature(aj.arbiter).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    expected = {
        "min_batch_size": 8,
        "max_batch_size": 512,
        "initial_batch_size": 64,
        "window": 100,
        "agent_optimizer": None,
        "mixture_optimizer": None,
        "learn_response": True,
        "anchor": "offset",
        "hyper_every": 1,
        "seed": 0,
    }
    assert expected.items() <= defaults.items()
    assert list(parameters)[:2] == ["agent", "response_loss"]


# Objectives that depend on the batch size


TRACKER = aj.mlp_agent((64,))


def follow(targets, start, **options):
    """The sizes and the mixtures of an agent whose objective is a / b + log b, a given a step."""
    objective = aj.noise_response("noise_floor")
    # The statistics are somebody else's test: here the closed form is what `value` says.
    told = lambda state, sample, due, size, signals: state._replace(
        held_batch_size=signals["value"]
    )
    tx = aj.arbiter(
        TRACKER,
        objective=objective._replace(measure=lambda *args: (), update=told),
        initial_batch_size=start,
        window=10,
        **options,
    )
    zeros = jnp.zeros(2)
    noise = dict.fromkeys(("gradient_noise", "update_noise", "grad_stats"), zeros)

    def step(state, inputs):
        target, seen = inputs
        _, state = tx.update(zeros, state, zeros, agent_inputs=seen, value=target, **noise)
        return state, (state.batch_size, aj.to_batch_size(state.mixture, 8, 512))

    seen = jax.random.uniform(jax.random.PRNGKey(1), (len(targets), 32, 64))  # as pixels are
    run = jax.jit(lambda state: jax.lax.scan(step, state, (jnp.asarray(targets), seen)))
    state, (sizes, mixtures) = run(tx.init(zeros))
    return np.asarray(sizes), np.asarray(mixtures), state


@pytest.mark.parametrize(
    ("start", "target", "spread"),
    # On the long way from an end of the range the proposals spread, and stay so.
    [(64, 20.0, 0.5), (16, 200.0, 0.5), (512 - 1, 40.0, 0.9)],
)
def test_an_agent_tracks_the_closed_form_within_a_tenth_of_the_budget(start, target, spread):
    budget = 1000
    sizes, mixtures, _ = follow(np.full(budget, target, np.float32), start)
    after = slice(budget // 10, None)
    assert np.quantile(np.abs(np.log(mixtures[after] / target)), 0.95) < 0.25
    # What is selected is one of the proposals around the mixture.
    assert np.median(np.abs(np.log(sizes[after] / target))) < spread


def test_an_agent_follows_a_closed_form_that_moves():
    targets = np.geomspace(30, 240, 600).astype(np.float32)
    _, mixtures, _ = follow(targets, 30)
    assert np.median(np.abs(np.log(mixtures[100:] / targets[100:]))) < 0.15


def test_an_agent_comes_back_from_the_end_of_the_range():
    targets = np.r_[np.full(600, 1.0), np.full(200, 60.0)].astype(np.float32)
    sizes, mixtures, _ = follow(targets, 64)
    assert sizes[599] <= 9
    assert 45 < mixtures[-1] < 75


def test_an_objective_that_says_nothing_is_skipped_and_counted():
    targets = np.full(30, 40.0, np.float32)
    targets[10:13] = np.nan
    _, mixtures, state = follow(targets, 64)
    assert int(state.meta_batch_size) == int(state.batch_size)
    assert int(state.num_skipped) == 3
    assert len(set(mixtures[9:13].tolist())) == 1
    chex.assert_tree_all_finite(state)


def test_an_agent_with_an_objective_asks_for_what_it_reads():
    init = lambda **options: aj.arbiter(TRACKER, **options).init(None)
    floor = init(objective=aj.noise_response("noise_floor"))
    floor_signals = {"agent_inputs", "value", "gradient_noise", "update_noise", "grad_stats"}
    assert aj.base.requests(floor).signals == floor_signals
    loss_fn = lambda params, batch: batch
    guarded = init(objective=aj.noise_response("noise_floor", loss_fn=loss_fn))
    assert aj.base.requests(guarded).signals == floor_signals | {"meta_batch"}
    gain = init(objective=aj.noise_response("expected_gain", loss_fn=loss_fn))
    assert aj.base.requests(gain).signals == {"agent_inputs", "meta_batch", "update_noise"}
    assert isinstance(floor, aj.ArbiterState)
    assert isinstance(gain, aj.ArbiterState)
    assert int(aj.get_batch_size(aj.re_anchor(gain, 128))) == 128


def test_expected_gain_is_an_objective_in_the_engine():
    """On a quadratic the agent ends near the closed form of its own statistics."""
    loss_fn = lambda w, x: jnp.sum((w[None] - x) ** 2, axis=1) / 2
    data = jax.random.normal(jax.random.PRNGKey(0), (512, 64))
    objective = aj.noise_response("expected_gain", loss_fn=loss_fn)
    rule = aj.arbiter(TRACKER, objective=objective, max_batch_size=64, window=10)
    tx = optax.chain(optax.sgd(0.1), rule)
    result = aj.fit(
        loss_fn, jnp.ones(64), tx, aj.Data(data, data), num_examples=40_000, window=10, key=1
    )
    state = result.state.opt_state[1]
    assert int(state.num_skipped) == 0
    # At its optimum a quadratic has nothing to gain: the largest size.
    assert float(objective.best(state.statistics)) > 64
    assert result.history[-1].batch_size > 50


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: aj.arbiter(AGENT), "exactly one of response_loss and objective"),
        (
            lambda: aj.arbiter(AGENT, response_loss, num_features=6, objective=object()),
            "exactly one of response_loss and objective",
        ),
        (lambda: aj.noise_response("noise"), "kind must be one of"),
        (lambda: aj.noise_response("expected_gain"), "loss_fn is needed"),
        (lambda: aj.noise_response("noise_floor", every=3), "options must be among num_examples"),
        (lambda: aj.noise_response("noise_floor", share=-1.0), "share must be"),
    ],
)
def test_a_wrong_objective_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
