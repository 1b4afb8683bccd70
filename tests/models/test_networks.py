"""VGG11, wide residual networks and the transformer."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from arbiter_jax import models
from arbiter_jax.base import WeightedLoss

xent = optax.softmax_cross_entropy_with_integer_labels
CIFAR = (32, 32, 3)


def convolve(x, kernel, stride=1):
    """As the networks do it, without a bias."""
    padding = [(kernel.shape[0] // 2,) * 2] * 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def shapes_of(model):
    return jax.eval_shape(model.init, jax.random.PRNGKey(0))


def images(num, *shape):
    return np.random.default_rng(0).standard_normal((num, *shape)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "num_params", "num_features"),
    [
        (lambda: models.wide_resnet(CIFAR, 10, depth=16, widen_factor=4), 2_748_890, 256),
        pytest.param(
            lambda: models.wide_resnet(CIFAR, 10, depth=28, widen_factor=10),
            36_479_194,
            640,
            marks=pytest.mark.exhaustive,
        ),
        (lambda: models.vgg11(CIFAR, 10), 9_231_114, 512),
    ],
    ids=["WRN-16-4", "WRN-28-10", "VGG11"],
)
def test_has_the_published_number_of_parameters(make, num_params, num_features):
    model = make()
    params, model_state = shapes_of(model)
    assert models.count_params(params) == num_params
    assert model.num_features == num_features
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((params, model_state)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [models.vgg11, functools.partial(models.wide_resnet, depth=10)], ids=["vgg", "wrn"]
)
@pytest.mark.parametrize("input_shape", [(28, 28, 1), (5, 7, 2)])
def test_images_of_any_size(make, input_shape):
    model = make(input_shape, num_classes=7)
    params, model_state = shapes_of(model)
    x = jax.ShapeDtypeStruct((3, *input_shape), jnp.float32)
    predict = models.make_losses(model, xent).predict
    assert jax.eval_shape(predict, params, x, model_state).shape == (3, 7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "sample"),
    [
        (lambda dtype: models.vgg11((8, 8, 1), dtype=dtype), images(2, 8, 8, 1)),
        (lambda dtype: models.wide_resnet((8, 8, 1), depth=10, dtype=dtype), images(2, 8, 8, 1)),
        (lambda dtype: models.transformer(5, 4, width=8, dtype=dtype), np.ones((2, 4), np.int32)),
    ],
    ids=["vgg11", "wide_resnet", "transformer"],
)
def test_bfloat16_keeps_float32_variables(make, sample):
    model = make(jnp.bfloat16)
    variables = shapes_of(model)
    features, new_state = jax.eval_shape(
        lambda params, state, x: model.features(params, state, x, train=True), *variables, sample
    )
    assert features.dtype == jnp.bfloat16
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, variables[1])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    assert jax.eval_shape(model.head, *variables, features).dtype == jnp.float32


@pytest.mark.slow
def test_vgg_runs_and_normalizes(key):
    model = models.vgg11((8, 8, 1), num_classes=3)
    variables = jax.jit(model.init)(key)
    x = images(4, 8, 8, 1)

    @jax.jit
    def run(params, model_state):
        features, state = model.features(params, model_state, x, train=True)
        conv = params["convs"]["0"]
        return features, state, convolve(x, conv["kernel"]) + conv["bias"][None, None, None]

    features, new_state, y = run(*variables)
    assert features.shape == (4, 512)
    assert (np.asarray(features) >= 0).all()
    # The first BatchNorm sees y: its new mean is a tenth of the mean of the batch.
    mean = np.asarray(y).mean((0, 1, 2))
    chex.assert_trees_all_close(new_state["norms"]["0"]["mean"], 0.1 * mean, atol=1e-5)
    # He's initialization: variance 2 / fan-in.
    kernel = np.asarray(variables[0]["convs"]["3"]["kernel"])
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 256)), rel=0.02)


class OneNorm(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x).mean(axis=(1, 2)))


@pytest.mark.slow
def test_masked_statistics_equal_the_unpadded_ones(key):
    """For every batch size from 1 to 64 in a bucket of 64."""
    model = models.attach(OneNorm, "head", jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32))
    params, model_state = jax.jit(model.init)(key)
    x = 0.5 + images(64, 4, 4, 3)

    @jax.jit
    def masked(batch_size):
        mask = jnp.arange(64) < batch_size
        # What padding holds must not matter.
        inputs = jnp.where(mask[:, None, None, None], x, 1e4)
        features, state = model.features(params, model_state, inputs, train=True, mask=mask)
        return features, state["norm"]

    for batch_size in range(1, 65):
        features, norm = masked(batch_size)
        real = x[:batch_size].astype(np.float64)
        mean, var = real.mean((0, 1, 2)), real.var((0, 1, 2))
        np.testing.assert_allclose(norm["mean"], 0.5 * mean, atol=1e-6, rtol=0)
        np.testing.assert_allclose(norm["var"], 0.5 + 0.5 * var, atol=1e-6, rtol=0)
        expected = ((real - mean) / np.sqrt(var + 1e-5)).mean((1, 2))
        np.testing.assert_allclose(features[:batch_size], expected, atol=1e-5)


@functools.cache
def small_wide_resnet():
    """With blocks of 16, 32 and 64 features."""
    model = models.wide_resnet((8, 8, 1), 4, depth=10, widen_factor=1)
    return model, jax.jit(model.init)(jax.random.PRNGKey(0))


@pytest.mark.slow
def test_wide_resnet_trains_in_a_bucket(key):
    """As on the unpadded batch: loss, gradients and state of a whole network."""
    model, variables = small_wide_resnet()
    loss_fn = models.make_losses(model, xent).loss_fn
    real, labels = images(3, 8, 8, 1), np.array([0, 1, 3, 0, 1, 3])

    @jax.jit
    def step(params, model_state, x, mask):
        def loss(params):
            values, new_state = loss_fn(params, (x, labels), model_state, mask, key)
            return jnp.sum(values * mask) / jnp.sum(mask), new_state

        (value, new_state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, new_state, grads

    padded = step(*variables, np.concatenate([real, np.full_like(real, 7)]), np.arange(6) < 3)
    # A batch that holds each example twice has the means and variances of the unpadded one.
    unpadded = step(*variables, np.concatenate([real, real]), np.ones(6, bool))
    chex.assert_trees_all_close(padded[:2], unpadded[:2], atol=1e-6)
    chex.assert_trees_all_close(padded[2], unpadded[2], atol=1e-5)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(padded[2]["blocks"]))


@pytest.mark.slow
def test_wide_resnet_is_a_residual_network():
    """With its last convolution at zero a block is the identity, or its shortcut."""
    model, (params, model_state) = small_wide_resnet()
    # 16 features already enter the first group: its block needs no shortcut.
    assert ["shortcut" in block for block in params["blocks"].values()] == [False, True, True]
    blocks = {
        name: {**block, "conv2": jax.tree.map(jnp.zeros_like, block["conv2"])}
        for name, block in params["blocks"].items()
    }

    @jax.jit
    def run(params, x):
        def normed(x):  # with the statistics at the start: mean 0, variance 1
            return jnp.maximum(x / jnp.sqrt(1 + 1e-5), 0)

        features, _ = model.features(params, model_state, x)
        x = convolve(x, params["conv"]["kernel"])
        for name in ("1", "2"):
            x = convolve(normed(x), params["blocks"][name]["shortcut"]["kernel"], stride=2)
        return features, normed(x).mean((1, 2))

    features, expected = run({**params, "blocks": blocks}, images(2, 8, 8, 1))
    assert features.shape == (2, 64)
    assert np.abs(expected).max() > 0.1
    chex.assert_trees_all_close(features, expected, atol=1e-5)


@pytest.mark.slow
def test_wide_resnet_with_dropout_has_state():
    """It trains with a key, and its state keeps its types."""
    model = models.wide_resnet((8, 8, 1), 4, depth=10, widen_factor=1, dropout_rate=0.3)
    params, model_state = shapes_of(model)
    features, new_state = jax.eval_shape(
        lambda *args: model.features(*args, train=True, key=jax.random.PRNGKey(0)),
        params,
        model_state,
        images(2, 8, 8, 1),
    )
    assert features.shape == (2, 64)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, model_state)


@functools.cache
def small_transformer():
    model = models.transformer(11, 8, num_layers=1, num_heads=2, width=16)
    params, model_state = jax.jit(model.init)(jax.random.PRNGKey(0))
    assert model_state is None
    assert model.num_features == 16
    return model, params


@pytest.mark.slow
def test_transformer_is_causal_with_positions():
    """Guarantee: the logits at a position do not depend on later tokens."""
    model, params = small_transformer()
    predict = jax.jit(models.make_losses(model, xent).predict)
    tokens = np.random.default_rng(0).integers(0, 11, (3, 8))
    logits = predict(params, tokens)
    changed = tokens.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    other = predict(params, changed)
    chex.assert_trees_all_close(logits[:, :5], other[:, :5], atol=1e-5)
    assert np.abs(logits[:, 5:] - other[:, 5:]).max(axis=(0, 2)).min() > 1e-3
    same = np.asarray(predict(params, np.full((3, 8), 3)))[0]
    assert not np.allclose(same[0], same[1], atol=1e-3)
    assert jax.eval_shape(predict, params, tokens[:, :4]).shape == (3, 4, 11)
    with pytest.raises(ValueError, match="inputs must have a length <= 8, got 9"):
        jax.eval_shape(predict, params, np.zeros((3, 9), np.int32))


@pytest.mark.slow
def test_padding_tokens_weigh_nothing():
    model, params = small_transformer()
    losses = models.make_losses(model, models.token_cross_entropy)
    tokens = np.random.default_rng(0).integers(0, 11, (2, 9))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].copy()
    labels[:, 6:] = -1
    other_padding = np.where(np.arange(8) < 6, inputs, (inputs + 1) % 11)

    @jax.jit
    def run(params, inputs, response):
        batch = inputs, labels

        def total(params):
            value = losses.loss_fn(params, batch)
            return jnp.sum(value.losses), value

        grads, value = jax.grad(total, has_aux=True)(params)
        all_losses = xent(losses.predict(params, inputs), tokens[:, 1:])
        return value, grads, losses.response_loss(params, response, batch), all_losses

    response = np.zeros(16, np.float32)
    value, grads, responded, all_losses = run(params, inputs, response)
    assert isinstance(value, WeightedLoss)
    np.testing.assert_array_equal(value.weights, np.tile(np.arange(8) < 6, (2, 1)))
    chex.assert_trees_all_close(value.losses, all_losses * value.weights, atol=1e-5)
    chex.assert_trees_all_close(value, responded, atol=1e-5)
    other, other_grads, *_ = run(params, other_padding, response)
    chex.assert_trees_all_close(value, other, atol=1e-5)
    chex.assert_trees_all_close(grads, other_grads, atol=1e-5)
    np.testing.assert_array_equal(grads["positions"]["embedding"][6:], 0)


@pytest.mark.slow
def test_transformer_learns_a_sequence(key):
    model = models.transformer(7, 12, num_layers=1, num_heads=2, width=32, dropout_rate=0.1)
    losses = models.make_losses(model, models.token_cross_entropy)
    params, model_state = jax.jit(model.init)(key)
    assert model_state == {}
    tokens = (np.arange(13)[None] * np.arange(1, 5)[:, None]) % 7
    batch = (tokens[:, :-1], tokens[:, 1:])
    tx = optax.adam(1e-2)

    @jax.jit
    def train(params):
        def step(carry, key):
            params, opt_state = carry

            def loss(params):
                value, _ = losses.loss_fn(params, batch, {}, np.ones(4, bool), key)
                return jnp.sum(value.losses * value.weights) / jnp.sum(value.weights)

            value, grads = jax.value_and_grad(loss)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, 60))[1]

    values = train(params)
    assert values[0] > 1.5
    assert values[-1] < 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.wide_resnet(CIFAR, depth=17), "depth must be 6 n . 4 .* got 17"),
        (lambda: models.wide_resnet(CIFAR, widen_factor=0), "widen_factor must be an integer >= 1"),
        (lambda: models.wide_resnet(CIFAR, dropout_rate=1.0), r"dropout_rate must be in \[0, 1\)"),
        (lambda: models.vgg11((2, 2, 3)), "input_shape must be an integer >= 4"),
        (lambda: models.vgg11(CIFAR, 0), "num_classes must be an integer >= 1"),
        (lambda: models.transformer(5, 4, width=6), "width must be a multiple of num_heads=4"),
        (lambda: models.transformer(0, 4), "vocab_size must be an integer >= 1"),
        (lambda: models.transformer(5, 4, dtype=int), "dtype must be None or a dtype of floats"),
        (lambda: models.vgg11(None), r"input_shape must be \(height, width, channels\), got None"),
        (lambda: models.lenet(28), r"input_shape must be \(height, width, channels\), got 28"),
        (lambda: models.lenet((28, 28, 1), dtype="int8"), "dtype must be .* got 'int8'"),
        (lambda: models.wide_resnet(CIFAR, dtype="float31"), "dtype must be .* got 'float31'"),
        (lambda: models.mlp(None), "input_shape must be a tuple of integers >= 1, got None"),
        (lambda: models.mlp("88"), "input_shape must be a tuple of integers >= 1, got '88'"),
        (lambda: models.mlp((4,), 128), "hidden_sizes must be a tuple of integers >= 1, got 128"),
        (lambda: models.mlp((4,), dtype=bool), "dtype must be None or a dtype of floats"),
        (
            lambda: models.make_losses(None, abs),
            "model must be an arbiter_jax.models.Model, got None",
        ),
        (lambda: models.make_losses(models.mlp((4,)), None), "per_example_loss must be a function"),
        (
            lambda: models.token_cross_entropy(jnp.ones((2, 3, 4)), jnp.ones((2, 4), int)),
            r"logits and labels must be .* got shapes \(2, 3, 4\) and \(2, 4\)",
        ),
        (
            lambda: models.token_cross_entropy(jnp.ones((2, 3, 4)), jnp.ones((2, 3))),
            "labels of dtype float32",
        ),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
