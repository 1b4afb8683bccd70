"""Arbiter as an optax transformation: what it learns, what it decides, what it refuses."""

import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax.hyper_learning._warm_up import hyper_optimizer
from tests.arbiter_runs import (
    AGENT,
    NUM_FEATURES,
    compiled,
    make,
    problem,
    response_loss,
    run,
    step,
    trace,
)


def with_nan(signals, name):
    """The same signals, with one NaN in the first row of one of them."""

    def poison(x):
        x = np.array(x)
        x[0] = np.nan if x.dtype.kind != "i" else x[0]
        return x

    return signals | {name: jax.tree.map(poison, signals[name])}


# The state


def test_the_first_state():
    state = compiled()[1]
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
    assert (int(state.min_batch_size), int(state.max_batch_size)) == (8, 64)
    assert state.meta_loss.dtype == jnp.float32
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    requested = aj.base.requests(state)
    assert requested.signals == {"agent_inputs", "meta_batch"}
    assert set(requested.metrics) == set(state.metrics) <= set(state._fields)


def test_response_weights_are_drawn_uniformly():
    weights = make(num_features=10_000).init(None).response_weights
    assert -1 <= float(weights.min()) < -0.99
    assert 0.99 < float(weights.max()) <= 1
    assert abs(float(weights.mean())) < 0.03


def test_a_seed_may_be_an_int_or_a_key():
    expected = make(seed=7).init(None)
    chex.assert_trees_all_equal(make(seed=jax.random.PRNGKey(7)).init(None), expected)
    chex.assert_trees_all_equal(make(seed=jax.random.key(7)).init(None), expected)
    other = make(seed=8).init(None)
    assert float(jnp.abs(other.response_weights - expected.response_weights).max()) > 0.1
    assert np.any(other.key != expected.key)


@pytest.mark.slow
def test_seeds_vmap_to_what_each_of_them_does_alone():
    """Also where the conditions of their hyper-steps meet."""
    keys = jax.random.split(jax.random.PRNGKey(5), 3)
    params, grads, signals = problem()

    def three_steps(key):
        tx = make(seed=key, window=2, hyper_every=2)
        step = lambda state, _: (tx.update(grads, state, params, **signals)[1], None)
        return jax.lax.scan(step, tx.init(params), None, length=3)[0]

    together = jax.jit(jax.vmap(three_steps))(keys)
    compiled_once = jax.jit(three_steps)
    alone = [compiled_once(key) for key in keys]
    alone = jax.tree.map(lambda *x: np.stack(x), *alone)
    chex.assert_trees_all_close(together, alone, rtol=1e-4, atol=1e-5)
    assert len(set(together.mixture.tolist())) == 3
    assert aj.get_batch_size(together).shape == (3,)


# One hyper-step


def test_metrics_are_those_of_the_step():
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

    def step(state, _):
        state = tx.update(grads, state, params, **signals)[1]
        return state, state.meta_loss

    losses = jax.jit(lambda s: jax.lax.scan(step, s, length=30))(tx.init(params))[1]
    assert losses[-1] < losses[0] - 0.05


def test_it_sees_the_parameters_after_the_whole_update():
    """In a chain: momentum, and all."""
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), make())
    params, grads, signals = problem()
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, **signals)
    update, start = compiled()
    _, expected = update(updates, start, params, **signals)
    chex.assert_trees_all_close(state[1], expected, rtol=1e-5)
    assert int(aj.get_batch_size(state)) == 32


@pytest.mark.slow
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


# The end of a window


@pytest.mark.slow
def test_the_window_end_takes_the_heaviest_proposal():
    update, start = compiled(window=2, anchor="none")
    params, grads, signals = problem()
    # Proposals far apart: the last layer of the agent says them, whatever it sees.
    *hidden, last = start.agent_params
    bias = jnp.array([1.0, -3.0, 3.0, -1.0])
    last = {"weight": jnp.zeros_like(last["weight"]), "bias": bias}
    for chosen in range(4):
        logits = jnp.zeros(4).at[chosen].set(0.1)
        state = start._replace(agent_params=[*hidden, last], mixture_logits=logits)
        _, state = update(grads, state, params, **signals)
        assert int(state.batch_size) == 32
        assert int(state.window_step) == 1
        _, state = update(grads, state, params, **signals)
        expected = aj.to_batch_size(state.proposals, 8, 64)
        assert len(set(expected.tolist())) == 4
        assert int(state.batch_size) == int(expected[chosen])
        assert int(state.window_step) == 0


