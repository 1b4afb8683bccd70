"""Blocks from the host: the order of the examples, the end of the source, errors, threads."""

import gc
import itertools
import threading

import chex
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arbiter_jax import datasets
from arbiter_jax.batching import (
    _block_maker,
    bit_reversed,
    init_sampler,
    interleaved,
    next_bucket,
    sample_batch,
)
from arbiter_jax.batching._blocks import block_batch
from arbiter_jax.batching._loaders import chunks_of
from arbiter_jax.batching._sampling import examples_ahead

jitted_sample_batch = jax.jit(sample_batch, static_argnums=3)
jitted_block_batch = jax.jit(block_batch, static_argnums=2)


def numbered_chunks(sizes):
    """Chunks of the given sizes, whose examples are numbered."""
    start = 0
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
        # Row i holds example bit_reversed(8)[i] of its step, or the first example as padding.
        first = np.array([0, 4, 2, 0, 1, 0, 3, 0])
        np.testing.assert_array_equal(block.batches["y"], first[None] + 5 * np.arange(3)[:, None])
        np.testing.assert_array_equal(block.batches["x"][..., 1], -block.batches["y"])
        assert int(short.num_steps) == 2
        np.testing.assert_array_equal(short.batches["y"][:2], first[None] + np.array([[15], [20]]))

    def test_rows_are_in_the_order_of_the_sampler(self, key):
        data = np.arange(200.0)
        sampler = jax.jit(init_sampler)(key)
        order = np.asarray(jax.jit(examples_ahead)(sampler, data, np.arange(100)))
        with datasets.host_blocks([order], window=2) as blocks:
            for batch_size, bucket_size in ((5, 8), (8, 8), (11, 16)):
                block = blocks.next_block(batch_size, bucket_size)
                for t in range(2):
                    sampler, batch, mask = jitted_sample_batch(
                        sampler, data, batch_size, bucket_size
                    )
                    block_result = jitted_block_batch(block, t, bucket_size)
                    chex.assert_trees_all_equal(block_result, (batch, mask))

    @given(
        chunks=st.lists(st.integers(1, 40), min_size=1, max_size=10),
        sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=8),
        window=st.integers(1, 4),
    )
    def test_each_example_is_used_once_in_order(self, chunks, sizes, window):
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

        # Leaving the block waits for the thread, which first finishes what it has begun.
        with datasets.host_blocks(source(), window=2):
            pass
        assert not delivered  # the sizes are not known yet
        with datasets.host_blocks(source(), window=2) as blocks:
            blocks.next_block(3, 4)
        # The requested 6 and 8 more, enough for the next window with any size in this bucket.
        assert len(delivered) == 3

    def test_dtypes_are_those_of_the_device(self):
        chunk = (np.zeros((8, 2)), np.zeros(8, np.int64), np.zeros(8, np.uint8))
        with datasets.host_blocks([chunk], window=2) as blocks:
            dtypes = [str(leaf.dtype) for leaf in blocks.next_block(4, 4).batches]
        assert dtypes == ["float32", "int32", "uint8"]

    def test_what_is_no_sharding(self):
        with pytest.raises(
            ValueError, match=r"sharding must be a jax.sharding.Sharding, .* got 'x'"
        ):
            datasets.host_blocks([np.zeros(3)], window=1, sharding="x")

    def test_sharding(self):
        mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
        sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
        chunks = numbered_chunks([16])
        with datasets.host_blocks(chunks, window=2, sharding=sharding) as blocks:
            block = blocks.next_block(7, 8).batches
        assert block["x"].sharding == sharding
        assert block["x"].addressable_shards[0].data.shape == (2, 2, 2)

    def test_a_block_has_as_many_steps_as_fit(self):
        """12 bytes a row, of which a device has all, or one in four."""
        mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
        sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
        for placed, max_bytes in ((None, 2 * 4 * 12), (sharding, 2 * 12)):
            options = {"window": 5, "sharding": placed, "max_bytes": max_bytes}
            with datasets.host_blocks(numbered_chunks([40]), **options) as blocks:
                shapes, seen = [], []
                for batch_size, bucket_size, num_steps in (
                    (3, 4, 5),
                    (4, 4, 1),
                    (4, 4, 2),
                    (5, 8, 5),
                ):
                    block = blocks.next_block(batch_size, bucket_size, num_steps)
                    order = (
                        bit_reversed(bucket_size) if placed is None else interleaved(bucket_size)
                    )
                    real = order < batch_size
                    rows = np.asarray(block.batches["y"])[: int(block.num_steps), real]
                    seen += np.sort(rows, axis=1).ravel().tolist()
                    shapes.append((*block.batches["y"].shape, int(block.num_steps)))
            # A step of 8 rows alone is as large as the limit.
            assert shapes == [(2, 4, 2), (2, 4, 1), (2, 4, 2), (1, 8, 1)]
            assert seen == list(range(23))

    def test_a_block_has_as_many_groups_as_fit(self):
        """5 groups of 2 rows of 12 bytes: 2 steps of 2 groups, or one of any number of groups."""
        options = {"window": 8, "max_bytes": 5 * 2 * 12}
        with datasets.host_blocks(numbered_chunks([60]), **options) as blocks:
            shapes, seen = [], []
            for batch_size, num_steps in ((3, 8), (3, 1), (4, 8), (2, 8), (11, 8), (1, 2)):
                block = blocks.next_block(batch_size, 2, num_steps, micro_batch_size=2)
                shapes.append((*block.batches["y"].shape, int(block.num_steps)))
                rows = np.asarray(block.batches["y"])
                seen += np.unique(rows).tolist()
        held = [(5, 2, 2), (5, 2, 1), (5, 2, 2), (5, 2, 5), (8, 2, 1), (5, 2, 2)]
        assert shapes == held
        assert sorted(set(seen)) == list(range(6 + 3 + 8 + 10 + 11 + 2))

    def test_one_step_may_be_larger_than_the_limit(self):
        with datasets.host_blocks(numbered_chunks([40]), window=5, max_bytes=1) as blocks:
            assert blocks.next_block(7, 8).batches["y"].shape == (1, 8)

    def test_a_short_block_is_prefetched(self):
        read = []

        def source():
            for chunk in numbered_chunks([1] * 40):
                read.append(1)
                yield chunk

        with datasets.host_blocks(source(), window=5, max_bytes=2 * 4 * 12) as blocks:
            blocks.next_block(3, 4)
        assert len(read) == 6 + 2 * 4  # the block, and what the next one can hold


