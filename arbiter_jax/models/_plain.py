"""Plain functions of parameters and inputs, with the head's input intercepted.

A function has no submodules that could be intercepted, but its program shows where the parameters of
the head first meet the data: the data in that operation is the head's input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from arbiter_jax import _jaxpr
from arbiter_jax.base import PyTree
from arbiter_jax.models._cut import Network

# What a value of the program was computed from; where two meet, the larger number wins. OUTPUT: from
# the operation in which the head met the data. Everything else has no mark.
HEAD, DATA, OUTPUT = range(1, 4)


def network(
    apply: Callable[[PyTree, PyTree], PyTree], init: Callable[[jax.Array], PyTree], head: str
) -> Network:
    """The adapter of `apply(params, inputs) -> outputs`, whose head is a subtree of `params`."""

    def run(params, model_state, inputs, *, train, mask, key, features):
        del train, mask, key
        closed, shapes = jax.make_jaxpr(apply, return_shape=True)(params, inputs)
        marks = _marks_of_params(params, head) + [DATA] * len(jax.tree.leaves(inputs))
        program = _jaxpr.inline(closed, marks, _propagate, opens=lambda marks: HEAD in marks)
        recorded: list[jax.Array] = []

        def meet(op, operands):
            positions = _positions_of_data(program, op, head)
            if features is None:
                recorded.append(operands[positions[0]])
            else:
                operands = [features if i in positions else x for i, x in enumerate(operands)]
            return _jaxpr.apply(op, operands)

        overrides = {
            op.results[0]: meet for op in program.ops if _is_meeting(program.operand_marks(op))
        }
        outputs = _jaxpr.evaluate(program, jax.tree.leaves((params, inputs)), overrides)
        outputs = jax.tree.unflatten(jax.tree.structure(shapes), outputs)
        return outputs, tuple(recorded), model_state

    return Network(lambda key: (init(key), None), run)


def _marks_of_params(params: PyTree, head: str) -> list[int | None]:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    marks = [HEAD if f"{_name(path)}.".startswith(f"{head}.") else None for path in paths]
    if HEAD not in marks:
        names = dict.fromkeys(_name(path[:1]) for path in paths)
        raise ValueError(f"head must be a path in params ({', '.join(names)}), got {head!r}.")
    return marks


def _name(path: Sequence[Any]) -> str:
    return ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def _is_meeting(marks: list[int | None]) -> bool:
    return HEAD in marks and DATA in marks and OUTPUT not in marks


def _propagate(op: _jaxpr.Op, marks: list[int | None]) -> int | None:
    del op
    if _is_meeting(marks):
        return OUTPUT
    return max((mark for mark in marks if mark is not None), default=None)


def _positions_of_data(program: _jaxpr.Program, op: _jaxpr.Op, head: str) -> list[int]:
    """Which operands of a meeting are the data."""
    (data, *others) = {x for x in op.values if program.marks.get(x) == DATA}
    if others or _jaxpr.has_body(op):
        raise ValueError(
            f"head={head!r} must meet the data in one operation on one array, but meets it inside "
            f"`{op.name}`."
        )
    return [i for i, x in enumerate(op.operands) if x == data]
