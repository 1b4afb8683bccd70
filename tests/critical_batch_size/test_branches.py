"""The critical batch size, measured by branching."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax.critical_batch_size import measure_critical_batch_size, measured_warm_up

DATA = aj.Data(jax.random.normal(jax.random.key(0), (8192, 4)))
loss_fn = lambda w, x: jnp.sum((w[None] - 3 - 0.1 * x) ** 2, axis=-1) / 2


def start(rule=None, rate=0.02):
    tx = optax.chain(optax.sgd(rate), aj.schedulers.constant(4) if rule is None else rule)
    return tx, aj.init_state(jnp.zeros(4), tx, jax.random.key(1))


@pytest.mark.slow
def test_beyond_it_progress_is_lost():
    """Without noise to speak of a batch twice as large at the same rate is half the progress."""
    tx, state = start()
    found = measure_critical_batch_size(
        loss_fn, state, tx, DATA, max_batch_size=32, exponent=0.0, num_steps=20, tolerance=0.01
    )
    assert found.batch_sizes == (4, 8, 16, 32)
    assert found.batch_size == 4
    assert found.is_bounded
    assert list(found.losses) == sorted(found.losses)


@pytest.mark.slow
def test_below_it_nothing_is_lost():
    tx, state = start(rate=1e-3)
    found = measure_critical_batch_size(
        loss_fn, state, tx, DATA, max_batch_size=16, exponent=1.0, num_steps=20, tolerance=0.05
    )
    assert found.batch_size == 16
    assert not found.is_bounded


@pytest.mark.slow
def test_a_branch_that_diverges_is_lost():
    tx, state = start(rate=0.5)
    options = {"max_batch_size": 64, "exponent": 2.0, "num_steps": 100, "tolerance": 0.05}
    found = measure_critical_batch_size(loss_fn, state, tx, DATA, **options)
    assert found.batch_size < 64
    assert np.inf in found.losses


@pytest.mark.slow
def test_a_run_that_diverges_has_no_critical_size():
    tx, state = start(rate=1e20)
    options = {"max_batch_size": 16, "num_steps": 3}
    with pytest.warns(
        UserWarning, match="the smallest batch size, 4, had a loss that is not finite"
    ):
        found = measure_critical_batch_size(loss_fn, state, tx, DATA, **options)
    assert found.batch_size == 4
    assert found.losses == (np.inf,) * 3
    assert found.is_bounded


@pytest.mark.slow
def test_no_warm_up_of_a_run_that_diverges():
    tx, _ = start(rate=1e20)
    plan = {"num_examples": 400, "measure_at": (0,), "max_batch_size": 8, "num_steps": 2}
    with pytest.warns(UserWarning, match="no size could be measured"):
        schedule = measured_warm_up(loss_fn, jnp.zeros(4), tx, DATA, **plan)
    assert schedule.batch_sizes == (4,)


def test_leaves_the_run_alone():
    tx, state = start()
    before = jax.device_get(state)
    measure_critical_batch_size(loss_fn, state, tx, DATA, max_batch_size=8, num_steps=2)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))


def test_the_same_examples():
    seen = []

    def loss(w, x):
        jax.debug.callback(lambda rows: seen.append(np.asarray(rows)), x)
        return loss_fn(w, x)

    tx, state = start()
    measure_critical_batch_size(loss, state, tx, DATA, max_batch_size=8, num_steps=2)
    jax.effects_barrier()
    rows = [row.tobytes() for batch in seen for row in batch]
    assert len(set(rows)) == 16  # two branches, each of 16 examples


@pytest.mark.slow
def test_a_measured_rule_is_hidden_in_a_branch():
    tx, state = start(aj.schedulers.gradient_noise_scale(initial_batch_size=8))
    found = measure_critical_batch_size(
        loss_fn, state, tx, DATA, max_batch_size=32, exponent=0.5, num_steps=2
    )
    assert found.batch_sizes == (8, 16, 32)


@pytest.mark.slow
def test_a_warm_up_doubles_where_it_may():
    tx, _ = start(rate=1e-3)
    options = {"exponent": 1.0, "num_steps": 4, "tolerance": 1.0}
    schedule = measured_warm_up(
        loss_fn,
        jnp.zeros(4),
        tx,
        DATA,
        num_examples=2_000,
        measure_at=(0, 500, 1_000, 1_500),
        max_batch_size=16,
        **options,
    )
    assert schedule.starts == (0, 500)
    assert schedule.batch_sizes == (8, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_batch_size": 7}, "max_batch_size must be an integer >= 8"),
        ({"exponent": -1.0}, "exponent must be in"),
        ({"num_steps": 0}, "num_steps must be an integer >= 1"),
        ({"tolerance": -0.1}, "tolerance must be a finite number >= 0"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
    ],
)
def test_a_bad_argument_is_refused(arguments, message):
    tx, state = start()
    with pytest.raises(ValueError, match=message):
        measure_critical_batch_size(loss_fn, state, tx, DATA, **{"max_batch_size": 16} | arguments)
