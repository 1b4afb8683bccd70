"""Places data and state on the devices of a mesh.

A window is one program in global arrays, which XLA partitions. It reads the mesh from JAX's own
context, ``with jax.set_mesh(mesh):``, and splits the rows of batches over the axis "data"; the other
axes are the user's. :func:`fit` does both, and places what is not placed yet:

======================================  =========================================================
parameters, optimizer and model state   replicated, or as the user has placed them
data that is not placed                 replicated: a device takes its rows of a batch, and nothing
                                        but gradients and numbers moves between devices
data whose rows are split over "data"   sampling="exact": the batch is put together by a collective
                                        of its size; sampling="local": each device draws from its
                                        own rows, and no example moves
blocks from the host                    rows split; ``host_blocks(..., sharding=NamedSharding(mesh,
                                        PartitionSpec(None, "data")))`` sends each device its own
======================================  =========================================================

A batch size counts the examples of all devices. A run on n devices takes the examples and the
decisions of a run on one, to rounding, with these exceptions: random numbers that are drawn for each
row (dropout, `transform_batch`) meet other examples, because rows are ordered otherwise; and
sampling="local" is stratified by device, so that its batches depend on n.

Axes of type Explicit, which ``jax.make_mesh`` makes by default, are made Auto within a window, so that
loss functions are ordinary array code. Arrays that such a function captures instead of taking them as
arguments keep their Explicit type, and JAX refuses to mix the two: pass them in `params`, `model_state`
or the data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from arbiter_jax.base import PyTree
from arbiter_jax.batching import (
    DATA_AXIS,
    Block,
    check_data_axis,
    interleave_block,
    num_data_devices,
)

Function = TypeVar("Function", bound=Callable[..., Any])


def check_mesh(mesh: Any) -> None:
    """Raises a ValueError if rows cannot be split over this mesh."""
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh must be a jax.sharding.Mesh, such as jax.make_mesh((8,), ({DATA_AXIS!r},)), or "
            f"None, got {mesh!r}."
        )
    if DATA_AXIS not in mesh.axis_names:
        raise ValueError(
            f"mesh must have an axis {DATA_AXIS!r}, which the rows of batches are split over, got "
            f"the axes {mesh.axis_names}."
        )
    check_data_axis(mesh)


def check_bucket_of_mesh(bucket_size: int) -> None:
    """Raises a ValueError if a bucket has no row for some device of the mesh."""
    n = num_data_devices()
    if bucket_size < n:
        raise ValueError(
            f"bucket_size must be at least {n}, the devices along the mesh axis {DATA_AXIS!r}, got "
            f"{bucket_size}: pass max(bucket_size, {n})."
        )


def mesh_of(*trees: PyTree) -> Mesh | None:
    """The mesh to train on where none was given: that of the context, or of arrays on one."""
    mesh = jax.sharding.get_mesh()
    if DATA_AXIS in mesh.axis_names:
        return mesh
    for leaf in jax.tree.leaves(trees):
        mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
        if isinstance(mesh, Mesh) and DATA_AXIS in mesh.axis_names:
            return mesh
    return None


def with_auto_axes(mesh: Mesh) -> Mesh:
    """The same devices and names, with axes that array code need not know of."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


def place(tree: PyTree, mesh: Mesh, spec: PartitionSpec | None = None) -> Any:
    """The arrays on a mesh: as they are placed on its devices, the others by `spec`."""
    spec = PartitionSpec() if spec is None else spec

    def put(leaf: Any) -> jax.Array:
        found = getattr(leaf, "sharding", None)
        if isinstance(found, NamedSharding) and np.array_equal(found.mesh.devices, mesh.devices):
            return jax.device_put(leaf, NamedSharding(mesh, found.spec))
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)


def place_block(block: Block, mesh: Mesh) -> Block:
    """The batches of a block, with their rows split over the mesh axis "data"."""
    on_mesh = [isinstance(x.sharding, NamedSharding) for x in jax.tree.leaves(block.batches)]
    block = block if all(on_mesh) else interleave_block(block)
    batches = place(block.batches, mesh, PartitionSpec(None, DATA_AXIS))
    return block._replace(batches=batches)


def on_auto_axes(function: Function) -> Function:
    """Runs ``function(state, ...) -> (state, info)`` with the Explicit axes of a mesh made Auto.

    To be used under `jit`. The new state is sharded as the given one.
    """

    @functools.wraps(function)
    def call(state: PyTree, *args: Any, **kwargs: Any) -> Any:
        mesh = _explicit_mesh(state, args)
        if mesh is None:
            return function(state, *args, **kwargs)
        run = functools.partial(function, **kwargs)
        specs = jax.tree.map(_spec, state)
        with jax.sharding.use_abstract_mesh(mesh):
            run = jax.sharding.auto_axes(run, out_sharding=(specs, PartitionSpec()))
            return run(state, *args)

    return call  # pyright: ignore[reportReturnType]


def _spec(x: jax.Array) -> PartitionSpec:
    """How an array is sharded, as users write it: without the axes at the end that are not."""
    spec = tuple(jax.typeof(x).sharding.spec)
    while spec and spec[-1] is None:
        spec = spec[:-1]
    return PartitionSpec(*spec)


def _explicit_mesh(*trees: PyTree) -> jax.sharding.AbstractMesh | None:
    """The mesh with Explicit axes of the context, or of traced arrays; None if there is none."""
    meshes = [jax.sharding.get_abstract_mesh()]
    if not meshes[0].axis_names:
        leaves = [x for x in jax.tree.leaves(trees) if isinstance(x, jax.Array)]
        meshes = [jax.typeof(x).sharding.mesh for x in leaves]
    explicit = [mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types]
    return explicit[0] if explicit else None
