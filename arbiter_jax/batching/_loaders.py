"""Examples from any loader: chunks of NumPy arrays, and a position to go on from.

A source is iterated over; nothing here imports torch, grain or TensorFlow. Three kinds of sources can
say where they stand: those whose iterator has ``get_state`` and ``set_state`` (grain), those with
``state_dict`` and ``load_state_dict`` (torchdata), and all others that can be iterated over again,
which are read again from the beginning up to the position.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import jax
import numpy as np

from arbiter_jax import _validate
from arbiter_jax.base import PyTree
from arbiter_jax.batching._masking import num_rows


def is_loader(value: Any) -> bool:
    """Whether the value is iterated over for examples, and is not itself a pytree of arrays."""
    return _is_source(value) and jax.tree_util.all_leaves([value])


def _is_source(value: Any) -> bool:
    # Iterating over one of these would take their rows, parts or keys for chunks; a set has no order.
    is_data = isinstance(value, tuple | Mapping | Set | str | bytes)
    is_data = is_data or hasattr(value, "dtype") or hasattr(value, "__array__")
    return isinstance(value, Iterable) and not is_data


def is_resumable(source: Any) -> bool:
    """Whether an iterator can say where it stands, and go there: the protocol of grain."""
    return hasattr(source, "get_state") and hasattr(source, "set_state")


def chunks_of(source: Any, *, batched: bool = True, repeat: bool = False) -> Chunks:
    """An iterator over the chunks of a source; see :func:`host_blocks` for the arguments."""
    if not _is_source(source):
        raise ValueError(
            f"source must be an iterator over chunks of examples, got {type(source).__name__}; "
            "datasets.epochs(data) makes one from arrays, and torch.utils.data.DataLoader(dataset) "
            "from a dataset of torch."
        )
    batched, repeat = _validate.boolean(batched=batched), _validate.boolean(repeat=repeat)
    if repeat and isinstance(source, Iterator):
        raise ValueError(
            f"repeat must be False for a source that can be read only once, got True for a "
            f"{type(source).__name__}: pass what makes the iterator, such as a DataLoader, a dataset "
            "of grain, or an object whose __iter__ is the generator function."
        )
    iterator = iter(source)
    if is_resumable(iterator):
        kind = _WithState
    elif hasattr(source, "state_dict") and hasattr(source, "load_state_dict"):
        kind = _WithStateDict
    else:
        kind = Chunks if isinstance(source, Iterator) else _Replayed
    return kind(source, iterator, batched, repeat)


def checked_position(state: Any, *counts: str, others: tuple[str, ...] = ()) -> dict[str, Any]:
    """The argument of a ``set_state``, or a ValueError if no ``get_state()`` has returned it.

    Args:
      state: The argument.
      *counts: Its entries that are integers >= 0.
      others: Its other entries.
    """
    names = (*others, *counts)
    if not isinstance(state, Mapping) or not set(names) <= set(state):
        raise ValueError(
            "state must be what get_state() has returned, a dict with "
            f"{', '.join(map(repr, names))}, got {_validate.shown(state)}."
        )
    numbers = {n: _validate.integer(minimum=0, **{f"state[{n!r}]": state[n]}) for n in counts}
    return {**state, **numbers}


class Chunks:
    """Chunks of NumPy arrays [n, ...] of one structure, shape and dtype; cannot say where it stands."""

    def __init__(self, source: Any, iterator: Iterator[Any], batched: bool, repeat: bool):
        self._source, self._iterator = source, iterator
        self._batched, self._repeat = batched, repeat
        self._epoch = 0
        self._is_new = True  # whether nothing was read in this epoch
        self._kind: Any = None

    def __iter__(self) -> Iterator[PyTree]:
        return self

    def __next__(self) -> PyTree:
        try:
            item = next(self._iterator)
        except StopIteration:
            if not self._repeat or (self._is_new and not self._epoch):  # there is nothing to repeat
                raise
            self._start(self._epoch + 1)
            try:
                item = next(self._iterator)
            except StopIteration:
                raise ValueError(
                    "source must yield its examples again when it is iterated over again, as "
                    f"repeat=True asks, got none in epoch {self._epoch + 1}."
                ) from None
        self._is_new = False
        return self._checked(as_arrays(item, self._batched))

    def _start(self, epoch: int) -> None:
        self._iterator, self._epoch, self._is_new = iter(self._source), epoch, True

    def _checked(self, chunk: PyTree) -> PyTree:
        hint = ": if each is a single example, pass batched=False to datasets.host_blocks"
        hint = hint if self._batched else ""
        num_rows(chunk, "each chunk of the source", hint)
        leaves, structure = jax.tree.flatten(chunk)
        kind = structure, [(leaf.shape[1:], str(leaf.dtype)) for leaf in leaves]
        if self._kind not in (None, kind):
            hint = "" if self._batched else ": if each item is a batch, pass batched=True"
            different = self._kind[1] != kind[1]
            before, now = (x[1] if different else str(x[0]) for x in (self._kind, kind))
            raise ValueError(
                "source must yield chunks of the same structure, shape and dtype, got "
                f"{before} and {now}{hint}."
            )
        self._kind = kind
        return chunk

    def close(self) -> None:
        """Closes the iterator of the source, and lets go of it: a DataLoader's workers then end."""
        close = getattr(self._iterator, "close", None)
        self._iterator = iter(())
        if close is not None:
            with contextlib.suppress(Exception):
                close()


