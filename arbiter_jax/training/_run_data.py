"""The data of a run: checked, placed on the device, and handed out window by window."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from arbiter_jax.base import PyTree
from arbiter_jax.batching import Block, BlockSource, host_blocks
from arbiter_jax.batching._blocks import check_next_block
from arbiter_jax.batching._loaders import is_loader
from arbiter_jax.batching._rows import DATA_AXIS
from arbiter_jax.batching._take import read_examples
from arbiter_jax.training._check_data import check_data
from arbiter_jax.training._mesh import place, place_block
from arbiter_jax.training._out_of_memory import OutOfMemoryError, is_out_of_memory
from arbiter_jax.training._state import Data


def on_device(data: Any, window: int, mesh: jax.sharding.Mesh | None = None) -> Data:
    """The data as arrays on the device, except for what comes in blocks."""
    data = _from_loaders(data, window, mesh)
    _check_no_list_of_batches(getattr(data, "train", None))
    check_data(data)
    data = Data(data.train, getattr(data, "validation", None))
    if isinstance(data.train, Block):
        raise ValueError(
            "data.train must be arrays or a source of blocks, got one Block, which is the data of "
            "one run_window: pass what made it, e.g. arbiter_jax.datasets.host_blocks(...)."
        )
    if not isinstance(data.train, BlockSource):
        return _to_device(data, mesh)
    if data.train.window != window:
        raise ValueError(
            f"window must be that of the blocks, {data.train.window}, got {window}: a block holds "
            "the batches of one window."
        )
    return data._replace(validation=_to_device(data.validation, mesh))


def _from_loaders(data: Any, window: int, mesh: jax.sharding.Mesh | None) -> Any:
    """Data with blocks for a loader of training examples, and arrays for one of validation examples."""
    train = getattr(data, "train", None)
    validation = getattr(data, "validation", None)
    is_train = is_loader(train) and not isinstance(train, BlockSource)
    if not is_train and not is_loader(validation):
        return data
    # Before the thread of the blocks begins to read: the two may share workers.
    if is_loader(validation):
        validation = read_examples(validation, "data.validation")
    if is_train:
        sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(None, DATA_AXIS))
        repeat = not isinstance(train, Iterator)  # as arrays are, until the budget is used up
        train = host_blocks(data.train, window=window, repeat=repeat, sharding=sharding)
    return Data(train, validation)


def _check_no_list_of_batches(train: Any) -> None:
    """Raises a ValueError for a list of batches, which as a pytree is one batch of many arrays."""
    if not isinstance(train, list) or not all(isinstance(x, tuple | list | dict) for x in train):
        return
    example = lambda x: (np.shape(x)[1:], getattr(x, "dtype", None))
    kinds = [(jax.tree.structure(x), [*map(example, jax.tree.leaves(x))]) for x in train]
    if train and all(kind == kinds[0] for kind in kinds):
        raise ValueError(
            f"data.train must be arrays or a loader, got a list of batches ({len(train)}): join them "
            "into arrays, or pass an iterator, iter(batches). A pytree of arrays may be a tuple."
        )


def closing(data: Data, given: Any) -> contextlib.AbstractContextManager[Any]:
    """Closes at the end the blocks that were made for a loader; the user closes others."""
    made = isinstance(data.train, BlockSource) and data.train is not given.train
    return contextlib.closing(data.train) if made else contextlib.nullcontext()  # pyright: ignore


def _to_device(data: PyTree, mesh: jax.sharding.Mesh | None) -> Any:
    try:
        return jax.tree.map(jnp.asarray, data) if mesh is None else place(data, mesh)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            "data does not fit into the memory of the device: pass the training examples in blocks, "
            "aj.Data(arbiter_jax.datasets.host_blocks(source, window=window), validation)."
        ) from error


def room_for(data: Data, batch_size: int) -> int | None:
    """The steps that the block of a window has room for; None if the data is not a block."""
    if not isinstance(data.train, Block):
        return None
    num_slots, num_rows = jax.tree.leaves(data.train.batches)[0].shape[:2]
    return num_slots // -(-batch_size // num_rows)


def data_of_window(
    data: Data,
    batch_size: int,
    bucket_size: int,
    num_steps: int,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Data, int]:
    """What the next window trains on, and how many of its steps there are examples for."""
    if not isinstance(data.train, BlockSource):
        return data, num_steps
    groups = {"micro_batch_size": bucket_size} if batch_size > bucket_size else {}
    try:
        block = data.train.next_block(batch_size, bucket_size, num_steps, **groups)
    except StopIteration:
        return data, 0
    check_next_block(block, batch_size, num_steps)
    block = block if mesh is None else place_block(block, mesh)
    return data._replace(train=block), int(block.num_steps)
