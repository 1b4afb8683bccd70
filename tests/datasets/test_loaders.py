"""Blocks from other people's loaders: values, epochs, positions, and errors in one sentence.

grain and torch are imported where they are installed; stand-ins of our own have the same methods.
"""

import gc
import itertools
import threading
from collections import OrderedDict, UserDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import datasets
from arbiter_jax.batching import bit_reversed
from arbiter_jax.batching._loaders import chunks_of
from arbiter_jax.training._run_data import on_device
from tests.datasets import builders

NUM_EXAMPLES, WINDOW = 50, 3
X = np.random.default_rng(0).normal(size=(NUM_EXAMPLES, 2)).astype(np.float32)
Y = np.arange(NUM_EXAMPLES)


class Loader:
    """As a DataLoader of torch: batches of lists, a ragged last one, shuffled by its generator."""

    def __init__(self, batch_size=8, seed=None, num_examples=NUM_EXAMPLES):
        self.batch_size, self.num_examples = batch_size, num_examples
        self.generator = None if seed is None else np.random.default_rng(seed)

    def __iter__(self):
        order = np.arange(self.num_examples)
        order = order if self.generator is None else self.generator.permutation(order)
        for start in range(0, self.num_examples, self.batch_size):
            rows = order[start : start + self.batch_size]
            yield [X[rows], Y[rows]]


def grain_batches(batch_size=8):
    grain = pytest.importorskip("grain")
    examples = grain.MapDataset.source(Y).seed(3).shuffle()
    return examples.map(lambda i: (X[i], int(i))).batch(batch_size)


def grain_loader():
    grain = pytest.importorskip("grain")
    sampler = grain.samplers.IndexSampler(NUM_EXAMPLES, shuffle=True, seed=0, num_epochs=1)
    pairs = [(X[i], int(i)) for i in Y]
    return grain.DataLoader(
        data_source=pairs, sampler=sampler, operations=[grain.transforms.Batch(8)], worker_count=0
    )


def torch_loader(**options):
    data = pytest.importorskip("torch.utils.data")
    import torch

    pairs = data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    generator = torch.Generator().manual_seed(0)
    options = {"batch_size": 8, "shuffle": True, "generator": generator} | options
    return data.DataLoader(pairs, **options)


SOURCES = {
    "stand-in": lambda: Loader(seed=0),
    "list": lambda: list(Loader()),
    "grain MapDataset": grain_batches,
    "grain IterDataset": lambda: grain_batches().to_iter_dataset(),
    "grain DataLoader": grain_loader,
    "torch DataLoader": torch_loader,
}
every_source = pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)


def labels_of(block, batch_size):
    """The labels of the steps of a block, in the order of the source."""
    _, labels = block.batches
    real = np.argsort(bit_reversed(labels.shape[1]))[:batch_size]
    return np.asarray(labels)[: int(block.num_steps), real].ravel().tolist()


def read(blocks, num_blocks, batch_size=6):
    return [labels_of(blocks.next_block(batch_size, 8), batch_size) for _ in range(num_blocks)]


