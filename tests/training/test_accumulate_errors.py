"""What `accumulate` says to a batch that it did not begin."""

import jax.numpy as jnp
import optax
import pytest

import arbiter_jax as aj

ROWS = jnp.arange(8.0)


def loss_fn(w, x):
    return (w - x) ** 2


def test_a_batch_that_was_not_begun():
    tx = optax.chain(optax.sgd(0.1), aj.schedulers.gradient_noise_scale())
    params = jnp.zeros(())
    opt_state = tx.init(params)
    accumulator = aj.accumulate(loss_fn, tx)
    batch = accumulator.init(params, opt_state)
    with pytest.raises(ValueError, match="got ArrayImpl: it comes first"):
        accumulator.add(params, params, opt_state, ROWS)
    with pytest.raises(ValueError, match=r"add returns \(batch, aux\)"):
        accumulator.add((batch, None), params, opt_state, ROWS)
    with pytest.raises(ValueError, match=r"got tuple: .* \(batch, aux\)"):
        accumulator.finish((batch, None), params, opt_state)


def test_a_batch_of_another_chain():
    params = jnp.zeros(())
    plain = optax.chain(optax.sgd(0.1), aj.schedulers.constant(8))
    tx = optax.chain(optax.sgd(0.1), aj.schedulers.gradient_noise_scale())
    batch = aj.accumulate(loss_fn, plain).init(params, plain.init(params))
    with pytest.raises(ValueError, match="same chain, got one that keeps no statistics"):
        aj.accumulate(loss_fn, tx).add(batch, params, tx.init(params), ROWS)
