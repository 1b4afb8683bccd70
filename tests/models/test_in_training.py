"""Models in training: state through windows and buckets, losses of every form, augmentation."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import arbiter_jax as aj
from arbiter_jax import datasets, models
from arbiter_jax.batching import sample_batch

xent = optax.softmax_cross_entropy_with_integer_labels
NUM_INPUTS, NUM_CLASSES = 6, 3


class Network(nnx.Module):
    """A network of a user, with BatchNorm and dropout."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(NUM_INPUTS, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.classifier = nnx.Linear(8, NUM_CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.classifier(self.dropout(nnx.relu(self.norm(self.dense(x)))))


def draw(num, seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(1.0, 1.0, (num, NUM_INPUTS)).astype(np.float32)
    return jnp.asarray(inputs), jnp.asarray((inputs[:, 0] > 1).astype(np.int32))


def mlp_agent(num_inputs):
    return aj.mlp_agent((num_inputs,), hidden_sizes=(4,))


def arbiter(model, losses, agent):
    limits = {"min_batch_size": 4, "max_batch_size": 32, "initial_batch_size": 13}
    return aj.arbiter(agent, losses.response_loss, num_features=model.num_features, **limits)


@pytest.mark.slow
def test_state_goes_through_windows_and_buckets(key):
    """As in a loop without windows, buckets and Arbiter, with the same masks and keys."""
    model = models.attach(Network, "classifier", jax.ShapeDtypeStruct((1, NUM_INPUTS), jnp.float32))
    losses = models.make_losses(model, xent)
    sizes = [5, 5, 11, 11]
    schedule = lambda count: jnp.asarray([*sizes, 11])[count]
    optimizer = optax.sgd(0.1, momentum=0.9)
    tx = optax.chain(
        optimizer,
        # Computes its response in inference mode, which does not change the model.
        aj.schedulers.shadow(arbiter(model, losses, mlp_agent(NUM_INPUTS)), name="arbiter"),
        aj.schedulers.from_schedule(schedule, initial_batch_size=5),
    )
    params, model_state = jax.jit(model.init)(key)
    data = aj.Data(draw(40), draw(30, seed=1))
    start = aj.init_state(params, tx, key, model_state)
    result = aj.fit(losses.loss_fn, None, tx, data, num_examples=32, window=2, state=start)
    assert [record.bucket_size for record in result.history] == [8, 16]

    @functools.partial(jax.jit, static_argnums=4)
    def step(params, opt_state, model_state, sampler, bucket_size, size, key):
        sampler, batch, mask = sample_batch(sampler, data.train, size, bucket_size)

        def loss(params):
            values, new_state = losses.loss_fn(params, batch, model_state, mask, key)
            return jnp.mean(values, where=mask), new_state

        (_, new_state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        dense = batch[0] @ params["dense"]["kernel"] + params["dense"]["bias"][None]
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, new_state, sampler, dense, mask

    opt_state, sampler = optimizer.init(params), start.train_sampler
    mean = np.zeros(8)
    for i, size in enumerate(sizes):
        bucket_size = result.history[i // 2].bucket_size
        step_key = jax.random.fold_in(start.key, i)
        params, opt_state, model_state, sampler, dense, mask = step(
            params, opt_state, model_state, sampler, bucket_size, size, step_key
        )
        assert mask.sum() == size
        mean = 0.9 * mean + 0.1 * np.asarray(dense)[mask].mean(0)  # of the real examples only
    chex.assert_trees_all_close(result.state.params, params, atol=1e-5)
    chex.assert_trees_all_close(result.state.model_state, model_state, atol=1e-6)
    np.testing.assert_allclose(result.state.model_state["norm"]["mean"], mean, atol=1e-6)
    assert (result.per_step("shadow/arbiter") >= 4).all()


def linear_losses(per_example_loss):
    """The losses of a model with a linear head."""
    model = models.attach(
        lambda params, x: jnp.tanh(x @ params["body"]) @ params["head"],
        "head",
        jax.ShapeDtypeStruct((1, NUM_INPUTS), jnp.float32),
        init=lambda key: {
            "body": jax.random.normal(key, (NUM_INPUTS, 5)),
            "head": jnp.ones((5, NUM_CLASSES)) * jnp.arange(3.0)[None],
        },
    )
    return model, models.make_losses(model, per_example_loss)


def weighted(outputs, labels):
    """Classes have different weights."""
    weights = jnp.array([1.0, 4.0, 0.5])[labels]
    return aj.WeightedLoss(xent(outputs, labels), weights)


def auxiliary(outputs, labels):
    """A second term keeps the outputs small."""
    return xent(outputs, labels) + 0.3 * jnp.mean(jnp.square(outputs), axis=-1)


def expected_value(losses):
    """The definition, in NumPy."""
    if isinstance(losses, aj.WeightedLoss):
        values, weights = map(np.asarray, losses)
        return float((values * weights).sum() / weights.sum())
    return float(np.mean(losses))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("per_example_loss", "with_statistics"), [(weighted, True), (auxiliary, False)]
)
def test_weighted_and_auxiliary_losses(key, per_example_loss, with_statistics):
    """13 examples in a bucket of 16: value and gradient are those of the 13."""
    model, losses = linear_losses(per_example_loss)
    if with_statistics:
        noise = aj.schedulers.shadow(aj.schedulers.gradient_noise_scale(), name="noise")
        rules = [noise, aj.schedulers.constant(13)]
    else:
        rules = [arbiter(model, losses, mlp_agent(NUM_INPUTS))]
    tx = optax.chain(optax.sgd(0.5), *rules)
    data = aj.Data(draw(13), draw(30, seed=1))  # each batch is the whole data set
    params, _ = jax.jit(model.init)(key)
    state = aj.init_state(params, tx, key)
    state, info = aj.run_window(
        state, data, loss_fn=losses.loss_fn, tx=tx, bucket_size=16, window=2
    )

    @jax.jit
    @jax.value_and_grad
    def value_and_grad(params):
        loss = losses.loss_fn(params, data.train)
        if isinstance(loss, aj.WeightedLoss):
            return jnp.sum(loss.losses * loss.weights) / jnp.sum(loss.weights)
        return jnp.mean(loss)

    assert info.batch_size.tolist() == [13, 13]
    for t in range(2):
        expected = expected_value(losses.loss_fn(params, data.train))
        np.testing.assert_allclose(info.loss[t], expected, rtol=1e-5)
        _, grads = value_and_grad(params)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    chex.assert_trees_all_close(state.params, params, atol=1e-5)
    assert np.isfinite(info.metrics["shadow/noise" if with_statistics else "meta_loss"]).all()


@pytest.mark.slow
def test_a_loss_per_token_trains_with_arbiter(key):
    """Padding tokens and padding rows have no weight; the loss falls."""
    model = models.transformer(7, 8, num_layers=1, num_heads=2, width=16)
    losses = models.make_losses(model, models.token_cross_entropy)
    rng = np.random.default_rng(0)
    tokens = (rng.integers(1, 7, (40, 1)) * np.arange(9)[None] + rng.integers(0, 7, (40, 1))) % 7
    labels = np.where(np.arange(8)[None] < rng.integers(3, 9, (40, 1)), tokens[:, 1:], -1)
    examples = (jnp.asarray(tokens[:, :-1]), jnp.asarray(labels))
    agent = mlp_agent(8)
    agent = agent._replace(apply=lambda p, x, apply=agent.apply: apply(p, x / 7))
    tx = optax.chain(optax.adam(1e-2), arbiter(model, losses, agent))
    loss_fn = jax.jit(losses.loss_fn)
    params, _ = jax.jit(model.init)(key)
    first = loss_fn(params, examples)
    # Each batch holds 13 of the 40 examples: compare with those that the sampler draws.
    state = aj.init_state(params, tx, key)
    _, drawn, mask = sample_batch(state.train_sampler, examples, 13, 16)
    state, info = aj.run_window(
        state, aj.Data(examples, examples), loss_fn=losses.loss_fn, tx=tx, bucket_size=16, window=60
    )
    real = jax.tree.map(lambda x: x[np.asarray(mask)], drawn)
    expected = expected_value(loss_fn(params, real))
    np.testing.assert_allclose(info.loss[0], expected, rtol=1e-5)
    assert 0 < np.sum(first.weights) < first.weights.size
    assert np.mean(info.loss[-5:]) < 0.6 * np.mean(info.loss[:5])


@pytest.mark.slow
def test_augmentation_in_the_scan():
    """Each step shifts its images by a key of its own; a second run repeats the shifts."""
    images = np.zeros((4, 5, 5, 1), np.float32)
    images[:, 2, 2] = 1.0  # one bright pixel

    def loss_fn(params, batch):
        return jnp.sum(params[None] * batch, axis=(1, 2, 3))

    augment = lambda key, batch: datasets.pad_crop_flip(key, batch, padding=1)
    tx = optax.chain(optax.sgd(1.0), aj.schedulers.constant(4))
    run = lambda transform_batch: aj.fit(
        loss_fn,
        jnp.zeros((5, 5, 1)),
        tx,
        aj.Data(jnp.asarray(images)),
        num_examples=4 * 30,
        window=30,
        transform_batch=transform_batch,
    )
    plain, first, again = run(None), run(augment), run(augment)
    # Gradient descent adds up the images: one pixel, or the nine pixels around it.
    seen = -np.asarray(first.state.params)[..., 0]
    np.testing.assert_allclose(-np.asarray(plain.state.params)[..., 0].sum(), 30, rtol=1e-5)
    np.testing.assert_allclose(-plain.state.params[2, 2, 0], 30, rtol=1e-5)
    np.testing.assert_allclose(seen.sum(), 30, rtol=1e-5)
    assert (seen[1:4, 1:4] > 0).all()
    assert seen[[0, -1]].sum() == seen[:, [0, -1]].sum() == 0
    chex.assert_trees_all_equal(first.state.params, again.state.params)
