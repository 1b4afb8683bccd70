"""Offline meta-descent: what it repeats, what it learns, and what short horizons do."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import stochastic_meta_descent as smd
from tests.stochastic_meta_descent.problems import loss_fn, mean_loss, regression


@pytest.mark.slow
@pytest.mark.parametrize(
    "inner_optimizer", [optax.sgd, pytest.param(optax.adam, marks=pytest.mark.exhaustive)]
)
def test_every_look_ahead_starts_after_pretraining(inner_optimizer, key):
    """And the loss at its end descends."""
    params, data = regression()
    options = {
        "horizon": 10,
        "num_meta_steps": 30,
        "num_pretraining_steps": 3,
        "inner_optimizer": inner_optimizer,
        "effective_learning_rate": inner_optimizer is optax.sgd,
        "batch_size": 10,
        "hyperparameters": smd.Hyperparameters(0.002, 0.5, 0.1),
        "pretraining": smd.Hyperparameters(0.01, 0.5, 0.0),
        "meta_optimizer": optax.adam(0.1),
    }
    result = smd.offline(loss_fn, params, data, key, **options)
    assert result.losses.shape == result.history.decay.shape == (30,)
    assert result.losses[-3:].mean() < 0.95 * result.losses[:3].mean()
    assert result.hyperparameters.learning_rate > 1.5 * 0.002
    np.testing.assert_allclose(result.history.momentum, 0.5)  # not learned
    assert int(result.num_skipped) == 0
    # Pretraining is three steps of training, after which the velocity is discarded.
    state = aj.init_state(params, inner_optimizer(0.01, 0.5), key)
    state, _ = smd.train(
        loss_fn, state, data, smd.Hyperparameters(0.01, 0.5, 0.0),
        num_steps=3, inner_optimizer=inner_optimizer, batch_size=10,
    )  # fmt: skip
    chex.assert_trees_all_close(result.state.params, state.params, rtol=1e-6)
    assert all(not jnp.any(x) for x in jax.tree.leaves(result.state.opt_state))
    assert int(result.state.num_steps) == 0
    # The first look-ahead, again.
    again, _ = smd.train(
        loss_fn, result.state, data, jax.tree.map(lambda x: x[0], result.history),
        num_steps=10, inner_optimizer=inner_optimizer, batch_size=10,
    )  # fmt: skip
    np.testing.assert_allclose(result.losses[0], mean_loss(again.params, data), rtol=1e-5)


def noisy_quadratic_loss(params, batch):
    """Half h (theta - c)^2 with curvatures 1 and .01, for batches of centers c."""
    curvature = jnp.array([[1.0, 0.01]])
    return 0.5 * (curvature * (params[None] - batch) ** 2).sum(1)


@pytest.mark.slow
def test_a_longer_horizon_learns_a_larger_final_rate(key):
    centers = jax.random.normal(key, (512, 2)) * jnp.array([[1.0, 10.0]])
    centers = centers - centers.mean(0, keepdims=True)
    finals = []
    for horizon in (5, 100):
        result = smd.offline(
            noisy_quadratic_loss,
            jnp.array([3.0, 30.0]),
            centers,
            key,
            horizon=horizon,
            num_meta_steps=200,
            hyperparameters=smd.Hyperparameters(0.1, 0.0, 1.0),
            num_pretraining_steps=0,
            meta_optimizer=optax.adam(0.05),
            batch_size=1,
            time_constant=20.0,
        )
        rate, _, decay = result.hyperparameters
        finals.append(float(rate * (1 + 100 / 20.0) ** -decay))
    assert finals[1] > 3 * finals[0]


@pytest.mark.slow
def test_a_model_with_state_is_trained_and_evaluated(key):
    params, data = regression()

    def stateful(params, batch, model_state, mask, key):
        del mask, key
        return loss_fn(params, batch) * model_state, model_state

    result = smd.offline(
        stateful, params, data, key, horizon=2, num_meta_steps=2, num_pretraining_steps=0,
        batch_size=40, model_state=jnp.asarray(2.0),
    )  # fmt: skip
    # Twice the loss at rate .01 follows the same path as the loss at rate .02.
    state, _ = smd.train(
        loss_fn, aj.init_state(params, optax.sgd(0.02, 0.9), key), data,
        smd.Hyperparameters(0.02, 0.9, 0.1), num_steps=2, batch_size=40,
    )  # fmt: skip
    np.testing.assert_allclose(result.losses[0], 2 * mean_loss(state.params, data), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "horizon must be an integer >= 1"),
        ({"num_meta_steps": 0}, "num_meta_steps must be"),
        ({"num_pretraining_steps": -1}, "num_pretraining_steps must be"),
        ({"learned": ()}, "learned must name"),
        ({"learned": ("rate",)}, "learned must be one of 'learning_rate', 'momentum', 'decay'"),
        ({"hyperparameters": smd.Hyperparameters(0.0, 0.9, 0.1)}, "learning_rate must be"),
        ({"hyperparameters": smd.Hyperparameters(0.1, 1.0, 0.1)}, "momentum must be in"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"time_constant": 0.0}, "time_constant must be"),
        ({"learned": "learning_rate"}, "learned must be a tuple of names"),
        ({"learned": None}, "learned must be a tuple of names"),
        ({"hyperparameters": (0.1, 0.9, 0.0)}, "hyperparameters must be Hyperparameters"),
        ({"pretraining": None}, "hyperparameters must be Hyperparameters"),
        ({"inner_optimizer": optax.sgd(0.1)}, r"pass optax\.sgd and not optax\.sgd\(0\.1\)"),
        ({"meta_optimizer": optax.adam}, r"pass optax\.adam\(0\.01\) and not optax\.adam"),
    ],
)
def test_arguments_out_of_range(options, message, key):
    params, data = regression()
    with pytest.raises(ValueError, match=message):
        smd.offline(loss_fn, params, data, key, **({"horizon": 2} | options))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_fn": None}, "loss_fn must be a function"),
        ({"params": None}, "params must be a pytree of arrays of floats, .*, got None"),
        ({"params": {"w": np.zeros((3, 4), int)}}, "params must be .*, got int"),
        ({"data": None}, "data must be a pytree of arrays"),
        ({"data": np.array(["a", "b"])}, "data must be an array of numbers, got dtype <U1"),
    ],
)
def test_arguments_of_another_kind(arguments, message, key):
    params, data = regression()
    given = {"loss_fn": loss_fn, "params": params, "data": data, "key": key} | arguments
    with pytest.raises(ValueError, match=message):
        smd.offline(**given, horizon=2)
    with pytest.raises(ValueError, match=message):
        smd.online(**given, num_steps=2)
    if "params" not in arguments:
        state = aj.init_state(params, optax.sgd(0.1, 0.9), key)
        given = {"loss_fn": given["loss_fn"], "state": state, "data": given["data"]}
        given["hyperparameters"] = smd.Hyperparameters(0.1, 0.9, 0.0)
        with pytest.raises(ValueError, match=message):
            smd.train(**given, num_steps=1)
        with pytest.raises(ValueError, match=message):
            smd.hypergradient(**given, evaluation=given["data"], horizon=1)


@pytest.mark.slow
def test_data_that_is_not_finite_is_told(key):
    message = "3 of 3 meta steps had a hypergradient that was not finite and changed nothing"
    with pytest.warns(UserWarning, match=message):
        result = smd.offline(
            lambda w, x: (w - x) ** 2 / 2,
            jnp.zeros(()),
            jnp.full(10, jnp.nan),
            key,
            horizon=2,
            num_meta_steps=3,
            num_pretraining_steps=1,
            batch_size=2,
        )
    assert int(result.num_skipped) == 3
