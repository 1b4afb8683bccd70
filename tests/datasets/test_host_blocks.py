"""Blocks from the host: the order of the examples, the end, errors, and threads that end."""

import gc
import itertools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arbiter_jax import datasets
from arbiter_jax.batching import (
    bit_reversed,
    block_batch,
    examples_ahead,
    init_sampler,
    next_bucket,
    sample_batch,
)


def numbered_chunks(sizes, start=0):
    """Chunks whose examples are numbered from `start`."""
    for size in sizes:
        numbers = np.arange(start, start + size, dtype=np.int32)
        yield {"x": np.stack([numbers, -numbers], axis=1).astype(np.float32), "y": numbers}
        start += size


def threads():
    return [t for t in threading.enumerate() if t.name == "arbiter_jax.host_blocks"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    assert not threads()
    yield
    assert not threads()


class TestBlocks:
    def test_shapes_and_padding(self):
        with datasets.host_blocks(numbered_chunks([7] * 10), window=3) as blocks:
            block = blocks.next_block(5, 8)
            short = blocks.next_block(5, 8, num_steps=2)
        assert block.batches["x"].shape == (3, 8, 2)
        assert isinstance(block.batches["x"], jax.Array)
        assert (int(block.batch_size), int(block.num_steps)) == (5, 3)
        # Dealt out as the engine deals: the bits of the row's number reversed, padding the first.
        first = np.array([0, 4, 2, 0, 1, 0, 3, 0])
        np.testing.assert_array_equal(block.batches["y"], first[None] + 5 * np.arange(3)[:, None])
        np.testing.assert_array_equal(block.batches["x"][..., 1], -block.batches["y"])
        assert int(short.num_steps) == 2
        np.testing.assert_array_equal(short.batches["y"][:2], first[None] + np.array([[15], [20]]))

    def test_lays_rows_out_as_the_sampler_does(self, key):
        data = jnp.arange(200.0)
        sampler = init_sampler(key)
        order = np.asarray(examples_ahead(sampler, data, jnp.arange(100)))
        with datasets.host_blocks([order], window=2) as blocks:
            for batch_size, bucket_size in ((5, 8), (8, 8), (11, 16), (1, 1)):
                block = blocks.next_block(batch_size, bucket_size)
                for t in range(2):
                    sampler, batch, mask = sample_batch(sampler, data, batch_size, bucket_size)
                    taken, its_mask = block_batch(block, t, bucket_size)
                    np.testing.assert_array_equal(taken, batch)
                    np.testing.assert_array_equal(its_mask, mask)

    @given(
        chunks=st.lists(st.integers(1, 40), min_size=1, max_size=10),
        sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=8),
        window=st.integers(1, 4),
    )
    def test_each_example_is_delivered_once_in_the_order_of_the_source(self, chunks, sizes, window):
        seen = []
        with datasets.host_blocks(numbered_chunks(chunks), window=window) as blocks:
            for batch_size, num_steps in sizes:
                num_steps = min(num_steps, window)
                left = (sum(chunks) - len(seen)) // batch_size
                try:
                    block = blocks.next_block(batch_size, next_bucket(batch_size), num_steps)
                except StopIteration:
                    assert left == 0
                    continue
                assert int(block.num_steps) == min(num_steps, left)
                mask = bit_reversed(next_bucket(batch_size)) < batch_size
                rows = np.asarray(block.batches["y"])[: int(block.num_steps), mask]
                seen += np.sort(rows, axis=1).ravel().tolist()
                assert blocks.num_examples == len(seen)
        assert seen == list(range(len(seen)))

    def test_prefetches_one_window(self):
        delivered = []

        def source():
            for chunk in numbered_chunks([6] * 100):
                delivered.append(6)
                yield chunk

        with datasets.host_blocks(source(), window=2) as blocks:
            time.sleep(0.05)
            assert not delivered  # nothing is known of the sizes yet
            blocks.next_block(3, 4)
            deadline = time.monotonic() + 5
            while len(delivered) < 3 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.05)
            # The 6 that were asked for and, whatever the next size in this bucket, 8 more.
            assert len(delivered) == 3

    def test_dtypes_are_those_of_the_device(self):
        chunk = (np.zeros((8, 2)), np.zeros(8, np.int64), np.zeros(8, np.uint8))
        with datasets.host_blocks([chunk], window=2) as blocks:
            dtypes = [str(leaf.dtype) for leaf in blocks.next_block(4, 4).batches]
        assert dtypes == ["float32", "int32", "uint8"]

    def test_sharding(self):
        mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
        sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
        chunks = numbered_chunks([16])
        with datasets.host_blocks(chunks, window=2, sharding=sharding) as blocks:
            block = blocks.next_block(7, 8).batches
        assert block["x"].sharding == sharding
        assert block["x"].addressable_shards[0].data.shape == (2, 2, 2)


