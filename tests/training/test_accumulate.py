"""Micro-batches of a loss that takes a key and returns auxiliary output."""

import jax
import jax.numpy as jnp
import optax
import pytest

import arbiter_jax as aj


def loss_fn(w, x, model_state, mask, key):
    del mask
    return (w - x) ** 2 / 2 + jax.random.normal(key, x.shape), model_state, {"x": x, "sum": x.sum()}


@pytest.mark.slow
def test_aux_with_a_key_and_no_model_state():
    tx = optax.chain(optax.sgd(0.1), aj.schedulers.gradient_noise_scale(measure_every=2))
    params = jnp.zeros(())
    opt_state = tx.init(params)
    accumulator = aj.accumulate(loss_fn, tx, has_aux=True)
    rows = jnp.array([0.0, 1.0, 2.0, 4.0])
    for means in ([2.0, 5.0], [7.0, 7.0]):  # measured in halves, and whole
        batch = accumulator.init(params, opt_state)
        batch, aux = accumulator.add(batch, params, opt_state, rows, key=jax.random.key(0))
        assert aux["x"].tolist() == rows.tolist()
        assert float(aux["sum"]) == sum(means) / 2
        _, grads, signals = accumulator.finish(batch, params, opt_state)
        assert float(grads) == -1.75
        assert "model_state" not in signals
        _, opt_state = tx.update(grads, opt_state, params, **signals)
