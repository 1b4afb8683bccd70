"""An NNX module in a loop of one's own: the same steps and decisions as through `fit`."""

import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import arbiter_jax as aj
from arbiter_jax import datasets, models
from arbiter_jax.base import as_pure

BATCH_SIZE, NUM_STEPS = 8, 6


class Network(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        # `validation` has no variance: with a small epsilon only rounding would be left.
        self.norm = nnx.BatchNorm(4, momentum=0.5, epsilon=1.0, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.dense(x)))))


def squared(outputs, labels):
    return jnp.sum((outputs - labels[:, None]) ** 2, axis=-1)


def loss_fn(model, batch):
    return squared(model(batch[0]), batch[1])


def draw(num_rows, seed=0):
    inputs = np.random.default_rng(seed).normal(size=(num_rows, 3)).astype(np.float32)
    return inputs, (inputs[:, 0] - inputs[:, 1] ** 2).astype(np.float32)


def batches():
    source = datasets.epochs(draw(64), chunk_size=BATCH_SIZE)
    return list(itertools.islice(source, NUM_STEPS))


@functools.cache
def validation():
    """One example many times: then it does not matter which ones are drawn."""
    return tuple(np.repeat(x, 40, axis=0) for x in draw(1, seed=1))


@functools.cache
def attached():
    model = models.attach(Network(nnx.Rngs(0)), "head", jax.ShapeDtypeStruct((1, 3), jnp.float32))
    return model, models.make_losses(model, squared)


def chain(name):
    """A rule that measures on the gradient, on the loss or through the response; it only watches."""
    model, losses = attached()
    limits: Any = {"min_batch_size": 4, "max_batch_size": 16, "initial_batch_size": 6}
    if name == "gradient_noise_scale":
        rule = aj.schedulers.gradient_noise_scale(measure_every=1, **limits)
    elif name == "noise_floor":
        rule = aj.schedulers.noise_floor(
            losses.loss_fn, num_examples=400, measure_every=2, **limits
        )
    else:
        agent = aj.mlp_agent((3,), hidden_sizes=(4,))
        rule = aj.arbiter(agent, losses.response_loss, num_features=model.num_features, **limits)
    constant = aj.schedulers.constant(BATCH_SIZE)
    return optax.chain(optax.sgd(0.05), aj.schedulers.shadow(rule, name="rule"), constant)


