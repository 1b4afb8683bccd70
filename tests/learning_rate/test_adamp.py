"""AdamP against the algorithm in NumPy, and what JAX expects."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arbiter_jax.learning_rate import AdamPState, adamp

RATE, WEIGHT_DECAY, DELTA, WD_RATIO, EPS = 0.0625, 0.1, 0.1, 0.2, 1e-8


def project(param, grad, direction, channel_axis=-1):
    """The projected step and its decay: per channel, or else as a layer, or else unprojected."""
    for as_layer in (False, True):
        if as_layer:
            rows = [a.reshape(1, -1) for a in (param, grad, direction)]
        else:
            rows = [np.moveaxis(a, channel_axis, 0) for a in (param, grad, direction)]
            moved = rows[0].shape
            rows = [a.reshape(len(a), -1) for a in rows]
        w, g, p = rows
        norms = np.linalg.norm(w, axis=1) * np.linalg.norm(g, axis=1)
        cosine = np.abs(np.sum(w * g, axis=1)) / np.maximum(norms, EPS)
        if cosine.max() < DELTA / np.sqrt(w.shape[1]):
            unit = w / (np.linalg.norm(w, axis=1, keepdims=True) + EPS)
            q = p - unit * np.sum(unit * p, axis=1, keepdims=True)
            q = (
                q.reshape(param.shape)
                if as_layer
                else np.moveaxis(q.reshape(moved), 0, channel_axis)
            )
            return q, WD_RATIO
    return direction, 1.0


def reference(params, all_grads, channel_axis=-1):
    """Parameters and factor of the weight decay after every step."""
    moments = {k: (np.zeros_like(p), np.zeros_like(p)) for k, p in params.items()}
    params, history = dict(params), []
    for step, grads in enumerate(all_grads, start=1):
        ratios = {}
        for name, grad in grads.items():
            first, second = moments[name]
            first = 0.9 * first + 0.1 * grad
            second = 0.999 * second + 0.001 * grad**2
            moments[name] = first, second
            direction = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + EPS)
            ratios[name] = 1.0
            if grad.ndim > 1:
                direction, ratios[name] = project(params[name], grad, direction, channel_axis)
            decay = RATE * WEIGHT_DECAY * ratios[name]
            params[name] = params[name] * (1 - decay) - RATE * direction
        history.append((dict(params), ratios))
    return history


def tangent(rng, param, axes):
    """A random gradient orthogonal to the weights along the axes."""
    grad = rng.normal(size=param.shape)
    square = np.sum(param * param, axis=axes, keepdims=True)
    return grad - param * np.sum(grad * param, axis=axes, keepdims=True) / square


def make_problem(channel_axis=-1):
    rng = np.random.default_rng(0)
    params = {
        "by_channel": rng.normal(size=(3, 3, 4, 5)),
        "by_layer": rng.normal(size=(6, 5)),
        "free": rng.normal(size=(6, 5)),
        "bias": rng.normal(size=5),
    }
    channels = tuple(a for a in range(4) if a != channel_axis % 4)
    all_grads = [
        {
            "by_channel": tangent(rng, params["by_channel"], channels),
            "by_layer": tangent(rng, params["by_layer"], None),
            "free": params["free"] + rng.normal(size=(6, 5)),
            "bias": rng.normal(size=5),
        }
        for _ in range(2)
    ]
    return params, all_grads


@pytest.mark.parametrize("channel_axis", [-1, 0])
def test_equals_the_algorithm(channel_axis):
    params, all_grads = make_problem(channel_axis)
    history = reference(params, all_grads, channel_axis)
    assert history[0][1] == {
        "by_channel": WD_RATIO,
        "by_layer": WD_RATIO,
        "free": 1.0,
        "bias": 1.0,
    }
    with jax.enable_x64(True):
        tx = adamp(
            RATE,
            weight_decay=WEIGHT_DECAY,
            delta=DELTA,
            wd_ratio=WD_RATIO,
            channel_axis=channel_axis,
        )
        params = jax.tree.map(jnp.asarray, params)
        state = tx.init(params)
        for grads, (expected, _) in zip(all_grads, history, strict=True):
            updates, state = jax.jit(tx.update)(jax.tree.map(jnp.asarray, grads), state, params)
            params = optax.apply_updates(params, updates)
            chex.assert_trees_all_close(params, expected, rtol=1e-10)


def test_orthogonal():
    """Guarantee: Orthogonal."""
    params, (grads, _) = make_problem()
    params, grads = (
        jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), t) for t in (params, grads)
    )
    tx = adamp(RATE)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    inner = jax.tree.map(lambda u, p: u * p, updates, params)
    np.testing.assert_allclose(jnp.sum(inner["by_channel"], (0, 1, 2)), np.zeros(5), atol=1e-6)
    np.testing.assert_allclose(jnp.sum(inner["by_layer"]), 0, atol=1e-6)
    assert abs(jnp.sum(inner["free"])) > 0.01


@pytest.mark.parametrize("nesterov", [False, True])
def test_is_adamw_without_projection(nesterov):
    """Guarantee: Is AdamW without projection."""
    params, all_grads = make_problem()
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    tx = adamp(RATE, weight_decay=WEIGHT_DECAY, delta=0.0, nesterov=nesterov)
    plain = optax.adamw(RATE, weight_decay=WEIGHT_DECAY, nesterov=nesterov)
    state, plain_state = tx.init(params), plain.init(params)
    update, plain_update = jax.jit(tx.update), jax.jit(plain.update)
    for grads in all_grads:
        grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads)
        updates, state = update(grads, state, params)
        expected, plain_state = plain_update(grads, plain_state, params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5)


def test_the_rate_is_in_the_state():
    """And follows a schedule, if there is one."""
    params = {"w": jnp.ones((2, 2))}
    tx = adamp(optax.linear_schedule(1.0, 0.0, 4))
    state, update = tx.init(params), jax.jit(tx.update)
    for rate in (1.0, 0.75, 0.5):
        assert state.learning_rate == rate
        updates, state = update(params, state, params)  # Adam's direction is 1 everywhere
        np.testing.assert_allclose(updates["w"], -rate, rtol=1e-4)

    tx = adamp(0.1)
    state = tx.init(params)._replace(learning_rate=jnp.float32(0.3))
    np.testing.assert_allclose(jax.jit(tx.update)(params, state, params)[0]["w"], -0.3, rtol=1e-4)


def test_skips_and_counts():
    """Guarantee: Skips and counts. The square of 1e30 is infinite in float32."""
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    tx = adamp(0.1, weight_decay=0.1)
    update = jax.jit(tx.update)
    _, state = update(params, tx.init(params), params)
    for bad in (jnp.nan, jnp.inf, 1e30):
        grads = {"w": params["w"].at[0, 1].set(bad), "b": params["b"]}
        updates, skipped = update(grads, state, params)
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
        chex.assert_trees_all_equal(skipped, state._replace(num_skipped=jnp.int32(1)))


def test_a_probe_is_an_ordinary_update():
    params, tx = jnp.ones(2), adamp(0.1)
    updates, state = jax.jit(lambda s: tx.update(params, s, params, probe=True))(tx.init(params))
    np.testing.assert_allclose(updates, -0.1, rtol=1e-4)
    assert state.adam.count == 1


@pytest.mark.slow
def test_stable_types_one_program_vmap():
    tx = adamp(1e-2, weight_decay=0.1)
    params = {"w": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones(2), "s": jnp.ones(())}
    state = tx.init(params)
    types = jax.tree.map(jax.typeof, state)
    step = jax.jit(lambda g, s: tx.update(g, s, params, value=1.0))
    for _ in range(3):
        updates, state = step(params, state)
        assert jax.tree.map(jax.typeof, state) == types
        chex.assert_trees_all_equal_dtypes(updates, params)
    assert step._cache_size() == 1
    assert isinstance(state, AdamPState)
    assert state.learning_rate.dtype == jnp.float32

    weights = jax.random.normal(jax.random.PRNGKey(0), (4, 3, 2))
    grads = jax.random.normal(jax.random.PRNGKey(1), (4, 3, 2))
    grads = grads.at[0].set(grads[0] - weights[0] * jnp.sum(grads[0] * weights[0]))

    def one(w, g):
        return tx.update(g, tx.init(w), w)[0]

    together = jax.jit(jax.vmap(one))(weights, grads)
    one = jax.jit(one)
    for index in range(4):
        alone = one(weights[index], grads[index])
        np.testing.assert_allclose(together[index], alone, rtol=1e-5, atol=1e-8)


def test_the_parameters_are_required():
    tx = adamp(0.1)
    with pytest.raises(TypeError, match="adamp needs the signal `params`"):
        tx.update(jnp.ones((2, 2)), tx.init(jnp.ones((2, 2))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be a finite number >= 0, got -1.0"),
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b2": 1.0}, r"b2 must be in \[0, 1\), got 1.0"),
        ({"eps": 0}, "eps must be a finite number > 0, got 0"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number >= 0, got -0.1"),
        ({"delta": 2.0}, r"delta must be in \[0, 1\], got 2.0"),
        ({"wd_ratio": -1}, r"wd_ratio must be in \[0, 1\], got -1"),
        ({"channel_axis": 1}, "channel_axis must be one of 0, -1, got 1"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        adamp(**{"learning_rate": 0.1} | arguments)


def test_a_rate_that_is_not_finite_is_not_taken():
    tx = adamp(lambda n: jnp.where(n == 1, jnp.nan, 1.0 + n))
    params, rates = jnp.ones(2), []
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(jnp.ones(2), state, params)
        rates.append(float(-updates[0]))
    np.testing.assert_allclose(rates, [1.0, 1.0, 3.0], rtol=1e-4)
    assert int(state.num_skipped) == 1
    with pytest.raises(
        ValueError, match=r"learning_rate must be finite at the count 0, .* got inf"
    ):
        adamp(lambda n: 0.1 / jnp.sqrt(n)).init(params)
    with pytest.raises(ValueError, match=r"learning_rate must be finite in float32, got 1e\+300"):
        adamp(1e300)
