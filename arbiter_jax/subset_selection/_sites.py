"""What surrounds the one equation that a parameter enters, its site: probes and matrix products.

A zero added to the result of a site has the gradient of the loss with respect to that result,
without the gradient of the parameter being formed. Other frameworks need a hook on a layer for
this; here it works for any function of JAX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from arbiter_jax import _jaxpr
from arbiter_jax._numerics import extract_patches
from arbiter_jax._parameter_sites import Site, Sites

# Operations that keep the inner product of gradients (a broadcast only if it adds no elements).
_ISOMETRIES = frozenset(
    {"reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "copy"}
)


def evaluate(sites: Sites, arguments: Sequence[Any], probes: dict[int, jax.Array]):
    """Runs the program with probes added to the results of the sites.

    Returns:
      (outputs, other operands of each site, by leaf).
    """
    seen = {}

    def add_probe(site):
        def run(op, operands):
            others = [*operands[: site.position], *operands[site.position + 1 :]]
            seen[site.leaf] = [jnp.asarray(x) for x in others]
            return [_jaxpr.apply(op, operands)[0] + probes[site.leaf]]

        return run

    overrides = {site.op.results[0]: add_probe(site) for site in sites.by_leaf.values()}
    return _jaxpr.evaluate(sites.program, arguments, overrides), seen


class Matrix(NamedTuple):
    """How the gradient at a site is a sum of t outer products, of p times q elements."""

    data: int  # which of the other operands of the site is x
    factors: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]  # x, d -> (t,p), (t,q)
    to_operand: Callable[[jax.Array], jax.Array]  # (p, q) -> the shape of the operand


def as_matrix(site: Site) -> Matrix | None:
    """The site as a matrix product, None if it is not one."""
    for op in site.views:
        types = zip(op.operands, op.operand_types, strict=True)
        (before,) = [type_ for operand, type_ in types if isinstance(operand, int)]
        (after,) = op.result_types
        inexact = all(jnp.issubdtype(x.dtype, jnp.inexact) for x in (before, after))
        cast = op.name == "convert_element_type" and inexact
        if not (cast or op.name in _ISOMETRIES) or before.size != after.size:
            return None
    if site.op.name == "dot_general":
        return _dot_matrix(site)
    if site.op.name == "conv_general_dilated":
        return _conv_matrix(site.op.params, site.operand, 0) if site.position == 1 else None
    # The branches of `lax.platform_dependent` compute the same function: one that is a convolution
    # is enough.
    for branch in _jaxpr.platform_branches(site.op):
        if [op.name for op in branch.ops] == ["conv_general_dilated"]:
            # The first operand of the conditional is the index of the branch.
            positions = {value: 1 + i for i, value in enumerate(branch.inputs)}
            data, kernel = (positions.get(x) for x in branch.ops[0].operands)
            if data is not None and kernel == site.position:
                data -= data > site.position
                return _conv_matrix(branch.ops[0].params, site.operand, data)
    return None


def _dot_matrix(site: Site) -> Matrix | None:
    contracted, batch = site.op.params["dimension_numbers"]
    if batch[0]:
        return None
    position, operand = site.position, site.operand
    mine, other = contracted[position], contracted[1 - position]
    free = [axis for axis in range(operand.ndim) if axis not in mine]
    axes = [*mine, *free]
    q = math.prod(operand.shape[axis] for axis in free)

    def factors(x, d):
        rows = [axis for axis in range(x.ndim) if axis not in other]
        p = math.prod(x.shape[axis] for axis in other)
        x = lax.transpose(x, [*rows, *other]).reshape(-1, p)
        # The result has the axes of its left operand first.
        return x, d.reshape(-1, q) if position == 1 else d.reshape(q, -1).T

    return Matrix(0, factors, _to_operand(operand, axes))


def _conv_matrix(params: dict[str, Any], kernel: Any, data: int) -> Matrix | None:
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None
    lhs, rhs, out = params["dimension_numbers"]
    window = [kernel.shape[axis] for axis in rhs[2:]]

    def factors(x, d):
        x = lax.transpose(x, (lhs[0], *lhs[2:], lhs[1]))
        dilation = zip(params["padding"], params["lhs_dilation"], strict=True)
        config = [(low, high, step - 1) for (low, high), step in dilation]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])
        d = lax.transpose(d, (out[0], *out[2:], out[1]))
        x = extract_patches(x, window, params["window_strides"], params["rhs_dilation"])
        return x.reshape(-1, x.shape[-1]), d.reshape(-1, d.shape[-1])

    axes = [*rhs[2:], rhs[1], rhs[0]]  # [*spatial, features_in, features_out]
    return Matrix(data, factors, _to_operand(kernel, axes))


def _to_operand(operand: Any, axes: Sequence[int]) -> Callable[[jax.Array], jax.Array]:
    """The inverse of a transposition to `axes` that is followed by a reshape to a matrix."""

    def to_operand(matrix):
        matrix = matrix.reshape([operand.shape[axis] for axis in axes])
        return lax.transpose(matrix, [axes.index(axis) for axis in range(operand.ndim)])

    return to_operand
