"""Decoded arrays in the user's cache directory."""

import sys

import numpy as np
import pytest

from arbiter_jax.datasets import _cache


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_text("a")
    return path


def test_reads_once(source, cache_folder):
    calls = []

    def read():
        calls.append(1)
        return {"a": np.arange(3)}

    for _ in range(2):
        np.testing.assert_array_equal(_cache.cached("some/Set", source, read)["a"], [0, 1, 2])
    assert len(calls) == 1
    assert [p.suffix for p in cache_folder.iterdir()] == [".npz"]  # no temporary file is left


def test_a_changed_source_is_read_again(source):
    _cache.cached("set", source, lambda: {"a": np.arange(3)})
    source.write_text("ab")
    assert len(_cache.cached("set", source, lambda: {"a": np.arange(4)})["a"]) == 4


def test_a_damaged_cache_is_replaced(source, cache_folder):
    _cache.cached("set", source, lambda: {"a": np.arange(3)})
    (path,) = cache_folder.iterdir()
    path.write_bytes(path.read_bytes()[:50])
    _cache.cached("set", source, lambda: {"a": np.arange(3)})
    with np.load(path) as archive:
        np.testing.assert_array_equal(archive["a"], [0, 1, 2])


def test_an_interrupted_write_leaves_no_file(source, cache_folder, monkeypatch):
    def interrupt(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _cache.cached("set", source, lambda: {"a": np.arange(3)})
    assert list(cache_folder.iterdir()) == []


def test_works_if_the_cache_cannot_be_written(source, cache_folder):
    cache_folder.parent.mkdir()
    cache_folder.write_text("a file where the folder should be")
    assert _cache.cached("set", source, lambda: {"a": np.arange(3)})["a"].size == 3


def test_works_without_platformdirs(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert _cache.cached("set", source, lambda: {"a": np.arange(3)})["a"].size == 3
