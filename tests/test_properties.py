"""Properties that hold for whatever comes: Hypothesis looks for what breaks them."""

import functools
import itertools

import chex
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import arbiter_jax as aj
from arbiter_jax.batching import batch_mask, masked_mean
from arbiter_jax.batching._masking import replace_padding
from arbiter_jax.batching._sampling import permuted_index
from arbiter_jax.gradients import masked_value_and_grad, value_grad_and_stats
from arbiter_jax.gradients._estimators import stats_from_pieces

NUM_ROWS = 8
FLOATS = st.floats(width=32, allow_subnormal=False)  # all of them: NaN and infinities as well
MODERATE = st.floats(-100, 100, width=32, allow_subnormal=False)


@st.composite
def ranges(draw):
    low = draw(st.integers(1, 65_535))
    return low, draw(st.integers(low + 1, 65_536))


def rows(elements):
    return hnp.arrays(np.float32, NUM_ROWS, elements=elements)


# Buckets and logits


@pytest.mark.slow
@given(st.integers(1, 2**60))
def test_a_bucket_is_less_than_twice_its_size(n):
    bucket = aj.next_bucket(n)
    assert n <= bucket < 2 * n
    assert bucket.bit_count() == 1
    assert aj.next_bucket(bucket) == bucket


@given(st.integers(1, 2**60), st.integers(1, 2**60))
def test_buckets_are_monotone(a, b):
    assert (aj.next_bucket(min(a, b))) <= aj.next_bucket(max(a, b))


@given(ranges(), st.data())
def test_all_buckets_hold_every_size_between(limits, data):
    low, high = limits
    buckets = aj.all_buckets(low, high)
    assert aj.next_bucket(data.draw(st.integers(low, high))) in buckets
    assert (buckets[0], buckets[-1]) == (aj.next_bucket(low), aj.next_bucket(high))
    assert all(b == 2 * a for a, b in itertools.pairwise(buckets))


@given(ranges(), st.data())
def test_a_batch_size_survives_its_logit(limits, data):
    size = data.draw(st.integers(limits[0], limits[1] - 1))
    assert int(aj.to_batch_size(aj.to_logit(size, *limits), *limits)) == size


@given(FLOATS, ranges())
@example(float("nan"), (8, 512))
@example(float("-inf"), (8, 512))
@example(float("inf"), (1, 2))
def test_a_batch_size_stays_within_its_range(logit, limits):
    size = aj.to_batch_size(np.float32(logit), *limits)
    assert size.dtype == jnp.int32
    assert limits[0] <= int(size) <= limits[1]


@given(FLOATS, FLOATS, ranges())
def test_a_larger_logit_is_no_smaller_batch_size(a, b, limits):
    assume(not np.isnan(a) and not np.isnan(b))
    sizes = aj.to_batch_size(np.array([min(a, b), max(a, b)], np.float32), *limits)
    assert int(sizes[0]) <= int(sizes[1])


# Sampling


@functools.cache
def epochs_of(num_examples):
    position = np.arange(num_examples, dtype=np.int32)
    shuffle = lambda key, epoch: permuted_index(
        key, jnp.full_like(position, epoch), position, num_examples
    )
    return jax.jit(shuffle)


@pytest.mark.slow
@given(
    st.sampled_from([1, 2, 3, 5, 12, 97, 1000]), st.integers(0, 2**32 - 1), st.integers(0, 2**30)
)
def test_every_epoch_of_every_key_is_a_permutation(num_examples, seed, epoch):
    key = np.array([seed, ~seed % 2**32], np.uint32)
    order = epochs_of(num_examples)(key, np.int32(epoch))
    assert sorted(order.tolist()) == list(range(num_examples))


sample_batch = jax.jit(aj.sample_batch, static_argnums=3)


@pytest.mark.slow
@given(
    st.sampled_from([1, 3, 10, 37]),
    st.lists(st.integers(1, 16), min_size=1, max_size=10),
    st.integers(0, 2**32 - 1),
)
def test_no_example_comes_twice_in_an_epoch(num_examples, sizes, seed):
    sampler = aj.init_sampler(np.array([0, seed], np.uint32))
    counts = np.zeros(num_examples, int)
    for size in sizes:
        sampler, batch, mask = sample_batch(sampler, np.arange(num_examples), size, 16)
        assert int(mask.sum()) == size
        np.add.at(counts, np.asarray(batch)[np.asarray(mask)], 1)
        assert counts.max() - counts.min() <= 1
    assert counts.sum() == sum(sizes)


# Padding


def loss_fn(params, batch):
    inputs, labels = batch
    return jnp.sqrt(jnp.abs(params["a"] * inputs)) - params["b"] * labels


PARAMS = {"a": np.float32(0.7), "b": np.float32(-1.3)}
GRADIENT_FNS = {
    "plain": jax.jit(masked_value_and_grad(loss_fn)),
    "pieces": jax.jit(value_grad_and_stats(loss_fn, num_pieces=4)),
    "per_example": jax.jit(value_grad_and_stats(loss_fn, method="per_example", micro_batch_size=4)),
}


@given(rows(MODERATE), rows(MODERATE), rows(FLOATS), rows(FLOATS), st.integers(1, NUM_ROWS))
def test_the_content_of_padding_changes_no_bit(inputs, labels, garbage, other, batch_size):
    mask = batch_mask(batch_size, NUM_ROWS)
    clean = (inputs, labels)
    spoilt = jax.tree.map(lambda x, g: np.where(mask, x, g), clean, (garbage, other))
    chex.assert_trees_all_equal(replace_padding(spoilt, mask), replace_padding(clean, mask))
    for gradient_fn in GRADIENT_FNS.values():
        out = gradient_fn(PARAMS, spoilt, mask)
        chex.assert_trees_all_equal(out, gradient_fn(PARAMS, clean, mask))