def test_the_window_end_starts_alpha_over():
    """And lets the rest go on."""
    states = run(5, window=2)
    ends = [states[2], states[4]]
    for state in ends:
        assert 0 < float(jnp.abs(state.mixture_logits).max()) < 1e-5
        fresh = hyper_optimizer(1e-4).init(state.mixture_logits)
        chex.assert_trees_all_equal(state.mixture_opt_state, fresh)
        # What was learned is still reported.
        assert np.any(state.mixture_weights != jax.nn.softmax(state.mixture_logits))
    assert np.any(ends[0].mixture_logits != ends[1].mixture_logits)
    counts = lambda state: [int(x) for x in jax.tree.leaves(state) if x.dtype == jnp.int32]
    assert [counts(s.agent_opt_state) for s in states] == [[n] for n in range(6)]
    assert [counts(s.mixture_opt_state) for s in states] == [[0], [1], [0], [1], [0], [1]]


def test_the_offset_outlives_the_window():
    offsets = {float(state.offset) for state in run(5, window=2)[1:]}
    assert len(offsets) == 1
    assert offsets != {0.0}


def test_batch_size_changes_only_at_window_ends():
    sizes = [int(state.batch_size) for state in run(5, window=2)]
    assert sizes[0] == sizes[1]
    assert sizes[2] == sizes[3]
    assert sizes[4] == sizes[5]


def test_without_learning_the_pick_is_random():
    # The control of the experiments: both rates zero, so that alpha decides by its first draw.
    nothing = optax.set_to_zero()
    tx = make(window=1, agent_optimizer=nothing, mixture_optimizer=nothing, anchor="none")
    params, grads, signals = problem()

    def step(state, _):
        _, state = tx.update(grads, state, params, **signals)
        return state, state.batch_size

    sizes = jax.jit(lambda s: jax.lax.scan(step, s, length=400))(tx.init(params))[1]
    _, counts = np.unique(sizes[1:], return_counts=True)
    # Some of the four proposals may stand for the same size; each is picked a quarter of the time.
    assert len(counts) > 1
    assert np.all(np.abs(counts / 399 * 4 - np.round(counts / 399 * 4)) < 0.5)
    assert counts.min() > 60


# learn_response and hyper_every


def test_learn_response_false_keeps_the_weights():
    states, learned = run(2, learn_response=False), run(2)
    chex.assert_trees_all_equal(states[-1].response_weights, states[0].response_weights)
    assert np.any(learned[-1].response_weights != learned[0].response_weights)
    # The same draw, and the same first step of the agent.
    chex.assert_trees_all_equal(states[0].response_weights, learned[0].response_weights)
    chex.assert_trees_all_close(states[1].agent_params, learned[1].agent_params, rtol=1e-5)
    moments = lambda state: len(jax.tree.leaves(state.agent_opt_state))
    assert moments(states[0]) == moments(learned[0]) - 2


@pytest.mark.slow
def test_hyper_every_learns_at_every_nth_update():
    states = run(7, window=5, hyper_every=3)
    same = lambda a, b: all(
        np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )
    learned = [not same(a.agent_params, b.agent_params) for a, b in itertools.pairwise(states)]
    # Steps 0 and 3 of the first window, step 0 of the second, which begins after five.
    assert learned == [True, False, False, True, False, True, False]
    for before, after in itertools.pairwise(states):
        if int(after.window_step) in (2, 3):
            clock = {"window_step": after.window_step, "signals_due": after.signals_due}
            chex.assert_trees_all_equal(after, before._replace(**clock))


@pytest.mark.slow
def test_hyper_every_takes_the_same_steps():
    often, rarely = step()[1], step(window=5, hyper_every=3)[1]
    chex.assert_trees_all_close(rarely._replace(signals_due=None), often, rtol=1e-6)


