"""An agent whose objective depends on the batch size: it finds and follows the minimum."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from tests.arbiter_runs import AGENT, response_loss

TRACKER = aj.mlp_agent((64,))
CHUNK = 200


@functools.cache
def tracking():
    """An Arbiter whose objective is a / b + log b, with a the signal `value`, and its program."""
    objective = aj.noise_response("noise_floor", persistence=1.0)
    # What is measured is somebody else's test: here the closed form is what `value` says.
    given = lambda state, sample, measured, size, signals: state._replace(
        held_batch_size=signals["value"]
    )
    objective = objective._replace(measure=lambda *args: objective.empty_sample(), update=given)
    make = functools.partial(aj.arbiter, TRACKER, objective=objective, window=10)
    tx, zeros = make(), jnp.zeros(2)
    noise = dict.fromkeys(("gradient_noise", "update_noise", "grad_stats"), zeros)

    def step(state, inputs):
        target, seen = inputs
        _, state = tx.update(zeros, state, zeros, agent_inputs=seen, value=target, **noise)
        return state, (state.batch_size, aj.to_batch_size(state.mixture, 8, 512))

    return make, jax.jit(functools.partial(jax.lax.scan, step))


def follow(targets, start):
    """The sizes and the mixtures of an agent with one target per step, and its last state."""
    make, run = tracking()
    state = make(initial_batch_size=start).init(None)
    inputs = jax.random.uniform(jax.random.PRNGKey(1), (len(targets), 32, 64))  # as pixels are
    found = []
    for i in range(0, len(targets), CHUNK):
        part = slice(i, i + CHUNK)
        state, sizes = run(state, (jnp.asarray(targets[part], jnp.float32), inputs[part]))
        found.append(sizes)
    sizes, mixtures = (np.concatenate(x) for x in zip(*found, strict=True))
    return sizes, mixtures, state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "target", "spread"),
    # On the long way from an end of the range the proposals spread, and stay so.
    [(64, 20.0, 0.5), (16, 200.0, 0.5), (512 - 1, 40.0, 0.9)],
)
def test_an_agent_tracks_the_closed_form(start, target, spread):
    """Within a tenth of the budget."""
    budget = 1000
    sizes, mixtures, _ = follow(np.full(budget, target), start)
    after = slice(budget // 10, None)
    assert np.quantile(np.abs(np.log(mixtures[after] / target)), 0.95) < 0.25
    # What is selected is one of the proposals around the mixture.
    assert np.median(np.abs(np.log(sizes[after] / target))) < spread


@pytest.mark.slow
def test_an_agent_follows_a_closed_form_that_moves():
    targets = np.geomspace(30, 240, 600)
    _, mixtures, _ = follow(targets, 30)
    assert np.median(np.abs(np.log(mixtures[100:] / targets[100:]))) < 0.15


def test_an_agent_comes_back_from_the_end_of_the_range():
    sizes, mixtures, _ = follow(np.r_[np.full(600, 1.0), np.full(200, 60.0)], 64)
    assert sizes[599] <= 9
    assert 45 < mixtures[-1] < 75


def test_an_objective_without_information_is_skipped():
    targets = np.full(CHUNK, 40.0)
    targets[10:13] = np.nan
    _, mixtures, state = follow(targets, 64)
    assert int(state.meta_batch_size) == int(state.batch_size)
    assert int(state.num_skipped) == 3
    assert len(set(mixtures[9:13].tolist())) == 1
    chex.assert_tree_all_finite(state)


def test_an_agent_asks_for_what_its_objective_reads():
    init = lambda **options: aj.arbiter(TRACKER, **options).init(None)
    floor = init(objective=aj.noise_response("noise_floor", persistence=1.0))
    signals = {"agent_inputs", "value", "gradient_noise", "update_noise", "grad_stats"}
    assert aj.base.requests(floor).signals == signals
    loss_fn = lambda params, batch: batch
    guarded = init(objective=aj.noise_response("noise_floor", loss_fn=loss_fn))
    assert aj.base.requests(guarded).signals == signals | {"meta_batch", "persistence"}
    gain = init(objective=aj.noise_response("expected_gain", loss_fn=loss_fn, persistence=1.0))
    assert aj.base.requests(gain).signals == {"agent_inputs", "meta_batch", "update_noise"}
    assert isinstance(floor, aj.ArbiterState)
    assert isinstance(gain, aj.ArbiterState)
    assert int(aj.get_batch_size(aj.re_anchor(gain, 128))) == 128


def test_an_agent_reports_the_budget_of_its_objective():
    init = lambda **options: aj.arbiter(TRACKER, **options).init(None)
    planned = init(objective=aj.noise_response("noise_floor", num_examples=1000))
    assert [int(budget) for budget in aj.base.requests(planned).budgets] == [1000]


@pytest.mark.slow
def test_expected_gain_is_an_objective_in_training():
    """On a quadratic the agent ends near the closed form of its own statistics."""
    loss_fn = lambda w, x: jnp.sum((w[None] - x) ** 2, axis=1) / 2
    data = jax.random.normal(jax.random.PRNGKey(0), (512, 64))
    objective = aj.noise_response("expected_gain", loss_fn=loss_fn, persistence=1.0)
    rule = aj.arbiter(TRACKER, objective=objective, min_batch_size=33, max_batch_size=64, window=10)
    tx = optax.chain(optax.sgd(0.1), rule)
    result = aj.fit(
        loss_fn, jnp.ones(64), tx, aj.Data(data, data), num_examples=40_000, window=10, key=1
    )
    state = result.state.opt_state[1]
    assert int(state.num_skipped) == 0
    # At its optimum a quadratic has nothing to gain: the largest size.
    assert float(objective.best(state.statistics)) > 64
    assert result.history[-1].batch_size > 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of response_loss and objective"),
        (
            {"response_loss": response_loss, "num_features": 6, "objective": object()},
            "exactly one of response_loss and objective",
        ),
        ({"objective": response_loss}, "objective must be an aj.objectives.NoiseObjective"),
        ({"response_loss": 3, "num_features": 6}, "response_loss must be a function .* got 3"),
    ],
)
def test_a_wrong_objective_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        aj.arbiter(AGENT, **options)
