"""Where each parameter enters a function.

The function is traced, the calls that a parameter enters are inlined, and each parameter is followed
through reshapes and casts to the equation that uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from arbiter_jax._jaxpr import Op, Program, apply, inline, live


class Site(NamedTuple):
    """The one equation that uses a leaf: `op`, with the leaf as operand `position`."""

    leaf: int
    views: list[Op]  # from the leaf to that operand: reshape, cast, ...
    op: Op
    position: int

    @property
    def output(self) -> Any:
        """Shape and dtype of the result of the operation."""
        return self.op.result_types[0]

    @property
    def operand(self) -> Any:
        """Shape and dtype of the leaf as an operand of the operation."""
        return self.op.operand_types[self.position]

    def view(self, leaf: jax.Array) -> jax.Array:
        """The leaf as an operand of the operation."""
        for op in self.views:
            (leaf,) = apply(op, [leaf if isinstance(x, int) else x.val for x in op.operands])
        return leaf

    def apply(self, leaf: jax.Array, others: Sequence[jax.Array]) -> jax.Array:
        """The result of the operation for this leaf and the other operands."""
        operands = [*others[: self.position], self.view(leaf), *others[self.position :]]
        return apply(self.op, operands)[0]


class Sites(NamedTuple):
    """A program and the sites in it, by leaf."""

    program: Program
    by_leaf: dict[int, Site]


def find_sites(closed: Any, num_leaves: int) -> Sites:
    """Inlines the calls that leaves enter and finds the sites; leaves are the first inputs."""

    def propagate(op, marks):  # a view of one leaf is marked with that leaf
        return marks[0] if len(marks) == 1 and len(op.results) == 1 else None

    program = live(
        inline(
            closed,
            [i if i < num_leaves else None for i in range(len(closed.in_avals))],
            propagate,
            opens=lambda marks: any(mark is not None for mark in marks),
        )
    )
    users: dict[int, list[Op]] = {view: [] for view in program.marks}
    for op in program.ops:
        for view in op.values:
            if view in users:
                users[view].append(op)
    found = [_find_site(leaf, program, users) for leaf in range(num_leaves)]
    # If two leaves meet in one operation, it is a site of neither.
    taken = [site.op.results for site in found if site is not None]
    sites = {
        site.leaf: site for site in found if site is not None and taken.count(site.op.results) == 1
    }
    return Sites(program, sites)


def _find_site(leaf: int, program: Program, users: dict[int, list[Op]]) -> Site | None:
    views: list[Op] = []
    value = program.inputs[leaf]
    while value not in program.outputs and len(users[value]) == 1:
        (op,) = users[value]
        (result, *others) = op.results
        if result in users:
            views.append(op)
            value = result
            continue
        inexact = jnp.issubdtype(op.result_types[0].dtype, jnp.inexact)
        return None if others or not inexact else Site(leaf, views, op, op.operands.index(value))
    return None
