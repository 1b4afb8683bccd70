"""Online meta-descent: when it adjusts, what it does to the rate, and what JAX expects."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arbiter_jax import stochastic_meta_descent as smd
from tests.stochastic_meta_descent.problems import loss_fn, mean_loss, regression


@pytest.mark.slow
def test_lowers_the_rate_and_ends_worse_than_without(key):
    params, data = regression(200)
    options = {
        "num_steps": 400,
        "batch_size": 2,
        "hyperparameters": smd.Hyperparameters(0.02, 0.9, 0.0),
        "final_learning_rate": 1e-3,
        "meta_optimizer": optax.adam(0.03),
    }
    adjusted = smd.online(loss_fn, params, data, key, **options)
    left = smd.online(loss_fn, params, data, key, learned=(), **options)
    effective = lambda history: history.learning_rate / (1 - history.momentum)
    assert effective(adjusted.history)[199] < 0.7 * effective(adjusted.history)[0]
    np.testing.assert_allclose(left.history.learning_rate[:200], 0.02, rtol=1e-5)
    np.testing.assert_allclose(effective(left.history)[-1], 1e-3, rtol=0.05)
    assert adjusted.losses.shape == (400,)
    assert int(adjusted.state.num_steps) == 400
    assert mean_loss(adjusted.state.params, data) > mean_loss(left.state.params, data)


def run(key, params, data):
    return smd.online(
        loss_fn, params, data, key, num_steps=40, meta_every=8, learning_fraction=0.5,
        batch_size=4, num_evaluation_batches=2, num_meta_steps=2, final_learning_rate=0.5,
        hyperparameters=smd.Hyperparameters(0.05, 0.9, 0.0), reset_meta_state=True,
    )  # fmt: skip


@pytest.mark.slow
def test_adjusts_when_due_in_the_first_part_only(key):
    result = run(key, *regression())
    momenta = result.history.momentum
    changes = np.flatnonzero(np.diff(momenta)) + 1
    np.testing.assert_array_equal(changes, [8, 16])
    assert momenta[0] != 0.9  # step 0 is due
    # Each adjustment takes two steps of .01 in the logarithm of 1 - momentum.
    logs = np.log(1 - np.asarray(momenta)[[7, 8]])
    assert abs(logs[1] - logs[0]) == pytest.approx(0.02, rel=1e-2)
    # Look-ahead and evaluation use up examples of the sampler: 3 adjustments of (5 + 2) batches.
    used = result.state.train_sampler.epoch * 40 + result.state.train_sampler.cursor
    assert int(used) == 40 * 4 + 3 * (5 + 2) * 4


@pytest.mark.slow
def test_is_a_pure_function_that_vmaps(key):
    params, data = regression()
    keys = jax.random.split(key, 2)
    together = jax.vmap(lambda key: run(key, params, data).losses)(keys)
    alone = jnp.stack([run(key, params, data).losses for key in keys])
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    assert not np.allclose(alone[0], alone[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be"),
        ({"learning_fraction": 1.5}, "learning_fraction must be in"),
        ({"meta_every": 0}, "meta_every must be"),
        ({"num_evaluation_batches": 0}, "num_evaluation_batches must be"),
        ({"final_learning_rate": 0.0}, "final_learning_rate must be"),
    ],
)
def test_arguments_out_of_range(options, message, key):
    params, data = regression()
    with pytest.raises(ValueError, match=message):
        smd.online(loss_fn, params, data, key, **({"num_steps": 10} | options))


@pytest.mark.slow
def test_data_that_is_not_finite_is_told(key):
    message = "3 of 3 meta steps had a hypergradient that was not finite and changed nothing"
    with pytest.warns(UserWarning, match=message):
        result = smd.online(
            lambda w, x: (w - x) ** 2 / 2,
            jnp.zeros(()),
            jnp.full(10, jnp.nan),
            key,
            num_steps=20,
            batch_size=2,
            num_meta_steps=3,
        )
    assert int(result.num_skipped) == 3
