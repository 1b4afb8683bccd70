"""VGG11, wide residual networks and the transformer."""

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


def shapes_of(model):
    return jax.eval_shape(model.init, jax.random.PRNGKey(0))


def images(num, *shape):
    return np.random.default_rng(0).standard_normal((num, *shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("make", "num_params", "num_features"),
    [
        (lambda: models.wide_resnet(CIFAR, 10, depth=16, widen_factor=4), 2_748_890, 256),
        (lambda: models.wide_resnet(CIFAR, 10, depth=28, widen_factor=10), 36_479_194, 640),
        (lambda: models.wide_resnet(CIFAR, 100, depth=28, widen_factor=10), 36_536_884, 640),
        (lambda: models.vgg11(CIFAR, 10), 9_231_114, 512),
    ],
    ids=["WRN-16-4", "WRN-28-10", "WRN-28-10 of 100 classes", "VGG11"],
)
def test_number_of_parameters_is_the_published_one(make, num_params, num_features):
    model = make()
    params, model_state = shapes_of(model)
    assert models.count_params(params) == num_params
    assert model.num_features == num_features
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((params, model_state)))


@pytest.mark.parametrize("make", [models.vgg11, models.wide_resnet])
@pytest.mark.parametrize("input_shape", [(8, 8, 1), (28, 28, 1), CIFAR, (5, 7, 2)])
def test_images_of_any_size(make, input_shape):
    model = make(input_shape, num_classes=7)
    params, model_state = shapes_of(model)
    x = jax.ShapeDtypeStruct((3, *input_shape), jnp.float32)
    predict = models.make_losses(model, xent).predict
    assert jax.eval_shape(predict, params, x, model_state).shape == (3, 7)


@pytest.mark.parametrize(
    ("make", "sample"),
    [
        (lambda dtype: models.vgg11(CIFAR, dtype=dtype), images(2, *CIFAR)),
        (lambda dtype: models.wide_resnet(CIFAR, dtype=dtype), images(2, *CIFAR)),
        (lambda dtype: models.transformer(5, 4, width=8, dtype=dtype), np.ones((2, 4), np.int32)),
    ],
    ids=["vgg11", "wide_resnet", "transformer"],
)
def test_bfloat16_computes_in_it_and_keeps_float32_variables(make, sample):
    model = make(jnp.bfloat16)
    variables = shapes_of(model)
    features, new_state = jax.eval_shape(
        lambda params, state, x: model.features(params, state, x, train=True), *variables, sample
    )
    assert features.dtype == jnp.bfloat16
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, variables[1])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    assert jax.eval_shape(model.head, *variables, features).dtype == jnp.float32


def test_vgg_runs_and_normalizes(key):
    model = models.vgg11((8, 8, 1), num_classes=3)
    variables = model.init(key)
    x = images(4, 8, 8, 1)

    @jax.jit
    def run(params, model_state):
        _, state = model.features(params, model_state, x, train=True)
        return model.features(params, model_state, x)[0], state

    features, new_state = run(*variables)
    assert features.shape == (4, 512)
    assert (np.asarray(features) >= 0).all()
    # The first BatchNorm saw conv0's output: its new mean is a tenth of that of the batch.
    conv = variables[0]["convs"]["0"]
    y = jax.lax.conv_general_dilated(
        x, conv["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    mean = (np.asarray(y) + conv["bias"][None, None, None]).mean((0, 1, 2))
    chex.assert_trees_all_close(new_state["norms"]["0"]["mean"], 0.1 * mean, atol=1e-5)


class OneNorm(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x).mean(axis=(1, 2)))


def test_masked_statistics_equal_those_of_the_unpadded_batch(key):
    """For every batch size from 1 to 64 in a bucket of 64."""
    model = models.attach(OneNorm, "head", jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32))
    params, model_state = model.init(key)
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


