"""Every batch-size rule against everything that the protocol promises.

The list of rules comes from `schedulers.__all__`: a member without a case in `rules` fails.
"""

import collections
import functools
import inspect
import pathlib
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import _jaxpr, base
from tests.rules import (
    ARBITERS,
    LIMITS,
    NOT_RULES,
    NUM_FEATURES,
    RULES,
    USUAL,
    grads_at,
    loss_fn,
    params_like,
    signals_at,
    usual_in_ci,
)

LOW, HIGH, START = LIMITS.values()
NUM_STEPS = 6

CASES = RULES | ARBITERS

ALL_RULES = sorted(CASES)
NUM_TRACES = collections.Counter()

# Most of the time goes into compiling programs that run once: let XLA take it easy.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def make(name: str) -> optax.GradientTransformationExtraArgs:
    return CASES[name].make(**LIMITS)


@functools.cache
def start_of(name: str) -> Any:
    return jit(make(name).init)(params_like())


@functools.cache
def steps() -> list[tuple[Any, dict[str, Any]]]:
    return [(grads_at(t), signals_at(t)) for t in range(NUM_STEPS)]


@functools.cache
def jitted(name: str):
    def update(grads, state, signals):
        NUM_TRACES[name] += 1
        return make(name).update(grads, state, params_like(), **signals)

    return jit(update)


