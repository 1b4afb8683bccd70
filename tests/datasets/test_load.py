"""Data sets by name."""

import sys

import numpy as np
import pytest

from arbiter_jax import datasets


@pytest.fixture
def without_extras(monkeypatch):
    """Makes the packages of all extras fail to import."""
    extras = "sklearn sklearn.datasets tensorflow_datasets platformdirs PIL importlib_resources"
    for name in extras.split():
        monkeypatch.setitem(sys.modules, name, None)


def test_paths(tmp_path):
    np.savez(tmp_path / "mine.npz", inputs=np.eye(10), labels=np.arange(10) % 2)
    assert datasets.load(str(tmp_path / "mine.npz")).input_shape == (10,)
    assert datasets.load(tmp_path / "mine.npz").input_shape == (10,)


@pytest.mark.parametrize(
    ("name", "size"),
    [("diabetes", 282), ("digits", 1146), ("synthetic", 1280)],
)
def test_bundled_sets_need_only_their_name(name, size, connections):
    data = datasets.load(name, seed=1)
    assert len(data.train[1]) == size
    assert not connections


@pytest.mark.parametrize("name", ["", "No Such", "../digits", "digits.csv"])
def test_unknown_names(name):
    with pytest.raises(datasets.DatasetNotFoundError, match="must be one of diabetes, digits"):
        datasets.load(name)


@pytest.mark.parametrize("name", [None, 3, b"digits"])
def test_a_name_is_a_string(name):
    with pytest.raises(ValueError, match=r"name must be a string, one of diabetes, .*, got "):
        datasets.load(name)


@pytest.mark.parametrize(
    ("name", "meant"), [("digit", "digits"), ("fashion-mnist", "fashion_mnist")]
)
def test_a_close_name_is_suggested(name, meant):
    with pytest.raises(datasets.DatasetNotFoundError) as caught:
        datasets.load(name)
    assert str(caught.value).endswith(f"Did you mean {meant!r}?")
    assert len(str(caught.value).splitlines()) == 1


def test_folders_are_ignored_if_no_files_are_needed(tmp_path):
    data = datasets.load("digits", tmp_path, download=True)
    np.testing.assert_array_equal(data.test[0], datasets.digits().test[0])


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("digits", {}, ImportError, r'digits needs scikit-learn: .* "arbiter-jax\[data\]"'),
        ("diabetes", {}, ImportError, r'diabetes needs scikit-learn: .* "arbiter-jax\[data\]"'),
        ("cifar10", {}, ValueError, r'To get it from tfds: pip install "arbiter-jax\[tfds\]"'),
        ("cifar10", {"download": True}, ValueError, r'not installed: .* "arbiter-jax\[tfds\]"'),
    ],
)
def test_a_missing_extra_is_named(without_extras, name, options, error, message):
    with pytest.raises(error, match=message) as caught:
        datasets.load(name, **options)
    assert len(str(caught.value).splitlines()) == 1


def test_generated_data_and_text_need_no_extra(without_extras, connections):
    assert datasets.load("synthetic").num_classes == 10
    data = datasets.load("text", seed=1)
    assert len(data.train[1]) == pytest.approx(70_000, rel=0.3)  # it differs between Pythons
    assert not connections


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="color"):
        datasets.load("digits", color="red")
