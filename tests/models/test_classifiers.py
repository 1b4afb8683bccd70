"""The multilayer perceptron and LeNet."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arbiter_jax import models

xent = optax.softmax_cross_entropy_with_integer_labels


def images(num, *shape):
    return np.random.default_rng(0).standard_normal((num, *shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("input_shape", "num_params"), [((28, 28, 1), 61_706), ((32, 32, 3), 62_006)]
)
def test_lenet_has_the_published_size(key, input_shape, num_params):
    model = models.lenet(input_shape, num_classes=10)
    params, model_state = jax.eval_shape(model.init, key)
    assert models.count_params(params) == num_params
    assert model_state is None
    assert model.num_features == 84


def test_mlp_has_the_expected_size(key):
    model = models.mlp((28, 28, 1), hidden_sizes=(256,), num_classes=10)
    params, model_state = jax.eval_shape(model.init, key)
    assert models.count_params(params) == 784 * 256 + 256 + 256 * 10 + 10
    assert model_state is None
    assert model.num_features == 256


def test_mlp_flattens_its_inputs(key):
    model = models.mlp((8, 8, 1), hidden_sizes=(16, 12), num_classes=3)
    params, _ = model.init(key)
    x = images(4, 8, 8, 1)

    @jax.jit
    def run(params, x):
        predict = models.make_losses(model, xent).predict
        flat = x.reshape(4, 64)
        return predict(params, x), predict(params, flat), model.features(params, None, x)[0]

    logits, of_flat, features = run(params, x)
    chex.assert_trees_all_equal(logits, of_flat)
    hidden = x.reshape(4, 64)
    for layer in ("0", "1"):
        weights = params["hidden"][layer]
        hidden = np.maximum(hidden @ weights["kernel"] + weights["bias"][None], 0)
    chex.assert_trees_all_close(features, hidden, atol=1e-5)


@pytest.mark.parametrize("input_shape", [(8, 8, 1), (4, 5, 2), (28, 28, 1), (32, 32, 3)])
def test_lenet_takes_images_of_any_size(key, input_shape):
    model = models.lenet(input_shape, num_classes=7)
    params, _ = jax.eval_shape(model.init, key)
    predict = models.make_losses(model, xent).predict
    logits = jax.eval_shape(predict, params, images(3, *input_shape))
    assert logits.shape == (3, 7)


@functools.cache
def small(make):
    """A model for 8x8 images and its parameters."""
    model = make((8, 8, 1))
    return model, jax.jit(model.init)(jax.random.PRNGKey(0))[0]


@pytest.mark.parametrize("make", [models.mlp, models.lenet])
def test_bfloat16_keeps_float32_parameters(make):
    """The dtype of the computation; parameters and logits stay float32."""
    reference, params = small(make)
    model = make((8, 8, 1), dtype=jnp.bfloat16)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(model.init, jax.random.PRNGKey(0))[0], params
    )

    @jax.jit
    def run(params, x):
        features, _ = model.features(params, None, x)
        expected = models.make_losses(reference, xent).predict(params, x)
        return features, model.head(params, None, features), expected

    features, logits, expected = run(params, images(16, 8, 8, 1))
    assert features.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    chex.assert_trees_all_close(logits, expected, atol=0.05)
    assert not np.array_equal(logits, expected)


def test_initialization_is_truncated_normal():
    """With variance 1 / fan-in, cut off at two standard deviations of the normal variable."""
    _, params = small(models.mlp)
    weights = np.asarray(params["hidden"]["0"]["kernel"]) * np.sqrt(64)
    assert abs(weights.mean()) < 0.03
    assert abs(weights.std() - 1) < 0.03
    assert 2.2 < np.abs(weights).max() <= 2 / 0.8796
    assert (np.asarray(params["hidden"]["0"]["bias"]) == 0).all()


def test_parameters_depend_on_the_key(key):
    model, _ = small(models.mlp)
    keys = jax.random.split(key, 3)
    stacked, _ = jax.vmap(model.init)(keys)
    chex.assert_shape(stacked["head"]["kernel"], (3, 128, 10))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], stacked), model.init(keys[1])[0])
    assert not np.array_equal(stacked["head"]["kernel"][0], stacked["head"]["kernel"][1])


@pytest.mark.slow
@pytest.mark.parametrize("make", [models.mlp, models.lenet])
def test_learns_in_a_scan(make):
    model, params = small(make)
    loss_fn, _, predict = models.make_losses(model, xent)
    labels = np.arange(64) % 4
    x = images(64, 8, 8, 1) * 0.3 + images(4, 8, 8, 1)[labels]
    tx = optax.adam(3e-3)

    @jax.jit
    def train(params, opt_state):
        def step(carry, _):
            params, opt_state = carry
            value, grads = jax.value_and_grad(lambda p: jnp.mean(loss_fn(p, (x, labels))))(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        carry, values = jax.lax.scan(step, (params, opt_state), None, length=40)
        return predict(carry[0], x), values

    logits, values = train(params, tx.init(params))
    assert values[-1] < 0.1 * values[0]
    assert (logits.argmax(-1) == labels).mean() > 0.95


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.mlp((0, 8)), "input_shape must be an integer >= 1"),
        (lambda: models.mlp((8, 8), hidden_sizes=(0,)), "hidden_sizes must be an integer >= 1"),
        (lambda: models.mlp((8, 8), num_classes=0), "num_classes must be an integer >= 1"),
        (lambda: models.lenet((28, 28)), "input_shape must be .height, width, channels."),
        (lambda: models.lenet((3, 28, 1)), "input_shape must be an integer >= 4"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