@pytest.mark.parametrize("made", [True, False])
def test_signals_that_a_loop_made_or_not(made):
    """Known while tracing: a hyper-step without a condition, or none at all."""
    tx = make(window=5, hyper_every=3)
    params, grads, signals = problem()
    # The end of the window is the one condition that is left.
    update = lambda state: tx.update(grads, state, params, **signals, signals_made=made)[1]
    state = compiled(window=5, hyper_every=3)[1]
    assert str(jax.make_jaxpr(update)(state)).count("while[") == 0
    after = jax.jit(update)(state)
    if made:
        chex.assert_trees_all_close(after, step(window=5, hyper_every=3)[1], rtol=1e-6)
    else:
        clock = {"window_step": after.window_step, "signals_due": after.signals_due}
        chex.assert_trees_all_equal(after, state._replace(**clock))
        assert int(after.window_step) == 1


# Numbers that are not finite


@pytest.mark.parametrize("where", ["agent_inputs", "meta_batch", "params", "updates"])
def test_a_nan_changes_nothing_but_num_skipped(where):
    update, _ = compiled()
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


def test_a_nan_at_a_window_end_leaves_a_valid_size():
    update, start = compiled(window=2)
    params, grads, signals = problem()
    _, state = update(grads, start, params, **signals)
    _, state = update(grads, state, params, **with_nan(signals, "agent_inputs"))
    assert int(state.num_skipped) == 1
    # The decision is that of the last hyper-step that was one.
    assert int(state.batch_size) in aj.to_batch_size(state.proposals, 8, 64).tolist()
    assert int(state.window_step) == 0
    chex.assert_tree_all_finite(state)


def test_nothing_but_nan_keeps_the_size_and_its_anchor():
    update, state = compiled(window=2)
    params, grads, signals = problem()
    for _ in range(5):
        _, state = update(grads, state, params, **with_nan(signals, "meta_batch"))
        assert int(state.batch_size) == 32
    assert int(state.num_skipped) == 5
    _, state = update(grads, state, params, **signals)
    np.testing.assert_allclose(state.mixture, aj.to_logit(32, 8, 64), rtol=1e-5)


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
    for t in range(6):
        params, grads, signals = problem(t)
        _, state = update(grads, state, params, **signals)
        assert limits[0] <= int(state.batch_size) <= limits[1]
        assert limits[0] <= int(state.meta_batch_size) <= limits[1]


# What it refuses


def test_missing_params_are_named():
    _, grads, signals = problem()
    with pytest.raises(TypeError, match="arbiter needs the signal `params`: call update"):
        make().update(grads, compiled()[1], None, **signals)


@pytest.mark.parametrize("shape", [(8, 3), (8, 5), (8,), (8, 4, 1), (4,), (7, 4)])
def test_an_agent_of_the_wrong_shape_is_named(shape):
    agent = aj.Agent(lambda key: jnp.zeros(()), lambda params, inputs: jnp.zeros(shape) + params)
    tx = aj.arbiter(agent, response_loss, num_features=NUM_FEATURES)
    with pytest.raises(ValueError, match=r"\(batch, num_proposals\) = \(8, 4\), got"):
        trace(tx, *problem())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"min_batch_size": 64, "initial_batch_size": 64},
            "max_batch_size must be > min_batch_size, got 64 for both",
        ),
        ({"max_batch_size": "64"}, "max_batch_size must be an integer >= 1, got '64'"),
        ({"window": 0}, "window must be an integer >= 1, got 0"),
        ({"window": 10.0}, "window must be an integer >= 1, got 10.0"),
        ({"num_features": 0}, "num_features must be an integer >= 1, got 0"),
        ({"hyper_every": 0}, "hyper_every must be an integer >= 1 and <= 100, got 0"),
        ({"hyper_every": 101}, "hyper_every must be an integer >= 1 and <= 100, got 101"),
        ({"anchor": "warm_up"}, "anchor must be one of 'offset', 'none', got 'warm_up'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


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
    assert AGENT.num_proposals == 4