class TestValues:
    @every_source
    def test_each_example_once_in_order_of_the_loader(self, make):
        order = np.concatenate([np.asarray(labels) for _, labels in make()]).tolist()
        with datasets.host_blocks(make(), window=WINDOW) as blocks:
            block = blocks.next_block(8, 8)
            assert isinstance(block.batches, tuple)
            np.testing.assert_array_equal(block.batches[0], X[np.asarray(block.batches[1])])
            seen = labels_of(block, 8)
            for size in (5, 3, 1):
                seen += labels_of(blocks.next_block(size, 8), size)
        assert seen == order  # 3 steps of 8, of 5 and of 3, and 2 of 1

    @every_source
    def test_epochs_follow_each_other(self, make):
        with datasets.host_blocks(make(), window=WINDOW, repeat=True) as blocks:
            seen = list(itertools.chain(*read(blocks, 9)))
        for epoch in range(3):
            rows = seen[epoch * NUM_EXAMPLES : (epoch + 1) * NUM_EXAMPLES]
            assert sorted(rows) == Y.tolist()

    def test_single_examples(self):
        examples = [{"x": X[i], "y": int(i)} for i in Y]  # labels are numbers of Python
        with datasets.host_blocks(examples, window=2, batched=False) as blocks:
            batches = blocks.next_block(4, 4).batches
        assert batches["y"].tolist() == [[0, 2, 1, 3], [4, 6, 5, 7]]
        assert batches["y"].dtype == jnp.int32
        np.testing.assert_array_equal(batches["x"], X[np.asarray(batches["y"])])

    def test_containers(self):
        """Lists are tuples, at any depth; mappings that JAX does not know are dicts."""
        item = UserDict({"a": [Y, {"b": [Y]}], "c": OrderedDict(d=Y)})
        (chunk,) = chunks_of([item])
        expected = {"a": (Y, {"b": (Y,)}), "c": OrderedDict(d=Y)}
        assert jax.tree.structure(chunk) == jax.tree.structure(expected)

    def test_tensors_of_torch(self):
        torch = pytest.importorskip("torch")
        tensor = torch.tensor([[0.1], [2.0]])
        chunk = (tensor.requires_grad_(), tensor.bfloat16(), tensor.half(), tensor > 1)
        (found,) = chunks_of([chunk])
        assert [str(x.dtype) for x in found] == ["float32", "bfloat16", "float16", "bool"]
        np.testing.assert_array_equal(found[1], np.float32([[0.1], [2]]).astype(jnp.bfloat16))
        with pytest.raises(ValueError, match=r"dense tensors .* got torch\.float32, torch\.sparse"):
            next(chunks_of([tensor.to_sparse()]))

    def test_a_loader_of_one_example(self):
        with datasets.host_blocks([[X[:1], Y[:1]]], window=WINDOW, repeat=True) as blocks:
            assert read(blocks, 2, batch_size=2) == [[0] * 6] * 2

    def test_an_epoch_of_iterators_that_share_state(self):
        """`iter` of a loader with persistent workers starts its one iterator again."""

        class Shared(Loader):
            iterator = None

            def __iter__(self):
                self.iterator = super().__iter__()
                return self

            def __next__(self):
                return next(self.iterator)

        shared = Shared()
        validation = datasets.take(shared, 10)[1].tolist()
        assert validation == list(range(10))
        assert datasets.take(shared)[1].tolist() == Y.tolist()


class TestTake:
    def test_a_data_source_of_tfds(self, tmp_path):
        """Its items are examples, each of them a dict."""
        pytest.importorskip("tensorflow_datasets")
        builders.prepare(tmp_path)
        builder = builders.small_set()(data_dir=str(tmp_path), file_format="array_record")
        found = datasets.take(builder.as_data_source(split="train"), batched=False)
        assert {name: x.shape for name, x in found.items()} == {"x": (20, 3), "y": (20,)}
        np.testing.assert_array_equal(found["y"], found["x"][:, 0] % 3)
        assert sorted(found["x"][:, 0].tolist()) == list(range(20))

    def test_an_iterator_goes_on_after_what_was_taken(self):
        generator = (np.arange(4 * i, 4 * i + 4) for i in range(3))
        assert datasets.take(generator, 6).tolist() == [0, 1, 2, 3, 4, 5]
        assert [chunk.tolist() for chunk in generator] == [[8, 9, 10, 11]]

    @every_source
    def test_takes_all_or_the_first(self, make):
        inputs, labels = datasets.take(make())
        np.testing.assert_array_equal(inputs, X[labels])
        assert sorted(labels.tolist()) == Y.tolist()
        np.testing.assert_array_equal(datasets.take(make(), 11)[1], labels[:11])

    def test_examples(self):
        assert datasets.take(iter([3, 1, 2]), 2, batched=False).tolist() == [3, 1]

    @pytest.mark.parametrize(
        ("source", "options", "message"),
        [
            ([], {}, "source must hold at least 1 example.*, got 0"),
            ([X], {"num_examples": 51}, "source must hold at least 51 examples, got 50"),
            (itertools.repeat(X), {"max_bytes": 3000}, r"at most 3000 bytes .* first 400 ex.*take"),
            (datasets.epochs(X), {}, "source must have an end .* got an endless Epochs: read"),
            ([X], {"num_examples": 0}, "num_examples must be an integer >= 1"),
            ([X], {"max_bytes": 0}, "max_bytes must be an integer >= 1"),
            (X, {}, "source must be an iterator"),
            ([X[0]], {"batched": "no"}, "batched must be True or False"),
        ],
    )
    def test_errors(self, source, options, message):
        with pytest.raises(ValueError, match=message):
            datasets.take(source, **options)


