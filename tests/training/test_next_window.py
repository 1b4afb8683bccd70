"""The host's one read of a decision: batch size, bucket, steps of the next window."""

import numpy as np
import optax
import pytest

import arbiter_jax as aj


def arbiter():
    agent = aj.mlp_agent((3,), hidden_sizes=(4,))
    limits = {"min_batch_size": 4, "max_batch_size": 32, "initial_batch_size": 13}
    return aj.arbiter(agent, lambda *args: None, num_features=3, **limits)


def test_size_and_bucket_of_a_rule():
    constant = optax.chain(optax.sgd(0.1), aj.schedulers.constant(20))
    assert aj.next_window(constant.init({"w": 0.0})) == (20, 32, 100)
    assert aj.next_window(constant.init({"w": 0.0}), window=7) == (20, 32, 7)


def test_one_bucket_serves_both_batches():
    state = arbiter().init(None)
    assert aj.next_window(state)[:2] == (13, 16)
    assert aj.next_window(state._replace(meta_batch_size=np.int32(17)))[:2] == (13, 32)
    assert aj.next_window(state._replace(batch_size=np.int32(31)))[:2] == (31, 32)


def test_of_vmapped_seeds_the_largest_decides():
    sizes = np.array([3, 40, 8], np.int32)
    state = arbiter().init(None)._replace(batch_size=sizes, meta_batch_size=sizes)
    assert aj.next_window(state)[:2] == (40, 64)


def test_a_rule_may_ask_for_a_shorter_window():
    state = aj.schedulers.noise_floor(num_examples=10**6).init(None)
    assert aj.next_window(state, window=20)[2] == 1
    state = state._replace(window_steps=np.array([7, 30], np.int32))
    assert aj.next_window(state, window=20)[2] == 7
    assert aj.next_window(state, window=5)[2] == 5


def test_a_shadow_does_not_shorten_the_window():
    watched = aj.schedulers.shadow(aj.schedulers.noise_floor(num_examples=10**6))
    state = optax.chain(aj.schedulers.constant(8), watched).init(None)
    assert aj.next_window(state, window=20) == (8, 8, 20)


def test_needs_exactly_one_rule():
    with pytest.raises(ValueError, match=r"exactly one batch-size rule .* found none"):
        aj.next_window(optax.sgd(0.1).init({"w": 0.0}))
    two = optax.chain(aj.schedulers.constant(4), arbiter()).init(None)
    with pytest.raises(ValueError, match=r"found ConstantState, ArbiterState"):
        aj.next_window(two)


@pytest.mark.parametrize("window", [0, -1, 2.0, None])
def test_refuses_a_window_out_of_range(window):
    with pytest.raises(ValueError, match=r"^window must be an integer >= 1, got "):
        aj.next_window(aj.schedulers.constant(4).init(None), window=window)
