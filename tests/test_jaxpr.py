"""Traced programs, and that only one module depends on how JAX represents them."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import arbiter_jax
from arbiter_jax import _jaxpr

INTERNALS = re.compile(
    r"jax\.interpreters|jax\.extend|jax\._src|from jax import core|jax\.core\.(?!Tracer\b)\w|"
    r"jaxpr_as_fun|jaxprs_in_params|dce_jaxpr|get_bind_params|\.eqns\b|\.primitive\b"
)


def test_no_other_module_uses_internals_of_jax():
    root = pathlib.Path(arbiter_jax.__file__).parent
    users = [path.name for path in root.rglob("*.py") if INTERNALS.search(path.read_text())]
    assert users == ["_jaxpr.py"]


def largest(op, marks):
    del op
    return max((mark for mark in marks if mark is not None), default=None)


def inlined(fn, *args, opens=lambda marks: True):
    """The program of a function whose first input is marked 1, the second 2, and so on."""
    closed = jax.make_jaxpr(fn)(*args)
    return _jaxpr.inline(closed, range(1, 1 + len(args)), largest, opens)


def names(program):
    return [op.name for op in program.ops]


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


sine.defvjp(lambda x: (jnp.sin(x), jnp.cos(x)), lambda cos, g: (g * cos,), optimize_remat=True)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))])
def test_transparent_calls_are_inlined(wrap):
    table = np.arange(3.0, dtype=np.float32)
    fn = wrap(lambda x, y: jnp.sin(2.0 * x) * y + table)
    args = (jnp.ones(3), jnp.arange(3.0))
    program = inlined(fn, *args)
    assert names(program) == ["mul", "sin", "mul", "add"]
    np.testing.assert_allclose(_jaxpr.evaluate(program, args, {})[0], fn(*args), rtol=1e-6)


def test_closed_calls_are_inlined():
    """One remains of a function with a custom gradient if its residuals are not used."""
    closed, _ = _jaxpr.trim(jax.make_jaxpr(lambda x: jax.vjp(sine, x)[0])(0.5))
    assert "closed_call" in str(closed)
    program = _jaxpr.inline(closed, [None], largest, lambda marks: True)
    assert names(program) == ["sin"]
    np.testing.assert_allclose(_jaxpr.evaluate(program, [0.5], {}), [np.sin(0.5)], rtol=1e-6)


def test_calls_stay_unless_their_operands_open_them():
    def fn(x, y):
        return jax.jit(lambda y: y + 1)(y), jax.jit(lambda x: 2 * x)(x)

    program = inlined(fn, 1.0, 2.0, opens=lambda marks: 1 in marks)
    assert names(program) == ["jit", "mul"]
    assert [_jaxpr.has_body(op) for op in program.ops] == [True, False]
    assert [float(x) for x in _jaxpr.evaluate(program, [1.0, 2.0], {})] == [3.0, 2.0]


def test_marks_follow_the_values():
    def fn(x, y):
        return jnp.cos(jax.jit(lambda x: x + 1)(x)), lax.iota(jnp.float32, 3), x * y

    program = inlined(fn, 1.0, 2.0)
    marks = {op.name: program.marks.get(op.results[0]) for op in program.ops}
    assert marks == {"add": 1, "cos": 1, "iota": None, "mul": 2}
    (product,) = [op for op in program.ops if op.name == "mul"]
    assert program.operand_marks(product) == [1, 2]


def test_only_live_operations_are_kept():
    seen = []

    def fn(x):
        jnp.tan(x)
        jax.debug.callback(lambda x: seen.append(float(x)), jnp.sin(x))
        return jnp.cos(x)

    program = _jaxpr.live(inlined(fn, 0.0))
    assert names(program) == ["sin", "debug_callback", "cos"]
    assert _jaxpr.evaluate(program, [0.0], {})[0] == 1
    jax.effects_barrier()
    assert seen == [0.0]


def test_an_operation_is_applied_to_other_operands():
    def fn(x):
        return lax.scan(lambda c, _: (2.0 * c, c), x, None, length=3)[0] * x * x

    program = inlined(fn, 1.0)
    loop, *products = program.ops
    assert float(_jaxpr.apply(loop, [5.0])[0]) == 40
    assert float(_jaxpr.apply(products[0], [3.0, 4.0])[0]) == 12


def test_overrides_replace_operations():
    program = inlined(lambda x: jnp.sin(x) + jnp.cos(x), 0.0)
    cosine = program.ops[1]
    seen = []

    def run(op, operands):
        seen.append((op.name, float(operands[0])))
        return [10 + _jaxpr.apply(op, operands)[0]]

    assert float(_jaxpr.evaluate(program, [0.0], {cosine.results[0]: run})[0]) == 11
    assert seen == [("cos", 0.0)]


def test_types_of_operands_and_results():
    (op,) = inlined(lambda x: x.astype(jnp.int32), jnp.ones((2, 3))).ops
    assert [(x.shape, x.dtype) for x in op.operand_types] == [((2, 3), jnp.float32)]
    assert [(x.shape, x.dtype) for x in op.result_types] == [((2, 3), jnp.int32)]
    assert op.params["new_dtype"] == jnp.int32


def test_branches_of_a_function_for_each_platform():
    def fn(x, y):
        return lax.platform_dependent(x, y, cpu=jax.jit(lambda x, y: x * y), default=lax.sub)

    program = inlined(fn, 1.0, 2.0)
    branches = _jaxpr.platform_branches(program.ops[-1])
    assert [names(branch) for branch in branches] == [["mul"], ["sub"]]
    assert branches[1].ops[0].operands == branches[1].inputs
    conditional = inlined(lambda x: lax.cond(x > 0, lax.sin, lax.cos, x), 1.0).ops[-1]
    assert conditional.name == "cond"
    assert _jaxpr.platform_branches(conditional) == []


def test_trim_drops_what_no_output_needs():
    """Inside loops, too; the same program gives the same object."""

    @jax.make_jaxpr
    def trace(x, y):
        carry = lax.scan(lambda c, _: ((c[0] + 1, jnp.tanh(c[1])), None), (x, y), None, length=2)[0]
        return carry[0]

    trimmed, used = _jaxpr.trim(trace(1.0, 2.0))
    assert used == [True, False]
    assert "tanh" not in str(trimmed)
    assert float(_jaxpr.evaluate_closed(trimmed, [1.0])[0]) == 3
    assert _jaxpr.trim(trace(3.0, 4.0))[0].jaxpr is trimmed.jaxpr


def test_text_is_without_addresses():
    def trace():
        return jax.make_jaxpr(
            lambda x: jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((), jnp.float32), x)
        )(1.0)

    assert _jaxpr.text(trace()) == _jaxpr.text(trace())
    assert "callback" in _jaxpr.text(trace())


# What an output depends on


@jax.custom_jvp
def doubled(x):
    return 2 * x


doubled.defjvp(lambda xs, ts: (2 * xs[0], 2 * ts[0]))


def accumulate(x, y):
    """The second output is reached by x after two iterations, the third never."""

    def body(carry, row):
        a, b, c = carry
        return (a + x, b + a, c + y), row * y

    (a, b, c), rows = lax.scan(body, (y, y, y), jnp.ones((3, 2)))
    return a, b, c, rows


def count_down(x, y):
    """A loop whose number of iterations depends on x: all that it changes does, too."""
    return lax.while_loop(
        lambda c: c[0].sum() > 0, lambda c: (c[0] - x, c[1] + y, c[2]), (y, y, 0.0)
    )


FINITE = lambda x: jnp.all(jnp.isfinite(x)) & ~jnp.any(jnp.isnan(x))

DEPENDENCE = {
    "arithmetic": (lambda x, y: (x + y, y * 2, x * 0.0, jnp.zeros_like(x)), "1000"),
    "calls": (lambda x, y: (jax.jit(doubled)(x), jax.checkpoint(doubled)(y), sine(x)), "101"),
    "a comparison": (lambda x, y: (jnp.where(x > 0, y, 1), jnp.where(y > 0, y, 1)), "10"),
    "both are zero": (lambda x, y: (jnp.where(x > 0, 0 * y, jnp.zeros_like(x)),), "0"),
    "finite": (lambda x, y: (jnp.where(FINITE(x), y, 0), jnp.where(FINITE(x), x, 0)), "01"),
    "a branch": (
        lambda x, y: lax.cond(x.sum() > 0, lambda: (y, 0 * y), lambda: (1 + y, jnp.zeros(2))),
        "10",
    ),
    "a fixed branch": (
        lambda x, y: lax.cond(y.sum() > 0, lambda: (y, x), lambda: (1 + y, y)),
        "01",
    ),
    "a scan": (accumulate, "1100"),
    "a while": (count_down, "110"),
    "a fixed while": (lambda x, y: count_down(y, y), "000"),
    "what is not known": (lambda x, y: (jnp.cumsum(x), jnp.sort(y), jnp.linalg.norm(x)), "101"),
}


@pytest.mark.parametrize("case", DEPENDENCE)
def test_outputs_depend_on_what_reaches_them(case):
    fn, expected = DEPENDENCE[case]
    closed = jax.make_jaxpr(fn)(jnp.ones(2), jnp.ones(2))
    found = _jaxpr.dependent_outputs(closed, [True, False])
    assert found == [digit == "1" for digit in expected]
    assert not any(_jaxpr.dependent_outputs(closed, [False, False]))
