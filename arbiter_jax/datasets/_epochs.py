"""An endless iterator over arrays that knows where it stands."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from arbiter_jax import _validate
from arbiter_jax.base import PyTree
from arbiter_jax.batching._loaders import checked_position
from arbiter_jax.batching._masking import num_rows


class Epochs:
    """Chunks of arrays, reshuffled in every epoch; see :func:`epochs`."""

    is_endless = True  # cannot be read as a whole

    def __init__(self, data: PyTree, chunk_size: int, seed: int, start: int):
        self._data, self._chunk_size, self._seed = data, chunk_size, seed
        self._num_rows = num_rows(data)
        self._go_to(start)

    def __iter__(self) -> Iterator[PyTree]:
        return self

    def __next__(self) -> PyTree:
        while len(self._rest) < self._chunk_size:
            self._epoch += 1
            self._rest = np.concatenate([self._rest, self._order(self._epoch)])
        rows, self._rest = self._rest[: self._chunk_size], self._rest[self._chunk_size :]
        self._num_examples += self._chunk_size
        return jax.tree.map(lambda x: np.asarray(x[rows]), self._data)

    def get_state(self) -> dict[str, int]:
        """Where it stands: the number of examples so far, and what fixes their order."""
        return {"num_examples": self._num_examples, **self._fixed()}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to where ``get_state()`` was called, perhaps in another process.

        Raises:
          ValueError: If that was over other data, or with another seed, or it has not returned this
            state.
        """
        state = checked_position(state, "num_examples", "seed", "num_rows")
        for name, here in self._fixed().items():
            if state[name] != here:
                raise ValueError(
                    f"epochs must have the {name} that it was saved with, {state[name]}, got {here}."
                )
        self._go_to(state["num_examples"])

    def _fixed(self) -> dict[str, int]:
        return {"seed": self._seed, "num_rows": self._num_rows}

    def _go_to(self, start: int) -> None:
        # The number of an epoch seeds its permutation, and a seed of NumPy has 32 bits.
        last = 2**32 * self._num_rows - 1
        num_examples = _validate.integer(start=start, minimum=0, maximum=last)
        self._num_examples = num_examples
        self._epoch, offset = divmod(num_examples, self._num_rows)
        self._rest = self._order(self._epoch)[offset:]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.RandomState([self._seed, epoch]).permutation(self._num_rows)


def epochs(data: PyTree, *, chunk_size: int = 1024, seed: int = 0, start: int = 0) -> Epochs:
    """Iterates endlessly over arrays in chunks, reshuffled in every epoch.

    Args:
      data: Pytree of arrays [n, ...]. They may be memory-mapped, ``np.load(path, mmap_mode="r")``,
        and larger than memory.
      chunk_size: Number of examples per chunk, an integer >= 1. A chunk may cross the end of an
        epoch.
      seed: An integer in [0, 2**32). Seed and epoch number determine the permutation of an epoch.
      start: Number of examples to skip, an integer >= 0 in the first 2**32 epochs.

    Returns:
      An iterator over pytrees of arrays [chunk_size, ...]. Its ``get_state()`` says where it stands,
      and ``set_state(state)`` goes there.

    Raises:
      ValueError: If the arrays are empty or differ in length, or an argument is out of range.

    >>> import numpy as np
    >>> from arbiter_jax import datasets
    >>> chunks = datasets.epochs(np.arange(4), chunk_size=3)
    >>> sorted(np.concatenate([next(chunks) for _ in range(4)]).tolist())
    [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    """
    num_rows(data)
    chunk_size = _validate.integer(chunk_size=chunk_size, minimum=1)
    seed = _validate.integer(seed=seed, minimum=0, maximum=2**32 - 1)
    return Epochs(data, chunk_size, seed, start)
