"""The training loop of a look-ahead, its hypergradient, and the memory that this takes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import stochastic_meta_descent as smd
from arbiter_jax.batching import sample_batch
from tests.stochastic_meta_descent.problems import (
    HYPERPARAMETERS,
    as_arrays,
    loss_fn,
    mean_loss,
    regression,
    start,
)

OPTIMIZERS = pytest.mark.parametrize("inner_optimizer", [optax.sgd, optax.adam])


@OPTIMIZERS
def test_train_is_the_optimizer_with_a_decaying_rate(inner_optimizer, key):
    state, data = start(inner_optimizer, key)
    trained, losses = smd.train(
        loss_fn,
        state,
        data,
        HYPERPARAMETERS,
        num_steps=6,
        inner_optimizer=inner_optimizer,
        batch_size=4,
        time_constant=3.0,
    )
    # A schedule inside the optimizer must give the same as a new optimizer at every step.
    schedule = lambda t: 0.05 * (1 + t / 3.0) ** -0.7
    tx = inner_optimizer(schedule, 0.8)

    def step(carry, _):
        params, opt_state, sampler = carry
        sampler, batch, _ = sample_batch(sampler, data, 4, 4)
        value, grads = jax.value_and_grad(mean_loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, sampler), value

    carry = (state.params, tx.init(state.params), state.train_sampler)
    (params, _, _), values = jax.lax.scan(step, carry, length=6)
    np.testing.assert_allclose(losses, values, rtol=1e-5)
    chex.assert_trees_all_close(trained.params, params, rtol=1e-4, atol=1e-6)
    assert int(trained.num_steps) == 6
    assert int(trained.num_examples) == 24


def test_train_equals_run_window(key):
    """Without decay, and in every field of the state."""
    state, data = start(optax.sgd, key)
    trained, losses = smd.train(
        loss_fn, state, data, HYPERPARAMETERS._replace(decay=0.0), num_steps=3, batch_size=4
    )
    window, info = aj.run_window(
        aj.init_state(state.params, optax.sgd(0.05, 0.8), key),
        aj.Data(data),
        loss_fn=loss_fn,
        tx=optax.sgd(0.05, 0.8),
        bucket_size=4,
        window=3,
    )
    chex.assert_trees_all_close(trained, window, rtol=1e-6)
    np.testing.assert_allclose(losses, info.loss, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "inner_optimizer", [pytest.param(optax.sgd, marks=pytest.mark.exhaustive), optax.adam]
)
def test_hypergradient_equals_differences_and_reverse(inner_optimizer, key):
    with jax.enable_x64(True):
        state, data = start(inner_optimizer, key)
        options = {"inner_optimizer": inner_optimizer, "batch_size": 4, "time_constant": 3.0}
        at = as_arrays(HYPERPARAMETERS)

        def loss_after(hyperparameters):
            after, _ = smd.train(loss_fn, state, data, hyperparameters, num_steps=7, **options)
            return mean_loss(after.params, data)

        value, gradient = smd.hypergradient(
            loss_fn, state, data, data, HYPERPARAMETERS, horizon=7, **options
        )
        # `train` checks concrete values only, so reverse mode can trace it.
        loss, reverse = jax.jit(jax.value_and_grad(loss_after))(at)
        np.testing.assert_allclose(value, loss, rtol=1e-12)
        np.testing.assert_allclose(gradient, reverse, rtol=1e-9)
        # Rows: one hyperparameter larger, then one smaller.
        shifts = 1e-5 * jnp.concatenate([jnp.eye(3), -jnp.eye(3)])
        points = smd.Hyperparameters(*(jnp.stack(at)[None] + shifts).T)
        losses = jax.jit(jax.vmap(loss_after))(points)
        assert np.all(np.abs(gradient) > 1e-4)
        np.testing.assert_allclose(gradient, (losses[:3] - losses[3:]) / 2e-5, rtol=1e-5)


def gradient_memory(horizon: int, reverse: bool = False) -> int:
    """Temporary memory of one compiled hypergradient, in bytes."""
    params, data = regression()
    params = jax.tree.map(lambda x: jnp.zeros((50, *x.shape)), params)
    fn = lambda params, batch: jax.vmap(loss_fn, (0, None))(params, batch).mean(0)
    state = aj.init_state(params, optax.sgd(0.1, 0.9), jax.random.PRNGKey(0))

    def forward(hyperparameters):
        return smd.hypergradient(
            fn, state, data, data, hyperparameters, horizon=horizon, batch_size=8
        )

    def backward(hyperparameters):
        def loss(hyperparameters):
            after, _ = smd.train(fn, state, data, hyperparameters, num_steps=horizon, batch_size=8)
            return fn(after.params, data).mean()

        return jax.value_and_grad(loss)(hyperparameters)

    lowered = jax.jit(backward if reverse else forward).lower(as_arrays(HYPERPARAMETERS))
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_does_not_depend_on_the_horizon():
    short, long = gradient_memory(10), gradient_memory(1000)
    assert short > 0
    assert long == short
    # The same measurement sees what reverse mode stores.
    assert gradient_memory(1000, reverse=True) > 10 * gradient_memory(10, reverse=True)


def test_a_loss_that_is_not_finite_is_told(key):
    state = aj.init_state(jnp.zeros(()), optax.sgd(0.1, 0.0), key)
    train = lambda data: smd.train(
        lambda w, x: (w - x) ** 2 / 2,
        state,
        data,
        smd.Hyperparameters(0.1, 0.0, 0.0),
        num_steps=3,
        batch_size=2,
    )[1]
    with pytest.warns(UserWarning, match="3 of 3 steps had a loss that was not finite, the first"):
        train(jnp.full(10, jnp.nan))
    assert not jnp.isfinite(jax.jit(train)(jnp.full(10, jnp.nan))).any()  # traced: no warning
