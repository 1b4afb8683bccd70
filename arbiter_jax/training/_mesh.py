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

A batch size counts the examples of all devices. A run on n devices takes the same examples and
makes the same decisions as a run on one, to rounding, with two exceptions: random numbers that are
drawn for each row (dropout, `transform_batch`) meet other examples, because rows are in another
order; and sampling="local" is stratified by device, so its batches depend on n. It needs the same
number of examples on each device, and works without micro-batches only.

Axes of type Explicit, which ``jax.make_mesh`` makes by default, are made Auto within a window, so that
loss functions are ordinary array code. Arrays that such a function captures instead of taking them as
arguments keep their Explicit type, and JAX refuses to mix the two: pass them in `params`, `model_state`
or the data.

Where the batch itself is compared example by example (`subset_gradients`), the inputs of a batch are
gathered on every device. A bucket with one row a device leaves half of the devices idle where halves
of the batch are compared.

>>> import arbiter_jax as aj, jax, jax.numpy as jnp, optax
>>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
>>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(64))
>>> loss_fn = lambda w, batch: (w - batch) ** 2 / 2
>>> data = aj.Data(jnp.ones(128))
>>> result = aj.fit(loss_fn, jnp.zeros(()), tx, data, num_examples=640, window=10, mesh=mesh)
>>> round(float(result.state.params), 4), result.state.params.sharding.is_fully_replicated
(0.6513, True)

In your own loop, with arrays that are placed on the mesh, the window is called within it:

>>> everywhere = jax.sharding.NamedSharding(mesh, jax.P())
>>> state = jax.device_put(aj.init_state(jnp.zeros(()), tx, 0), everywhere)
>>> with jax.set_mesh(mesh):
...     state, info = aj.run_window(
...         state, jax.device_put(data, everywhere), loss_fn=loss_fn, tx=tx, bucket_size=64, window=10)
>>> round(float(state.params), 4)
0.6513
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from arbiter_jax.base import PyTree
from arbiter_jax.batching import Block
from arbiter_jax.batching._blocks import interleave_block
from arbiter_jax.batching._rows import DATA_AXIS, check_data_axis, num_data_devices
from arbiter_jax.training._state import Data

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


def in_mesh(fit: Function) -> Function:
    """Runs ``fit(..., mesh=mesh)`` in the context of the mesh, with its Explicit axes made Auto.

    Without a mesh, that of the context is taken, or of arrays that are placed on one. The result's
    state is sharded on the mesh that was given.
    """

    @functools.wraps(fit)
    def call(*args: Any, mesh: Mesh | None = None, **options: Any) -> Any:
        if mesh is not None:
            check_mesh(mesh)
        try:
            context = jax.sharding.get_mesh()
        except ValueError:  # within jit, vmap or grad, where `fit` says what to do instead
            return fit(*args, **options)
        mesh = _mesh_of(context, [*args, *options.values()]) if mesh is None else mesh
        if mesh is None:
            return fit(*args, **options)
        auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
        with jax.set_mesh(auto):
            result = fit(*args, mesh=auto, **options)
        return result._replace(state=place(result.state, mesh))

    return call  # pyright: ignore[reportReturnType]


def _mesh_of(context: Mesh, arguments: list[Any]) -> Mesh | None:
    """The mesh of the context, or of the first array that lies on one with an axis "data"."""
    meshes: list[Any] = [context]
    # The data may be any object with these attributes, which need not be a pytree.
    of_data = [[getattr(x, name, None) for name in Data._fields] for x in arguments]
    trees = [*arguments, *of_data]
    for leaf in jax.tree.leaves(trees, is_leaf=lambda node: isinstance(node, Iterator)):
        meshes.append(getattr(getattr(leaf, "sharding", None), "mesh", None))
    found = [x for x in meshes if isinstance(x, Mesh) and DATA_AXIS in x.axis_names]
    return found[0] if found else None


def place(tree: PyTree, mesh: Mesh | None, spec: PartitionSpec | None = None) -> Any:
    """The arrays on a mesh: as they are placed on its devices, the others by `spec`.

    Args:
      tree: A pytree. Leaves that are not arrays, or cannot be read, are returned as they are: the
        caller checks them.
      mesh: Where to; None leaves everything where it is.
      spec: How the arrays that lie elsewhere are split; replicated if None.
    """
    spec = PartitionSpec() if spec is None else spec

    def put(leaf: Any, mesh: Any = mesh) -> Any:
        if not hasattr(leaf, "__array__") or (isinstance(leaf, jax.Array) and leaf.is_deleted()):
            return leaf
        leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        found: Any = getattr(leaf, "sharding", None)
        placed = isinstance(found, NamedSharding) and _is_same(found.mesh, mesh)
        return jax.device_put(leaf, NamedSharding(mesh, found.spec if placed else spec))

    return tree if mesh is None else jax.tree.map(put, tree)


def _is_same(a: Any, b: Mesh) -> bool:
    """Whether two meshes have the same devices and names, whatever the types of their axes."""
    return a.axis_names == b.axis_names and np.array_equal(a.devices, b.devices)


def place_block(block: Block, mesh: Mesh) -> Block:
    """The batches of a block, with their rows split over the mesh axis "data"."""
    shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(block.batches)]
    if not all(isinstance(x, NamedSharding) for x in shardings):
        block = interleave_block(block)
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
