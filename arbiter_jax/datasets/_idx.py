"""The IDX file format of MNIST, and of data sets that use the same file names.

LeCun, Cortes and Burges, The MNIST database, http://yann.lecun.com/exdb/mnist/.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib

import numpy as np

from arbiter_jax.datasets._dataset import Split

_UNSIGNED_BYTE = 0x08
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
      ValueError: If the file is not in this format, or its length does not match its header.
    """
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path!r} cannot be read: {error}.") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE:
        raise ValueError(f"{path!r} must be an IDX file of unsigned bytes.")
    rank = content[3]
    if len(content) < 4 + 4 * rank:
        raise ValueError(f"{path!r} ends within its header.")
    shape = struct.unpack_from(f">{rank}I", content, offset=4)
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if data.size != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"{path!r} must hold {shape} bytes, got {data.size}.")
    return data.reshape(shape)


def read_idx_dataset(folder: str) -> tuple[Split, Split]:
    """Reads (training, test) from a folder; images are uint8 [n, height, width, 1]."""
    train, test = (
        tuple(read_idx(_locate(folder, name) or name) for name in pair) for pair in _FILES
    )
    return (train[0][..., np.newaxis], train[1]), (test[0][..., np.newaxis], test[1])
