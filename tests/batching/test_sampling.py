"""Sampling without replacement on the device."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arbiter_jax as aj
from arbiter_jax.batching import bit_reversed
from arbiter_jax.batching._sampling import advance, permuted_index

SIZE, BUCKET = 19, 8  # one program for most of the tests

sample_batch = jax.jit(aj.sample_batch, static_argnums=3)
init_sampler = jax.jit(aj.init_sampler)
jitted_index = jax.jit(permuted_index, static_argnums=3)


def epochs(key, dataset_size, num_epochs):
    """The permutations of several epochs, int[num_epochs, dataset_size]."""
    epoch, position = np.indices((num_epochs, dataset_size), dtype=np.int32)
    return np.asarray(jitted_index(key, epoch, position, dataset_size))


def draw(sampler, batch_sizes, dataset_size=SIZE, bucket_size=BUCKET):
    """The indices in each batch, in the order of drawing, and the sampler after the last one."""
    data, order = np.arange(dataset_size), np.argsort(bit_reversed(bucket_size))
    drawn = []
    for size in batch_sizes:
        sampler, batch, mask = sample_batch(sampler, data, size, bucket_size)
        drawn.append(np.asarray(batch)[order][: np.sum(mask)].tolist())
    return drawn, sampler


class TestPermutation:
    @pytest.mark.parametrize("dataset_size", [1, 16, 17, 1797])
    def test_every_epoch_is_a_permutation(self, dataset_size, key):
        order = epochs(key, dataset_size, 3)
        np.testing.assert_array_equal(np.sort(order), np.tile(np.arange(dataset_size), (3, 1)))

    def test_epochs_and_keys_differ(self, key):
        order = epochs(key, 100, 50)
        assert len({tuple(row) for row in order}) == 50
        other = epochs(jax.random.PRNGKey(1), 100, 50)
        # Two independent permutations agree at one position in expectation.
        assert np.mean(order == other) < 0.03
        assert np.mean(order[1:] == order[:-1]) < 0.03

    @pytest.mark.parametrize("dataset_size", [2, 3, 4, 5])
    def test_all_permutations_are_equally_frequent(self, dataset_size, key):
        num_permutations = math.factorial(dataset_size)
        order = epochs(key, dataset_size, 100 * num_permutations)
        assert (np.sort(order) == np.arange(dataset_size)[None]).all()
        _, counts = np.unique(order, axis=0, return_counts=True)
        assert len(counts) == num_permutations
        # Chi-square: mean k, variance 2k for k degrees of freedom; 5 standard deviations.
        degrees = num_permutations - 1
        chi_square = np.sum((counts - 100.0) ** 2 / 100.0)
        assert chi_square < degrees + 5 * math.sqrt(2 * degrees)

    @pytest.mark.parametrize("dataset_size", [17, 100])
    def test_positions_are_equally_frequent(self, dataset_size, key):
        num_epochs = 50 * dataset_size
        order = epochs(key, dataset_size, num_epochs)
        counts = np.zeros((dataset_size, dataset_size))
        np.add.at(counts, (np.arange(dataset_size)[None, :].repeat(num_epochs, 0), order), 1)
        chi_square = np.sum((counts - 50.0) ** 2 / 50.0)
        degrees = (dataset_size - 1) ** 2
        assert abs(chi_square - degrees) < 5 * math.sqrt(2 * degrees)

    def test_successive_examples_are_independent(self, key):
        """The index difference of successive examples is uniform over 1 ... n - 1 (mod n)."""
        n, num_epochs = 101, 400
        steps = np.diff(epochs(key, n, num_epochs)) % n
        counts = np.bincount(steps.ravel(), minlength=n)[1:]
        expected = steps.size / (n - 1)
        assert np.sum((counts - expected) ** 2 / expected) < n + 5 * math.sqrt(2 * n)


class TestSampleBatch:
    def test_each_example_comes_once_per_epoch(self, key):
        """Whatever the batch sizes."""
        sizes = [3, 5, 1, 8, 8, 2, 7, 6, 4, 8, 8, 8, 8, 8]
        drawn, sampler = draw(init_sampler(key), sizes)
        assert [len(batch) for batch in drawn] == sizes
        stream = [index for batch in drawn for index in batch]
        for epoch in range(len(stream) // SIZE):
            assert sorted(stream[SIZE * epoch : SIZE * (epoch + 1)]) == list(range(SIZE))
        assert (int(sampler.epoch), int(sampler.cursor)) == divmod(len(stream), SIZE)

    def test_a_batch_that_crosses_an_epoch(self, key):
        """Its rest comes from the permutation of the next epoch."""
        (first, second, third), sampler = draw(init_sampler(key), [7, 7, 7])
        assert sorted(first + second + third[:5]) == list(range(SIZE))
        assert third[5:] == epochs(sampler.key, SIZE, 2)[1, :2].tolist()
        assert (int(sampler.epoch), int(sampler.cursor)) == (1, 2)

    @pytest.mark.parametrize(("dataset_size", "batch_size"), [(5, 13), (1, 8), (5, 7), (5, 5)])
    def test_a_batch_larger_than_the_data(self, dataset_size, batch_size, key):
        """Repeats the examples as evenly as possible."""
        (first, second), _ = draw(init_sampler(key), [batch_size] * 2, dataset_size, 16)
        assert len(first) == len(second) == batch_size
        for total, batch in ((batch_size, first), (2 * batch_size, first + second)):
            counts = np.bincount(batch, minlength=dataset_size)
            assert set(counts) <= {total // dataset_size, -(-total // dataset_size)}

    @pytest.mark.parametrize(
        ("batch_size", "num_real"), [(0, 0), (1, 1), (5, 5), (BUCKET, BUCKET), (50, BUCKET)]
    )
    def test_edge_cases_of_the_batch_size(self, batch_size, num_real, key):
        sampler, batch, mask = sample_batch(init_sampler(key), np.arange(SIZE), batch_size, BUCKET)
        batch, mask = np.asarray(batch), np.asarray(mask)
        np.testing.assert_array_equal(mask, bit_reversed(BUCKET) < batch_size)
        assert (int(sampler.epoch), int(sampler.cursor)) == (0, num_real)
        assert len(set(batch[mask].tolist())) == num_real
        assert set(batch[~mask].tolist()) <= {batch[0]}  # padding repeats the first row

    def test_the_bucket_does_not_change_what_is_drawn(self, key):
        sizes = [3, 8, 5, 7]
        small, _ = draw(init_sampler(key), sizes)
        large, _ = draw(init_sampler(key), sizes, bucket_size=32)
        assert small == large

    def test_a_restored_sampler_continues(self, key):
        whole, end = draw(init_sampler(key), [8] * 9)
        first, saved = draw(init_sampler(key), [8] * 4)
        saved = jax.tree.map(np.asarray, saved)  # as a checkpoint would store it
        second, resumed_end = draw(saved, [8] * 5)
        assert first + second == whole
        chex.assert_trees_all_equal(resumed_end, end)

    def test_vmap_over_seeds(self):
        keys = np.asarray(jax.random.split(jax.random.PRNGKey(3), 4))
        data, sizes = np.arange(SIZE), np.array([1, 3, 8, 5])
        sample = lambda key, size: aj.sample_batch(aj.init_sampler(key), data, size, BUCKET)
        together = jax.device_get(jax.jit(jax.vmap(sample))(keys, sizes))
        for i in range(4):
            alone = sample_batch(init_sampler(keys[i]), data, sizes[i], BUCKET)
            chex.assert_trees_all_equal(jax.tree.map(lambda x, i=i: x[i], together), alone)
        assert len({tuple(row) for row in together[1].tolist()}) == 4

    def test_in_a_scan(self, key):
        def step(sampler, _):
            sampler, batch, _ = aj.sample_batch(sampler, jnp.arange(SIZE), 4, BUCKET)
            return sampler, batch

        scan = jax.jit(lambda sampler: jax.lax.scan(step, sampler, None, length=SIZE))
        batches = np.asarray(scan(init_sampler(key))[1])
        batches = batches[:, np.argsort(bit_reversed(BUCKET))[:4]]
        drawn, _ = draw(init_sampler(key), [4] * SIZE)
        assert batches.tolist() == drawn
        np.testing.assert_array_equal(np.bincount(batches.ravel()), np.full(SIZE, 4))

    def test_every_leaf_gets_the_same_rows(self, key):
        data = {"inputs": np.arange(20).reshape(10, 2), "labels": (np.arange(10),)}
        _, batch, _ = sample_batch(init_sampler(key), data, 4, 4)
        chex.assert_shape(batch["inputs"], (4, 2))
        np.testing.assert_array_equal(np.asarray(batch["inputs"])[:, 0] // 2, batch["labels"][0])

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (np.zeros((0, 3)), "data must hold at least 1 example"),
            ((np.zeros(3), np.zeros(4)), "one leading axis of equal length"),
        ],
    )
    def test_empty_and_ragged_data_is_refused(self, data, message, key):
        with pytest.raises(ValueError, match=message):
            sample_batch(init_sampler(key), data, 1, 1)


class TestBitReversed:
    @pytest.mark.parametrize("bucket_size", [1, 2, 16, 48])
    def test_every_half_gets_half_of_a_batch(self, bucket_size):
        """And every quarter a quarter, and so on, up to one example."""
        position = bit_reversed(bucket_size)
        assert sorted(position) == list(range(bucket_size))
        for batch_size in range(bucket_size + 1):
            for num_pieces in (2, 4, 8, 16):
                if bucket_size % num_pieces == 0 and bucket_size & (bucket_size - 1) == 0:
                    shares = (position < batch_size).reshape(num_pieces, -1).sum(axis=1)
                    assert shares.max() - shares.min() <= 1


def test_a_typed_key_samples_like_its_raw_data(key):
    typed = aj.init_sampler(jax.random.wrap_key_data(key))
    chex.assert_trees_all_equal(typed, aj.init_sampler(key))
    assert typed.key.dtype == jnp.uint32


def test_advance_counts_epochs(key):
    sampler = advance(aj.init_sampler(key), 25, 10)
    assert (int(sampler.epoch), int(sampler.cursor)) == (2, 5)
    chex.assert_trees_all_equal(sampler.key, aj.init_sampler(key).key)
