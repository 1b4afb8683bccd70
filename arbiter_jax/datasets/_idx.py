"""The IDX file format of MNIST, and of data sets that use the same file names.

LeCun, Cortes and Burges, The MNIST database, http://yann.lecun.com/exdb/mnist/.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import zlib

import numpy as np

from arbiter_jax.datasets import _limits
from arbiter_jax.datasets._dataset import Split

_UNSIGNED_BYTE = 0x08
_CHUNK = 2**20  # bytes
_FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)

DESCRIPTION = "the IDX files train-images-idx3-ubyte[.gz] and so on"


def _locate(folder: str, name: str) -> str | None:
    candidates = (os.path.join(folder, name + suffix) for suffix in ("", ".gz"))
    return next((path for path in candidates if os.path.isfile(path)), None)


def has_idx(folder: str) -> bool:
    """Whether the folder holds the four IDX files of a data set."""
    return all(_locate(folder, name) for pair in _FILES for name in pair)


def read_idx(path: str) -> np.ndarray:
    """Reads one array of unsigned bytes from a file, which may be gzipped.

    Raises:
      ValueError: If the file cannot be read or is not in this format, its length does not match its
        header, or the header asks for more memory than such a file may: see `_limits`.
    """
    try:
        with open(path, "rb") as raw, gzip.open(raw) if path.endswith(".gz") else raw as file:
            return _read(path, file, os.fstat(raw.fileno()).st_size)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path!r} cannot be read: {_limits.reason(error)}.") from error


def _read(path: str, file: io.BufferedIOBase, file_size: int) -> np.ndarray:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != _UNSIGNED_BYTE:
        raise ValueError(f"{path!r} must be an IDX file of unsigned bytes.")
    rank = magic[3]
    header = file.read(4 * rank)
    if len(header) < 4 * rank:
        raise ValueError(f"{path!r} ends within its header.")
    shape = struct.unpack(f">{rank}I", header)
    promised = math.prod(shape)
    # A plain file holds what it promises or not; a gzipped one is known only when it is unpacked.
    if file_size and not path.endswith(".gz") and promised != file_size - 4 - 4 * rank:
        got = file_size - 4 - 4 * rank
        raise ValueError(f"{path!r} must hold {shape} bytes, got {got}.")
    _limits.check(
        _limits.memory_of(promised, 1),
        _limits.max_bytes_of(file_size),
        repr(path),
        f"unpack it: gunzip {path}.",
    )
    content = bytearray()
    while len(content) <= promised and (chunk := file.read(_CHUNK)):
        content += chunk
    if len(content) != promised:
        got = len(content) if len(content) < promised else "more"
        raise ValueError(f"{path!r} must hold {shape} bytes, got {got}.")
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_idx_dataset(folder: str) -> tuple[Split, Split]:
    """Reads (training, test) from a folder; images are uint8 [n, height, width, 1]."""
    train, test = (
        tuple(read_idx(_locate(folder, name) or name) for name in pair) for pair in _FILES
    )
    for images, _ in (train, test):
        if images.ndim != 3:
            raise ValueError(
                f"the images in {folder!r} must have shape [n, height, width], got {images.shape}."
            )
    return (train[0][..., np.newaxis], train[1]), (test[0][..., np.newaxis], test[1])
