"""Plain functions of parameters and inputs, with the head's input intercepted.

A function has no submodules to intercept, but its program shows where the parameters of the head
first meet the data: what they meet is the head's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend import core

from arbiter_jax.models._cut import Network

PyTree = Any
# Calls that mean no more than the program inside of them.
_TRANSPARENT = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr"}


def network(
    apply: Callable[[PyTree, PyTree], PyTree], init: Callable[[jax.Array], PyTree], head: str
) -> Network:
    """The adapter of `apply(params, inputs) -> outputs`, whose head is a subtree of `params`."""

    def run(params, model_state, inputs, *, train, mask, key, features):
        del train, mask, key
        closed, shapes = jax.make_jaxpr(apply, return_shape=True)(params, inputs)
        params_with_paths = jax.tree_util.tree_leaves_with_path(params)
        marks = [HEAD if _under(head, path) else NEITHER for path, _ in params_with_paths]
        if HEAD not in marks:
            names = dict.fromkeys(_name(path[:1]) for path, _ in params_with_paths)
            raise ValueError(f"head must be a path in params ({', '.join(names)}), got {head!r}.")
        leaves = jax.tree.leaves(inputs)
        interpreter = _Interpreter(head, features)
        outputs = interpreter.evaluate(
            closed.jaxpr,
            [(x, NEITHER) for x in closed.consts],
            [
                *zip([x for _, x in params_with_paths], marks, strict=True),
                *((x, DATA) for x in leaves),
            ],
        )
        outputs = jax.tree.unflatten(jax.tree.structure(shapes), [x for x, _ in outputs])
        return outputs, tuple(interpreter.recorded), model_state

    return Network(lambda key: (init(key), None), run)


# What a value of the program was computed from; the larger number wins where two meet. OUTPUT: from
# the operation where the head met the data.
NEITHER, HEAD, DATA, OUTPUT = range(4)
_Marked = tuple[Any, int]


class _Interpreter:
    """Evaluates a program while it records, or replaces, what the head's parameters meet."""

    def __init__(self, head: str, replacement: jax.Array | None):
        self.head = head
        self.replacement = replacement
        self.recorded: list[jax.Array] = []

    def evaluate(
        self, jaxpr: core.Jaxpr, consts: Iterable[_Marked], args: Iterable[_Marked]
    ) -> list[_Marked]:
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(atom):
            return (atom.val, NEITHER) if isinstance(atom, core.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            results = self.step(jaxpr, eqn, [*map(read, eqn.invars)])
            known.update(zip(eqn.outvars, results, strict=True))
        return [*map(read, jaxpr.outvars)]

    def step(self, jaxpr: core.Jaxpr, eqn: core.JaxprEqn, operands: list[_Marked]) -> list[_Marked]:
        body = _TRANSPARENT.get(eqn.primitive.name)
        if body is not None:
            inner = eqn.params[body]
            return self.evaluate(inner.jaxpr, [(x, NEITHER) for x in inner.consts], operands)

        marks = [mark for _, mark in operands]
        result = max(marks, default=NEITHER)
        if HEAD in marks and result == DATA:
            self.meet(eqn, operands)
            result = OUTPUT
        # One equation is a program, too: the public way to evaluate it.
        variables = {
            atom: value
            for atom, (value, _) in zip(eqn.invars, operands, strict=True)
            if not isinstance(atom, core.Literal)
        }
        program = jaxpr.replace(
            constvars=[], invars=[*variables], outvars=[*eqn.outvars], eqns=[eqn]
        )
        outputs = jax.core.eval_jaxpr(program, [], *variables.values())
        return [(value, result) for value in outputs]

    def meet(self, eqn: core.JaxprEqn, operands: list[_Marked]) -> None:
        """Records or replaces, in place, the one operand that is data."""
        found = {id(v): i for i, v in enumerate(eqn.invars) if operands[i][1] == DATA}
        if len(found) > 1 or any(True for _ in core.jaxprs_in_params(eqn.params)):
            raise ValueError(
                f"head={self.head!r} must meet the data in one operation on one array, but meets "
                f"it inside of `{eqn.primitive.name}`."
            )
        (index,) = found.values()
        if self.replacement is None:
            self.recorded.append(operands[index][0])
        else:
            operands[index] = (self.replacement, DATA)


def _name(path: Sequence[Any]) -> str:
    return ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def _under(head: str, path: Sequence[Any]) -> bool:
    return f"{_name(path)}.".startswith(f"{head}.")