def resumed(make, num_blocks, positions, **options):
    """Reads on from some of the positions of a run, with a loader of its own each."""
    options = {"window": WINDOW} | options
    with datasets.host_blocks(make(), **options) as blocks:
        states, whole = [], []
        for _ in range(num_blocks):
            states.append(blocks.get_state())
            whole += read(blocks, 1)
    for k in positions:
        with datasets.host_blocks(make(), **options) as blocks:
            blocks.set_state(states[k])
            assert read(blocks, num_blocks - k) == whole[k:], (k, states[k])
            assert blocks.num_examples == num_blocks * 6 * WINDOW


class TestPosition:
    @every_source
    def test_goes_on_in_any_epoch(self, make):
        """Chunks 0, 6 and 7 of the first epoch, and the third epoch, begin in these blocks."""
        resumed(make, 7, (0, 2, 6), repeat=True)
        resumed(make, 2, (1,))

    def test_the_place_of_a_loader_with_a_state_dict(self):
        """The protocol of torchdata; its own reshuffling is not tested."""

        class Stateful(Loader):
            start = count = 0

            def __iter__(self):
                self.count, self.start = self.start, 0
                for chunk in itertools.islice(super().__iter__(), self.count, None):
                    self.count += 1
                    yield chunk

            def state_dict(self):
                return {"count": self.count}

            def load_state_dict(self, state):
                self.start = state["count"]

        resumed(Stateful, 8, range(8), repeat=True)

    @pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
    def test_a_real_loader_with_a_state_dict(self):
        """Tensors in its state are bytes in a checkpoint, and tensors again."""
        stateful = pytest.importorskip("torchdata.stateful_dataloader")
        import torch

        def make():
            generator = torch.Generator().manual_seed(0)
            return stateful.StatefulDataLoader(
                list(Y), batch_size=8, shuffle=True, generator=generator
            )

        chunks = chunks_of(make())
        next(chunks)
        state, rest = chunks.get_state(), [next(chunks).tolist() for _ in range(6)]
        again = chunks_of(make())
        again.set_state(state)
        assert [chunk.tolist() for chunk in again] == rest

    def test_another_order_is_refused(self):
        with datasets.host_blocks(Loader(seed=0), window=WINDOW, repeat=True) as blocks:
            read(blocks, 5)  # of the second epoch
            state = blocks.get_state()
        message = r"^source must yield again what .*manual_seed\(0\)"
        with datasets.host_blocks(Loader(seed=1), window=WINDOW, repeat=True) as blocks:
            blocks.set_state(state)
            with pytest.raises(ValueError, match=message):
                read(blocks, 1)
        with datasets.host_blocks(Loader(num_examples=10), window=WINDOW) as blocks:
            blocks.set_state(state)
            with pytest.raises(ValueError, match="source must yield again what it yielded"):
                read(blocks, 1)

    def test_goes_back_in_one_process(self):
        with datasets.host_blocks(Loader(), window=WINDOW, repeat=True) as blocks:
            states, seen = [], []
            for _ in range(5):
                states.append(blocks.get_state())
                seen += read(blocks, 1)
            for k in (4, 1, 0):
                blocks.set_state(states[k])
                assert read(blocks, 1) == [seen[k]]

    def test_a_generator_has_none(self):
        with datasets.host_blocks(iter(Loader()), window=WINDOW) as blocks:
            message = "iterable more than once, .* got a generator: use datasets.epochs"
            with pytest.raises(ValueError, match=message):
                blocks.get_state()