@given(rows(MODERATE), rows(FLOATS), st.integers(1, NUM_ROWS))
def test_the_masked_mean_is_the_mean_of_the_rest(losses, garbage, batch_size):
    mask = batch_mask(batch_size, NUM_ROWS)
    mean = masked_mean(jnp.where(mask, losses, garbage), mask)
    np.testing.assert_allclose(mean, losses[:batch_size].mean(dtype=np.float64), atol=1e-4)


def response_loss(params, response, meta_batch):
    inputs, labels = meta_batch
    # Smooth at zero, where a root alone has no gradient.
    return jnp.sqrt(1 + (inputs * (1 + response[0]) * params["a"]) ** 2) - labels


@functools.cache
def arbiter():
    agent = aj.mlp_agent((1,), hidden_sizes=(2,))
    tx = aj.arbiter(
        agent,
        response_loss,
        num_features=1,
        min_batch_size=1,
        max_batch_size=NUM_ROWS,
        initial_batch_size=4,
        window=1,
        anchor="none",
    )
    return jax.jit(tx.update), tx.init(PARAMS)


@pytest.mark.slow
@given(rows(MODERATE), rows(FLOATS), rows(FLOATS), st.integers(1, NUM_ROWS - 1))
def test_the_meta_batch_counts_up_to_its_size(inputs, garbage, other, size):
    update, start = arbiter()
    # Proposals that are all alike and say what we want, whatever the agent sees.
    logit = aj.to_logit(size, 1, NUM_ROWS)
    hidden, last = start.agent_params
    last = {"weight": jnp.zeros_like(last["weight"]), "bias": jnp.full_like(last["bias"], logit)}
    start = start._replace(agent_params=[hidden, last])
    mask = batch_mask(size, NUM_ROWS)
    zeros, labels = jax.tree.map(np.zeros_like, PARAMS), np.ones(NUM_ROWS, np.float32)
    spoilt = (np.where(mask, inputs, garbage), np.where(mask, labels, other))
    states = [
        update(zeros, start, PARAMS, agent_inputs=inputs[:, None], meta_batch=meta_batch)[1]
        for meta_batch in ((inputs, labels), spoilt)
    ]
    assert int(states[0].meta_batch_size) == size
    chex.assert_trees_all_equal(*states)


@pytest.mark.slow
@given(rows(FLOATS), rows(FLOATS), hnp.arrays(np.float32, 4, elements=FLOATS))
def test_arbiter_stays_in_range_on_any_input(inputs, labels, alpha):
    update, start = arbiter()
    state = start._replace(mixture_logits=jnp.asarray(alpha))
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    signals = {"agent_inputs": inputs[:, None], "meta_batch": (inputs, labels)}
    for _ in range(2):
        updates, state = update(zeros, state, PARAMS, **signals)
        chex.assert_trees_all_equal(updates, zeros)
        assert 1 <= int(state.batch_size) <= NUM_ROWS
        assert 1 <= int(state.meta_batch_size) <= NUM_ROWS
        # A window of one: alpha is drawn again, so nothing bad stays.
        chex.assert_tree_all_finite(state)


# Statistics


def pieces_strategy():
    return hnp.arrays(np.float32, (4, 3), elements=st.floats(-10, 10, width=32))


stats_of = jax.jit(lambda pieces, sizes: stats_from_pieces(list(pieces), sizes))


@given(pieces_strategy(), hnp.arrays(np.int8, 4, elements=st.integers(1, 64)))
def test_statistics_of_pieces_fit_their_definition(pieces, sizes):
    stats = stats_of(pieces, sizes.astype(np.float32))
    weights = sizes.astype(np.float64)
    mean = weights @ pieces / weights.sum()
    spread = np.sum(weights[:, None] * (pieces - mean) ** 2) / 3
    scale = 1e-4 * (1 + np.sum(weights[:, None] * pieces.astype(np.float64) ** 2))
    np.testing.assert_allclose(stats.variance_trace, spread, atol=scale)
    np.testing.assert_allclose(stats.mean_sq_norm, mean @ mean - spread / weights.sum(), atol=scale)
    assert float(stats.variance_trace) >= 0
    assert float(stats.inner_product_variance) >= 0
    assert np.isnan(stats.half_cosine) or abs(float(stats.half_cosine)) <= 1 + 1e-5


@given(pieces_strategy(), st.permutations([0, 1]), st.permutations([2, 3]))
def test_statistics_ignore_the_order_of_pieces(pieces, first, second):
    sizes = np.full(4, 8, np.float32)
    stats, shuffled_stats = stats_of(pieces, sizes), stats_of(pieces[[*first, *second]], sizes)
    chex.assert_trees_all_close(stats, shuffled_stats, rtol=1e-3, atol=1e-3)


# Reading a decision


@given(st.lists(st.sampled_from(["sgd", "empty", "adam"]), max_size=4), st.integers(0, 4))
def test_the_one_rule_of_a_chain_is_found_at_any_depth(others, depth):
    make = {"sgd": lambda: optax.sgd(0.1), "empty": optax.identity, "adam": lambda: optax.adam(0.1)}
    params = {"w": jnp.zeros(2)}
    state = aj.schedulers.constant(17).init(params)
    for i, name in enumerate(others):
        other = make[name]().init(params)
        state = (other, state) if i < depth else {"rule": state, "other": (other,)}
    assert int(aj.get_batch_size(state)) == 17
