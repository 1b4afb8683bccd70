"""Arrays of an ``.npz`` file: every size is checked before it is read, and nothing is unpickled.

An ``.npz`` file is a zip archive with a file in NumPy's format per array,
https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Iterable
from typing import IO, Any

import numpy as np

from arbiter_jax.datasets import _limits

_SUFFIX = ".npy"
_COMPRESSION = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what NumPy writes


def read_arrays(
    file: IO[bytes],
    choose: Callable[[list[str]], Iterable[str]] = lambda names: names,
    max_bytes: int | None = None,
) -> dict[str, np.ndarray]:
    """Reads the chosen arrays of an open ``.npz`` file.

    Args:
      file: The file, opened for reading bytes.
      choose: Function of the names in the file, which returns those to read.
      max_bytes: See :func:`arbiter_jax.datasets.from_npz`.

    Raises:
      ValueError: If the file is damaged or no archive, an array is not plain data, or the arrays need
        more memory than allowed. Then none has been read.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:
        file.seek(0)
        if file.read(4) == b"PK\3\4":
            raise ValueError(
                f"the archive is damaged or cut off ({_limits.reason(error)})"
            ) from error
        raise ValueError("it must be an .npz file, as written by numpy.savez") from error
    with archive:
        members = {m.filename.removesuffix(_SUFFIX): m for m in archive.infolist()}
        names = list(choose(list(members)))
        needed = sum(_memory_of(archive, members[name], name) for name in names)
        allowed = _limits.max_bytes_of(size, max_bytes)
        _limits.check(
            needed, allowed, f"the data of {', '.join(names)}", f"pass max_bytes={needed}"
        )
        return {name: _read(archive, members[name], name) for name in names}


def _memory_of(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> int:
    """Bytes that an array takes in memory, by its header, which must agree with the archive's."""

    def parse(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, int]:
        # Later versions of the format are for records; their headers may have 4 GiB.
        if np.lib.format.read_magic(file) != (1, 0) or member.compress_type not in _COMPRESSION:
            raise ValueError("it is not written like an array of numbers")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return shape, dtype, member.file_size - file.tell()

    shape, dtype, follow = _opened(archive, member, name, parse)
    if dtype.hasobject:
        raise ValueError(
            f"array {name!r} must hold numbers, got pickled objects, which are refused"
        )
    promised = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or promised != follow:
        raise ValueError(
            f"array {name!r} must hold the {_limits.readable(promised)} that shape {shape} and dtype "
            f"{dtype} promise, but {_limits.readable(follow)} follow its header"
        )
    return _limits.memory_of(math.prod(shape), dtype.itemsize)


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> np.ndarray:
    # zipfile reads no more than `member.file_size`, and raises if the data or its checksum differ.
    return _opened(
        archive, member, name, lambda file: np.lib.format.read_array(file, allow_pickle=False)
    )


def _opened(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, read: Callable[[Any], Any]
) -> Any:
    """What `read` makes of the opened member."""
    try:
        with archive.open(member) as file:
            return read(file)
    # The content may be nonsense at every level, from the compression to the header, which is a
    # Python literal: there is no list of what may be raised.
    except Exception as error:
        text = _limits.reason(error)
        raise ValueError(f"array {name!r} is damaged or not an array ({text})") from error
