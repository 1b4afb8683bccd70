"""Rules in compiled windows, on a problem whose noise is known in closed form.

The loss is |w - x|^2 / 2 with x ~ N(0, s^2 I), and the parameters stay where they are: G = w, and
|G|^2 = |w|^2, tr S = s^2 d.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import schedulers

DIMENSION, SPREAD, LEVEL = 20, 2.0, 0.35
TRACE = SPREAD**2 * DIMENSION  # 80
SIGNAL = LEVEL**2 * DIMENSION  # 2.45
LOSS = (TRACE + SIGNAL) / 2
NOISE = SPREAD**2 / 16  # of the mean gradient of 16 examples, in each direction
BATCH_SQ_NORM = SIGNAL + DIMENSION * NOISE
BATCH_SQ_NORM_VARIANCE = 2 * DIMENSION * NOISE**2 + 4 * NOISE * SIGNAL
LIMITS = {"min_batch_size": 4, "max_batch_size": 256, "initial_batch_size": 16}


def loss_fn(params, batch):
    return 0.5 * jnp.sum((params[None, :] - batch) ** 2, axis=1)


def data():
    x = np.random.default_rng(0).normal(0, SPREAD, (4_096, DIMENSION))
    return aj.Data(train=jnp.asarray(x, jnp.float32))


def run(rule, num_windows, window=100):
    """The applied batch sizes and the last state; the learning rate is 0."""
    tx = optax.chain(optax.sgd(0.0), rule)
    state = aj.init_state(jnp.full(DIMENSION, LEVEL), tx, jax.random.PRNGKey(1))
    source, sizes = data(), []
    for _ in range(num_windows):
        _, bucket, _ = aj.next_window(state.opt_state)
        state, info = aj.run_window(
            state, source, loss_fn=loss_fn, tx=tx, bucket_size=bucket, window=window
        )
        sizes += sorted(set(info.batch_size.tolist()))
    return sizes, state.opt_state


WATCHED = {
    "gradient_noise_scale": (schedulers.gradient_noise_scale(**LIMITS), TRACE / SIGNAL),
    "cabs": (schedulers.cabs(10.0, **LIMITS), 10.0 * 15 / 16 * TRACE / LOSS),
    "norm_test": (
        schedulers.norm_test(eta=0.5, decay=0.99, **LIMITS),
        TRACE / BATCH_SQ_NORM / 0.5**2,
    ),
    "inner_product_test": (
        schedulers.inner_product_test(theta=0.1, decay=0.99, **LIMITS),
        SPREAD**2 * BATCH_SQ_NORM / (BATCH_SQ_NORM**2 + BATCH_SQ_NORM_VARIANCE) / 0.1**2,
    ),
    "adadamp": (schedulers.adadamp(decay=0.99, **LIMITS), 16.0),
}


@pytest.mark.slow
def test_one_run_ranks_many_rules():
    """Beside a constant size, all rules watch; each finds the size that theory names."""
    shadows = [schedulers.shadow(rule, name=name) for name, (rule, _) in WATCHED.items()]
    sizes, opt_state = run(optax.chain(schedulers.constant(16), *shadows), 3)
    assert sizes == [16, 16, 16]
    found = {name: int(size) for name, size in schedulers.shadow_batch_sizes(opt_state).items()}
    assert found == {
        name: pytest.approx(size, rel=0.2, abs=1) for name, (_, size) in WATCHED.items()
    }


@pytest.mark.slow
def test_a_rule_that_acts_settles_where_theory_says():
    sizes, _ = run(schedulers.gradient_noise_scale(**LIMITS), 4)
    assert sizes[0] == 16
    assert sizes[-1] == pytest.approx(TRACE / SIGNAL, rel=0.2)


@pytest.mark.slow
def test_hysteresis_in_windows_moves_by_its_factor():
    rule = schedulers.gradient_noise_scale(**(LIMITS | {"initial_batch_size": 4}))
    sizes, _ = run(schedulers.hysteresis(rule, dwell=10, max_factor=2.0), 3, window=20)
    assert sizes == [4, 8, 16]


def test_dive_batch_sees_the_gradients():
    """N D = (|G|^2 + tr S) / (|G|^2 + tr S / N) for an epoch of N examples at one place."""
    rule = schedulers.dive_batch(1600, **(LIMITS | {"delta": 3.0}))
    tx = optax.chain(rule, optax.sgd(0.0))
    state = aj.init_state(jnp.full(DIMENSION, LEVEL), tx, jax.random.PRNGKey(1))
    state, _ = aj.run_window(state, data(), loss_fn=loss_fn, tx=tx, bucket_size=16, window=100)
    diversity = (SIGNAL + TRACE) / (SIGNAL + TRACE / 1600)
    assert int(aj.get_batch_size(state.opt_state)) == pytest.approx(3.0 * diversity, rel=0.15)
