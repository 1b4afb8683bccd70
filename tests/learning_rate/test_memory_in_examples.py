"""Optimizers whose memory is measured in examples."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import learning_rate

PARAMS = {"w": jnp.array([[0.5, -1.0], [2.0, 0.1]]), "b": jnp.array([0.3, -0.2])}


def grads_at(t):
    keys = iter(jax.random.split(jax.random.key(t), 2))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), PARAMS)


def run(tx, sizes):
    state, out = tx.init(PARAMS), []
    for t, size in enumerate(sizes):
        signals = {} if size is None else {"batch_size": jnp.int32(size)}
        updates, state = tx.update(grads_at(t), state, PARAMS, **signals)
        out.append(updates)
    return out


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (learning_rate.scale_by_adam_in_examples(64), optax.scale_by_adam()),
        (aj.adamw_in_examples(1e-3, 64, weight_decay=0.1), optax.adamw(1e-3, weight_decay=0.1)),
        (
            learning_rate.lamb_in_examples(1e-3, 64, weight_decay=0.1),
            optax.lamb(1e-3, weight_decay=0.1),
        ),
        (learning_rate.trace_in_examples(64, 0.9), optax.trace(0.9)),
        (learning_rate.trace_in_examples(64, 0.9, nesterov=True), optax.trace(0.9, nesterov=True)),
        (learning_rate.ema_in_examples(64, 0.99), optax.ema(0.99)),
        (learning_rate.ema_in_examples(64, 0.99, debias=False), optax.ema(0.99, debias=False)),
    ],
    ids=["adam", "adamw", "lamb", "momentum", "nesterov", "ema", "ema without debias"],
)
def test_the_reference_is_neutral(ours, theirs):
    for a, b in zip(run(ours, [64] * 5), run(theirs, [None] * 5), strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-7), a, b)


def test_the_same_half_life():
    """One step of k times the size forgets as k steps do."""
    for tx in (learning_rate.scale_by_adam_in_examples(64), learning_rate.ema_in_examples(64, 0.9)):
        zero, one = jnp.zeros(1), jnp.ones(1)
        _, state = tx.update(one, tx.init(one), batch_size=64)
        slow = fast = state
        for _ in range(8):
            _, slow = tx.update(zero, slow, batch_size=64)
        _, fast = tx.update(zero, fast, batch_size=512)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), slow, fast)


def test_momentum_keeps_its_gain():
    """Of a constant gradient, the steady step is the same at any size."""
    tx = learning_rate.trace_in_examples(64, 0.9)
    for size in (16, 64, 512):
        state = tx.init(jnp.ones(()))
        for _ in range(600):
            step, state = tx.update(jnp.ones(()), state, batch_size=size)
        assert float(step) == pytest.approx(10.0, rel=1e-3)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_decay_per_example_stays(exponent):
    """rate(B) * wd(B) / B does not depend on B."""
    taken = []
    for size in (64, 256):
        tx = optax.chain(
            learning_rate.add_decayed_weights_in_examples(0.1, 64, exponent=exponent),
            aj.scale_by_batch_size(64, exponent),
        )
        updates, _ = tx.update(jnp.zeros(1), tx.init(jnp.ones(1)), jnp.ones(1), batch_size=size)
        taken.append(float(updates[0]) / size)
    assert taken[0] == pytest.approx(taken[1])


def test_a_mask_keeps_weights_from_decaying():
    tx = learning_rate.add_decayed_weights_in_examples(0.1, 64, mask={"w": True, "b": False})
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS, batch_size=64)
    np.testing.assert_allclose(updates["w"], 0.1 * PARAMS["w"])
    np.testing.assert_array_equal(updates["b"], 0)


def test_one_program_for_all_sizes():
    tx, traces = aj.adamw_in_examples(1e-3, 64), []

    @jax.jit
    def step(state, size):
        traces.append(size)
        return tx.update(PARAMS, state, PARAMS, batch_size=size)[1]

    state = tx.init(PARAMS)
    for size in (8, 64, 4096):
        state = step(state, jnp.int32(size))
    assert len(traces) == 1


def test_half_precision_stays_half():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    tx = aj.adamw_in_examples(1e-3, 64)
    updates, state = tx.update(params, tx.init(params), params, batch_size=128)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert state[0].weight_mu.dtype == jnp.float32


def test_the_batch_size_is_needed():
    with pytest.raises(TypeError, match="adam_in_examples needs the signal `batch_size`"):
        run(aj.adamw_in_examples(1e-3, 64), [None])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"b1": 1.0}, "b1 must be in"),
        ({"b2": -0.1}, "b2 must be in"),
        ({"eps": -1.0}, "eps must be a finite number >= 0"),
        ({"weight_decay": -1.0}, "weight_decay must be a finite number >= 0"),
        ({"exponent": 3.0}, "exponent must be in"),
    ],
)
def test_a_bad_argument_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        aj.adamw_in_examples(**{"learning_rate": 1e-3, "batch_size": 64} | arguments)
