"""Hypergradient descent by hand, against optax without it, and what JAX expects."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arbiter_jax.learning_rate import HypergradientState, adam_hd, sgd_hd

GRADS = np.array([[1.0, -2.0, 0.5], [0.8, -1.5, -0.2], [-0.3, 0.4, 0.9], [0.1, 0.2, -0.4]])
RATE, META_RATE = 0.1, 0.02


def run(tx, grads=GRADS):
    """Updates and rates of every step; the gradients are split over two leaves."""

    def step(state, grad):
        update, state = tx.update({"a": grad[:2], "b": grad[2:]}, state)
        return state, (jnp.concatenate([update["a"], update["b"]]), state.learning_rate)

    state = tx.init({"a": jnp.zeros(2), "b": jnp.zeros(1)})
    state, (updates, rates) = jax.lax.scan(step, state, jnp.asarray(grads, jnp.float32))
    return updates, rates, state


def expected(directions, multiplicative=False, low=0.0, high=np.inf):
    """The equations of the docstring, given the direction of every step."""
    rate, previous = RATE, np.zeros(3)
    updates, rates = [], []
    for grad, direction in zip(GRADS, directions, strict=True):
        h = grad @ previous
        if multiplicative:
            norms = np.linalg.norm(grad) * np.linalg.norm(previous)
            rate = rate * (1 + META_RATE * h / norms) if norms else rate
        else:
            rate = rate + META_RATE * h
        rate = np.clip(rate, low, high)
        rates.append(rate)
        updates.append(-rate * direction)
        previous = direction
    return updates, rates


def sgd_directions(momentum, nesterov):
    buffer = np.zeros(3)
    for grad in GRADS:
        buffer = momentum * buffer + grad
        yield grad + momentum * buffer if nesterov else buffer


def adam_directions(b1=0.9, b2=0.999, eps=1e-8):
    first, second = np.zeros(3), np.zeros(3)
    for step, grad in enumerate(GRADS, start=1):
        first = b1 * first + (1 - b1) * grad
        second = b2 * second + (1 - b2) * grad**2
        yield first / (1 - b1**step) / (np.sqrt(second / (1 - b2**step)) + eps)


@pytest.mark.parametrize("multiplicative", [False, True])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_by_hand(momentum, nesterov, multiplicative):
    tx = sgd_hd(RATE, META_RATE, momentum, nesterov, multiplicative=multiplicative)
    updates, rates, _ = run(tx)
    want_updates, want_rates = expected(sgd_directions(momentum, nesterov), multiplicative)
    np.testing.assert_allclose(rates, want_rates, rtol=1e-5)
    np.testing.assert_allclose(updates, want_updates, rtol=1e-5)


@pytest.mark.parametrize("multiplicative", [False, True])
def test_adam_by_hand(multiplicative):
    tx = adam_hd(RATE, META_RATE, multiplicative=multiplicative)
    updates, rates, state = run(tx)
    want_updates, want_rates = expected(adam_directions(), multiplicative)
    np.testing.assert_allclose(rates, want_rates, rtol=1e-5)
    np.testing.assert_allclose(updates, want_updates, rtol=1e-4)
    directions = list(adam_directions())
    np.testing.assert_allclose(state.hypergradient, GRADS[-1] @ directions[-2], rtol=1e-4)


def test_hypergradient_is_minus_the_derivative():
    def loss(w):
        return jnp.sum(jnp.array([1.0, 3.0]) * w**2) + jnp.sum(w) ** 4

    start = jnp.array([0.7, -0.4])
    derivative = jax.grad(lambda rate: loss(start - rate * jax.grad(loss)(start)))(RATE)
    tx = sgd_hd(RATE, 0.0)
    update, state = tx.update(jax.grad(loss)(start), tx.init(start))
    _, state = tx.update(jax.grad(loss)(start + update), state)
    np.testing.assert_allclose(state.hypergradient, -derivative, rtol=1e-5)


@pytest.mark.parametrize(
    ("tx", "plain"),
    [
        (sgd_hd(0.1, 0.0), optax.sgd(0.1)),
        (sgd_hd(0.1, 0.0, 0.9), optax.sgd(0.1, momentum=0.9)),
        (sgd_hd(0.1, 0.0, 0.9, True), optax.sgd(0.1, momentum=0.9, nesterov=True)),
        (adam_hd(0.1, 0.0), optax.adam(0.1)),
    ],
)
def test_plain_optimizer_at_beta_zero(tx, plain):
    """Guarantees: Is SGD at beta = 0; Is Adam at beta = 0."""
    state = plain.init(jnp.zeros(3))
    for grad, update in zip(GRADS, run(tx)[0], strict=True):
        want, state = plain.update(jnp.asarray(grad, jnp.float32), state)
        np.testing.assert_allclose(update, want, rtol=1e-6)


@pytest.mark.parametrize("multiplicative", [False, True])
@pytest.mark.parametrize("make", [sgd_hd, adam_hd])
def test_the_rate_stays_in_range(make, multiplicative):
    """Guarantee: Stays in range."""
    grads = np.random.default_rng(0).normal(size=(50, 3)) * 100
    unbounded = {"multiplicative": multiplicative, "hypergradient_learning_rate": 1.5}
    _, rates, _ = run(make(0.1, **unbounded), grads)
    assert np.all(np.asarray(rates) >= 0)  # the published rate turns negative here
    tx = make(0.1, min_learning_rate=0.05, max_learning_rate=0.2, **unbounded)
    _, rates, _ = run(tx, grads)
    np.testing.assert_allclose([rates.min(), rates.max()], [0.05, 0.2])


@functools.cache
def run_with_bad_gradients(make):
    """A run per bad value, in the third and the fourth of six steps, and the run without them."""
    bads = jnp.array([np.nan, np.inf, -np.inf, 1e30])
    third = jnp.stack([bads, jnp.ones(4), jnp.ones(4)], axis=1)
    fourth = jnp.stack([jnp.full(4, 0.1), bads, jnp.full(4, 0.1)], axis=1)
    grads = jnp.broadcast_to(jnp.asarray(GRADS, jnp.float32), (4, 4, 3))
    grads = jnp.concatenate([grads[:, :2], third[:, None], fourth[:, None], grads[:, 2:]], axis=1)
    tx = make(0.1, 0.01)
    return jax.jit(jax.vmap(lambda grads: run(tx, grads)))(grads), run(tx)


@pytest.mark.parametrize(
    ("make", "row"), [(sgd_hd, 0), (sgd_hd, 1), (sgd_hd, 2), *((adam_hd, row) for row in range(4))]
)
def test_steps_that_are_not_finite_are_skipped(make, row):
    """Guarantee: Skips and counts. The square of 1e30, the last value, is infinite in float32."""
    results, (want_updates, want_rates, want_state) = run_with_bad_gradients(make)
    updates, rates, state = jax.tree.map(lambda x: x[row], results)
    np.testing.assert_array_equal(updates[2:4], np.zeros((2, 3)))
    np.testing.assert_allclose(np.delete(updates, [2, 3], axis=0), want_updates, rtol=1e-6)
    np.testing.assert_allclose(np.delete(rates, [2, 3]), want_rates, rtol=1e-6)
    assert state.num_skipped == 2
    assert want_state.num_skipped == 0


@pytest.mark.parametrize("multiplicative", [False, True])
def test_a_gradient_of_zero_leaves_the_rate(multiplicative):
    tx = sgd_hd(0.1, 0.5, multiplicative=multiplicative)
    updates, rates, state = run(tx, np.zeros((3, 3)))
    np.testing.assert_allclose(rates, 0.1)
    np.testing.assert_array_equal(updates, np.zeros((3, 3)))
    assert state.num_skipped == 0


@pytest.mark.parametrize("make", [sgd_hd, adam_hd])
def test_stable_types_and_one_program(make):
    tx = make(0.1, 0.01)
    params = {"w": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.ones(2)}
    state = tx.init(params)
    types = jax.tree.map(jax.typeof, state)
    step = jax.jit(lambda g, s: tx.update(g, s, params, value=1.0))
    for _ in range(3):
        updates, state = step(params, state)
        assert jax.tree.map(jax.typeof, state) == types
        chex.assert_trees_all_equal_dtypes(updates, params)
    assert step._cache_size() == 1
    assert isinstance(state, HypergradientState)
    assert state.learning_rate.dtype == jnp.float32
    assert state.num_skipped.dtype == jnp.int32


@pytest.mark.parametrize("make", [sgd_hd, adam_hd])
def test_a_probe_is_an_ordinary_update(make):
    tx = make(0.1, 0.01)
    grads = jnp.asarray(GRADS[0], jnp.float32)
    updates, _ = jax.jit(lambda s: tx.update(grads, s, probe=True))(tx.init(jnp.zeros(3)))
    direction = grads if make is sgd_hd else np.sign(grads)
    np.testing.assert_allclose(updates, -0.1 * direction, rtol=1e-4)


@pytest.mark.slow
def test_vmap_equals_a_loop():
    tx = adam_hd(0.1, 0.01)
    batch = jnp.stack([GRADS, -2 * GRADS, GRADS[::-1]]).astype(jnp.float32)
    together = jax.jit(jax.vmap(lambda grads: run(tx, grads)[:2]))(batch)
    alone_fn = jax.jit(lambda grads: run(tx, grads)[:2])
    for index, grads in enumerate(batch):
        for row, alone in zip(together, alone_fn(grads), strict=True):
            np.testing.assert_allclose(row[index], alone, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (sgd_hd, {"learning_rate": -0.1}, "learning_rate must be a finite number >= 0, got -0.1"),
        (adam_hd, {"max_learning_rate": 0.05}, r"learning_rate must be in \[0.0, 0.05\], got 0.1"),
        (sgd_hd, {"hypergradient_learning_rate": -1}, "hypergradient_learning_rate must be a fini"),
        (sgd_hd, {"min_learning_rate": -1}, "min_learning_rate must be a finite number >= 0"),
        (sgd_hd, {"min_learning_rate": 2, "max_learning_rate": 1}, "max_learning_rate must be in"),
        (sgd_hd, {"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        (adam_hd, {"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        (adam_hd, {"b2": -0.1}, r"b2 must be in \[0, 1\), got -0.1"),
        (adam_hd, {"eps": 0.0}, "eps must be a finite number > 0, got 0.0"),
    ],
)
def test_arguments_out_of_range(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**{"learning_rate": 0.1, "hypergradient_learning_rate": 0.01} | arguments)
