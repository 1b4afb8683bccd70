"""A rule around any objective: its limits, the cost of a step, what the two named rules are."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import objectives, schedulers
from arbiter_jax.schedulers._step_times import step_cost
from tests.floor_runs import noise_signals

LIMITS = {"min_batch_size": 8, "max_batch_size": 512}


def loss_fn(w, batch):
    return jnp.sum((w[None] - batch) ** 2, axis=1) / 2


def signals_at(t, size):
    """Everything that the two objectives read, for parameters of two entries."""
    signals = noise_signals(0.2) | {"gradient_noise": jnp.ones(2), "batch_size": size}
    signals |= {"update_noise": jnp.full(2, -0.1), "value": 1 / (1 + t)}
    return signals | {"meta_batch": jnp.zeros((4, 2))}


def run(rule, num_steps=30, **signals):
    """The state after some steps of one size, one of them with a loss that is not finite."""

    def step(state, t):
        given = signals_at(jnp.where(t == 7, jnp.nan, t), 32) | signals
        return rule.update(-0.1 * jnp.ones(2), state, jnp.ones(2), **given)[1], None

    run = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(num_steps))[0])
    return run(rule.init(jnp.ones(2)))


@pytest.mark.parametrize(
    ("named", "objective", "options"),
    [
        (
            schedulers.noise_floor(num_examples=20_000, persistence=2.0, **LIMITS),
            objectives.noise_floor(num_examples=20_000, persistence=2.0),
            {},
        ),
        (
            schedulers.expected_gain(loss_fn, persistence=2.0, **LIMITS),
            objectives.expected_gain(loss_fn, persistence=2.0),
            {"measure_every": 10, "max_change": 2.0},
        ),
    ],
)
def test_the_named_rules_are_rules_around_objectives(named, objective, options):
    state = run(named)
    same = run(schedulers.from_objective(objective, **LIMITS, **options))
    assert type(same).__name__ == "ObjectiveState"
    chex.assert_trees_all_equal(tuple(same), tuple(state))
    assert int(state.num_skipped) == (1 if "value" in state.statistics.requires else 0)


@pytest.mark.parametrize("budget", [None, 8000])
def test_an_objective_may_plan_for_the_loops_budget(budget):
    """20 first batches of an 800th, and windows of a 50th of it."""
    rule = schedulers.from_objective(objectives.noise_floor(persistence=1.0), **LIMITS)
    signals = {} if budget is None else {"budget": jnp.int32(budget)}
    assert int(rule.init(None).window_steps) == 1
    state = run(rule, num_steps=60, **signals)
    largest = 2**31 - 1 if budget is None else max(1, budget // 50 // int(state.batch_size))
    assert int(state.window_steps) == largest
    assert int(state.statistics.run_budget) == (budget or 0)


def test_a_loop_need_not_measure_at_other_steps():
    """With signals that were not made, only counters advance."""
    rule = schedulers.from_objective(objectives.expected_gain(loss_fn, persistence=1.0), **LIMITS)
    state, zeros = run(rule, num_steps=3), jax.tree.map(jnp.zeros_like, signals_at(0, 32))
    _, after = rule.update(jnp.ones(2), state, jnp.ones(2), **zeros, signals_made=False)
    expected = state._replace(num_steps=state.num_steps + 1)
    chex.assert_trees_all_equal(after, expected)


@pytest.mark.parametrize("make", ["noise_floor", "expected_gain"])
def test_the_cost_of_a_step_is_measured(make):
    options = {"step_cost": "measured", "initial_batch_size": 32, "persistence": 1.0}
    rule = getattr(schedulers, make)(loss_fn, **options)
    assert "step_seconds" in aj.base.requests(rule.init(None)).signals
    update = jax.jit(lambda state, signals: rule.update(jnp.ones(2), state, jnp.ones(2), **signals))
    state, seconds = rule.init(jnp.ones(2)), jnp.float32(jnp.nan)
    for size in (32, 64, 128, 64):
        for _ in range(2):
            signals = signals_at(0, jnp.asarray(size)) | {"step_seconds": seconds}
            state = update(state, signals)[1]
        seconds = jnp.float32(1e-3 * (200 + size))  # a step costs as much as 200 examples
    assert float(step_cost(state.step_cost.times)) == pytest.approx(200, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        schedulers.noise_floor,
        pytest.param(schedulers.expected_gain, marks=pytest.mark.exhaustive),
    ],
)
def test_a_smallest_size_of_one_is_taken_as_two(make):
    """One example carries no information about noise: a rule would stay there, and skip every step."""
    inputs = jax.random.normal(jax.random.PRNGKey(0), (64, 2))
    limits = {"min_batch_size": 1, "max_batch_size": 4, "initial_batch_size": 1}
    rule, data = make(loss_fn, persistence=1.0, **limits), aj.Data(inputs, inputs)
    tx = optax.chain(optax.sgd(0.1), rule)
    result = aj.fit(loss_fn, jnp.ones(2), tx, data, num_examples=400, window=20)
    assert int(result.state.opt_state[1].num_skipped) == 0
    assert min(record.batch_size for record in result.history) == 2
    assert max(record.batch_size for record in result.history) > 2
    only = make(loss_fn, max_batch_size=1, min_batch_size=1).init(jnp.ones(2))
    assert int(aj.get_batch_size(only)) == 1


@pytest.mark.parametrize("make", ["from_objective", "noise_floor", "expected_gain"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure_every": 0}, "measure_every must be"),
        ({"max_change": 1.0}, "max_change must be a finite number > 1"),
        ({"step_cost": -1.0}, "step_cost must be"),
        ({"step_cost": "free"}, "step_cost must be one of 'measured'"),
    ],
)
def test_bad_arguments_are_named(make, options, message):
    first = objectives.noise_floor() if make == "from_objective" else loss_fn
    with pytest.raises(ValueError, match=message):
        getattr(schedulers, make)(first, **options)


@pytest.mark.parametrize("objective", [loss_fn, 100_000, None])
def test_anything_but_an_objective_is_refused(objective):
    with pytest.raises(ValueError, match="objective must be a NoiseObjective, for example"):
        schedulers.from_objective(objective)
