"""Checkpoints of a run, written by Orbax while the run goes on.

One is a directory with the number of windows for its name: ``state`` is the TrainState, ``history``
what every step has reported, ``meta`` the rest. Orbax writes it under another name and renames it
when it is whole, so that a process that is killed leaves whole checkpoints only.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arbiter_jax import _validate
from arbiter_jax._processes import gather_text
from arbiter_jax.callbacks._history import PackedHistory, unpack
from arbiter_jax.training import TrainState
from arbiter_jax.training._checkpointing import Checkpoint, first_difference

_FORMAT = 2  # of what lies in a checkpoint; the fields of TrainState are compared by name


def _orbax() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            'Checkpoints need Orbax: pip install "arbiter-jax[checkpoint]".'
        ) from error
    return ocp


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where and when :func:`arbiter_jax.fit` saves a run; see :func:`checkpoints`."""

    directory: str
    every: int
    keep: int

    def open(self, identity: dict[str, str]) -> _OpenCheckpoints:
        """The checkpoints of one run; :func:`arbiter_jax.fit` calls it."""
        return _OpenCheckpoints(self.directory, self.keep, identity)


def checkpoints(directory: str | os.PathLike[str], *, every: int = 1, keep: int = 3) -> Checkpoints:
    """Saves a run while it trains, so that it can be killed at any moment and resumed.

    Pass it to :func:`arbiter_jax.fit` with ``resume=True``: a script that was preempted is then
    simply started again. A checkpoint holds the whole :class:`arbiter_jax.TrainState`, the history,
    the measured time of a step, and where the run stands in its data. It is written in the
    background, and counts only when it is whole.

    ``state`` inside a checkpoint is an ordinary one of Orbax: ``StandardCheckpointer().restore(
    path + "/state", aj.init_state(params, tx, key))`` reads it, to go on under another range with
    ``fit(..., state=...)``, say.

    A source of blocks must have ``get_state()`` and ``set_state(state)``, as that of
    :func:`arbiter_jax.datasets.host_blocks` over ``datasets.epochs`` has. The `aux` of a loss must be
    made of dicts with text keys, lists, tuples and arrays.

    Several processes that train together pass the same directory, on a disk that they share. Each
    continues at its place in its own source, so there must be as many of them as before.

    Args:
      directory: Where to, on a disk that outlives the process. It is made if it is not there.
      every: Windows between two checkpoints, an integer >= 1. The end of a run is always saved.
      keep: How many of the newest ones to keep, an integer >= 1.

    Returns:
      :class:`Checkpoints`, for one run at a time.

    Raises:
      ValueError: If an argument is out of its range, or the directory is a file.

    *Guarantees*:
      * A killed run ends as one that was not: bit for bit, on the same machine.
      * A checkpoint of another model, chain, range or format is refused, and the first difference
        named.

    >>> import tempfile
    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(6))
    >>> loss_fn = lambda w, batch: (w - batch) ** 2 / 2
    >>> directory = tempfile.TemporaryDirectory()
    >>> saved = aj.callbacks.checkpoints(directory.name, every=5)
    >>> run = lambda: aj.fit(loss_fn, jnp.zeros(()), tx, aj.Data(jnp.ones(50)), num_examples=100,
    ...     window=10, checkpoints=saved, resume=True)
    >>> len(run().history), len(run().history)  # the second one had ended before
    (2, 2)
    >>> directory.cleanup()
    """
    every = _validate.integer(every=every, minimum=1)
    keep = _validate.integer(keep=keep, minimum=1)
    if not isinstance(directory, str | os.PathLike) or not os.fspath(directory):
        raise ValueError(f"directory must be a path, got {directory!r}.")
    path = os.fspath(directory)
    if "://" not in path:
        path = os.path.abspath(os.path.expanduser(path))
        if os.path.exists(path) and not os.path.isdir(path):
            raise ValueError(f"directory must be a directory to write into, got the file {path}.")
    return Checkpoints(path, every, keep)


