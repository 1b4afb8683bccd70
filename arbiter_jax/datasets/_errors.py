"""The error for data that cannot be found."""

from __future__ import annotations

from collections.abc import Sequence


class DatasetNotFoundError(FileNotFoundError, ValueError):
    """The data set was not found; the message says where we looked and how to get it.

    It is a ``FileNotFoundError``, because files are missing, and also a ``ValueError``, so that code
    which passes on a name from a command line can treat it like any other bad argument.
    """


def not_found(
    name: str, missing: str, searched: Sequence[str], remedy: str
) -> DatasetNotFoundError:
    """The error with its usual message: what is missing, where we looked, how to get it."""
    return DatasetNotFoundError(
        f"data set {name!r} was not found: searched {', '.join(searched)} for {missing}. {remedy}"
    )
