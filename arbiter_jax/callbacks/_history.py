"""The history of a run as a few arrays, so that saving it again costs what the newest windows cost.

Steps of windows whose `info` has the same form lie one after another in one array a leaf. The
arrays grow by doubling, and what is saved is a view of their beginning, which never changes. What
callbacks have noted is one array of (window, name, value), because few windows may have it.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from arbiter_jax.base import StepInfo
from arbiter_jax.training import WindowRecord

_INTEGERS = (
    "window_index",
    "batch_size",
    "bucket_size",
    "num_steps",
    "num_examples",
    "num_compilations",
)
_FLOATS = ("loss", "seconds")


class _Column:
    """An array that grows along its first axis."""

    def __init__(self, rows: np.ndarray):
        self._rows, self._length = np.empty((64, *rows.shape[1:]), rows.dtype), 0

    def append(self, rows: np.ndarray) -> None:
        length = self._length + len(rows)
        if length > len(self._rows):
            grown = np.empty((2 * length, *self._rows.shape[1:]), self._rows.dtype)
            grown[: self._length] = self._rows[: self._length]
            self._rows = grown
        self._rows[self._length : length] = rows
        self._length = length

    def view(self) -> np.ndarray:
        return self._rows[: self._length]


class _Segment:
    """Consecutive windows whose info has one form."""

    def __init__(self, form: Any, leaves: list[np.ndarray]):
        self.form, self.num_windows = form, 0
        self.columns = [_Column(leaf) for leaf in leaves]

    def append(self, leaves: list[np.ndarray]) -> None:
        self.num_windows += 1
        for column, leaf in zip(self.columns, leaves, strict=True):
            column.append(leaf)


class PackedHistory:
    """A history that is appended to and packed."""

    def __init__(self) -> None:
        self._num_windows = 0
        self._integers = _Column(np.zeros((0, len(_INTEGERS)), np.int64))
        self._floats = _Column(np.zeros((0, len(_FLOATS)), np.float64))
        self._segments: list[_Segment] = []
        self._evaluations = _Column(np.zeros((0, 3), np.float64))  # window, name, value
        self._names: dict[str, int] = {}

    def pack(self, history: list[WindowRecord]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays of a history that begins with what was packed before, and their forms."""
        for record in history[self._num_windows :]:
            self._append(record)
        self._num_windows = len(history)
        arrays = {"integers": self._integers.view(), "floats": self._floats.view()}
        for i, segment in enumerate(self._segments):
            for j, column in enumerate(segment.columns):
                if column.view().size:  # Orbax writes no empty array
                    arrays[f"segment{i}_leaf{j}"] = column.view()
        if self._names:
            arrays["evaluations"] = self._evaluations.view()
        segments = [
            {
                "form": segment.form,
                "num_windows": segment.num_windows,
                "shapes": [list(column.view().shape) for column in segment.columns],
                "dtypes": [str(column.view().dtype) for column in segment.columns],
            }
            for segment in self._segments
        ]
        return arrays, {"segments": segments, "evaluations": list(self._names)}

    def _append(self, record: WindowRecord) -> None:
        self._integers.append(np.array([[getattr(record, name) for name in _INTEGERS]]))
        self._floats.append(np.array([[getattr(record, name) for name in _FLOATS]]))
        info = record.info
        leaves: list[np.ndarray] = []
        form = _form({"metrics": info.metrics, "aux": info.aux}, leaves)
        leaves = [np.asarray(leaf) for leaf in (info.loss, info.batch_size, *leaves)]
        kinds = [(leaf.shape[1:], leaf.dtype) for leaf in leaves]
        last = self._segments[-1] if self._segments else None
        if (
            last is None
            or last.form != form
            or kinds != [(column.view().shape[1:], column.view().dtype) for column in last.columns]
        ):
            self._segments.append(_Segment(form, leaves))
        self._segments[-1].append(leaves)
        for name, value in record.evaluation.items():
            row = (record.window_index, self._names.setdefault(name, len(self._names)), value)
            self._evaluations.append(np.array([row], np.float64))


def unpack(arrays: dict[str, np.ndarray], forms: dict[str, Any]) -> list[WindowRecord]:
    """The history that was packed."""
    history: list[WindowRecord] = []
    for i, segment in enumerate(forms["segments"]):
        leaves = [
            arrays.get(f"segment{i}_leaf{j}", np.zeros(shape, np.dtype(dtype)))
            for j, (shape, dtype) in enumerate(
                zip(segment["shapes"], segment["dtypes"], strict=True)
            )
        ]
        begin = 0
        for _ in range(segment["num_windows"]):
            row = len(history)
            integers = dict(zip(_INTEGERS, arrays["integers"][row].tolist(), strict=True))
            floats = dict(zip(_FLOATS, arrays["floats"][row].tolist(), strict=True))
            end = begin + integers["num_steps"]
            rows: list[Any] = [leaf[begin:end] for leaf in leaves]
            info = StepInfo(*rows[:2], **_formed(segment["form"], rows[2:]))
            history.append(WindowRecord(**integers, **floats, info=info, evaluation={}))
            begin = end
    names = forms["evaluations"]
    for window, name, value in arrays["evaluations"].tolist() if names else ():
        history[int(window)].evaluation[names[int(name)]] = value
    return history


def _form(node: Any, leaves: list[Any]) -> Any:
    """How containers lie in each other, as JSON; the arrays are added to `leaves`."""
    if node is None:
        return None
    if type(node) is dict and all(isinstance(name, str) for name in node):
        return {"dict": [[name, _form(part, leaves)] for name, part in node.items()]}
    if type(node) in (list, tuple):
        return {type(node).__name__: [_form(part, leaves) for part in node]}
    if not jax.tree_util.all_leaves([node]):
        raise ValueError(
            "loss_fn must return an aux of dicts with text for keys, lists, tuples and arrays to be "
            f"saved in checkpoints, got a {type(node).__name__}."
        )
    leaves.append(node)
    return len(leaves) - 1


def _formed(form: Any, leaves: list[Any]) -> Any:
    if form is None or isinstance(form, int):
        return None if form is None else leaves[form]
    ((kind, parts),) = form.items()
    if kind == "dict":
        return {name: _formed(part, leaves) for name, part in parts}
    return {"list": list, "tuple": tuple}[kind](_formed(part, leaves) for part in parts)