def loop(tx, grad_fn, model, examples, **arguments):
    """A loop as a user of NNX writes it."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch, num_examples):
        value, grads, signals = grad_fn(
            model, optimizer.opt_state, batch, num_examples=num_examples, **arguments
        )
        optimizer.update(model, grads, **signals)
        return value

    for i, batch in enumerate(examples):
        step(model, optimizer, batch, i * BATCH_SIZE)
        yield optimizer


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "gradient_noise_scale",
        "noise_floor",
        pytest.param("arbiter", marks=pytest.mark.exhaustive),
    ],
)
def test_as_in_fit(name):
    tx, (attached_model, losses) = chain(name), attached()
    params, model_state = jax.jit(attached_model.init)(jax.random.key(0))
    with datasets.host_blocks(datasets.epochs(draw(64), chunk_size=BATCH_SIZE), window=1) as blocks:
        result = aj.fit(
            losses.loss_fn,
            params,
            tx,
            aj.Data(blocks, validation()),
            num_examples=400,  # what the rule is built for
            stop_at=NUM_STEPS * BATCH_SIZE,
            model_state=model_state,
            window=1,
        )
    model, sizes = Network(nnx.Rngs(0)), []
    grad_fn = aj.value_grad_and_signals(loss_fn, tx)
    for optimizer in loop(tx, grad_fn, model, batches(), validation=validation()):
        sizes.append(int(aj.schedulers.shadow_batch_sizes(optimizer.opt_state)["rule"]))
        assert aj.next_window(optimizer.opt_state, 1) == (BATCH_SIZE, BATCH_SIZE, 1)
        assert int(aj.get_batch_size(optimizer.opt_state)) == BATCH_SIZE
    assert sizes == result.per_step("shadow/rule").tolist()
    found = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    found = {str(p): x for p, x in jax.tree.leaves_with_path(as_pure(found))}
    for state in (result.state.params, result.state.model_state):
        for path, expected in jax.tree.leaves_with_path(state):
            np.testing.assert_allclose(found[str(path)], expected, rtol=1e-4, atol=1e-6)
    mine = jax.tree.leaves(as_pure(optimizer.opt_state))
    chex.assert_trees_all_close(mine, jax.tree.leaves(result.state.opt_state), rtol=1e-3, atol=1e-5)


CHAINS = {
    "multi_steps": lambda rule: optax.MultiSteps(optax.chain(optax.sgd(0.1), rule), 2),
    "injected": lambda rule: optax.chain(optax.inject_hyperparams(optax.sgd)(0.1), rule),
    "muon": lambda rule: optax.chain(optax.contrib.muon(0.1), rule),
    "schedule_free": lambda rule: optax.chain(optax.contrib.schedule_free_sgd(0.1), rule),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_any_chain_in_nnx_optimizer(name):
    """Equals the loop of plain functions."""
    tx = CHAINS[name](aj.schedulers.gradient_noise_scale(measure_every=1, max_batch_size=64))
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    params = {k: jnp.array(x) for k, x in as_pure(nnx.state(model)).items()}
    opt_state = tx.init(params)
    *_, optimizer = loop(tx, aj.value_grad_and_signals(loss_fn, tx), model, batches()[:3])
    plain = lambda p, batch: squared(batch[0] @ p["kernel"] + p["bias"][None], batch[1])
    grad_fn = aj.value_grad_and_signals(plain, tx)

    @jax.jit
    def step(params, opt_state, batch, num_examples):
        _, grads, signals = grad_fn(params, opt_state, batch, num_examples=num_examples)
        updates, opt_state = tx.update(grads, opt_state, params, **signals)
        return optax.apply_updates(params, updates), opt_state

    for i, batch in enumerate(batches()[:3]):
        params, opt_state = step(params, opt_state, batch, i * BATCH_SIZE)
    chex.assert_trees_all_close(dict(as_pure(nnx.state(model))), params, rtol=1e-4, atol=1e-6)
    size = int(aj.get_batch_size(optimizer.opt_state))
    assert size == int(aj.get_batch_size(opt_state)) > 8
    assert jax.tree.structure(as_pure(optimizer.opt_state)) == jax.tree.structure(
        tx.init(as_pure(nnx.state(model)))
    )


def numbers(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def variables(model):
    leaves = jax.tree.leaves_with_path(as_pure(nnx.state(model)))
    return {jax.tree_util.keystr(path): numbers(x) for path, x in leaves}


COUNT = "['dropout']['rngs']['count']"


@pytest.mark.slow
def test_in_place_once_and_not_by_a_nan():
    rule = aj.schedulers.gradient_noise_scale(measure_every=1)
    tx = optax.chain(optax.apply_if_finite(optax.sgd(0.1), 9), rule)
    model = Network(nnx.Rngs(0), rate=0.5)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grad_fn = aj.value_grad_and_signals(loss_fn, tx)
    inputs, labels = jax.tree.map(jnp.asarray, batches()[0])
    # Outside of any jit: two halves, one after the other, each with its own draw of dropout.
    value, grads, signals = grad_fn(model, optimizer.opt_state, (inputs, labels))
    assert isinstance(grads["head"]["kernel"], nnx.Param)
    assert int(variables(model)[COUNT]) == 2
    mean = np.zeros(4)
    for half in (inputs[::2], inputs[1::2]):
        mean = (mean + np.asarray(model.dense(half)).mean(axis=0)) / 2
    np.testing.assert_allclose(model.norm.mean[...], mean, rtol=1e-5)
    optimizer.update(model, grads, **signals)
    kept = variables(model)
    value, grads, signals = grad_fn(model, optimizer.opt_state, (inputs.at[3].set(np.nan), labels))
    optimizer.update(model, grads, **signals)
    assert np.isnan(value)
    chex.assert_trees_all_equal(variables(model), kept)


@pytest.mark.slow
def test_accumulated_over_micro_batches():
    rule = aj.schedulers.gradient_noise_scale(measure_every=1)
    tx = optax.chain(optax.sgd(0.1), rule)
    batch = jax.tree.map(jnp.asarray, batches()[0])
    whole, parts = Network(nnx.Rngs(0)), Network(nnx.Rngs(0))
    opt_state = nnx.Optimizer(whole, tx, wrt=nnx.Param).opt_state
    grad_fn = aj.value_grad_and_signals(loss_fn, tx, micro_batch_size=4)
    expected = nnx.jit(grad_fn)(whole, opt_state, batch)
    accumulator = aj.accumulate(loss_fn, tx)
    state = accumulator.init(parts, opt_state)
    mean = np.zeros(4)
    for first in (0, 1):  # the same quarters
        rows = jax.tree.map(lambda x, first=first: x[first::2], batch)
        state = accumulator.add(state, parts, opt_state, rows)
        assert not parts.norm.mean[...].any()
        for half in (rows[0][::2], rows[0][1::2]):
            mean = (mean + np.asarray(parts.dense(half)).mean(axis=0)) / 2
    value, grads, signals = accumulator.finish(state, parts, opt_state)
    chex.assert_trees_all_close((value, grads), expected[:2], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(parts.norm.mean[...], mean, rtol=1e-5)
    stats = signals["grad_stats"].variance_trace, expected[2]["grad_stats"].variance_trace
    np.testing.assert_allclose(*stats, rtol=1e-3)


@pytest.mark.slow
def test_inside_jax_jit_with_a_masked_batch_norm():
    """Split and merged by hand, with x64; the mask reaches BatchNorm through the loss."""

    def masked_loss(model, batch, mask):
        x = model.norm(model.dense(batch[0]), mask=mask[:, None])
        return squared(model.head(x), batch[1])

    with jax.enable_x64(True):
        tx = optax.chain(optax.sgd(0.1), aj.schedulers.gradient_noise_scale(measure_every=1))
        grad_fn = aj.value_grad_and_signals(masked_loss, tx)
        model = Network(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        graphdef, start = nnx.split((model, optimizer))
        inputs, labels = draw(4, seed=2)

        @jax.jit
        def step(state, batch, mask):
            model, optimizer = nnx.merge(graphdef, state)
            value, grads, signals = grad_fn(model, optimizer.opt_state, batch, mask=mask)
            optimizer.update(model, grads, **signals)
            return nnx.state((model, optimizer)), value

        whole = step(start, (inputs, labels), np.ones(4, bool))
        pad = lambda x: np.concatenate([x, np.full((4, *x.shape[1:]), np.nan, x.dtype)])
        padded = step(start, (pad(inputs), pad(labels)), np.arange(8) < 4)
        chex.assert_trees_all_equal_shapes_and_dtypes(whole[0], start)
        found, expected = ([numbers(x) for x in jax.tree.leaves(y)] for y in (padded, whole))
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
        dtypes = {x.dtype.name for x in jax.tree.leaves(nnx.state(model, nnx.Param))}
        assert dtypes == {"float32"}


@pytest.mark.slow
def test_traced_once_outside_of_jit():
    traces = []

    def counted_loss(model, batch):
        traces.append(1)
        return loss_fn(model, batch)

    tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(8))
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grad_fn = aj.value_grad_and_signals(counted_loss, tx)
    counts = []
    for batch in batches()[:3]:
        _, grads, signals = grad_fn(model, optimizer.opt_state, batch)
        optimizer.update(model, grads, **signals)
        counts.append(len(traces))
    assert counts[1:] == counts[:1] * 2


def test_without_signals_for_a_chain_that_takes_none():
    tx = optax.scale(-0.1)
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    _, grads, signals = aj.value_grad_and_signals(loss_fn, tx)(
        model, optimizer.opt_state, batches()[0]
    )
    assert signals == {}
    assert model.norm.mean[...].any()
    before = model.head.kernel[...]
    optimizer.update(model, grads, **signals)
    expected = before - 0.1 * grads["head"]["kernel"][...]
    np.testing.assert_allclose(model.head.kernel[...], expected, rtol=1e-6)
