"""Schedules of each count, their last finite rate, and what JAX expects."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arbiter_jax.learning_rate import scale_by_schedule

UPDATES = {"w": jnp.array([1.0, -2.0]), "b": jnp.ones(1, jnp.bfloat16)}
COUNTS = ("num_steps", "num_examples", "progress")


@pytest.mark.parametrize("count", COUNTS)
def test_the_rate_is_the_schedule_at_the_count(count):
    tx = scale_by_schedule(optax.linear_schedule(0.5, 0.0, 100), count)
    state = tx.init(UPDATES)
    np.testing.assert_allclose(state.learning_rate, 0.5)
    # The other counts, which the loop passes too, have no effect.
    counts = dict.fromkeys(COUNTS, 7) | {count: 50}
    updates, state = tx.update(UPDATES, state, **counts)
    np.testing.assert_allclose(state.learning_rate, 0.25)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda u: 0.25 * u, UPDATES))
    chex.assert_trees_all_equal_dtypes(updates, UPDATES)


def test_keeps_the_last_rate():
    """Guarantee: Keeps the last rate."""
    tx = scale_by_schedule(lambda n: jnp.where(n == 1, jnp.nan, 2.0 + n), "num_steps")
    state, rates = tx.init(UPDATES), []
    for num_steps in (0, 1, 2):
        updates, state = tx.update(UPDATES, state, num_steps=num_steps)
        np.testing.assert_allclose(updates["w"], state.learning_rate * UPDATES["w"])
        rates.append(float(state.learning_rate))
    assert rates == [2.0, 2.0, 4.0]
    assert int(state.num_skipped) == 1


def test_a_schedule_without_a_first_rate():
    """It is refused where the rate is known, and the updates are 0 where it is not."""
    tx = scale_by_schedule(lambda n: 0.1 / jnp.sqrt(n))
    with pytest.raises(ValueError, match=r"schedule must be finite at the count 0, .* got inf"):
        tx.init(UPDATES)
    state = jax.jit(tx.init)(UPDATES)
    assert float(state.learning_rate) == 0
    updates, state = tx.update(UPDATES, state, num_examples=0)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, UPDATES))
    _, state = tx.update(UPDATES, state, num_examples=4)
    np.testing.assert_allclose(state.learning_rate, 0.05)
    assert int(state.num_skipped) == 1


def test_a_schedule_that_returns_no_scalar_is_refused():
    with pytest.raises(
        ValueError, match=r"that returns a scalar, .* returned an array float32\[2\]"
    ):
        scale_by_schedule(lambda n: jnp.ones(2)).init(UPDATES)


def test_stable_types_one_program_scan_equals_loop():
    tx, counts = scale_by_schedule(lambda n: 1 / (1 + n)), jnp.arange(4)
    update = lambda state, n: tx.update(UPDATES, state, num_examples=n, value=1.0)
    step, state, rows = jax.jit(update), tx.init(UPDATES), []
    types = jax.tree.map(jax.typeof, state)
    for n in counts:
        updates, state = step(state, n)
        assert jax.tree.map(jax.typeof, state) == types
        rows.append(updates["w"])
    _, scanned = jax.lax.scan(lambda s, n: update(s, n)[::-1], tx.init(UPDATES), counts)
    np.testing.assert_allclose(scanned["w"], rows, rtol=1e-6)
    together = jax.vmap(lambda n: update(tx.init(UPDATES), n)[1].learning_rate)(counts)
    np.testing.assert_allclose(together, 1 / np.arange(1, 5), rtol=1e-6)
    assert step._cache_size() == 1
    assert state.learning_rate.dtype == jnp.float32


@pytest.mark.parametrize("count", COUNTS)
def test_the_count_is_required(count):
    tx = scale_by_schedule(optax.constant_schedule(0.1), count)
    with pytest.raises(TypeError, match=f"scale_by_schedule needs the signal `{count}`"):
        tx.update(UPDATES, tx.init(UPDATES))


def test_a_probe_passes_through():
    tx = scale_by_schedule(optax.constant_schedule(0.1))
    state = tx.init(UPDATES)
    updates, after = tx.update(UPDATES, state, probe=True)
    assert updates is UPDATES
    assert after is state


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1,), "schedule must be a function of a count, got 0.1"),
        ((optax.constant_schedule(0.1), "epochs"), "count must be one of 'num_steps', 'num_exam"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        scale_by_schedule(*arguments)
