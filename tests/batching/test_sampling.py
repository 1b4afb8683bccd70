"""Sampling without replacement on the device, and what padding may not do."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arbiter_jax as aj
from arbiter_jax.batching import (
    advance,
    batch_mask,
    bit_reversed,
    masked_mean,
    num_rows,
    replace_padding,
    total_weight,
)
from arbiter_jax.batching._sampling import permuted_index

SIZES = (1, 2, 3, 4, 5, 16, 17, 1797)

sample_batch = jax.jit(aj.sample_batch, static_argnums=3)
init_sampler = jax.jit(aj.init_sampler)
masked_value_and_grad = jax.jit(jax.value_and_grad(masked_mean))


def epochs(key, num_examples, num_epochs):
    """The order of several epochs, int[num_epochs, num_examples]."""
    epoch, position = np.indices((num_epochs, num_examples), dtype=np.int32)
    return np.asarray(jax.jit(permuted_index, static_argnums=3)(key, epoch, position, num_examples))


def draw(sampler, num_examples, batch_sizes, bucket_size):
    """The indices in the order of drawing, one list a batch, and the sampler after them."""
    data, order = np.arange(num_examples), np.argsort(bit_reversed(bucket_size))
    drawn = []
    for size in batch_sizes:
        sampler, batch, mask = sample_batch(sampler, data, size, bucket_size)
        drawn.append(np.asarray(batch)[order][: np.sum(mask)].tolist())
    return drawn, sampler


@pytest.mark.parametrize("num_examples", SIZES)
def test_every_epoch_is_a_permutation(num_examples, key):
    order = epochs(key, num_examples, 3)
    np.testing.assert_array_equal(np.sort(order), np.tile(np.arange(num_examples), (3, 1)))


def test_epochs_and_keys_give_different_permutations(key):
    order = epochs(key, 100, 50)
    assert len({tuple(row) for row in order}) == 50
    other = epochs(jax.random.PRNGKey(1), 100, 50)
    # Two independent permutations agree in one place in expectation.
    assert np.mean(order == other) < 0.03
    assert np.mean(order[1:] == order[:-1]) < 0.03


@pytest.mark.parametrize("num_examples", [2, 3, 4, 5])
def test_every_permutation_of_a_small_set_is_as_frequent(num_examples, key):
    num_permutations = math.factorial(num_examples)
    num_epochs = 100 * num_permutations
    _, counts = np.unique(epochs(key, num_examples, num_epochs), axis=0, return_counts=True)
    assert len(counts) == num_permutations
    # Chi-square: mean k, variance 2k for k degrees of freedom; 5 standard deviations.
    degrees = num_permutations - 1
    chi_square = np.sum((counts - 100.0) ** 2 / 100.0)
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("num_examples", [17, 100])
def test_every_example_is_as_frequent_in_every_place(num_examples, key):
    num_epochs = 50 * num_examples
    order = epochs(key, num_examples, num_epochs)
    counts = np.zeros((num_examples, num_examples))
    np.add.at(counts, (np.arange(num_examples)[None, :].repeat(num_epochs, 0), order), 1)
    chi_square = np.sum((counts - 50.0) ** 2 / 50.0)
    degrees = (num_examples - 1) ** 2
    assert abs(chi_square - degrees) < 5 * math.sqrt(2 * degrees)


def test_neighbours_in_the_data_are_no_neighbours_in_the_order(key):
    # The next example is independent of this one: every step of 1..n-1 (mod n) is as frequent.
    n, num_epochs = 101, 400
    steps = np.diff(epochs(key, n, num_epochs)) % n
    counts = np.bincount(steps.ravel(), minlength=n)[1:]
    expected = steps.size / (n - 1)
    assert np.sum((counts - expected) ** 2 / expected) < n + 5 * math.sqrt(2 * n)


def test_each_example_comes_once_an_epoch_across_batches_of_changing_size(key):
    sizes = [3, 5, 1, 8, 8, 2, 7, 6, 4, 8, 8, 8, 8, 8]
    drawn, sampler = draw(init_sampler(key), 19, sizes, 8)
    assert [len(batch) for batch in drawn] == sizes
    stream = [index for batch in drawn for index in batch]
    for epoch in range(len(stream) // 19):
        assert sorted(stream[19 * epoch : 19 * (epoch + 1)]) == list(range(19))
    assert (int(sampler.epoch), int(sampler.cursor)) == divmod(len(stream), 19)


def test_a_batch_that_crosses_the_end_of_an_epoch_takes_the_rest_from_the_next(key):
    drawn, sampler = draw(init_sampler(key), 10, [7, 7], 8)
    first, second = drawn
    assert sorted(first + second[:3]) == list(range(10))
    assert len(set(second[3:])) == 4
    assert (int(sampler.epoch), int(sampler.cursor)) == (1, 4)


@pytest.mark.parametrize(("num_examples", "batch_size"), [(5, 13), (1, 8), (2, 7), (3, 3)])
def test_a_batch_larger_than_the_data_repeats_as_evenly_as_it_can(num_examples, batch_size, key):
    (first, second), _ = draw(init_sampler(key), num_examples, [batch_size] * 2, 16)
    for batch in (first, second):
        counts = np.bincount(batch, minlength=num_examples)
        assert counts.sum() == batch_size
    counts = np.bincount(first, minlength=num_examples)
    assert set(counts) <= {batch_size // num_examples, -(-batch_size // num_examples)}
    counts = np.bincount(first + second, minlength=num_examples)
    assert set(counts) <= {2 * batch_size // num_examples, -(-2 * batch_size // num_examples)}


def test_padding_repeats_a_row_that_was_drawn(key):
    data = jnp.arange(100)
    _, batch, mask = sample_batch(init_sampler(key), data, 5, 16)
    assert mask.sum() == 5
    assert mask[0]
    assert set(batch[~mask].tolist()) == {int(batch[0])}


@pytest.mark.parametrize("bucket_size", [1, 2, 16, 48])
def test_every_piece_of_a_bucket_gets_its_share_of_a_batch(bucket_size, key):
    assert sorted(bit_reversed(bucket_size)) == list(range(bucket_size))
    data = np.arange(bucket_size)
    for batch_size in range(bucket_size + 1):
        _, _, mask = sample_batch(init_sampler(key), data, batch_size, bucket_size)
        assert mask.sum() == batch_size
        for num_pieces in (2, 4, 8, 16):
            if bucket_size % num_pieces == 0 and bucket_size & (bucket_size - 1) == 0:
                shares = mask.reshape(num_pieces, -1).sum(axis=1)
                assert shares.max() - shares.min() <= 1


def test_a_batch_size_above_the_bucket_is_clipped_to_it(key):
    sampler, batch, mask = sample_batch(init_sampler(key), np.arange(100), 50, 16)
    assert batch.shape == (16,)
    assert mask.all()
    assert int(sampler.cursor) == 16


def test_what_is_drawn_depends_on_the_position_and_not_on_the_bucket(key):
    sizes = [3, 8, 5, 7]
    small, _ = draw(init_sampler(key), 50, sizes, 8)
    large, _ = draw(init_sampler(key), 50, sizes, 64)
    assert small == large


def test_a_saved_sampler_goes_on_with_the_very_next_example(key):
    whole, end = draw(init_sampler(key), 23, [8] * 9, 8)
    first, saved = draw(init_sampler(key), 23, [8] * 4, 8)
    # As a checkpoint does: through plain NumPy arrays.
    saved = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, saved))
    second, resumed_end = draw(saved, 23, [8] * 5, 8)
    assert first + second == whole
    chex.assert_trees_all_equal(resumed_end, end)


def test_seeds_vmap_to_what_each_of_them_draws_alone():
    keys = np.asarray(jax.random.split(jax.random.PRNGKey(3), 4))
    data = np.arange(13)
    sizes = np.array([1, 3, 8, 5])
    sample = lambda sampler, size: aj.sample_batch(sampler, data, size, 8)
    vmapped = jax.jit(jax.vmap(lambda key, size: sample(aj.init_sampler(key), size)))
    samplers, batches, masks = vmapped(keys, sizes)
    for i in range(4):
        alone = sample_batch(init_sampler(keys[i]), data, sizes[i], 8)
        together = jax.tree.map(lambda x, i=i: x[i], (samplers, batches, masks))
        chex.assert_trees_all_equal(together, alone)
    assert len({tuple(row) for row in batches.tolist()}) == 4


def test_sampling_runs_in_a_scan_with_a_state_of_stable_types(key):
    def step(sampler, _):
        sampler, batch, _ = aj.sample_batch(sampler, jnp.arange(11), 4, 4)
        return sampler, batch

    scan = jax.jit(lambda sampler: jax.lax.scan(step, sampler, None, length=11))
    _, batches = scan(init_sampler(key))
    drawn, _ = draw(init_sampler(key), 11, [4] * 11, 4)
    assert batches[:, np.argsort(bit_reversed(4))].tolist() == drawn
    np.testing.assert_array_equal(np.bincount(batches.ravel()), np.full(11, 4))


def test_every_leaf_of_a_pytree_gets_the_same_rows(key):
    data = {"inputs": jnp.arange(20).reshape(10, 2), "labels": (jnp.arange(10),)}
    _, batch, _ = sample_batch(init_sampler(key), data, 4, 4)
    chex.assert_shape(batch["inputs"], (4, 2))
    np.testing.assert_array_equal(batch["inputs"][:, 0] // 2, batch["labels"][0])


def test_a_typed_key_samples_like_its_raw_data(key):
    typed = aj.init_sampler(jax.random.wrap_key_data(key))
    chex.assert_trees_all_equal(typed, aj.init_sampler(key))
    assert typed.key.dtype == jnp.uint32


def test_advance_counts_epochs(key):
    sampler = advance(aj.init_sampler(key), 25, 10)
    assert (int(sampler.epoch), int(sampler.cursor)) == (2, 5)
    chex.assert_trees_all_equal(sampler.key, aj.init_sampler(key).key)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (jnp.zeros((0, 3)), r"data must hold at least 1 example, got shapes \[\(0, 3\)\]"),
        ((jnp.zeros(3), jnp.zeros(4)), r"one leading axis of equal length, got shapes"),
        (jnp.zeros(()), r"one leading axis of equal length, got shapes"),
        ((), r"one leading axis of equal length, got shapes"),
    ],
)
def test_empty_and_ragged_data_is_refused(data, message, key):
    with pytest.raises(ValueError, match=message):
        num_rows(data)
    with pytest.raises(ValueError, match=message):
        sample_batch(init_sampler(key), data, 1, 1)


def test_batch_mask_counts():
    assert [int(batch_mask(n, 4).sum()) for n in (0, 1, 4, 9)] == [0, 1, 4, 4]
    assert batch_mask(2, 4).tolist() == [True, True, False, False]


def test_replace_padding_leaves_no_trace_of_the_padding():
    mask = jnp.array([True, True, False, False])
    batch = {"x": jnp.array([[1.0, 2.0], [3.0, 4.0], [jnp.nan, jnp.inf], [9.0, 9.0]])}
    batch["y"] = jnp.array([5, 6, -1, 1 << 30])
    clean = replace_padding(batch, mask)
    assert clean["x"].tolist() == [[1, 2], [3, 4], [1, 2], [1, 2]]
    assert clean["y"].tolist() == [5, 6, 5, 5]


@pytest.mark.parametrize("garbage", [jnp.nan, jnp.inf, -jnp.inf, 1e30])
def test_masked_mean_ignores_padding_in_value_and_gradient(garbage):
    mask = jnp.array([True, True, True, False])
    losses = jnp.array([1.0, 2.0, 6.0, garbage])
    value, grads = masked_value_and_grad(losses, mask)
    assert float(value) == 3.0
    np.testing.assert_allclose(grads, [1 / 3, 1 / 3, 1 / 3, 0], rtol=1e-6)


def test_masked_mean_of_nothing_is_zero():
    assert float(masked_mean(jnp.array([jnp.nan, 1.0]), jnp.zeros(2, bool))) == 0.0


def test_masked_mean_of_weighted_tokens_is_the_weighted_mean_of_the_real_ones():
    rng = np.random.default_rng(0)
    losses, weights = rng.normal(size=(4, 5)), rng.uniform(size=(4, 5))
    weights[0, 3:] = 0
    weights[1, 1:] = 0
    expected = np.sum(losses[:3] * weights[:3]) / np.sum(weights[:3])
    losses[3] = np.nan  # a padded row
    losses[0, 3:] = np.inf  # padded tokens of a real row
    weighted = aj.WeightedLoss(jnp.asarray(losses), jnp.asarray(weights))
    mask = batch_mask(3, 4)
    np.testing.assert_allclose(masked_mean(weighted, mask), expected, rtol=1e-6)
    np.testing.assert_allclose(total_weight(weighted, mask), np.sum(weights[:3]), rtol=1e-6)


def test_masked_mean_of_many_axes_is_the_mean_over_all_of_them():
    losses = jnp.arange(12.0).reshape(3, 2, 2)
    assert float(masked_mean(losses, batch_mask(2, 3))) == np.arange(8).mean()


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_loss_function_that_has_taken_the_mean_itself_is_told_so(shape):
    with pytest.raises(ValueError, match=r"one loss per example, shape \(4,\) or \(4, ...\), got"):
        masked_mean(jnp.zeros(shape), jnp.ones(4, bool))
