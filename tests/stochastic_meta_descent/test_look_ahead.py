"""The coordinates in which hyperparameters are learned, and one step in them with all limits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arbiter_jax import stochastic_meta_descent as smd
from arbiter_jax.stochastic_meta_descent._look_ahead import (
    LookAheadConfig,
    MetaState,
    from_log_values,
    init_meta_state,
    look_ahead_gradient,
    meta_step,
    to_log_values,
)
from tests.stochastic_meta_descent.problems import HYPERPARAMETERS, as_arrays, loss_fn, start


def config(**changes) -> LookAheadConfig:
    options = {
        "loss_fn": loss_fn,
        "inner_optimizer": optax.sgd,
        "batch_size": 4,
        "time_constant": 3.0,
        "horizon": 3,
        "learned": ("learning_rate", "momentum", "decay"),
        "effective_learning_rate": True,
    }
    return LookAheadConfig(**(options | changes))


def test_log_values_of_the_effective_rate():
    with jax.enable_x64(True):
        hyperparameters = as_arrays((0.05, 0.8, 0.7))
        log_values = to_log_values(config(), hyperparameters)
        np.testing.assert_allclose(jnp.exp(log_values["learning_rate"]), 0.25)
        np.testing.assert_allclose(jnp.exp(log_values["momentum"]), 0.2)
        np.testing.assert_allclose(jnp.exp(log_values["decay"]), 0.7)
        back = from_log_values(config(), log_values, HYPERPARAMETERS)
        np.testing.assert_allclose(back, hyperparameters)
        plain = to_log_values(config(effective_learning_rate=False), hyperparameters)
        np.testing.assert_allclose(jnp.exp(plain["learning_rate"]), 0.05)
        # What is not learned does not depend on the coordinates.
        only = config(learned=("decay",))
        back = from_log_values(only, {"decay": jnp.log(2.0)}, hyperparameters)
        np.testing.assert_allclose(back, (0.05, 0.8, 2.0))


@pytest.mark.slow
def test_gradient_in_log_space_follows_the_chain_rule(key):
    with jax.enable_x64(True):
        state, data = start(optax.sgd, key)
        at = as_arrays(HYPERPARAMETERS)
        log_values = to_log_values(config(), at)
        decode = lambda log_values: from_log_values(config(), log_values, at)

        @jax.jit
        def gradients(log_values):
            _, ours = look_ahead_gradient(config(), log_values, decode, state, data, data)
            return ours, jax.jacobian(decode)(log_values)

        ours, jacobian = gradients(log_values)
        _, plain = smd.hypergradient(
            loss_fn, state, data, data, at, horizon=3, batch_size=4, time_constant=3.0
        )
        for name in log_values:
            expected = sum(
                getattr(plain, field) * getattr(jacobian, field)[name] for field in at._fields
            )
            np.testing.assert_allclose(ours[name], expected, rtol=1e-9)


def meta_of(**values) -> MetaState:
    log_values = {name: jnp.log(x) for name, x in values.items()}
    return MetaState(log_values, optax.sgd(1.0).init(log_values), jnp.zeros((), jnp.int32))


def test_derivatives_and_values_are_limited():
    """Derivatives to 10, values to their ranges."""
    meta = meta_of(learning_rate=0.5, momentum=0.1, decay=0.2)
    # With respect to the logarithms; with respect to the values themselves 200, -3 and -500.
    gradient = {"learning_rate": 100.0, "momentum": -0.3, "decay": -100.0}
    gradient = jax.tree.map(jnp.asarray, gradient)
    after = meta_step(config(meta_optimizer=optax.sgd(1.0)), meta, gradient).log_values
    np.testing.assert_allclose(after["learning_rate"], jnp.log(0.5) - 10 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(after["momentum"], jnp.log(0.1) + 0.3, rtol=1e-6)
    np.testing.assert_allclose(after["decay"], jnp.log(0.2) + 10 * 0.2, rtol=1e-6)
    for sign, limits in ((1.0, (1e-4, 1e-4, 1e-4)), (-1.0, (10.0, 1.0, 1e3))):
        meta = meta_of(learning_rate=1.0, momentum=0.9, decay=1.0)
        gradient = {name: jnp.asarray(9.0 * sign) for name in meta.log_values}
        for _ in range(3):
            meta = meta_step(config(meta_optimizer=optax.sgd(5.0)), meta, gradient)
        values = [jnp.exp(meta.log_values[name]) for name in ("learning_rate", "momentum", "decay")]
        np.testing.assert_allclose(values, limits, rtol=1e-5)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_bad_hypergradient_is_skipped_and_counted(bad):
    log_values = {"decay": jnp.asarray(0.3), "learning_rate": jnp.asarray(-1.0)}
    meta = MetaState(log_values, optax.adam(0.1).init(log_values), jnp.zeros((), jnp.int32))
    gradient = {"decay": jnp.asarray(1.0), "learning_rate": jnp.asarray(bad)}
    after = meta_step(config(meta_optimizer=optax.adam(0.1)), meta, gradient)
    chex.assert_trees_all_equal(after, meta._replace(num_skipped=jnp.asarray(1, jnp.int32)))


def test_reset_meta_state_fixes_the_step_size_of_adam():
    gradients = [{"decay": jnp.asarray(x)} for x in (1.0, 1e-3, -0.5)]
    for reset in (True, False):
        cfg = config(learned=("decay",), reset_meta_state=reset)
        meta, moves = init_meta_state(cfg, as_arrays(HYPERPARAMETERS)), []
        for gradient in gradients:
            after = meta_step(cfg, meta, gradient)
            moves.append(float(after.log_values["decay"] - meta.log_values["decay"]))
            meta = after
        if reset:
            np.testing.assert_allclose(moves, [-0.01, -0.01, 0.01], rtol=1e-3)
        else:
            assert abs(moves[1] + 0.01) > 1e-3