class TestShareOfAProcess:
    """The second of two processes, which has rows 2 and 3 of 4; training/test_processes has both."""

    def maker(self, monkeypatch, source):
        monkeypatch.setattr(_block_maker, "spans_processes", lambda sharding: True)
        monkeypatch.setattr(_block_maker, "process_rows", lambda shape, sharding: np.array([2, 3]))
        monkeypatch.setattr(_block_maker, "place", lambda batches, bucket_size, sharding: batches)
        return _block_maker.BlockMaker(chunks_of(source), window=3, sharding=None, max_bytes=2**20)

    @pytest.mark.parametrize(
        ("batch_size", "share", "expected"),
        [(4, 2, [[0, 1], [2, 3]]), (3, 1, [[0, 0], [1, 1]]), (1, 0, [[0, 0], [0, 0]])],
    )
    def test_its_rows(self, monkeypatch, batch_size, share, expected):
        """Of the 4 positions it has 1 and 3; where it has none, its rows are padding."""
        maker = self.maker(monkeypatch, numbered_chunks([5, 5]))
        request = _block_maker.Request(batch_size, 4, num_steps=2)
        assert maker.count(request) == 2
        block = maker.block(request)
        assert block.batches["y"][:2].tolist() == expected
        assert (int(block.batch_size), int(block.num_steps)) == (batch_size, 2)
        maker.drop(block, request)
        if share:
            following = maker.block(request).batches["y"][0].min()
            assert following == 2 * share

    def test_its_rows_of_groups(self, monkeypatch):
        """Of a step of 7 examples in groups of 4 and 3 it has 2 and 1."""
        maker = self.maker(monkeypatch, numbered_chunks([5, 5]))
        request = _block_maker.Request(7, 4, num_steps=3)
        assert maker.count(request) == 1  # of three slots
        block = maker.block(request)
        assert block.batches["y"].tolist() == [[0, 1], [2, 0], [0, 0]]
        maker.drop(block, request)
        assert maker.block(request).batches["y"].tolist() == [[3, 4], [5, 3], [3, 3]]

    def test_padding_does_not_end_with_the_source(self, monkeypatch):
        maker = self.maker(monkeypatch, numbered_chunks([2]))
        request = _block_maker.Request(4, 4, 1)
        maker.drop(maker.block(request), request)
        assert maker.count(request) == 0
        assert maker.block(_block_maker.Request(1, 4, 3)).batches["y"].tolist() == [[0, 0]] * 3
        empty = self.maker(monkeypatch, [])
        assert empty.count(_block_maker.Request(1, 4, 3)) == 0