class TestErrors:
    @pytest.mark.parametrize(
        ("items", "batched", "message"),
        [
            ([(X[0], 3)], True, r"equal length, got shapes .*: if each .* pass batched=False to "),
            ([3], True, r"each chunk of the source: \(\): if each .* pass batched=False"),
            ([[X[:2], ("a", "b")]], True, r"source\[1\]\[0\] must be an array of numbers.*<U1"),
            ([{"y": "a"}], False, r"must be an array of numbers, got dtype <U1: encode"),
            ([X[:4], X[:3]], False, r"\[\(\(4, 2\), 'float32'\)\] and .* pass batched=True\."),
            (
                [{"x": X[:4]}, {"z": X[:4]}],
                True,
                r"got PyTreeDef\({'x': \*}\) and PyTreeDef\({'z': \*}\)",
            ),
            ([object()], False, "must be an array of numbers, got dtype object"),
            ([X[:0]], True, "must hold at least 1 example"),
        ],
    )
    def test_items(self, items, batched, message):
        with (
            datasets.host_blocks(items, window=1, batched=batched) as blocks,
            pytest.raises(ValueError, match=message),
        ):
            blocks.next_block(8, 8)

    def test_what_cannot_be_repeated(self):
        for source in (iter(Loader()), datasets.epochs(X), map(np.asarray, [X])):
            with pytest.raises(ValueError, match="repeat must be False for a source that can be"):
                datasets.host_blocks(source, window=1, repeat=True)
        with pytest.raises(ValueError, match="repeat must be True or False, got 'no'"):
            datasets.host_blocks([X], window=1, repeat="no")

    def test_an_empty_loader_ends(self):
        with datasets.host_blocks([], window=1, repeat=True) as blocks:
            for _ in range(2):
                with pytest.raises(StopIteration):
                    blocks.next_block(1, 1)

    def test_an_empty_second_epoch(self):
        class Once:
            def __init__(self):
                self.chunks = iter(Loader())

            def __iter__(self):
                yield from self.chunks

        with datasets.host_blocks(Once(), window=WINDOW, repeat=True) as blocks:
            assert list(itertools.chain(*read(blocks, 2))) == list(range(36))
            rest = blocks.next_block(6, 8, num_steps=2)  # what was read ahead is not lost
            assert labels_of(rest, 6) == list(range(36, 48))
            with pytest.raises(
                ValueError, match=r"^source must yield .* again .* none in epoch 2\."
            ):
                blocks.next_block(8, 8)

    def test_an_exception_of_the_second_epoch(self):
        class Failing(Loader):
            epoch = 0

            def __iter__(self):
                self.epoch += 1
                if self.epoch > 1:
                    raise RuntimeError("a worker has died")
                return super().__iter__()

        with datasets.host_blocks(Failing(), window=1, repeat=True) as blocks:
            for _ in range(6):
                read(blocks, 1, batch_size=8)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="a worker has died"):
                    read(blocks, 1, batch_size=8)


# Through `fit`

TX = optax.chain(optax.sgd(0.05), aj.schedulers.constant(6))


def loss_fn(w, batch):
    inputs, labels = batch
    return (inputs @ w - labels) ** 2 / 100


