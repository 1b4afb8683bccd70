"""How much memory a file may ask for, decided before any of it is used.

A file that somebody else wrote may promise more than it holds, or unpack to a thousand times its size.
"""

from __future__ import annotations

import os
from typing import Any

from arbiter_jax import _validate

# Arrays become float32, and real data shrinks by a factor of at most about 30 from there: bytes to
# floats are 4, photographs in JPEG another 8. Deflate alone can reach a thousand.
MAX_EXPANSION = 64
ALWAYS_ALLOWED = 2**30  # bytes


def max_bytes_of(file_size: int, max_bytes: int | None = None) -> int:
    """The memory that the arrays of a file may take.

    Args:
      file_size: Size of the file in bytes.
      max_bytes: What the user allows; if None, a GiB, or `MAX_EXPANSION` times the file's size.
    """
    if max_bytes is not None:
        return _validate.integer(max_bytes=max_bytes, minimum=1)
    return max(ALWAYS_ALLOWED, MAX_EXPANSION * file_size)


def memory_of(num_elements: int, itemsize: int) -> int:
    """Bytes of an array in memory, at least as float32, which it becomes."""
    return num_elements * max(4, itemsize)


def check(needed: int, allowed: int, what: str, remedy: str) -> None:
    """Raises if `what` needs more bytes than are allowed.

    Args:
      needed: Bytes in memory.
      allowed: From :func:`max_bytes_of`.
      what: Subject of the message.
      remedy: What a user does who trusts the file.
    """
    if needed > allowed:
        raise ValueError(
            f"{what} must take at most {readable(allowed)} of memory, but needs {readable(needed)}; "
            f"if you trust it, {remedy}"
        )


def readable(num_bytes: int) -> str:
    """A number of bytes in the largest unit that it has one of."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.4g} {unit}"
    return f"{num_bytes} bytes"


def as_path(path: Any, name: str) -> str:
    """The argument as a path, or an error that names it."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"{name} must be a path, got {path!r}.")
    return str(os.fspath(path))


def reason(error: BaseException) -> str:
    """What went wrong with a file, without its path and in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split()).rstrip(".")
