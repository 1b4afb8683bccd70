"""What all noise objectives share: averages, one step, the slope for an agent, their two names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arbiter_jax as aj
from arbiter_jax import objectives
from arbiter_jax.objectives._objective import limited_loss, power_average, update_objective
from tests.floor_runs import noise_signals


def loss_fn(w, batch):
    return (w - batch) ** 2 / 2


# Averages


def test_a_sample_counts_for_all_steps_since_the_last():
    mean = power_average(jnp.float32(0), jnp.float32(3.0), jnp.int32(0), jnp.int32(2), 1)
    mean = power_average(mean, jnp.float32(5.0), jnp.int32(2), jnp.int32(4), 1)
    # Weights t^1, integrated from 0 to 2 and from 2 to 4: 2 and 6.
    assert float(mean) == pytest.approx((2 * 3 + 6 * 5) / 8)


def test_an_average_still_moves_after_very_many_steps():
    now = jnp.int32(30_000_000)  # 1 - (now - 1) / now is 0 in float32
    mean = power_average(jnp.float32(0), jnp.float32(1), now - 1, now, 3)
    assert float(mean) == pytest.approx(4 / 3e7, rel=1e-3)


# One step


def step_of(measures, calls=None):
    """One step of the noise floor, from the state after another one; the state before and after."""
    objective = objectives.noise_floor(persistence=1.0)
    measure = objective.measure

    def counted(*args):
        if calls is not None:
            calls.append(None)
        return measure(*args)

    objective = objective._replace(measure=counted)
    at = jnp.ones(()), jnp.ones(()), jnp.asarray(8)
    signals = lambda loss: {"value": jnp.float32(loss)} | noise_signals(loss / 8)
    before, _ = update_objective(objective, objective.init(), *at, signals(2.0))
    if calls is not None:
        calls.clear()
    after, _ = update_objective(objective, before, *at, signals(1.0), measures)
    return before, after


def test_a_step_that_does_not_measure_counts_its_loss():
    calls = []
    before, after = step_of(False, calls)
    assert calls == []  # not even traced
    assert float(after.noise) == float(before.noise)
    assert int(after.num_measurements) == 1
    assert int(after.training.last) == 2
    assert float(after.training.recent) < float(before.training.recent)


@pytest.mark.parametrize("measures", [True, False])
def test_a_flag_that_is_traced_decides_like_a_bool(measures):
    expected = step_of(measures)[1]
    traced = jax.jit(lambda flag: step_of(flag)[1])(jnp.array(measures))
    for a, b in zip(*map(jax.tree.leaves, (traced, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("measures", [True, False])
def test_known_while_tracing_needs_no_cond(measures):
    conds = lambda flag: str(jax.make_jaxpr(lambda: step_of(flag)[1])()).count("cond[")
    assert conds(measures) == 0
    assert str(jax.make_jaxpr(lambda flag: step_of(flag)[1])(True)).count("cond[") == 1


# For an agent


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["noise_floor", "expected_gain"])
def test_the_objective_is_least_at_its_closed_form(kind):
    objective = objectives.noise_response(
        kind, loss_fn=loss_fn, persistence=1.0, step_cost=20.0 * (kind == "expected_gain")
    )
    known = {
        "noise_floor": {"held_batch_size": jnp.array(77.0)},
        "expected_gain": {"noiseless_gain": jnp.array(0.02), "noise_cost": jnp.array(1.5)},
    }
    state = objective.init()._replace(**known[kind])
    sizes = jnp.linspace(2, 1000, 100_000)
    values = jax.vmap(lambda b: objective.loss(state, b))(sizes)
    assert bool(jnp.all(jnp.isfinite(values)))
    assert float(sizes[jnp.argmin(values)]) == pytest.approx(float(objective.best(state)), rel=5e-3)
    slopes = jax.vmap(jax.grad(lambda b: objective.loss(state, b)))(sizes)
    assert np.all(np.sign(slopes[::100]) == np.sign(sizes[::100] - objective.best(state)))


@pytest.mark.parametrize(
    ("best", "size", "expected"),
    [
        (100.0, 10.0, -1.0),  # 1 - 100 / 10, cut
        (100.0, 80.0, 1 - 100 / 80),
        (100.0, 100.0, 0.0),
        (100.0, 199.0, 1 - 100 / 199),
        (1e4, 199.0, -1.0),
        (1e4, 199.9, 0.0),  # outward, in the last half example
    ],
)
def test_the_slope_in_log_size_is_bounded(best, size, expected):
    objective = objectives.noise_floor()
    state = objective.init()._replace(held_batch_size=jnp.array(best))

    def loss(logit):
        return limited_loss(objective, state, 8 + (200 - 8) * jax.nn.sigmoid(logit), 8, 200)

    logit = jnp.log((size - 8) / (200 - size))
    assert float(jax.grad(loss)(logit)) == pytest.approx(expected, abs=1e-4)


# By name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "noise"}, "kind must be one of"),
        ({"kind": "expected_gain"}, "loss_fn must be a function .* got None"),
        ({"kind": "expected_gain", "loss_fn": 3}, "loss_fn must be a function .* got 3"),
        ({"loss_fn": 100_000}, "a budget is given as num_examples"),
        ({"measure_every": 3}, "options must be among num_examples, .* got measure_every"),
        ({"noise_share": -1.0}, "noise_share must be"),
    ],
)
def test_a_wrong_noise_response_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        aj.noise_response(**arguments)
