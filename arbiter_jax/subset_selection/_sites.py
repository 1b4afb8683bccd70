"""Where each parameter enters a function: the one equation, and what surrounds it.

The function is traced, the calls that a parameter enters are inlined, and each parameter is
followed through reshapes and casts to the equation that uses it, its *site*. A zero added to what
the site returns has the gradient of the loss with respect to that output, found without that of the
parameter: what other frameworks hang on a layer as a hook, for any function of JAX.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

# Calls whose body may take the place of the call.
_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"})
# Operations that keep the inner product of gradients (a broadcast only where it adds no elements).
_ISOMETRIES = frozenset(
    {"reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "copy", "copy_p"}
)


class Op(NamedTuple):
    """One equation; operands are numbers of values, or literals."""

    eqn: core.JaxprEqn
    operands: list[Any]
    results: list[int]


class Site(NamedTuple):
    """The one equation that uses a leaf: `op`, with the leaf as operand `position`."""

    leaf: int
    views: list[Op]  # from the leaf to that operand: reshape, cast, ...
    op: Op
    position: int

    @property
    def output(self) -> Any:
        """Shape and type of what the operation returns."""
        return self.op.eqn.outvars[0].aval

    @property
    def operand(self) -> Any:
        """Shape and type of the leaf as the operation takes it."""
        return self.op.eqn.invars[self.position].aval

    def view(self, leaf: jax.Array) -> jax.Array:
        """The leaf as the operation takes it."""
        for op in self.views:
            (leaf,) = _bind(op, [leaf if _is_value(x) else x.val for x in op.operands])
        return leaf

    def apply(self, leaf: jax.Array, others: Sequence[jax.Array]) -> jax.Array:
        """What the operation returns for this leaf and the other operands."""
        operands = [*others[: self.position], self.view(leaf), *others[self.position :]]
        return _bind(self.op, operands)[0]


class Program(NamedTuple):
    """An inlined jaxpr."""

    ops: list[Op]
    inputs: list[int]
    constants: dict[int, Any]
    outputs: list[Any]
    sites: dict[int, Site]  # by leaf


def _is_value(operand: Any) -> bool:
    return not isinstance(operand, core.Literal)


def inline(closed: core.ClosedJaxpr, num_leaves: int) -> Program:
    """Flattens the calls that leaves enter and finds the sites; leaves are the first inputs."""
    numbers = itertools.count()
    ops: list[Op] = []
    constants: dict[int, Any] = {}
    leaf_of: dict[int, int] = {}  # value -> the one leaf that it is a view of

    def run(jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        values = dict(zip(jaxpr.invars, arguments, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            values[var] = next(numbers)
            constants[values[var]] = const
        for eqn in jaxpr.eqns:
            operands = [values[v] if _is_value(v) else v for v in eqn.invars]
            views = [x for x in operands if _is_value(x) and x in leaf_of]
            if views and eqn.primitive.name in _CALLS:
                body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
                inner, inner_consts = (
                    (body.jaxpr, body.consts) if isinstance(body, core.ClosedJaxpr) else (body, ())
                )
                results = run(inner, inner_consts, operands)
            else:
                results = [next(numbers) for _ in eqn.outvars]
                ops.append(Op(eqn, operands, results))
                if len(results) == 1 and len(views) == 1 == sum(map(_is_value, operands)):
                    leaf_of[results[0]] = leaf_of[views[0]]
            values.update(zip(eqn.outvars, results, strict=True))
        return [values[v] if _is_value(v) else v for v in jaxpr.outvars]

    inputs = [next(numbers) for _ in closed.jaxpr.invars]
    for leaf in range(num_leaves):
        leaf_of[inputs[leaf]] = leaf
    outputs = run(closed.jaxpr, closed.consts, inputs)
    ops = _live(ops, outputs)

    used_by: dict[int, list[Op]] = {view: [] for view in leaf_of}
    for op in ops:
        for view in (x for x in op.operands if _is_value(x) and x in leaf_of):
            used_by[view].append(op)
    sites = {}
    for leaf in range(num_leaves):
        site = _find_site(leaf, inputs[leaf], used_by, outputs)
        if site is not None:
            sites[leaf] = site
    # Where two leaves meet in one operation there is no site: neither has its own.
    taken = [id(site.op) for site in sites.values()]
    sites = {leaf: site for leaf, site in sites.items() if taken.count(id(site.op)) == 1}
    return Program(ops, inputs, constants, outputs, sites)


def _live(ops: list[Op], outputs: list[Any]) -> list[Op]:
    """The operations that the outputs depend on: a head, say, may have run in vain before."""
    needed = set(filter(_is_value, outputs))
    live = []
    for op in reversed(ops):
        if not needed.isdisjoint(op.results):
            needed.update(filter(_is_value, op.operands))
            live.append(op)
    return live[::-1]


def _find_site(leaf: int, value: int, used_by: dict, outputs: list[Any]) -> Site | None:
    views: list[Op] = []
    while value not in outputs and len(used_by[value]) == 1:
        (op,) = used_by[value]
        (result, *others) = op.results
        if result in used_by:
            views.append(op)
            value = result
            continue
        inexact = jnp.issubdtype(op.eqn.outvars[0].aval.dtype, jnp.inexact)
        return None if others or not inexact else Site(leaf, views, op, op.operands.index(value))
    return None


def _bind(op: Op, operands: Sequence[Any]) -> list[Any]:
    bound = op.eqn.primitive.get_bind_params(op.eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # jax < 0.10: a pair
    out = op.eqn.primitive.bind(*functions, *operands, **params)
    return list(out) if op.eqn.primitive.multiple_results else [out]


def evaluate(program: Program, arguments: Sequence[Any], probes: dict[int, jax.Array]):
    """Runs the program with probes added at the sites; returns what the sites were given, too."""
    values = {**program.constants, **dict(zip(program.inputs, arguments, strict=True))}
    site_of = {id(site.op): site for site in program.sites.values()}
    seen = {}
    for op in program.ops:
        operands = [values[x] if _is_value(x) else x.val for x in op.operands]
        results = _bind(op, operands)
        if id(op) in site_of:
            site = site_of[id(op)]
            results[0] = results[0] + probes[site.leaf]
            others = [*operands[: site.position], *operands[site.position + 1 :]]
            seen[site.leaf] = [jnp.asarray(x) for x in others]
        values.update(zip(op.results, results, strict=True))
    return [values[x] if _is_value(x) else x.val for x in program.outputs], seen


class Matrix(NamedTuple):
    """How the gradient at a site is a sum of t outer products, of p times q elements."""

    data: int  # which of the other operands of the site is x
    factors: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]  # x, d -> (t,p), (t,q)
    to_operand: Callable[[jax.Array], jax.Array]  # (p, q) -> the shape of the operand


def as_matrix(site: Site) -> Matrix | None:
    """The site as a matrix product, None where it is none."""
    for op in site.views:
        name = op.eqn.primitive.name
        (x,) = [v.aval for v in op.eqn.invars if _is_value(v)]
        (y,) = [v.aval for v in op.eqn.outvars]
        cast = name == "convert_element_type" and jnp.issubdtype(x.dtype, jnp.inexact)
        if not (cast or name in _ISOMETRIES) or x.size != y.size:
            return None
    eqn = site.op.eqn
    if eqn.primitive.name == "dot_general":
        return _dot_matrix(eqn, site.position, site.operand)
    if eqn.primitive.name == "conv_general_dilated":
        return _conv_matrix(eqn.params, site.operand, 0) if site.position == 1 else None
    # A function that is written for each platform is one and the same function: any branch tells.
    if eqn.primitive.name == "cond" and eqn.params.get("branches_platforms") is not None:
        for branch in eqn.params["branches"]:
            eqns = branch.jaxpr.eqns
            if len(eqns) == 1 and eqns[0].primitive.name == "conv_general_dilated":
                arguments = list(branch.jaxpr.invars)  # the first operand of a cond is the index
                if all(v in arguments for v in eqns[0].invars):
                    data, kernel = (1 + arguments.index(v) for v in eqns[0].invars)
                    if kernel == site.position:
                        return _conv_matrix(eqns[0].params, site.operand, data - (data > kernel))
    return None


def _dot_matrix(eqn: core.JaxprEqn, position: int, operand: Any) -> Matrix | None:
    contracted, batch = eqn.params["dimension_numbers"]
    if batch[0]:
        return None
    mine, other = contracted[position], contracted[1 - position]
    free = [axis for axis in range(operand.ndim) if axis not in mine]
    axes = [*mine, *free]
    q = math.prod(operand.shape[axis] for axis in free)

    def factors(x, d):
        rows = [axis for axis in range(x.ndim) if axis not in other]
        p = math.prod(x.shape[axis] for axis in other)
        x = lax.transpose(x, [*rows, *other]).reshape(-1, p)
        # The axes of the product are those of its left operand first.
        return x, d.reshape(-1, q) if position == 1 else d.reshape(q, -1).T

    def to_operand(matrix):
        matrix = matrix.reshape([operand.shape[axis] for axis in axes])
        return lax.transpose(matrix, [axes.index(axis) for axis in range(operand.ndim)])

    return Matrix(0, factors, to_operand)


def _conv_matrix(params: dict[str, Any], kernel: Any, data: int) -> Matrix | None:
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None
    lhs, rhs, out = params["dimension_numbers"]
    axes = [*rhs[2:], rhs[1], rhs[0]]  # [*spatial, features_in, features_out]
    window = [kernel.shape[axis] for axis in rhs[2:]]

    def factors(x, d):
        x = lax.transpose(x, (lhs[0], *lhs[2:], lhs[1]))
        dilation = zip(params["padding"], params["lhs_dilation"], strict=True)
        config = [(low, high, step - 1) for (low, high), step in dilation]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])
        d = lax.transpose(d, (out[0], *out[2:], out[1]))
        strides = params["window_strides"]
        spans = [
            (size - 1) * stride + 1 for size, stride in zip(d.shape[1:-1], strides, strict=True)
        ]
        slices = []  # the input as each position of the kernel sees it
        for place in itertools.product(*map(range, window)):
            start = [k * step for k, step in zip(place, params["rhs_dilation"], strict=True)]
            limit = [low + span for low, span in zip(start, spans, strict=True)]
            limits = (x.shape[0], *limit, x.shape[-1])
            slices.append(lax.slice(x, (0, *start, 0), limits, (1, *strides, 1)))
        patches = jnp.concatenate(slices, axis=-1)
        return patches.reshape(-1, patches.shape[-1]), d.reshape(-1, d.shape[-1])

    def to_operand(matrix):
        matrix = matrix.reshape([kernel.shape[axis] for axis in axes])
        return lax.transpose(matrix, [axes.index(axis) for axis in range(kernel.ndim)])

    return Matrix(data, factors, to_operand)
