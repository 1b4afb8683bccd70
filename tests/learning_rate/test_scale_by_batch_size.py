"""The power rule by hand, and what JAX expects."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbiter_jax.learning_rate import scale_by_batch_size

UPDATES = {"w": jnp.array([1.0, -2.0]), "b": jnp.ones(1, jnp.bfloat16)}


@pytest.mark.parametrize(
    ("exponent", "batch_size", "factor"),
    [(1.0, 256, 4.0), (0.5, 256, 2.0), (0.5, 16, 0.5), (0.0, 256, 1.0), (-1.0, 256, 0.25)],
)
def test_the_power_rule(exponent, batch_size, factor):
    tx = scale_by_batch_size(64, exponent)
    updates, state = tx.update(UPDATES, tx.init(UPDATES), batch_size=batch_size)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda u: factor * u, UPDATES))
    chex.assert_trees_all_equal_dtypes(updates, UPDATES)
    np.testing.assert_allclose(state.learning_rate, factor)


def test_the_reference_is_neutral():
    """Guarantee: The reference is neutral."""
    tx = scale_by_batch_size(64, 0.7)
    updates, _ = tx.update(UPDATES, tx.init(UPDATES), batch_size=64)
    chex.assert_trees_all_equal(updates, UPDATES)


def test_stable_types_one_program_scan_equals_loop():
    tx, sizes = scale_by_batch_size(64, 0.5), jnp.array([64, 128, 32, 512], jnp.int32)
    update = lambda state, batch_size: tx.update(UPDATES, state, batch_size=batch_size, value=1.0)
    step, state, rows = jax.jit(update), tx.init(UPDATES), []
    types = jax.tree.map(jax.typeof, state)
    for batch_size in sizes:
        updates, state = step(state, batch_size)
        assert jax.tree.map(jax.typeof, state) == types
        rows.append(updates["w"])
    _, scanned = jax.lax.scan(lambda s, b: update(s, b)[::-1], tx.init(UPDATES), sizes)
    np.testing.assert_allclose(scanned["w"], rows, rtol=1e-6)
    together = jax.vmap(lambda b: update(tx.init(UPDATES), b)[1].learning_rate)(sizes)
    np.testing.assert_allclose(together, np.sqrt(sizes / 64), rtol=1e-6)
    assert step._cache_size() == 1
    assert state.learning_rate.dtype == jnp.float32


def test_the_batch_size_is_required():
    tx = scale_by_batch_size(64)
    with pytest.raises(TypeError, match="scale_by_batch_size needs the signal `batch_size`"):
        tx.update(UPDATES, tx.init(UPDATES))


def test_a_probe_passes_through():
    tx = scale_by_batch_size(64)
    state = tx.init(UPDATES)
    updates, after = tx.update(UPDATES, state, probe=True)
    assert updates is UPDATES
    assert after is state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scale_by_batch_size(0), "reference must be an integer >= 1, got 0"),
        (lambda: scale_by_batch_size(64, 3), r"exponent must be in \[-2, 2\], got 3"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