def wrap(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    every_second = optax.MultiSteps(tx, every_k_schedule=2)
    # Not `every_second.gradient_transformation()`, which takes no extra arguments. And not the
    # other way round: MultiSteps never forgets a gradient that is not finite.
    every_second = optax.GradientTransformationExtraArgs(every_second.init, every_second.update)
    return optax.apply_if_finite(every_second, max_consecutive_errors=5)


@jit
def update_without_a_rule(grads, state):
    return wrap(optax.sgd(0.1)).update(grads, state, params_like())


@functools.cache
def run(name: str) -> tuple[list[Any], list[Any]]:
    """The updates and the states of a run of one rule by itself."""
    state, updates, states = start_of(name), [], []
    for grads, signals in steps():
        out, state = jitted(name)(grads, state, signals)
        updates.append(out)
        states.append(state)
    return updates, states


def sizes_of(name: str) -> list[int]:
    return [int(aj.get_batch_size(state)) for state in run(name)[1]]


def public_functions() -> set[str]:
    members = {name: getattr(aj.schedulers, name) for name in aj.schedulers.__all__}
    return {name for name, member in members.items() if inspect.isfunction(member)}


def test_every_member_has_a_case():
    assert public_functions() | set(ARBITERS) == set(CASES) | set(NOT_RULES)


def nodes_of(tree):
    yield tree
    for child in base.children(tree):
        yield from nodes_of(child)


@pytest.mark.slow
def test_every_member_is_a_function_or_a_state():
    nodes = [node for name in CASES for node in nodes_of(start_of(name))]
    types = {type(node).__name__ for node in nodes}
    others = {"BatchSchedule", "RateState"}  # a plan, and the state of the rate beside a rule
    assert set(aj.schedulers.__all__) - public_functions() - others <= types


def test_exports_are_sorted():
    assert list(aj.schedulers.__all__) == sorted(aj.schedulers.__all__)


@pytest.mark.slow
def test_the_cases_move():
    """A suite over rules that stand still would prove little."""
    still = {name for name in CASES if len({START, *sizes_of(name)}) == 1}
    assert still == {"constant", "shadow"}


@pytest.mark.parametrize("name", ALL_RULES)
def test_updates_unchanged(name):
    for updates, (grads, _) in zip(run(name)[0], steps(), strict=True):
        chex.assert_trees_all_equal(updates, grads)


@pytest.mark.parametrize("name", ALL_RULES)
def test_stays_in_range(name):
    assert int(aj.get_batch_size(start_of(name))) == START
    assert all(LOW <= size <= HIGH for size in sizes_of(name))
    for state in [start_of(name), *run(name)[1]]:
        chex.assert_shape(aj.get_batch_size(state), ())
        chex.assert_type(aj.get_batch_size(state), jnp.int32)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", ALL_RULES)
def test_state_types_are_stable(name, x64):
    with jax.enable_x64(x64):
        # Not the cached rule of `make`, which may have been made without x64.
        tx, grads, signals = CASES[name].make(**LIMITS), grads_at(0), signals_at(0)
        before = jax.eval_shape(tx.init, params_like())
        update = lambda state: tx.update(grads, state, params_like(), **signals)[1]
        after = jax.eval_shape(update, before)
        chex.assert_trees_all_equal_structs(before, after)
        kinds = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
        assert kinds(before) == kinds(after)


@pytest.mark.parametrize("name", ALL_RULES)
def test_a_second_call_does_not_recompile(name):
    run(name)
    assert NUM_TRACES[name] == 1


@pytest.mark.parametrize("name", ALL_RULES)
def test_scan_equals_loop(name):
    def step(state, inputs):
        grads, signals = inputs
        _, state = make(name).update(grads, state, params_like(), **signals)
        return state, aj.get_batch_size(state)

    inputs = jax.tree.map(lambda *xs: jnp.stack(xs), *steps())
    state, sizes = jit(lambda s, x: jax.lax.scan(step, s, x))(start_of(name), inputs)
    assert sizes.tolist() == sizes_of(name)
    chex.assert_trees_all_close(state, run(name)[1][-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALL_RULES)
def test_vmaps(name):
    """Two seeds at once, each with a state and signals of its own, equal two by themselves."""
    states = run(name)[1]
    stack = lambda *trees: jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
    (first_grads, first_signals), (second_grads, second_signals) = steps()[1], steps()[4]
    update = lambda g, state, signals: make(name).update(g, state, params_like(), **signals)[1]
    after = jit(jax.vmap(update))(
        stack(first_grads, second_grads),
        stack(states[0], states[3]),
        stack(first_signals, second_signals),
    )
    chex.assert_trees_all_close(after, stack(states[1], states[4]), rtol=1e-5, atol=1e-6)
    assert aj.get_batch_size(after).tolist() == [sizes_of(name)[1], sizes_of(name)[4]]


@pytest.mark.parametrize("name", ALL_RULES)
def test_ignores_unknown_extra_arguments(name):
    tx, (grads, signals) = make(name), steps()[0]
    state = start_of(name)

    def program(**unknown):
        update = lambda g, s: tx.update(g, s, params_like(), **signals, **unknown)
        return _jaxpr.text(jax.make_jaxpr(update)(grads, state))

    assert program() == program(an_argument_of_somebody_else=object())


@pytest.mark.slow
@pytest.mark.parametrize("name", usual_in_ci(ALL_RULES))
def test_works_without_batch_size(name):
    """In a loop of one's own nobody passes it: the latest decision counts as applied."""
    tx, (grads, signals), state = make(name), steps()[0], start_of(name)
    without = {k: v for k, v in signals.items() if k != "batch_size"}

    @jit
    def both(state):
        given = without | {"batch_size": aj.get_batch_size(state)}
        return [tx.update(grads, state, params_like(), **s)[1] for s in (without, given)]

    assumed, expected = both(state)
    chex.assert_trees_all_equal(assumed, expected)


@pytest.mark.parametrize("name", ALL_RULES)
def test_survives_chain_multi_steps_apply_if_finite(name):
    """All three around one another: two steps to an update, and one step that is not finite."""

    tx = wrap(optax.chain(optax.sgd(0.1), make(name)))
    update = jit(lambda g, s, signals: tx.update(g, s, params_like(), **signals))
    state, expected = jit(tx.init)(params_like()), wrap(optax.sgd(0.1)).init(params_like())
    assert base.requests(state).signals == set(CASES[name].signals)
    assert set(CASES[name].signals) <= set(base.SIGNALS)
    states = [state]
    for t, (grads, signals) in enumerate(steps()):
        grads = jax.tree.map(lambda g, bad=(t == 3): g * jnp.nan if bad else g, grads)
        updates, state = update(grads, state, signals)
        expected_updates, expected = update_without_a_rule(grads, expected)
        chex.assert_trees_all_close(updates, expected_updates, rtol=1e-6)
        states.append(state)
        assert LOW <= int(aj.get_batch_size(state)) <= HIGH
    rules = [base.requests(state).rules for state in states]
    chex.assert_trees_all_equal(rules[2], rules[4])  # between two updates, and the bad step
    if name not in ("constant", "shadow"):
        for before, after in [(rules[0], rules[2]), (rules[4], rules[5])]:
            assert not jax.tree.all(jax.tree.map(jnp.array_equal, before, after))


@pytest.mark.parametrize("name", ALL_RULES)
def test_a_missing_signal_is_named(name):
    tx, (grads, signals) = make(name), steps()[0]
    state = jit(tx.init)(params_like())
    for missing in CASES[name].signals:
        rest = {k: v for k, v in signals.items() if k != missing}
        with pytest.raises(TypeError, match=f"`{missing}`"):
            tx.update(grads, state, params_like(), **rest)


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"min_batch_size": 0}, "min_batch_size"),
        ({"min_batch_size": 2.5}, "min_batch_size"),
        ({"max_batch_size": 8}, "max_batch_size"),
        ({"initial_batch_size": 256}, "initial_batch_size"),
        ({"initial_batch_size": 8}, "initial_batch_size"),
    ],
)
@pytest.mark.parametrize("name", sorted(set(ALL_RULES) - {"seesaw"}))  # which has other arguments
def test_bad_limits_are_named(name, limits, named):
    with pytest.raises(ValueError, match=named):
        CASES[name].make(**(LIMITS | limits))


