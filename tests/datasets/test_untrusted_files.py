"""Files that somebody else wrote: what they promise is checked before any of it is used."""

import gzip
import io
import json
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from arbiter_jax import datasets
from arbiter_jax.datasets import _cache, _idx, _limits, _tfds

SMALL = 2**24  # bytes, of memory at the peak
MEMBERS = {"inputs": np.eye(10), "labels": np.arange(10) % 2}


@pytest.fixture
def peak():
    """A function that returns the largest number of bytes in use since the start of the test."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


def npy(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array))
    return file.getvalue()


def header(shape, descr="<f4", version=1):
    """The header of an array, which may promise anything."""
    text = str({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text


def write_npz(path, *, compression=zipfile.ZIP_DEFLATED, **members):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in ({k: npy(v) for k, v in MEMBERS.items()} | members).items():
            archive.writestr(f"{name}.npy", content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header((2**42, 1)) + bytes(8), r"must hold the 16 TiB that shape .* but 8 bytes follow"),
        (header((2**100,)) + bytes(8), r"must hold the .* TiB that shape .* promise"),
        (header((-1, 10)) + bytes(40), "must hold the -40 bytes that shape"),
        (header((2**40, 0)), "must have the same number of rows, got 1099511627776 and 10"),
        (header((10, 1), "|O") + bytes(80), "got pickled objects, which are refused"),
        (header((10, 1), [("x", "<f4")]) + bytes(40), "must be real numbers, got dtype"),
        (header((10, 1), version=2) + bytes(40), "not written like an array of numbers"),
        (header("(" * 500), "is damaged or not an array"),
        (b"\x93NUMPY\x01\x00\xff\xff{'descr': " + b"[" * 60_000, "is damaged or not an array"),
        (b"\x80\x04N.", "is damaged or not an array"),
        (b"", "is damaged or not an array"),
    ],
    ids=range(11),
)
def test_an_array_that_is_not_what_it_says(tmp_path, peak, content, message):
    path = tmp_path / "bad.npz"
    write_npz(path, inputs=content)
    with pytest.raises(ValueError, match=message) as caught:
        datasets.from_npz(path)
    assert str(caught.value).startswith(f"{str(path)!r}: ")
    assert len(str(caught.value).splitlines()) == 1
    assert peak() < SMALL


@pytest.mark.slow
def test_an_archive_that_unpacks_to_too_much(tmp_path, peak):
    """1.1 GB of zeros in 1.1 MB, as float32; a real archive of this size passes."""
    path = tmp_path / "bomb.npz"
    shape, zeros = (280, 1000, 1000), bytes(10**6)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("inputs.npy", "w") as file:
            file.write(header(shape, "|u1"))
            for _ in range(shape[0]):
                file.write(zeros)
        archive.writestr("labels.npy", npy(np.arange(280)))
    assert path.stat().st_size < 2**19
    with pytest.raises(
        ValueError, match=r"at most 1 GiB of memory, but needs 1\.043 GiB"
    ) as caught:
        datasets.from_npz(path)
    assert "pass max_bytes=1120002240." in str(caught.value)
    assert peak() < SMALL


def test_the_limit_is_an_argument(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, **MEMBERS, other=np.zeros(10**6))  # which is not read
    needed = 8 * 110
    assert datasets.load(path, max_bytes=needed).input_shape == (10,)
    with pytest.raises(ValueError, match="at most 879 bytes of memory, but needs 880 bytes"):
        datasets.from_npz(path, max_bytes=needed - 1)
    with pytest.raises(ValueError, match="max_bytes must be an integer >= 1, got 0"):
        datasets.from_npz(path, max_bytes=0)


def test_a_large_file_may_be_as_large_as_it_is():
    assert _limits.max_bytes_of(10**6) == 2**30
    assert _limits.max_bytes_of(10**10) >= 4 * 10**10  # bytes, which become float32


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_of_other_programs_is_refused(tmp_path, compression):
    write_npz(tmp_path / "bad.npz", compression=compression)
    with pytest.raises(ValueError, match="not written like an array of numbers"):
        datasets.from_npz(tmp_path / "bad.npz")


def test_a_truncated_archive_is_called_damaged(tmp_path):
    path = tmp_path / "cut.npz"
    np.savez(path, **MEMBERS)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="the archive is damaged or cut off"):
        datasets.from_npz(path)


def test_a_file_without_permission_says_so(tmp_path, monkeypatch):
    path = tmp_path / "mine.npz"
    np.savez(path, **MEMBERS)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match=r"mine\.npz' cannot be read: Permission denied\.$"):
        datasets.from_npz(path)
    with pytest.raises(ValueError, match="labels' cannot be read: Permission denied"):
        _idx.read_idx(str(tmp_path / "labels"))


@pytest.mark.parametrize("path", [None, 3, b"mine.npz", ""])
def test_what_is_no_path(path):
    with pytest.raises(ValueError, match="path must be a path, got"):
        datasets.from_npz(path)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "a.npz").mkdir()
    with pytest.raises(ValueError, match=r"must be an \.npz file, but is a folder"):
        datasets.from_npz(tmp_path / "a.npz")


# The cache, which anybody may have written to


def test_a_cache_that_promises_too_much_is_replaced(tmp_path, cache_folder, peak):
    source = tmp_path / "source"
    source.write_text("a")
    read = lambda: {"a": np.arange(3)}
    _cache.cached("set", source, read)
    (path,) = cache_folder.iterdir()
    write_npz(path, inputs=header((2**42,)))
    np.testing.assert_array_equal(_cache.cached("set", source, read)["a"], [0, 1, 2])
    assert peak() < SMALL


# IDX


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("shape", "num_bytes", "message"),
    [
        ((2**31, 2**31, 2**31), 9, r"must (hold \(|take at most 1 GiB of memory, but needs)"),
        ((2**28,), 9, r"must hold \(268435456,\) bytes, got 9"),
        ((3,), 2, r"must hold \(3,\) bytes, got 2"),
        ((3,), 2**25, r"must hold \(3,\) bytes, got (33554432|more)"),
    ],
)
def test_idx_files_that_are_not_what_they_say(tmp_path, suffix, shape, num_bytes, message, request):
    path = tmp_path / f"labels{suffix}"
    with (gzip.open if suffix else open)(path, "wb") as file:
        file.write(bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape))
        file.write(bytes(num_bytes))
    peak = request.getfixturevalue("peak")
    with pytest.raises(ValueError, match=message):
        _idx.read_idx(str(path))
    assert peak() < SMALL


def test_idx_images_have_three_axes(tmp_path):
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{name}-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 0, 1]))
    with pytest.raises(ValueError, match=r"must have shape \[n, height, width\], got \(2,\)"):
        datasets.mnist(tmp_path)


# JSON


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "must be JSON with a list of pixels"),
        (json.dumps({"data": [10**400]}), "must be JSON with a list of pixels"),
        ("\ud800".encode("utf-8", "surrogatepass"), "must be JSON with a list of pixels"),
        (None, "must have at most 64 MiB, got 1 TiB"),
    ],
)
def test_json_that_is_not_what_it_should_be(tmp_path, peak, content, message):
    folder = tmp_path / "src" / "digits"
    folder.mkdir(parents=True)
    for digit in range(10):
        path = folder / f"{digit}.json"
        path.write_bytes(content.encode() if isinstance(content, str) else content or b"")
        if content is None:
            with path.open("r+b") as file:
                file.truncate(2**40)  # a sparse file, which takes no space
    with pytest.raises(ValueError, match=message):
        datasets.mnist10k(tmp_path)
    assert peak() < SMALL


# tfds


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (2**50, r"the split train of 1125899906842624 examples must take at most 1 GiB"),
        (4, "train must have the 4 examples that tfds counted, got 3"),
        (2, "train must have the 2 examples that tfds counted, got 3"),
    ],
)
def test_tfds_counts_are_checked(size, message, peak):
    source = [{"x": np.zeros(8), "y": np.int64(1)}] * 3
    with pytest.raises(ValueError, match=message):
        _tfds._decode(source, size, ("x", "y"), "train", 2**30, "")
    assert peak() < SMALL


# Folders


@pytest.mark.parametrize("data_dir", [3, "", b"folder"])
@pytest.mark.parametrize("name", ["mnist", "mnist10k", "cifar10"])
def test_what_is_no_folder(name, data_dir):
    with pytest.raises(ValueError, match="data_dir must be a path, got"):
        datasets.load(name, data_dir)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(datasets.DatasetNotFoundError, match="cannot be made, Not a directory"):
        datasets.load("cifar10", tmp_path / "file" / "folder", download=True)