class TestEnd:
    def test_a_source_that_ends(self):
        with datasets.host_blocks(numbered_chunks([10]), window=2) as blocks:
            blocks.next_block(2, 2)
            with pytest.raises(StopIteration):
                blocks.next_block(8, 8)
            last = blocks.next_block(4, 4)  # what is left is one batch of four, and two
            assert int(last.num_steps) == 1
            assert last.batches["y"][0].tolist() == [4, 6, 5, 7]
            assert blocks.next_block(1, 1).batches["y"].tolist() == [[8], [9]]
            with pytest.raises(StopIteration):
                blocks.next_block(1, 1)

    def test_an_empty_source(self):
        with datasets.host_blocks([], window=1) as blocks, pytest.raises(StopIteration):
            blocks.next_block(1, 1)

    def test_an_exception_of_the_source_is_raised_where_its_block_is_asked_for(self):
        def source():
            yield from numbered_chunks([8])
            raise RuntimeError("the disk is gone")

        with datasets.host_blocks(source(), window=2) as blocks:
            blocks.next_block(4, 4)
            time.sleep(0.05)  # the thread has met the error by now, and keeps it
            for size in (4, 2, 2):  # for other sizes too, and again
                with pytest.raises(RuntimeError, match="the disk is gone"):
                    blocks.next_block(size, size)

    def test_rows_before_an_exception_are_delivered(self):
        def source():
            yield from numbered_chunks([10])
            raise RuntimeError("the disk is gone")

        with datasets.host_blocks(source(), window=2) as blocks:
            blocks.next_block(4, 4)
            assert blocks.next_block(1, 1).batches["y"].tolist() == [[8], [9]]

    @pytest.mark.parametrize(
        ("chunks", "message"),
        [
            ([np.zeros((0, 2))], "equally many rows, at least one"),
            ([(np.zeros((3, 2)), np.zeros(2))], "equally many rows"),
            ([np.float32(1)], "equally many rows"),
            ([{}], "equally many rows"),
            ([np.zeros((3, 2)), np.zeros((3, 1))], "one structure, shape and dtype"),
            ([np.zeros(3), np.zeros(3, np.int32)], "one structure, shape and dtype"),
            ([np.zeros(3), (np.zeros(3),)], "one structure, shape and dtype"),
        ],
    )
    def test_bad_chunks(self, chunks, message):
        with (
            datasets.host_blocks(chunks, window=2) as blocks,
            pytest.raises(ValueError, match=message),
        ):
            blocks.next_block(3, 4)

    def test_bad_sizes(self):
        with pytest.raises(ValueError, match="window must be an integer >= 1"):
            datasets.host_blocks([], window=0)
        with datasets.host_blocks(numbered_chunks([9]), window=1) as blocks:
            with pytest.raises(ValueError, match="batch_size must be an integer >= 1 and <= 4"):
                blocks.next_block(5, 4)
            with pytest.raises(ValueError, match="batch_size must be"):
                blocks.next_block(0, 4)
            with pytest.raises(ValueError, match="bucket_size must be a power of two"):
                blocks.next_block(5, 6)
            with pytest.raises(ValueError, match="num_steps must be an integer >= 1 and <= 1"):
                blocks.next_block(4, 4, num_steps=2)
            assert blocks.next_block(4, 4).batches["y"].tolist() == [[0, 2, 1, 3]]  # none was lost

    def test_closing_ends_the_thread_and_the_source(self):
        closed = []

        def source():
            try:
                yield from numbered_chunks(itertools.repeat(5))
            finally:
                closed.append(threading.current_thread().name)

        blocks = datasets.host_blocks(source(), window=3)
        blocks.next_block(2, 2)
        blocks.close()
        blocks.close()
        assert closed == ["arbiter_jax.host_blocks"]
        with pytest.raises(ValueError, match="the blocks are closed"):
            blocks.next_block(2, 2)

    def test_leaving_by_an_exception_ends_the_thread(self):
        def interrupted():
            with datasets.host_blocks(numbered_chunks([9] * 9), window=1) as blocks:
                blocks.next_block(4, 4)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert not threads()

    def test_forgetting_the_blocks_ends_the_thread(self):
        blocks = datasets.host_blocks(numbered_chunks([9] * 9), window=1)
        blocks.next_block(4, 4)
        del blocks
        gc.collect()
        assert not threads()


class TestEpochs:
    def test_each_epoch_is_another_permutation(self):
        data = (np.arange(10), np.arange(10) * 2)
        chunks = datasets.epochs(data, chunk_size=4, seed=1)
        parts = [next(chunks) for _ in range(5)]
        numbers = np.concatenate([part[0] for part in parts])
        np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), numbers * 2)
        first, second = numbers[:10], numbers[10:]
        np.testing.assert_array_equal(np.sort(first), np.arange(10))
        np.testing.assert_array_equal(np.sort(second), np.arange(10))
        assert not np.array_equal(first, second)
        assert {len(part[0]) for part in parts} == {4}

    @pytest.mark.parametrize("start", [0, 3, 10, 27])
    def test_resumes_at_any_example(self, start):
        def numbers(**options):
            chunks = datasets.epochs(np.arange(10), chunk_size=3, seed=5, **options)
            return np.concatenate([next(chunks) for _ in range(15)])

        np.testing.assert_array_equal(numbers(start=start)[:18], numbers()[start : start + 18])

    def test_memory_mapped(self, tmp_path):
        np.save(tmp_path / "x.npy", np.arange(100, dtype=np.uint8).reshape(50, 2))
        mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
        with datasets.host_blocks(datasets.epochs(mapped, chunk_size=7), window=5) as blocks:
            block = np.asarray(blocks.next_block(10, 16).batches)[:, bit_reversed(16) < 10]
        np.testing.assert_array_equal(np.sort(block[..., 0].ravel()), np.arange(0, 100, 2))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"data": np.zeros((0, 2))}, "at least one"),
            ({"data": np.zeros(3), "chunk_size": 0}, "chunk_size must be an integer >= 1"),
            ({"data": np.zeros(3), "seed": -1}, "seed must be an integer >= 0"),
            ({"data": np.zeros(3), "start": -1}, "start must be an integer >= 0"),
        ],
    )
    def test_refuses(self, options, message):
        with pytest.raises(ValueError, match=message):
            datasets.epochs(**options)
