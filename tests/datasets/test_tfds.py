"""TensorFlow Datasets without TensorFlow and without a network."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from arbiter_jax import datasets
from arbiter_jax.datasets import _cache, _tfds, _tfds_prepare
from arbiter_jax.datasets import _reachability as _network

pytest.importorskip("tensorflow_datasets")


def small_set(splits=("train", "validation", "test"), config=None, supervised_keys=("x", "y")):
    """The class of a builder of 20, 6 and 4 examples."""
    import tensorflow_datasets as tfds

    class SmallSet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.0")
        BUILDER_CONFIGS = [] if config is None else [tfds.core.BuilderConfig(name=config)]

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "x": tfds.features.Tensor(shape=(3,), dtype=np.float32),
                        "y": tfds.features.ClassLabel(num_classes=4),
                    }
                ),
                supervised_keys=supervised_keys,
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for i in range({"train": 20, "validation": 6, "test": 4}[split]):
                yield i, {"x": np.full(3, i, np.float32), "y": i % 3}

    return SmallSet


def prepare(root, config=None, **options):
    builder = small_set(config=config, **options)
    kwargs = {} if config is None else {"config": config}
    builder(data_dir=str(root), file_format="array_record", **kwargs).download_and_prepare()


class TestDigits8x8:
    def test_prepares_and_reads_within_five_seconds_without_a_network(self, tmp_path, connections):
        pytest.importorskip("sklearn.datasets")  # importing takes longer than all the rest
        start = time.monotonic()
        data = datasets.load("digits8x8", tmp_path / "new")
        assert time.monotonic() - start < 5
        assert not connections
        assert (tmp_path / "new" / "digits8x8" / "1.0.0" / "dataset_info.json").is_file()
        assert data.num_classes == 10
        assert data.input_shape == (8, 8, 1)

    def test_equals_digits_up_to_order(self, tmp_path):
        through_tfds, direct = datasets.load("digits8x8", tmp_path), datasets.digits()

        def sorted_rows(data):  # tfds shuffles; normalisation depends on the split: undo its scale
            images = np.concatenate([data.train[0], data.validation[0]]).reshape(-1, 64)
            step = np.diff(np.unique(images)).max()
            levels = np.rint((images - images.min()) / step).astype(int)
            return np.array(sorted(map(tuple, levels)))

        np.testing.assert_array_equal(sorted_rows(through_tfds), sorted_rows(direct))
        assert len(through_tfds.test[1]) == len(direct.test[1])

    def test_default_place_is_the_cache(self, cache_folder):
        datasets.load("digits8x8")
        assert (cache_folder / "tfds" / "digits8x8" / "1.0.0").is_dir()
        assert len(list(cache_folder.glob("digits8x8-*.npz"))) == 1

    def test_second_load_comes_from_the_cache(self, tmp_path, monkeypatch):
        first = datasets.from_tfds("digits8x8", tmp_path)
        monkeypatch.setattr(_tfds, "_read", lambda *_: pytest.fail("read again"))
        again = datasets.from_tfds("digits8x8", tmp_path)
        np.testing.assert_array_equal(first.train[0], again.train[0])

    def test_environment_variable(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ARBITER_JAX_DATA", str(tmp_path))
        datasets.load("digits8x8")
        assert (tmp_path / "digits8x8" / "1.0.0").is_dir()

    def test_prints_nothing(self, tmp_path, capsys):
        datasets.load("digits8x8", tmp_path)
        captured = capsys.readouterr()
        assert captured.out == captured.err == ""


class TestPrepared:
    def test_official_validation_split_is_kept(self, tmp_path):
        prepare(tmp_path)
        data = datasets.load("small_set", tmp_path)
        assert [len(labels) for _, labels in data[:3]] == [20, 6, 4]
        assert data.num_classes == 4  # of the feature, not the highest label plus one

    def test_validation_is_the_test_where_there_is_no_test(self, tmp_path):
        prepare(tmp_path, splits=("train", "validation"))
        data = datasets.load("small_set", tmp_path)
        assert [len(labels) for _, labels in data[:3]] == [16, 4, 6]

    def test_configurations(self, tmp_path):
        for config in ("large", "small"):
            prepare(tmp_path, config=config)
        assert datasets.load("small_set/small", tmp_path).input_shape == (3,)
        assert datasets.load("small_set/small:1.2.0", tmp_path).input_shape == (3,)
        with pytest.raises(ValueError, match="small_set/large, small_set/small"):
            datasets.load("small_set", tmp_path)
        with pytest.raises(datasets.DatasetNotFoundError):
            datasets.load("small_set/small:1.3.0", tmp_path)

    def test_newest_version_is_read(self, tmp_path):
        for version in ("1.9.0", "1.10.0", "incomplete.1.11.0"):
            folder = tmp_path / "some_set" / version
            folder.mkdir(parents=True)
            (folder / "dataset_info.json").touch()
        (tmp_path / "some_set" / "2.0.0").mkdir()
        assert _tfds.find_prepared(tmp_path, "some_set").name == "1.10.0"
        assert _tfds.find_prepared(tmp_path, "some_set:1.9.0").name == "1.9.0"

    def test_other_file_formats_are_explained(self, tmp_path):
        prepare(tmp_path)
        info = tmp_path / "small_set" / "1.2.0" / "dataset_info.json"
        info.write_text(info.read_text().replace("array_record", "tfrecord"))
        with pytest.raises(ValueError, match="tfds build small_set --file_format=array_re"):
            datasets.load("small_set", tmp_path)

    def test_not_a_set_of_inputs_and_labels(self, tmp_path):
        prepare(tmp_path, supervised_keys=None)
        with pytest.raises(ValueError, match="must be a set of inputs and labels"):
            datasets.load("small_set", tmp_path)


class TestMissing:
    @pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100", "svhn_cropped"])
    def test_one_line_within_two_seconds(self, tmp_path, connections, name):
        start = time.monotonic()
        with pytest.raises(datasets.DatasetNotFoundError) as caught:
            datasets.load(name, tmp_path)
        assert time.monotonic() - start < 2
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        for part in (f"{name}/<version>/dataset_info.json", str(tmp_path), f"tfds build {name}"):
            assert part in message
        assert not connections  # nothing was downloaded, and nobody was asked

    def test_default_places_are_named(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ARBITER_JAX_DATA", str(tmp_path))
        with pytest.raises(datasets.DatasetNotFoundError) as caught:
            datasets.load("cifar10")
        assert f"{tmp_path}, {tmp_path / 'tfds_default'}" in str(caught.value)

    def test_a_typing_error_is_recognised(self, tmp_path):
        with pytest.raises(datasets.DatasetNotFoundError, match=r"did you mean .*cifar10"):
            datasets.load("cifr10", tmp_path)

    def test_without_tfds_the_extra_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr(_tfds_prepare, "_installed", lambda: False)
        with pytest.raises(
            datasets.DatasetNotFoundError, match=r'pip install "arbiter-jax\[data\]"'
        ):
            datasets.load("cifar10", tmp_path)
        with pytest.raises(
            datasets.DatasetNotFoundError, match=r'pip install "arbiter-jax\[data\]"'
        ):
            datasets.load("cifar10", tmp_path, download=True)

    def test_in_a_fresh_process_within_two_seconds_of_its_imports(self, tmp_path):
        program = (
            "import time; from arbiter_jax import datasets; start = time.monotonic()\n"
            f"try: datasets.load('cifar10', {str(tmp_path)!r})\n"
            "except ValueError: print(time.monotonic() - start)"
        )
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
        )
        assert float(result.stdout) < 2


class TestDownload:
    @pytest.mark.parametrize("name", ["mnist", "cifar10"])
    def test_offline_it_fails_within_two_seconds(self, tmp_path, connections, name):
        start = time.monotonic()
        with pytest.raises(datasets.DatasetNotFoundError, match="does not answer") as caught:
            datasets.load(name, tmp_path / "new", download=True)
        assert time.monotonic() - start < 2
        assert connections
        assert f"tfds build {name}" in str(caught.value)

    def test_a_resolver_that_hangs_is_not_waited_for(self, tmp_path, monkeypatch):
        released = threading.Event()

        def hang(*args, **kwargs):
            released.wait(60)
            raise OSError

        monkeypatch.setattr("socket.getaddrinfo", hang)
        start = time.monotonic()
        try:
            with pytest.raises(datasets.DatasetNotFoundError, match=r"www\.cs\.toronto\.edu"):
                datasets.load("cifar10", tmp_path, download=True)
            assert time.monotonic() - start < 2
        finally:
            released.set()

    def test_missing_tensorflow_is_explained(self, tmp_path, monkeypatch):
        import tensorflow_datasets as tfds

        class NeedsTensorFlow(small_set(), skip_registration=True):
            def _info(self):
                features = {"x": tfds.features.Image(shape=(4, 4, 1)), "y": np.int64}
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(features),
                    supervised_keys=("x", "y"),
                )

            def _generate_examples(self, split):
                yield 0, {"x": np.zeros((4, 4, 1), np.uint8), "y": 0}

        if tensorflow_is_installed():
            pytest.skip("TensorFlow is installed")
        with pytest.raises(datasets.DatasetNotFoundError) as caught:
            _tfds_prepare.prepare("needs_tensorflow", tmp_path, builder=NeedsTensorFlow)
        assert 'needs tensorflow: pip install "arbiter-jax[tensorflow]"' in str(caught.value)

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (type("ExtractError", (Exception,), {})("gz"), r"arbiter-jax\[tensorflow\]"),
            (ModuleNotFoundError("No module", name="PIL"), r"needs PIL.*arbiter-jax\[data\]"),
            (OSError("no space left\non device"), "failed with OSError: no space left$"),
        ],
    )
    def test_failures_of_tfds_are_one_line(self, tmp_path, monkeypatch, error, reason):
        import tensorflow_datasets as tfds

        monkeypatch.setattr(_tfds_prepare, "unreachable_host", lambda urls: None)

        def fail(self, **kwargs):
            raise error

        monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
        with pytest.raises(datasets.DatasetNotFoundError, match=reason) as caught:
            datasets.load("cifar10", tmp_path, download=True)
        assert len(str(caught.value).splitlines()) == 1


def tensorflow_is_installed():
    import importlib.util

    return importlib.util.find_spec("tensorflow") is not None


class TestNetwork:
    def test_hosts_that_answer(self, monkeypatch):
        asked = []

        class Connection:
            def close(self):
                pass

        def connect(address, timeout):
            asked.append(address)
            if address[0] == "down.example":
                raise OSError
            return Connection()

        monkeypatch.setattr("socket.create_connection", connect)
        urls = ["https://up.example/a", "http://up.example/b", "no url", "https://up.example/c"]
        assert _network.unreachable_host(urls) is None
        assert sorted(asked) == [("up.example", 80), ("up.example", 443)]
        assert _network.unreachable_host([*urls, "https://down.example"]) == "down.example"
        assert _network.unreachable_host([]) is None

    def test_behind_a_proxy_the_proxy_is_asked(self, monkeypatch):
        monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
        assert _network.unreachable_host(["https://up.example"]) == "proxy.example"


class TestCache:
    @pytest.fixture
    def source(self, tmp_path):
        path = tmp_path / "source"
        path.write_text("a")
        return path

    def test_reads_once(self, source, cache_folder):
        calls = []

        def read():
            calls.append(1)
            return {"a": np.arange(3)}

        for _ in range(2):
            np.testing.assert_array_equal(_cache.cached("some/Set", source, read)["a"], [0, 1, 2])
        assert len(calls) == 1
        assert [p.suffix for p in cache_folder.iterdir()] == [".npz"]  # no temporary file is left

    def test_a_changed_source_is_read_again(self, source):
        _cache.cached("set", source, lambda: {"a": np.arange(3)})
        source.write_text("ab")
        assert len(_cache.cached("set", source, lambda: {"a": np.arange(4)})["a"]) == 4

    def test_a_damaged_cache_is_replaced(self, source, cache_folder):
        _cache.cached("set", source, lambda: {"a": np.arange(3)})
        (path,) = cache_folder.iterdir()
        path.write_bytes(path.read_bytes()[:50])
        _cache.cached("set", source, lambda: {"a": np.arange(3)})
        with np.load(path) as archive:
            np.testing.assert_array_equal(archive["a"], [0, 1, 2])

    def test_an_interrupted_write_leaves_nothing(self, source, cache_folder, monkeypatch):
        def interrupt(file, **arrays):
            file.write(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(np, "savez", interrupt)
        with pytest.raises(KeyboardInterrupt):
            _cache.cached("set", source, lambda: {"a": np.arange(3)})
        assert list(cache_folder.iterdir()) == []

    def test_a_folder_that_cannot_be_written_costs_nothing_else(self, source, cache_folder):
        cache_folder.parent.mkdir()
        cache_folder.write_text("a file where the folder should be")
        assert _cache.cached("set", source, lambda: {"a": np.arange(3)})["a"].size == 3

    def test_without_platformdirs(self, source, monkeypatch):
        monkeypatch.setitem(sys.modules, "platformdirs", None)
        assert _cache.cached("set", source, lambda: {"a": np.arange(3)})["a"].size == 3