MEASURED = [name for name in ALL_RULES if set(CASES[name].signals) & base.MEASURED_SIGNALS]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in USUAL else pytest.mark.exhaustive)
        for name in sorted(set(MEASURED) - {"shadow"})
    ],
)
def test_a_batch_of_one_is_left(name):
    """One example says nothing about noise: a rule that could be at 1 would stay there."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(64, NUM_FEATURES)), jnp.float32)
    data = aj.Data(*[(inputs, jnp.asarray(rng.normal(size=64), jnp.float32))] * 2)
    make = CASES[name].make if name != "cabs" else functools.partial(aj.schedulers.cabs, 2.0)
    start: dict[str, Any] = {}
    if name in ARBITERS:  # it starts from 64 by default, and learns slowly
        fast = {"agent_optimizer": optax.adam(0.05), "mixture_optimizer": optax.adam(0.05)}
        start = {"initial_batch_size": 1, **fast}
    tx = optax.chain(optax.sgd(0.02), make(min_batch_size=1, max_batch_size=4, **start))
    params = jax.tree.map(jnp.zeros_like, params_like())  # noise is all that there is
    result = aj.fit(loss_fn, params, tx, data, num_examples=400, window=5)
    (rule,) = base.requests(result.state.opt_state).rules
    assert int(rule.min_batch_size) == 2
    assert int(result.per_step("batch_size")[0]) == 2
    # An agent descends over thousands of steps; what it needs is that each of them measures.
    assert int(np.max(result.per_step("batch_size"))) > 2 or name in ARBITERS
    assert int(next(s.num_skipped for s in nodes_of(rule) if hasattr(s, "num_skipped"))) == 0


@pytest.mark.parametrize("name", sorted(set(MEASURED) - {"shadow"} - set(ARBITERS)))
def test_a_range_of_one_size_stays_1(name):
    state = CASES[name].make(min_batch_size=1, max_batch_size=1).init(params_like())
    (rule,) = base.requests(state).rules
    assert [int(x) for x in (rule.batch_size, rule.min_batch_size, rule.max_batch_size)] == [1] * 3


def _guarantees(docstring: str) -> list[str]:
    """The names of the guarantees of a docstring: "* Grows only: ..." -> "grows_only"."""
    _, found, text = docstring.partition("*Guarantees*:")
    block = text.split(">>>")[0]
    return [
        re.sub(r"[^a-z0-9]+", "_", name.lower()) for name in re.findall(r"\* ([^:*]+):", block)
    ] or (["nothing"] if not found else [])


@pytest.mark.parametrize("name", sorted(set(CASES) - set(ARBITERS)))
def test_every_guarantee_has_a_test_of_its_name(name):
    """In the suites about all rules, or in the files of this rule."""
    rule = getattr(aj.schedulers, name)
    here, module = pathlib.Path(__file__).parent, inspect.getmodule(rule).__name__
    own = f"test{module.rpartition('.')[2]}.py"
    sources = [pathlib.Path(__file__), here / "schedulers" / "test_properties.py"]
    sources += [
        path for path in (here / "schedulers" / own, here / "objectives" / own) if path.exists()
    ]
    tests = set(re.findall(r"^def test_(\w+)\(", "\n".join(s.read_text() for s in sources), re.M))
    guarantees = _guarantees(inspect.getdoc(rule))
    assert guarantees
    assert set(guarantees) <= tests
