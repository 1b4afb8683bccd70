"""Complex parameters count as pairs of real ones, and products of half precision are float32's."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax._numerics import tree_dot
from arbiter_jax.gradients import masked_value_and_grad, per_example_grads, value_grad_and_stats

S = aj.schedulers


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


BATCH = draw(16, 3), draw(16, 3, seed=1), draw(16, seed=2)


def as_pairs(params):
    return jax.tree.map(lambda z: jnp.stack([z.real, z.imag]), params)


def as_complex(pairs):
    return jax.tree.map(lambda x: x[0] + 1j * x[1], pairs)


def complex_loss(params, batch):
    """|x . z - y|^2 / 2 and what makes the direction matter."""
    real, imag, labels = batch
    outputs = jax.lax.complex(real, imag) @ params["z"]
    return jnp.abs(outputs - labels) ** 2 / 2 + jnp.imag(outputs) * labels


def real_loss(params, batch):
    return complex_loss(as_complex(params), batch)


COMPLEX = {"z": jax.lax.complex(draw(3, seed=3), draw(3, seed=4))}
PAIRS = as_pairs(COMPLEX)


@pytest.mark.slow
def test_the_gradient_points_uphill():
    """As for real pairs; jax.grad returns the conjugate."""
    mask = jnp.arange(16) < 11
    got = masked_value_and_grad(complex_loss)(COMPLEX, BATCH, mask)
    expected = masked_value_and_grad(real_loss)(PAIRS, BATCH, mask)
    chex.assert_trees_all_close(as_pairs(got.grads), expected.grads, rtol=1e-5, atol=1e-5)
    got, expected = per_example_grads(complex_loss)(COMPLEX, BATCH), per_example_grads(real_loss)
    rows = jnp.moveaxis(expected(PAIRS, BATCH)["z"], 1, 0)
    np.testing.assert_allclose(jnp.stack([got["z"].real, got["z"].imag]), rows, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pieces", "per_example", "per_device"])
def test_statistics_of_complex_parameters(method):
    scale = {"z": jnp.array([1.0, 2.0, 0.5])}
    scales = {"z": jnp.stack([scale["z"], scale["z"]])}

    def stats(loss, params, scale):
        name = "data" if method == "per_device" else None
        fn = value_grad_and_stats(loss, method=method, axis_name=name)
        run = lambda batch: fn(params, batch, jnp.ones(len(batch[0]), bool), preconditioner=scale)
        if method == "per_device":
            mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
            run = jax.shard_map(run, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P())
        return jax.jit(run)(BATCH)

    got, expected = stats(complex_loss, COMPLEX, scale), stats(real_loss, PAIRS, scales)
    chex.assert_trees_all_close(got.grad_stats, expected.grad_stats, rtol=1e-4)
    if method == "pieces":
        noise = as_pairs(got.gradient_noise)
        chex.assert_trees_all_close(noise, expected.gradient_noise, rtol=1e-4, atol=1e-6)


def window(loss, params, tx):
    state = aj.init_state(params, tx, jax.random.PRNGKey(0))
    data = aj.Data(BATCH, BATCH)
    return aj.run_window(state, data, loss_fn=loss, tx=tx, bucket_size=8, window=12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda loss: optax.sgd(0.05, momentum=0.9),
        lambda loss: aj.sgd_hd(0.05, 0.001, momentum=0.5),
        lambda loss: aj.sgd_hd(0.05, 0.1, multiplicative=True),
        lambda loss: optax.chain(
            optax.sgd(0.02, momentum=0.5),
            S.constant(8),
            S.shadow(S.noise_floor(loss, num_examples=1000), name="floor"),
            S.shadow(S.expected_gain(loss), name="gain"),
            S.shadow(S.dive_batch(64), name="dive"),
            S.shadow(S.simigrad(), name="simigrad"),
        ),
    ],
)
def test_a_run_is_that_of_real_pairs(make):
    got, info = window(complex_loss, COMPLEX, make(complex_loss))
    expected, expected_info = window(real_loss, PAIRS, make(real_loss))
    np.testing.assert_allclose(info.loss, expected_info.loss, rtol=1e-4)
    assert info.loss[-1] < info.loss[0]
    chex.assert_trees_all_close(as_pairs(got.params), expected.params, rtol=1e-4, atol=1e-5)
    numbers = lambda state: [float(x) for x in jax.tree.leaves(state.opt_state) if not x.ndim]
    np.testing.assert_allclose(numbers(got), numbers(expected), rtol=1e-3, atol=1e-6)
    chex.assert_trees_all_close(info.metrics, expected_info.metrics, rtol=1e-3, atol=1e-6)


def test_a_loss_without_a_forward_derivative():
    """A custom_vjp: the curvature of expected gain comes from the gradient's derivative."""

    @jax.custom_vjp
    def identity(x):
        return x

    identity.defvjp(lambda x: (x, None), lambda _, g: (g,))
    loss = lambda params, batch: identity(complex_loss(params, batch))
    objective = lambda loss: aj.objectives.expected_gain(loss, persistence=1.0)
    direction = jax.tree.map(lambda z: z * 0.1j, COMPLEX)
    signals = {"meta_batch": BATCH, "update_noise": direction}
    measure = lambda loss: objective(loss).measure(direction, COMPLEX, jnp.int32(8), signals)
    chex.assert_trees_all_close(measure(loss), measure(complex_loss), rtol=1e-4)