def fit(data, num_examples=96, **options):
    options = {"num_examples": num_examples, "window": WINDOW, "clock": lambda: 0.0} | options
    return aj.fit(loss_fn, jnp.zeros(2), TX, data, **options)


def assert_equal_runs(one, other):
    np.testing.assert_array_equal(one.state.params, other.state.params)
    assert [r.loss for r in one.history] == [r.loss for r in other.history]
    assert [r.num_examples for r in one.history] == [r.num_examples for r in other.history]


class TestFit:
    def test_equals_fit_from_epochs(self):
        """A loader over the order of `datasets.epochs`, in batches of another size."""

        class Ordered:
            def __iter__(self):
                return itertools.islice(datasets.epochs((X, Y), chunk_size=10, seed=1), 10)

        with datasets.host_blocks(datasets.epochs((X, Y), seed=1), window=WINDOW) as blocks:
            expected = fit(aj.Data(blocks))
        assert expected.state.num_examples == 96
        assert_equal_runs(fit(aj.Data(Ordered(), [[X[:5], Y[:5]]])), expected)
        gc.collect()
        assert not [t for t in threading.enumerate() if t.name == "arbiter_jax.host_blocks"]

    def test_repeats_until_the_budget(self):
        order = [np.tile(X, (2, 1)), np.tile(Y, 2)]
        with datasets.host_blocks([order], window=WINDOW) as blocks:
            expected = fit(aj.Data(blocks))
        assert_equal_runs(fit(aj.Data(Loader())), expected)
        with pytest.warns(UserWarning, match="ended"):
            assert fit(aj.Data(iter(Loader()))).state.num_examples == 48

    @pytest.mark.parametrize("name", ["stand-in", "grain IterDataset", "torch DataLoader"])
    def test_a_stopped_run_goes_on(self, name, tmp_path):
        pytest.importorskip("orbax.checkpoint")

        def stop(record, state):
            if record.window_index == 3:  # in the second epoch
                raise KeyboardInterrupt

        run = lambda **options: fit(aj.Data(SOURCES[name]()), num_examples=120, **options)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoints=aj.checkpoints(tmp_path, every=1), callbacks=stop)
        again = run(checkpoints=aj.checkpoints(tmp_path, every=1), resume=True)
        assert_equal_runs(again, run())

    def test_a_generator_cannot_be_saved(self, tmp_path):
        pytest.importorskip("orbax.checkpoint")
        with pytest.raises(ValueError, match=r"^source must be .* got a generator: use"):
            fit(aj.Data(iter(Loader())), checkpoints=aj.checkpoints(tmp_path))

    def test_on_a_mesh(self):
        """Eight rows of a step on four devices: the run of one device, to rounding."""
        mesh = jax.make_mesh((4,), ("data",))
        results = [fit(aj.Data(Loader()), mesh=mesh), fit(aj.Data(Loader()))]
        params = [np.asarray(result.state.params) for result in results]
        np.testing.assert_allclose(*params, rtol=1e-5)

    @pytest.mark.parametrize("batches", [[(X, Y)], [(X[:8], Y[:8]), (X[8:13], Y[8:13])]])
    def test_a_list_is_no_loader(self, batches):
        message = r"data.train must be arrays or a loader, got a list of batches \(.\): join them"
        with pytest.raises(ValueError, match=message):
            fit(aj.Data(batches))

    def test_several_seeds_share_arrays_alone(self):
        keys = jax.random.split(jax.random.key(0), 2)
        with pytest.raises(ValueError, match=r"data\.train must be arrays if key holds several"):
            aj.fit(loss_fn, jnp.zeros((2, 2)), TX, aj.Data(Loader()), num_examples=96, key=keys)

    def test_validation_from_a_loader(self):
        data = on_device(aj.Data((X, Y), Loader()), WINDOW)
        np.testing.assert_array_equal(data.validation[0], X)
        np.testing.assert_array_equal(data.validation[1], Y)
