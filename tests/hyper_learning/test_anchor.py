"""Where the mixture stands: at the initial batch size, or where `re_anchor` puts it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from tests.arbiter_runs import AGENT, compiled, make, problem, run, step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "starts"),
    [
        ((8, 512), [*range(8, 512, 37), 63, 64, 65, 511]),
        ((1, 2), [1]),
        ((7, 1000), [7, 8, 500, 999]),
        ((32, 65536), [32, 33, 1000, 40_000, 65_535]),
    ],
)
def test_the_offset_is_exact(limits, starts):
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
def test_the_first_update_is_at_the_initial_batch_size(size):
    start = make(initial_batch_size=size).init(problem().params)
    assert int(start.batch_size) == size
    np.testing.assert_allclose(start.mixture, aj.to_logit(size, 8, 64), rtol=1e-6)
    _, state = step(start)  # the initial size is in the state and nowhere else
    np.testing.assert_allclose(state.mixture, aj.to_logit(size, 8, 64), rtol=1e-6, atol=1e-6)
    # The largest size itself has an infinite logit: the agent starts one below.
    assert int(state.meta_batch_size) == min(size, 63)
    assert int(state.batch_size) == size


@pytest.mark.slow
def test_anchor_none_leaves_the_agent_as_it_is():
    start, state = step(window=2, anchor="none")
    assert float(state.offset) == 0.0
    inputs = problem().signals["agent_inputs"]
    raw = np.sort(np.mean(AGENT.apply(start.agent_params, inputs), axis=0))
    np.testing.assert_allclose(state.proposals, raw, rtol=1e-4, atol=1e-6)
    # So does the offset, but for one constant.
    _, anchored = step()
    np.testing.assert_allclose(anchored.proposals - anchored.offset, raw, rtol=1e-4, atol=1e-5)


def test_re_anchor_starts_over_around_another_size():
    update, _ = compiled()
    params, grads, signals = problem()
    (*_, state) = run(3)
    anchored = aj.re_anchor((optax.EmptyState(), state), 50)
    assert isinstance(anchored[0], optax.EmptyState)
    assert int(aj.get_batch_size(anchored)) == 50
    _, after = update(grads, anchored[1], params, **signals)
    np.testing.assert_allclose(after.mixture, aj.to_logit(50, 8, 64), rtol=1e-5)
    assert int(after.meta_batch_size) == int(after.batch_size) == 50
    assert int(after.window_step) == 1
    assert float(after.offset) != float(state.offset)
    # What the agent has learned stays, alpha and its optimizer start over.
    chex.assert_trees_all_equal(anchored[1].agent_params, state.agent_params)
    chex.assert_trees_all_equal(anchored[1].agent_opt_state, state.agent_opt_state)
    chex.assert_trees_all_equal(anchored[1].response_weights, state.response_weights)
    assert 0 < float(jnp.abs(anchored[1].mixture_logits).max()) < 1e-5
    assert np.any(anchored[1].mixture_logits != state.mixture_logits)
    once = [int(x) for x in jax.tree.leaves(after.mixture_opt_state) if x.dtype == jnp.int32]
    assert once == [1]


@pytest.mark.slow
def test_re_anchor_keeps_injected_hyperparameters():
    # The state of this optimizer is not all zeros at the start: it holds the learning rate.
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


@pytest.mark.slow
def test_re_anchor_keeps_the_shapes_of_vmapped_seeds():
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    states = jax.jit(jax.vmap(lambda key: make(seed=key).init(None)))(keys)
    anchored = jax.jit(aj.re_anchor)(states, 50)
    chex.assert_trees_all_equal_shapes_and_dtypes(anchored, states)
    assert anchored.batch_size.tolist() == [50, 50, 50]
    assert len({tuple(row) for row in anchored.mixture_logits.tolist()}) == 3


def test_re_anchor_needs_an_arbiter():
    with pytest.raises(ValueError, match=r"must hold the state of an aj\.arbiter, found none"):
        aj.re_anchor(optax.sgd(0.1).init({"w": 0.0}), 64)