class TestEnd:
    def test_a_source_that_ends(self):
        with datasets.host_blocks(numbered_chunks([10]), window=2) as blocks:
            blocks.next_block(2, 2)
            with pytest.raises(StopIteration):
                blocks.next_block(8, 8)
            last = blocks.next_block(4, 4)  # of the 6 examples left
            assert int(last.num_steps) == 1
            assert last.batches["y"][0].tolist() == [4, 6, 5, 7]
            assert blocks.next_block(1, 1).batches["y"].tolist() == [[8], [9]]
            with pytest.raises(StopIteration):
                blocks.next_block(1, 1)

    def test_an_empty_source(self):
        with datasets.host_blocks([], window=1) as blocks, pytest.raises(StopIteration):
            blocks.next_block(1, 1)

    def test_an_exception_of_the_source_is_raised(self):
        """When the block is requested that it affects, and again at later requests."""

        def source():
            yield from numbered_chunks([8])
            raise RuntimeError("the disk is gone")

        with datasets.host_blocks(source(), window=2) as blocks:
            blocks.next_block(4, 4)
            for size in (4, 2, 2):
                with pytest.raises(RuntimeError, match="the disk is gone"):
                    blocks.next_block(size, size)

    def test_an_exception_of_its_place_is_raised(self):
        class Source:
            def __init__(self):
                self.asked = 0

            def __iter__(self):
                return self

            def __next__(self):
                return np.ones(4)

            def get_state(self):
                self.asked += 1
                if self.asked > 2:  # after the first chunk, which the block uses up
                    raise OSError("the disk is gone")
                return 0

            set_state = None

        with datasets.host_blocks(Source(), window=1) as blocks:
            for _ in range(2):
                with pytest.raises(OSError, match="the disk is gone"):
                    blocks.next_block(4, 4)

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
            ([np.zeros((0, 2))], "each chunk of the source must hold at least 1 example"),
            ([(np.zeros((3, 2)), np.zeros(2))], "each chunk of the source must be a pytree"),
            ([np.float32(1)], "leading axis of equal length"),
            ([{}], "leading axis of equal length"),
            ([None], "leading axis of equal length"),
            (
                [np.array(["a", "b", "c"])],
                "each chunk of the source must be an array of numbers, got dtype <U1",
            ),
            ([np.zeros((3, 2)), np.zeros((3, 1))], "same structure, shape and dtype"),
            ([np.zeros(3), np.zeros(3, np.int32)], "same structure, shape and dtype"),
            ([np.zeros(3), (np.zeros(3),)], "same structure, shape and dtype"),
        ],
    )
    def test_bad_chunks(self, chunks, message):
        with (
            datasets.host_blocks(chunks, window=2) as blocks,
            pytest.raises(ValueError, match=message),
        ):
            blocks.next_block(3, 4)

    @pytest.mark.parametrize(
        "source", [None, 3, "abc", np.ones((9, 3)), (np.ones(9), np.ones(9)), {"x": np.ones(9)}]
    )
    def test_data_is_no_source(self, source):
        """Its rows, parts or keys would be taken for chunks."""
        with pytest.raises(ValueError, match=r"source must be an iterator .* datasets\.epochs"):
            datasets.host_blocks(source, window=2)

    def test_bad_sizes(self):
        with pytest.raises(ValueError, match="window must be an integer >= 1"):
            datasets.host_blocks([], window=0)
        with pytest.raises(ValueError, match="max_bytes must be an integer >= 1"):
            datasets.host_blocks([], window=1, max_bytes=0)
        mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
        options = {"window": 1, "sharding": NamedSharding(mesh, PartitionSpec(None, "data"))}
        with datasets.host_blocks(numbered_chunks([9]), **options) as blocks:
            message = r"sharding must split a block of shape \[1, 2, 2\] evenly, got NamedSharding"
            with pytest.raises(ValueError, match=message):
                blocks.next_block(2, 2)
            assert blocks.next_block(4, 4).batches["y"].tolist() == [[0, 1, 2, 3]]  # interleaved
        with datasets.host_blocks(numbered_chunks([9]), window=1) as blocks:
            with pytest.raises(ValueError, match="batch_size must be an integer >= 1 and <= 4"):
                blocks.next_block(5, 4)
            with pytest.raises(ValueError, match="batch_size must be"):
                blocks.next_block(0, 4)
            with pytest.raises(ValueError, match="bucket_size must be a power of two"):
                blocks.next_block(5, 6)
            with pytest.raises(ValueError, match="num_steps must be an integer >= 1 and <= 1"):
                blocks.next_block(4, 4, num_steps=2)
            # No example was lost.
            assert blocks.next_block(4, 4).batches["y"].tolist() == [[0, 2, 1, 3]]

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
        with pytest.raises(ValueError, match="the blocks are closed; make new ones"):
            blocks.next_block(2, 2)

    def test_leaving_by_an_exception_ends_the_thread(self):
        def interrupted():
            with datasets.host_blocks(numbered_chunks([9] * 9), window=1) as blocks:
                blocks.next_block(4, 4)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert not threads()

    @pytest.mark.parametrize("again", ["same size", "another size", "set_state", "generator"])
    def test_goes_on_after_ctrl_c(self, again):
        """Examples that nobody has got come again, in the size that is asked for now."""
        is_slow, go_on = threading.Event(), threading.Event()

        class Loader:
            def __iter__(self):
                for chunk in np.arange(60).reshape(15, 4):
                    if chunk[0] == 24 and not go_on.is_set():
                        is_slow.set()
                        go_on.wait()
                    yield chunk

        class Interrupted:
            def get(self):
                is_slow.wait()
                raise KeyboardInterrupt

        loader = iter(Loader()) if again == "generator" else Loader()
        size = 3 if again == "another size" else 4
        with datasets.host_blocks(loader, window=2) as blocks:
            blocks.next_block(4, 4)
            blocks.next_block(4, 4)
            results, blocks._results = blocks._results, Interrupted()
            with pytest.raises(KeyboardInterrupt):
                blocks.next_block(4, 4)
            blocks._results = results
            go_on.set()
            if again == "set_state":
                blocks.set_state(blocks.get_state())
            found = [blocks.next_block(size, 4).batches for _ in range(2)]
        assert np.unique(found).tolist() == list(range(16, 16 + 4 * size))

    def test_integers_that_would_wrap(self):
        chunk = {"x": np.zeros(4), "id": np.full(4, 2**40)}
        error = pytest.raises(ValueError, match=r"^each .*\['id'\] must fit into int32, got")
        with datasets.host_blocks([chunk], window=1) as blocks, error:
            blocks.next_block(2, 2)

    def test_garbage_collection_ends_the_thread(self):
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
            ({"data": np.zeros((0, 2))}, "data must hold at least 1 example"),
            ({"data": np.zeros(3), "chunk_size": 0}, "chunk_size must be an integer >= 1"),
            ({"data": np.zeros(3), "seed": -1}, "seed must be an integer >= 0"),
            ({"data": np.zeros(3), "start": -1}, "start must be an integer >= 0"),
            (
                {"data": np.zeros(10), "start": 10 * 2**32},
                "start must be an integer >= 0 and <= 42949672959, got 42949672960",
            ),
        ],
    )
    def test_bad_arguments_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            datasets.epochs(**options)

    def test_the_last_epoch_of_all_has_an_order(self):
        chunks = datasets.epochs(np.arange(10), chunk_size=10, start=10 * (2**32 - 1))
        assert sorted(next(chunks).tolist()) == list(range(10))

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            (
                {"num_examples": 3},
                r"state must be what get_state\(\) has returned, .* 'num_rows', got",
            ),
            (None, "state must be what get_state.* got None"),
            ({"num_examples": -3, "seed": 0, "num_rows": 3}, "must be an integer >= 0, got -3"),
            ({"num_examples": 3, "seed": 1, "num_rows": 3}, "epochs must have the seed"),
        ],
    )
    def test_a_place_that_it_has_not_saved(self, state, message):
        with pytest.raises(ValueError, match=message):
            datasets.epochs(np.zeros(3)).set_state(state)
