"""TensorFlow Datasets without TensorFlow and without a network."""

import importlib.util

import numpy as np
import pytest

from arbiter_jax import datasets
from arbiter_jax.datasets import _tfds, _tfds_prepare
from tests.datasets import builders

tfds = pytest.importorskip(
    "tensorflow_datasets", reason='needs tensorflow-datasets: pip install "arbiter-jax[tfds]"'
)

INSTALL = r'pip install "arbiter-jax\[tfds\]"'


def sizes(data):
    return [len(labels) for _, labels in (data.train, data.validation, data.test)]


@pytest.fixture(scope="module")
def digits8x8(tmp_path_factory):
    """A folder with a prepared data set of uint8 images."""
    builders.register_digits8x8()
    root = tmp_path_factory.mktemp("tfds")
    tfds.builder("digits8x8", data_dir=root, file_format="array_record").download_and_prepare()
    return root


class TestDigits8x8:
    def test_equals_digits_up_to_order(self, digits8x8, connections):
        through_tfds, direct = datasets.load("digits8x8", digits8x8), datasets.digits()

        def sorted_rows(data):
            """The pixels before normalization, which depends on the split, in a fixed order."""
            images = np.concatenate([data.train[0], data.validation[0]]).reshape(-1, 64)
            step = np.diff(np.unique(images)).max()
            levels = np.rint((images - images.min()) / step).astype(int)
            return np.array(sorted(map(tuple, levels)))

        np.testing.assert_array_equal(sorted_rows(through_tfds), sorted_rows(direct))
        assert sizes(through_tfds) == sizes(direct)
        assert through_tfds.num_classes == 10
        assert through_tfds.input_shape == (8, 8, 1)
        assert not connections

    def test_second_load_comes_from_the_cache(self, digits8x8, cache_folder, monkeypatch):
        first = datasets.from_tfds("digits8x8", digits8x8)
        assert len(list(cache_folder.glob("digits8x8-*.npz"))) == 1
        monkeypatch.setattr(_tfds, "_read", lambda *_: pytest.fail("read again"))
        again = datasets.from_tfds("digits8x8", digits8x8)
        np.testing.assert_array_equal(first.train[0], again.train[0])

    def test_environment_variable(self, digits8x8, monkeypatch):
        monkeypatch.setenv("ARBITER_JAX_DATA", str(digits8x8))
        assert datasets.load("digits8x8").input_shape == (8, 8, 1)

    def test_default_folder_of_tfds(self, digits8x8, monkeypatch):
        monkeypatch.setenv("TFDS_DATA_DIR", str(digits8x8))
        assert datasets.load("digits8x8").input_shape == (8, 8, 1)


class TestPrepared:
    def test_official_validation_split_is_kept(self, tmp_path):
        builders.prepare(tmp_path)
        data = datasets.load("small_set", tmp_path)
        assert sizes(data) == [20, 6, 4]
        assert data.num_classes == 4  # of the feature, not the highest label plus one

    def test_validation_becomes_a_missing_test_split(self, tmp_path):
        builders.prepare(tmp_path, splits=("train", "validation"))
        assert sizes(datasets.load("small_set", tmp_path)) == [16, 4, 6]

    def test_splits_are_held_out_of_training_alone(self, tmp_path):
        builders.prepare(tmp_path, splits=("train",))
        assert sizes(datasets.load("small_set", tmp_path)) == [13, 3, 4]

    def test_labels_that_are_no_classes(self, tmp_path):
        builders.prepare(tmp_path, label=tfds.features.Scalar(np.float32))
        data = datasets.load("small_set", tmp_path)
        assert data.num_classes == 0
        assert data.train[1].dtype == np.float32

    def test_configurations(self, tmp_path):
        for config in ("large", "small"):
            builders.prepare(tmp_path, config=config)
        assert datasets.load("small_set/small", tmp_path).input_shape == (3,)
        assert datasets.load("small_set/small:1.2.0", tmp_path).input_shape == (3,)
        with pytest.raises(ValueError, match="small_set/large, small_set/small, got 'small_set'"):
            datasets.load("small_set", tmp_path)
        with pytest.raises(datasets.DatasetNotFoundError):
            datasets.load("small_set/small:1.3.0", tmp_path)

    def test_a_single_configuration_need_not_be_named(self, tmp_path):
        builders.prepare(tmp_path, config="small")
        (tmp_path / "small_set" / "empty").mkdir()
        assert datasets.load("small_set", tmp_path).input_shape == (3,)

    def test_empty_splits_are_refused(self):
        with pytest.raises(ValueError, match="test must not be empty"):
            _tfds._decode([], 0, ("x", "y"), "test", 2**30, "")

    def test_newest_version_is_read(self, tmp_path):
        for version in ("1.9.0", "1.10.0", "incomplete.1.11.0"):
            folder = tmp_path / "some_set" / version
            folder.mkdir(parents=True)
            (folder / "dataset_info.json").touch()
        (tmp_path / "some_set" / "2.0.0").mkdir()
        assert _tfds.find_prepared(tmp_path, "some_set").name == "1.10.0"
        assert _tfds.find_prepared(tmp_path, "some_set:1.9.0").name == "1.9.0"
        assert _tfds.find_prepared(tmp_path, "some_set/config") is None

    def test_other_file_formats_are_refused(self, tmp_path):
        builders.prepare(tmp_path)
        info = tmp_path / "small_set" / "1.2.0" / "dataset_info.json"
        info.write_text(info.read_text().replace("array_record", "tfrecord"))
        with pytest.raises(ValueError, match="tfds build small_set --file_format=array_re"):
            datasets.load("small_set", tmp_path)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"supervised_keys": None}, "must be a data set of inputs and labels"),
            ({"splits": ("test",)}, "must be a data set with a training split"),
            ({"lengths": (3, 4)}, r"train x must all have the same shape, got \(\d,\) and \(\d,\)"),
        ],
    )
    def test_unsuitable_data_is_refused(self, tmp_path, options, message):
        builders.prepare(tmp_path, **options)
        with pytest.raises(ValueError, match=message):
            datasets.load("small_set", tmp_path)

    def test_malformed_names_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"must have the form set\[/config\]\[:version\]"):
            datasets.from_tfds("Small-Set", tmp_path)

    def test_a_missing_decoder_is_named(self, digits8x8, monkeypatch):
        def fail(*args):
            raise ModuleNotFoundError("No module named 'PIL'", name="PIL")

        monkeypatch.setattr(_tfds, "_read", fail)
        with pytest.raises(ImportError, match=f"needs PIL: {INSTALL}"):
            datasets.load("digits8x8", digits8x8)


