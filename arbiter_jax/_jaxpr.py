"""Traced programs (jaxprs): inlined, searched, trimmed and evaluated.

JAX may change how it represents programs in any version, so all code that depends on that is here.
Reference: https://docs.jax.dev/en/latest/notebooks/Writing_custom_interpreters_in_Jax.html
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

# Calls that compute what their body computes, with the same derivatives: `jax.jit`, the calls that
# JAX's own transformations make, and `jax.checkpoint`, which saves no memory once it is inlined.
TRANSPARENT_CALLS = frozenset({"jit", "closed_call", "remat2"})


class Op(NamedTuple):
    """One equation of an inlined program; an operand is a literal or the number of a value."""

    eqn: core.JaxprEqn
    owner: core.Jaxpr  # the program that the equation was taken from
    operands: list[Any]
    results: list[int]

    @property
    def name(self) -> str:
        """Name of the primitive."""
        return self.eqn.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """Static parameters of the primitive."""
        return self.eqn.params

    @property
    def values(self) -> list[int]:
        """The operands that are not literals."""
        return [x for x in self.operands if isinstance(x, int)]

    @property
    def operand_types(self) -> list[Any]:
        """Shape and dtype of each operand."""
        return [x.aval for x in self.eqn.invars]

    @property
    def result_types(self) -> list[Any]:
        """Shape and dtype of each result."""
        return [x.aval for x in self.eqn.outvars]


class Program(NamedTuple):
    """A program whose values are numbered, with some or all of its calls inlined."""

    ops: list[Op]  # in the order of evaluation
    inputs: list[int]
    constants: dict[int, Any]  # by value
    outputs: list[Any]  # literals or numbers of values
    marks: dict[int, Any]  # by value; see `inline`

    def operand_marks(self, op: Op) -> list[Any]:
        """The mark of each operand that is not a literal, None if it has none."""
        return [self.marks.get(x) for x in op.values]


def inline(
    closed: core.ClosedJaxpr,
    marks: Sequence[Any],
    propagate: Callable[[Op, list[Any]], Any],
    opens: Callable[[list[Any]], bool],
) -> Program:
    """Numbers the values of a program, inlines calls, and propagates marks from its inputs.

    Args:
      closed: The program, from ``jax.make_jaxpr``.
      marks: What is known about each input, None for nothing.
      propagate: (op, marks of its operands that are not literals) -> mark of its results.
      opens: The same marks -> whether a transparent call with these operands is inlined.
    """
    numbers = itertools.count()
    program = Program([], [], {}, [], {})

    def mark(value: int, known: Any) -> int:
        if known is not None:
            program.marks[value] = known
        return value

    def walk(jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        values = dict(zip(jaxpr.invars, arguments, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            values[var] = next(numbers)
            program.constants[values[var]] = const

        def read(atom):
            return atom if isinstance(atom, core.Literal) else values[atom]

        for eqn in jaxpr.eqns:
            op = Op(eqn, jaxpr, [read(x) for x in eqn.invars], [])
            known = program.operand_marks(op)
            if op.name in TRANSPARENT_CALLS and opens(known):
                results = walk(*_body(op), op.operands)
            else:
                results = [next(numbers) for _ in eqn.outvars]
                op = op._replace(results=results)
                known = propagate(op, known)
                program.ops.append(op)
                for value in results:
                    mark(value, known)
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(x) for x in jaxpr.outvars]

    inputs = [mark(next(numbers), known) for known in marks]
    return program._replace(inputs=inputs, outputs=walk(closed.jaxpr, closed.consts, inputs))


def _body(op: Op) -> tuple[core.Jaxpr, Sequence[Any]]:
    """The program that a transparent call runs, and its constants."""
    body = op.params["call_jaxpr" if op.name == "closed_call" else "jaxpr"]
    return (body.jaxpr, body.consts) if isinstance(body, core.ClosedJaxpr) else (body, ())


def has_body(op: Op) -> bool:
    """Whether an operation contains a program: a call, a loop, a conditional."""
    return any(True for _ in core.jaxprs_in_params(op.params))


def platform_branches(op: Op) -> list[Program]:
    """The branches of a ``lax.platform_dependent``, all inlined; [] for any other operation.

    They take all operands but the first one, the index of the platform.
    """
    if op.name != "cond" or op.params.get("branches_platforms") is None:
        return []
    return [
        inline(branch, [None] * len(branch.jaxpr.invars), lambda *_: None, lambda _: True)
        for branch in op.params["branches"]
    ]


def live(program: Program) -> Program:
    """The program without the operations that no output and no side effect depends on."""
    needed = {x for x in program.outputs if isinstance(x, int)}
    ops = []
    for op in reversed(program.ops):
        if op.eqn.effects or not needed.isdisjoint(op.results):
            needed.update(op.values)
            ops.append(op)
    return program._replace(ops=ops[::-1])


def apply(op: Op, operands: Sequence[Any]) -> list[Any]:
    """What an operation returns for these operands."""
    # A program of one equation: evaluating a program is public, binding a primitive is not.
    arguments = {
        var: x
        for var, x in zip(op.eqn.invars, operands, strict=True)
        if not isinstance(var, core.Literal)
    }
    program = op.owner.replace(
        constvars=[], invars=[*arguments], outvars=op.eqn.outvars, eqns=[op.eqn]
    )
    return evaluate_closed(core.ClosedJaxpr(program, []), [*arguments.values()])


def evaluate(
    program: Program,
    arguments: Sequence[Any],
    overrides: Mapping[int, Callable[[Op, list[Any]], list[Any]]],
) -> list[Any]:
    """What a program returns.

    Args:
      program: The program.
      arguments: One array per input.
      overrides: By the number of an operation's first result, (op, operands) -> results: what is
        called instead of :func:`apply`.
    """
    values = {**program.constants, **dict(zip(program.inputs, arguments, strict=True))}

    def read(operand):
        return values[operand] if isinstance(operand, int) else operand.val

    for op in program.ops:
        run = overrides.get(op.results[0], apply) if op.results else apply
        results = run(op, [read(x) for x in op.operands])
        values.update(zip(op.results, results, strict=True))
    return [read(x) for x in program.outputs]


def trim(closed: core.ClosedJaxpr) -> tuple[core.ClosedJaxpr, list[bool]]:
    """A program without all that its outputs do not need, and which inputs it still takes.

    Calls, loops and conditionals are trimmed inside, too. JAX caches the result for as long as it
    caches the program.
    """
    jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return core.ClosedJaxpr(jaxpr, closed.consts), used


# What is known of a value that may depend on some inputs of its program, in the order of a join.
_ZERO, _INDEPENDENT, _DEPENDENT = range(3)

_CALLS = TRANSPARENT_CALLS | {"custom_jvp_call", "custom_vjp_call"}

# Zero if all their operands are.
_KEEP_ZERO = frozenset(
    {"abs", "add", "add_any", "broadcast_in_dim", "convert_element_type", "copy", "integer_pow"}
    | {"max", "min", "neg", "reduce_sum", "reshape", "sign", "slice", "square", "squeeze", "sub"}
    | {"transpose"}
)


def dependent_outputs(closed: core.ClosedJaxpr, inputs: Sequence[bool]) -> list[bool]:
    """Which outputs of a program depend on the marked inputs, all of which are finite.

    Calls, loops and conditionals are followed inside. The result of any other operation depends on
    all its operands, unless it multiplies by a constant zero or asks whether they are finite; what
    a condition chooses depends on what the condition does, unless all choices are zero.
    """
    marks = [_DEPENDENT if marked else _INDEPENDENT for marked in inputs]
    return [mark == _DEPENDENT for mark in _dependence(closed.jaxpr, marks)]


def _dependence(program: Any, arguments: Sequence[int]) -> list[int]:
    jaxpr = program.jaxpr if isinstance(program, core.ClosedJaxpr) else program
    marks = dict(zip(jaxpr.invars, arguments, strict=True))
    marks.update(dict.fromkeys(jaxpr.constvars, _INDEPENDENT))

    def read(atom):
        if isinstance(atom, core.Literal):
            return _ZERO if np.all(atom.val == 0) else _INDEPENDENT
        return marks[atom]

    for eqn in jaxpr.eqns:
        results = _dependence_of_results(eqn, [read(x) for x in eqn.invars])
        marks.update(zip(eqn.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _dependence_of_results(eqn: core.JaxprEqn, operands: list[int]) -> list[int]:
    name, params = eqn.primitive.name, eqn.params
    if name in _CALLS:
        (called,) = core.jaxprs_in_params(params)
        return _dependence(called, operands)
    if name == "cond":
        branches = [_dependence(branch, operands[1:]) for branch in params["branches"]]
        return _chosen(operands[0], [max(results) for results in zip(*branches, strict=True)])
    if name == "select_n":
        return _chosen(operands[0], [max(operands[1:])])
    if name == "scan":
        num_consts, num_carry = params["num_consts"], params["num_carry"]
        split = num_consts, num_consts + num_carry
        consts, carry, xs = (
            operands[: split[0]],
            operands[split[0] : split[1]],
            operands[split[1] :],
        )
        iteration = lambda carry: _dependence(params["jaxpr"], consts + carry + xs)
        carry = _fixed_point(lambda carry: iteration(carry)[:num_carry], carry)
        return carry + iteration(carry)[num_carry:]
    if name == "while":
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        asked, consts = operands[: split[0]], operands[split[0] : split[1]]

        def body(carry):
            (condition,) = _dependence(params["cond_jaxpr"], asked + carry)
            return _chosen(condition, _dependence(params["body_jaxpr"], consts + carry))

        return _fixed_point(body, operands[split[1] :])
    if name == "optimization_barrier":
        return operands
    is_nan = name == "ne" and eqn.invars[0] is eqn.invars[1]
    if name == "is_finite" or is_nan:
        return [_INDEPENDENT]
    if (name == "mul" and _ZERO in operands) or (name in _KEEP_ZERO and max(operands) == _ZERO):
        return [_ZERO]
    mark = _DEPENDENT if _DEPENDENT in operands else _INDEPENDENT
    return [mark] * len(eqn.outvars)


def _chosen(condition: int, results: list[int]) -> list[int]:
    """What a condition has chosen, from the joined marks of its choices."""
    if condition != _DEPENDENT:
        return results
    return [mark if mark == _ZERO else _DEPENDENT for mark in results]


def _fixed_point(body: Callable[[list[int]], list[int]], carry: list[int]) -> list[int]:
    """The marks of the carry of a loop at any iteration."""
    while True:
        joined = [max(pair) for pair in zip(carry, body(carry), strict=True)]
        if joined == carry:
            return carry
        carry = joined


def evaluate_closed(closed: core.ClosedJaxpr, operands: Sequence[Any]) -> list[Any]:
    """What a program that was not inlined returns."""
    return core.jaxpr_as_fun(closed)(*operands)


def text(closed: core.ClosedJaxpr) -> str:
    """A program as text, without the addresses of functions, which differ from trace to trace."""
    return re.sub(r"0x[0-9a-f]+", "", str(closed))