@pytest.mark.slow
def test_adamp_projects_complex_weights():
    """A step along i w rotates scale-invariant weights, which is orthogonal to them."""
    weights = {"w": jax.lax.complex(draw(4, 2, seed=5), draw(4, 2, seed=6))}
    tx = aj.adamp(0.1)
    grads = jax.tree.map(lambda w: 1j * w, weights)
    updates, state = tx.update(grads, tx.init(weights), weights)
    assert int(state.num_skipped) == 0
    along = jnp.sum(jnp.real(jnp.conj(weights["w"]) * updates["w"]), axis=0)
    np.testing.assert_allclose(along, 0, atol=1e-6)
    assert jnp.linalg.norm(updates["w"]) > 0.1


@pytest.mark.slow
def test_subsets_of_complex_gradients():
    rows = jax.lax.complex(draw(8, 5), draw(8, 5, seed=1))
    got = aj.select_subset(rows)
    expected = aj.select_subset(jnp.concatenate([rows.real, rows.imag], axis=1))
    chex.assert_trees_all_equal(got, expected)
    got = jax.jit(aj.subset_gradients(complex_loss))(COMPLEX, BATCH)
    expected = jax.jit(aj.subset_gradients(real_loss))(PAIRS, BATCH)
    np.testing.assert_array_equal(got.selected, expected.selected)
    chex.assert_trees_all_close(as_pairs(got.grads), expected.grads, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(got.grad_stats, expected.grad_stats, rtol=1e-4)


# Half precision


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("multiplicative", [False, True])
def test_small_gradients_have_a_hypergradient(multiplicative, dtype):
    """1e-4 squared is nothing in float16."""
    tx = aj.sgd_hd(0.1, 0.01, multiplicative=multiplicative)
    grads = jnp.full(100, 1e-4, dtype)
    state = tx.init(grads)
    for _ in range(2):
        _, state = tx.update(grads, state, grads)
    np.testing.assert_allclose(state.hypergradient, 100 * 1e-8, rtol=1e-2)
    expected = 0.1 * 1.01 if multiplicative else 0.1 + 0.01 * 1e-6
    np.testing.assert_allclose(state.learning_rate, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("method", ["pieces", "per_example"])
def test_small_gradients_have_statistics(method, dtype):
    """Those of the same gradients in float32; a preconditioner of 1e4 must not overflow either."""
    x = 1e-4 * draw(16, 3)
    loss = lambda w, x: jnp.sum(w[None] * x.astype(w.dtype), axis=1)
    rounded = x.astype(dtype).astype(jnp.float32)
    stats = lambda dtype, scale, x: aj.gradient_stats(
        loss, jnp.zeros(3, dtype), x, method=method, preconditioner=scale
    )
    for scale in (None, jnp.full(3, 1e9)):
        got, expected = stats(dtype, scale, x), stats(jnp.float32, scale, rounded)
        assert got.variance_trace > 0
        np.testing.assert_allclose(got.variance_trace, expected.variance_trace, rtol=0.05)


def test_products_of_any_types():
    x, y = jnp.array([1 + 2j, 3j]), jnp.array([2 - 1j, 1.0])
    assert float(tree_dot(x, y)) == 0.0  # 2 - 2 + 0
    assert float(tree_dot(x, x)) == 14.0
    assert tree_dot(x, x).dtype == jnp.float32
    half = jnp.full(4, 1e-4, jnp.float16)
    np.testing.assert_allclose(tree_dot(half, half), 4e-8, rtol=1e-2)
    assert float(tree_dot(half.astype(jnp.float32), x[0] * jnp.ones(4))) == pytest.approx(
        4e-4, 1e-2
    )