class _OpenCheckpoints:
    """The checkpoints of one run."""

    def __init__(self, directory: str, keep: int, identity: dict[str, str]):
        self._ocp = _orbax()
        self._identity = identity
        self._history = PackedHistory()
        options = self._ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, cleanup_tmp_directories=True
        )
        try:
            self._manager = self._ocp.CheckpointManager(directory, options=options)
        except OSError as error:
            raise ValueError(
                f"directory of aj.checkpoints must be one that can be written into, got {directory}: "
                f"{error.strerror or error}."
            ) from error

    def latest(self) -> str | None:
        """Path of the newest complete checkpoint, or None."""
        self._manager.wait_until_finished()
        number = self._manager.latest_step()
        return None if number is None else str(self._manager.directory / str(number))

    def restore(self, like: TrainState) -> Checkpoint:
        """The newest complete one; a ValueError if it is of another run."""
        args = self._ocp.args
        number = self._manager.latest_step()
        read = lambda **items: self._manager.restore(number, args=args.Composite(**items))
        meta = self._checked(lambda: read(meta=args.JsonRestore()).meta)
        items = {
            "state": args.StandardRestore(jax.tree.map(_like, like)),
            "history": args.StandardRestore(),
        }
        try:
            found = read(**items)
        except (
            KeyError,
            ValueError,
            OSError,
        ) as error:  # what Orbax says of files that are damaged
            raise ValueError(
                f"{self.latest()} must be a whole checkpoint, got one that cannot be read: delete it "
                "to go on from the one before."
            ) from error
        return Checkpoint(
            # Orbax writes no empty array.
            state=jax.tree.map(lambda x, y: x if y.size else y, found.state, like),
            history=unpack(found.history, meta["history"]),
            position=self._own_position(meta["positions"]),
            is_ended=meta["is_ended"],
            num_cache_hits=meta["num_cache_hits"],
        )

    def _own_position(self, positions: list[Any]) -> Any:
        if len(positions) != jax.process_count():
            raise ValueError(
                f"{self.latest()} must be a checkpoint of as many processes as there are now, "
                f"{jax.process_count()}, got one of {len(positions)}: each goes on in its own source."
            )
        return _decoded(positions[jax.process_index()])

    def _checked(self, read: Any) -> dict[str, Any]:
        path = self.latest()
        hint = "pass another directory to aj.checkpoints for this run"
        try:
            meta = read()
            version, identity = meta["format"], dict(meta["identity"])
        except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
            raise ValueError(
                f"{path} must be a checkpoint of aj.fit, got another: {hint}."
            ) from error
        if version != _FORMAT:
            raise ValueError(
                f"{path} must be a checkpoint of format {_FORMAT}, got one of format {version}, which "
                f"another version of arbiter_jax has written: {hint}."
            )
        different = first_difference(identity, self._identity)
        if different is not None:
            raise ValueError(
                f"{path} must be a checkpoint of this model, tx and range, but its {different}: {hint}."
            )
        return meta

    def save(self, checkpoint: Checkpoint) -> None:
        """Begins to write one; the one before is waited for."""
        args = self._ocp.args
        arrays, forms = self._history.pack(checkpoint.history)
        meta = {
            "format": _FORMAT,
            "identity": list(self._identity.items()),
            "history": forms,
            "positions": _of_all_processes(_encoded(checkpoint.position)),
            "is_ended": checkpoint.is_ended,
            "num_cache_hits": checkpoint.num_cache_hits,
        }
        self._manager.save(
            len(checkpoint.history),
            args=args.Composite(
                state=args.StandardSave(jax.tree.map(_storable, checkpoint.state)),
                history=args.StandardSave(arrays),
                meta=args.JsonSave(meta),
            ),
        )

    def close(self) -> None:
        """Waits until all are written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _of_all_processes(position: Any) -> list[Any]:
    """The positions of all processes, of which Orbax writes what the first one has."""
    if jax.process_count() == 1:
        return [position]
    return [json.loads(text) for text in gather_text(json.dumps(position))]


def _storable(leaf: Any) -> Any:
    """What Orbax takes of an array: not an empty one, nor one of a single process of several."""
    if not leaf.size:
        return np.zeros((1,), leaf.dtype)
    local = jax.process_count() > 1 and leaf.is_fully_addressable
    return np.asarray(leaf) if local else leaf


def _like(leaf: Any) -> Any:
    """What Orbax reads an array as: placed as the run has it, or on the host where it is free."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    if leaf.size and getattr(leaf, "committed", False):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return np.empty(leaf.shape if leaf.size else (1,), leaf.dtype)


def _encoded(position: Any) -> Any:
    """The position of a source as JSON, bytes included."""
    if isinstance(position, bytes):
        return {"bytes": base64.b64encode(position).decode()}
    if isinstance(position, dict):
        return {"dict": [[name, _encoded(part)] for name, part in position.items()]}
    if isinstance(position, list | tuple):
        return [_encoded(part) for part in position]
    if isinstance(position, np.generic):
        return position.item()
    if position is None or isinstance(position, bool | int | float | str):
        return position
    raise ValueError(
        "get_state of the source in data.train must return numbers, text, bytes, and dicts and lists "
        f"of them to be saved in checkpoints, got a {type(position).__name__}."
    )


def _decoded(position: Any) -> Any:
    if isinstance(position, list):
        return [_decoded(part) for part in position]
    if not isinstance(position, dict):
        return position
    if "bytes" in position:
        return base64.b64decode(position["bytes"])
    return {name: _decoded(part) for name, part in position["dict"]}