class _WithState(Chunks):
    """Of a source whose iterator has get_state and set_state, such as those of grain."""

    def get_state(self) -> Any:
        state: Any = self._iterator
        state = state.get_state()
        return {"epoch": self._epoch, "source": state} if self._repeat else state

    def set_state(self, state: Any) -> None:
        iterator: Any = self._iterator
        if self._repeat:
            state = checked_position(state, "epoch", others=("source",))
            if not self._is_new:
                self._start(0)
            iterator, self._epoch, state = self._iterator, state["epoch"], state["source"]
        iterator.set_state(state)
        self._is_new = False  # its epoch may end at once


class _WithStateDict(Chunks):
    """Of a source with state_dict and load_state_dict, such as torchdata's StatefulDataLoader.

    Without workers that one goes on with the rest of its epoch, but shuffles the next epochs in
    another order than a run that was never stopped.
    """

    def get_state(self) -> Any:
        return {"epoch": self._epoch, "source": _without_tensors(self._source.state_dict())}

    def set_state(self, state: Any) -> None:
        state = checked_position(state, "epoch", others=("source",))
        self._source.load_state_dict(_with_tensors(state["source"]))
        self._start(state["epoch"])
        self._is_new = False  # its epoch may end at once


class _Replayed(Chunks):
    """Of a source that is read again up to the position; its last chunk tells if it is the same."""

    _num_chunks = 0  # of this epoch
    _last = 0  # checksum of the first example of the chunk before

    def __next__(self) -> PyTree:
        chunk = super().__next__()
        self._num_chunks += 1
        self._last = 0
        for leaf in jax.tree.leaves(chunk):
            self._last = zlib.crc32(leaf[0].tobytes(), self._last)
        return chunk

    def _start(self, epoch: int) -> None:
        super()._start(epoch)
        self._num_chunks = 0

    def get_state(self) -> dict[str, int]:
        return {"epoch": self._epoch, "num_chunks": self._num_chunks, "checksum": self._last}

    def set_state(self, state: dict[str, int]) -> None:
        state = checked_position(state, "epoch", "num_chunks", "checksum")
        # An iterator that was not used stays: to make one may draw a random number.
        if self._epoch or self._num_chunks:
            self._start(0)
        self._last = 0
        wanted = state["epoch"], state["num_chunks"]
        while (self._epoch, self._num_chunks) < wanted:
            try:
                next(self)
            except StopIteration:
                break
        if (self._epoch, self._num_chunks, self._last) != (*wanted, state["checksum"]):
            raise ValueError(
                "source must yield again what it yielded before the run was saved, in the same "
                "order, got other examples: seed its order and augmentation (for a DataLoader "
                "generator=torch.Generator().manual_seed(0)), or use a loader that saves its place."
            )


def as_arrays(item: Any, batched: bool) -> PyTree:
    """An item of a loader as a chunk of NumPy arrays [n, ...]; lists become tuples."""
    chunk = jax.tree.map(_array, _as_pytree(item))
    return chunk if batched else jax.tree.map(lambda x: x[None], chunk)


def _as_pytree(node: Any) -> PyTree:
    """With tuples for lists, as torch collates pairs, and dicts for what is a mapping only."""

    def is_foreign(x: Any) -> bool:
        return isinstance(x, list) or (isinstance(x, Mapping) and not isinstance(x, dict))

    if isinstance(node, list):
        node = tuple(node)
    elif is_foreign(node):
        node = dict(node)
    return jax.tree.map(lambda x: _as_pytree(x) if is_foreign(x) else x, node, is_leaf=is_foreign)


def _array(leaf: Any) -> np.ndarray:
    """A leaf as an array of NumPy; tensors of torch without their gradient, on the CPU."""
    if not _is_tensor(leaf):
        return np.asarray(leaf)
    tensor = leaf.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # which NumPy has from JAX alone
        return tensor.float().numpy().astype(jax.numpy.bfloat16)
    try:
        return np.asarray(tensor)
    except TypeError as error:
        raise ValueError(
            f"source must yield dense tensors of a dtype of NumPy, got {tensor.dtype}, "
            f"{tensor.layout}: convert them in the loader."
        ) from error


def _is_tensor(leaf: Any) -> bool:
    return hasattr(leaf, "detach") and hasattr(leaf, "cpu")


_TENSOR = "torch tensor"


def _without_tensors(state: Any) -> Any:
    """The state of a loader as numbers, text and bytes: tensors hold states of random generators."""
    if _is_tensor(state):
        values = _array(state)
        return {_TENSOR: [str(values.dtype), list(values.shape), values.tobytes()]}
    if isinstance(state, Mapping):
        return {name: _without_tensors(part) for name, part in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(_without_tensors, state))
    return state


def _with_tensors(state: Any) -> Any:
    if isinstance(state, dict) and set(state) == {_TENSOR}:
        import torch  # pyright: ignore[reportMissingImports]  # a loader that has tensors needs it

        dtype, shape, data = state[_TENSOR]
        return torch.from_numpy(np.frombuffer(data, dtype).reshape(shape).copy())
    if isinstance(state, dict):
        return {name: _with_tensors(part) for name, part in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(_with_tensors, state))
    return state
