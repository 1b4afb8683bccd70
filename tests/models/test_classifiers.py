"""The multilayer perceptron and LeNet."""

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
def test_lenet_has_the_published_number_of_parameters(key, input_shape, num_params):
    model = models.lenet(input_shape, num_classes=10)
    params, model_state = jax.eval_shape(model.init, key)
    assert models.count_params(params) == num_params
    assert model_state is None
    assert model.num_features == 84


def test_mlp_has_the_expected_number_of_parameters(key):
    model = models.mlp((28, 28, 1), hidden_sizes=(256,), num_classes=10)
    params, model_state = jax.eval_shape(model.init, key)
    assert models.count_params(params) == 784 * 256 + 256 + 256 * 10 + 10
    assert model_state is None
    assert model.num_features == 256


def test_mlp_flattens_its_inputs(key):
    model = models.mlp((8, 8, 1), hidden_sizes=(16, 12), num_classes=3)
    params, _ = model.init(key)
    x = images(4, 8, 8, 1)
    predict = models.make_losses(model, xent).predict
    chex.assert_trees_all_equal(predict(params, x), predict(params, x.reshape(4, 64)))
    hidden = x.reshape(4, 64)
    for layer in ("0", "1"):
        weights = params["hidden"][layer]
        hidden = np.maximum(hidden @ weights["kernel"] + weights["bias"][None], 0)
    chex.assert_trees_all_close(model.features(params, None, x)[0], hidden, atol=1e-5)


@pytest.mark.parametrize("input_shape", [(8, 8, 1), (4, 5, 2), (28, 28, 1), (32, 32, 3)])
def test_lenet_takes_images_of_any_size(key, input_shape):
    model = models.lenet(input_shape, num_classes=7)
    params, _ = jax.eval_shape(model.init, key)
    predict = models.make_losses(model, xent).predict
    logits = jax.eval_shape(predict, params, images(3, *input_shape))
    assert logits.shape == (3, 7)


@pytest.mark.parametrize("make", [models.mlp, models.lenet])
def test_bfloat16_computes_in_it_and_keeps_float32_parameters(key, make):
    model, reference = make((8, 8, 1), dtype=jnp.bfloat16), make((8, 8, 1))
    params, _ = model.init(key)
    chex.assert_trees_all_equal(params, reference.init(key)[0])
    x = images(16, 8, 8, 1)
    features, _ = model.features(params, None, x)
    assert features.dtype == jnp.bfloat16
    logits = models.make_losses(model, xent).predict(params, x)
    assert logits.dtype == jnp.float32
    expected = models.make_losses(reference, xent).predict(params, x)
    chex.assert_trees_all_close(logits, expected, atol=0.05)
    assert not np.array_equal(logits, expected)


def test_parameters_depend_on_the_key_and_survive_vmap(key):
    model = models.mlp((8, 8, 1), hidden_sizes=(16,))
    keys = jax.random.split(key, 3)
    stacked, _ = jax.vmap(model.init)(keys)
    chex.assert_shape(stacked["head"]["kernel"], (3, 16, 10))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], stacked), model.init(keys[1])[0])
    assert not np.array_equal(stacked["head"]["kernel"][0], stacked["head"]["kernel"][1])


@pytest.mark.parametrize("make", [models.mlp, models.lenet])
def test_learns_under_jit_scan_and_optax(key, make):
    model = make((8, 8, 1), num_classes=4)
    loss_fn, _, predict = models.make_losses(model, xent)
    labels = np.arange(64) % 4
    x = images(64, 8, 8, 1) * 0.3 + images(4, 8, 8, 1)[labels]
    params, _ = model.init(key)
    tx = optax.adam(3e-3)

    @jax.jit
    def train(params, opt_state):
        def step(carry, _):
            params, opt_state = carry
            value, grads = jax.value_and_grad(lambda p: jnp.mean(loss_fn(p, (x, labels))))(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        return jax.lax.scan(step, (params, opt_state), None, length=40)

    (params, _), values = train(params, tx.init(params))
    assert values[-1] < 0.1 * values[0]
    assert (predict(params, x).argmax(-1) == labels).mean() > 0.95


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