def test_wide_resnet_trains_in_a_bucket_as_on_the_unpadded_batch(key):
    """Loss, gradients and state of a whole network, whatever the padding."""
    model = models.wide_resnet((8, 8, 1), 4, depth=10, widen_factor=1)
    loss_fn = models.make_losses(model, xent).loss_fn
    variables = model.init(key)
    x, y = images(8, 8, 8, 1), np.arange(8) % 4

    @jax.jit
    def step(params, model_state, x, y, mask):
        def loss(params):
            values, new_state = loss_fn(params, (x, y), model_state, mask, key)
            return jnp.sum(values * mask) / jnp.sum(mask), new_state

        (value, new_state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, new_state, grads

    mask = np.arange(8) < 5
    padded = step(*variables, np.where(mask[:, None, None, None], x, 7.0), y, mask)
    unpadded = step(*variables, x[:5], y[:5], np.ones(5, bool))
    chex.assert_trees_all_close(padded[:2], unpadded[:2], atol=1e-6)
    chex.assert_trees_all_close(padded[2], unpadded[2], atol=1e-5)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(padded[2]["blocks"]))


def test_wide_resnet_is_a_residual_network(key):
    """With the last convolution of each block at zero, a block of equal widths is the identity."""
    model = models.wide_resnet((8, 8, 1), 4, depth=16, widen_factor=1)
    params, _ = shapes_of(model)
    names = [name for name in params["blocks"] if "shortcut" in params["blocks"][name]]
    assert names == ["2", "4"]  # 16 features already enter the first group
    dropped = models.wide_resnet((8, 8, 1), 4, depth=10, widen_factor=1, dropout_rate=0.3)
    params, model_state = shapes_of(dropped)
    key = jax.random.PRNGKey(0)
    features, new_state = jax.eval_shape(
        lambda p, s, x: dropped.features(p, s, x, train=True, key=key),
        params,
        model_state,
        images(2, 8, 8, 1),
    )
    assert features.shape == (2, 64)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, model_state)


def test_transformer_is_causal_and_its_positions_differ(key):
    model = models.transformer(11, 8, num_layers=2, num_heads=2, width=16)
    params, model_state = model.init(key)
    assert model_state is None
    assert model.num_features == 16
    predict = jax.jit(models.make_losses(model, xent).predict)
    tokens = np.random.default_rng(0).integers(0, 11, (3, 8))
    logits = predict(params, tokens)
    changed = tokens.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    other = predict(params, changed)
    chex.assert_trees_all_close(logits[:, :5], other[:, :5], atol=1e-5)
    assert np.abs(logits[:, 5:] - other[:, 5:]).max(axis=(0, 2)).min() > 1e-3
    same = np.asarray(predict(params, np.full((1, 8), 3)))[0]
    assert not np.allclose(same[0], same[1], atol=1e-3)
    assert predict(params, tokens[:, :4]).shape == (3, 4, 11)


def test_padding_tokens_weigh_nothing(key):
    model = models.transformer(11, 8, num_layers=1, num_heads=2, width=16)
    losses = models.make_losses(model, models.token_cross_entropy)
    params, _ = model.init(key)
    tokens = np.random.default_rng(0).integers(0, 11, (2, 9))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].copy()
    labels[:, 6:] = -1

    @jax.jit
    def run(params, inputs, labels, response):
        value = losses.loss_fn(params, (inputs, labels))
        responded = losses.response_loss(params, response, (inputs, labels))
        grads = jax.grad(lambda p: jnp.sum(losses.loss_fn(p, (inputs, labels)).losses))(params)
        return value, responded, grads

    value, responded, grads = run(params, inputs, labels, np.zeros(16, np.float32))
    assert isinstance(value, WeightedLoss)
    np.testing.assert_array_equal(value.weights, np.tile(np.arange(8) < 6, (2, 1)))
    chex.assert_trees_all_close(value, responded, atol=1e-5)
    shorter, _, shorter_grads = run(params, inputs[:, :6], labels[:, :6], np.zeros(16, np.float32))
    chex.assert_trees_all_close(value.losses[:, :6], shorter.losses, atol=1e-5)
    chex.assert_trees_all_close(grads, shorter_grads, atol=1e-4)


def test_transformer_learns_a_sequence(key):
    model = models.transformer(7, 12, num_layers=1, num_heads=2, width=32, dropout_rate=0.1)
    losses = models.make_losses(model, models.token_cross_entropy)
    params, model_state = model.init(key)
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

        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, 60))

    (params, _), values = train(params)
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
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