class TestMissing:
    @pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100", "svhn_cropped"])
    def test_one_line_and_no_connection(self, tmp_path, connections, name):
        with pytest.raises(datasets.DatasetNotFoundError) as caught:
            datasets.load(name, tmp_path)
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        for part in (f"{name}/<version>/dataset_info.json", str(tmp_path), f"tfds build {name}"):
            assert part in message
        assert not connections

    def test_default_folders_are_named(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ARBITER_JAX_DATA", str(tmp_path))
        with pytest.raises(datasets.DatasetNotFoundError) as caught:
            datasets.load("cifar10")
        assert f"{tmp_path}, {tmp_path / 'tfds_default'}" in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "hint"),
        [("cifr10", r"did you mean .*cifar10.*\?"), ("xyzzyx", "has no data set 'xyzzyx'.")],
    )
    def test_unknown_names(self, tmp_path, name, hint):
        with pytest.raises(datasets.DatasetNotFoundError, match=hint):
            datasets.load(name, tmp_path)

    @pytest.mark.parametrize("download", [False, True])
    def test_without_tfds_the_extra_is_named(self, tmp_path, monkeypatch, download):
        monkeypatch.setattr(_tfds_prepare, "_installed", lambda: False)
        with pytest.raises(datasets.DatasetNotFoundError, match=INSTALL):
            datasets.load("cifar10", tmp_path, download=download)


class TestDownload:
    def test_prepares_in_a_new_folder(self, tmp_path, connections):
        builders.register_digits8x8()
        data = datasets.load("digits8x8", tmp_path / "new", download=True)
        assert data.input_shape == (8, 8, 1)
        assert (tmp_path / "new" / "digits8x8" / "1.0.0" / "dataset_info.json").is_file()
        assert not connections

    @pytest.mark.parametrize("name", ["mnist", "cifar10"])
    def test_a_host_that_does_not_answer(self, tmp_path, connections, name):
        with pytest.raises(datasets.DatasetNotFoundError, match="does not answer") as caught:
            datasets.load(name, tmp_path / "new", download=True)
        assert connections
        assert f"tfds build {name}" in str(caught.value)

    @pytest.mark.skipif(
        importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is installed"
    )
    def test_missing_tensorflow_is_named(self, tmp_path, monkeypatch):
        class NeedsTensorFlow(builders.small_set(), skip_registration=True):
            def _info(self):
                features = {"x": tfds.features.Image(shape=(4, 4, 1)), "y": np.int64}
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(features),
                    supervised_keys=("x", "y"),
                )

            def _generate_examples(self, split):
                yield 0, {"x": np.zeros((4, 4, 1), np.uint8), "y": 0}

        monkeypatch.setattr(tfds, "builder", lambda name, **options: NeedsTensorFlow(**options))
        with pytest.raises(datasets.DatasetNotFoundError) as caught:
            _tfds_prepare.prepare("needs_tensorflow", tmp_path)
        assert 'needs tensorflow: pip install "arbiter-jax[tensorflow]"' in str(caught.value)

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (type("ExtractError", (Exception,), {})("gz"), r"arbiter-jax\[tensorflow\]"),
            (ModuleNotFoundError("No module", name="PIL"), f"needs PIL: {INSTALL}"),
            (ImportError("a cycle"), f"needs another package: {INSTALL}"),
            (OSError("no space left\non device"), "failed with OSError: no space left$"),
        ],
    )
    def test_failures_of_tfds_are_one_line(self, tmp_path, monkeypatch, error, reason):
        def fail(self, **kwargs):
            raise error

        monkeypatch.setattr(_tfds_prepare, "unreachable_host", lambda urls: None)
        monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
        with pytest.raises(datasets.DatasetNotFoundError, match=reason) as caught:
            datasets.load("cifar10", tmp_path, download=True)
        assert len(str(caught.value).splitlines()) == 1
