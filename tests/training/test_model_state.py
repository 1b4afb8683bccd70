"""The model state of a step that went wrong: running averages never forget a NaN."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import arbiter_jax as aj
from arbiter_jax import models
from arbiter_jax.gradients import Gradient, masked_value_and_grad, value_grad_and_stats
from arbiter_jax.training._inner_step import inner_step

NUM_INPUTS = 3


class NnxNetwork(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(NUM_INPUTS, momentum=0.5, rngs=rngs)
        self.head = nnx.Linear(NUM_INPUTS, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x))


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x)
        return nn.Dense(2, name="head")(x)


def squared(outputs, labels):
    return jnp.sum((outputs - labels[:, None]) ** 2, axis=-1)


@functools.cache
def network(kind):
    module = NnxNetwork if kind == "nnx" else LinenNetwork()
    sample = jax.ShapeDtypeStruct((1, NUM_INPUTS), jnp.float32)
    model = models.attach(module, "head", sample)
    return model, models.make_losses(model, squared).loss_fn


def batch(seed, bad_row=None):
    inputs = np.random.default_rng(seed).normal(2.0, 1.0, (8, NUM_INPUTS)).astype(np.float32)
    if bad_row is not None:
        inputs[bad_row, 1] = np.inf
    return jnp.asarray(inputs), jnp.asarray(inputs[:, 0] > 2, jnp.float32)


def train(kind, tx, pieces, batches):
    model, loss_fn = network(kind)
    params, model_state = model.init(jax.random.PRNGKey(0))
    make = (
        functools.partial(value_grad_and_stats, num_pieces=2) if pieces else masked_value_and_grad
    )
    step = jax.jit(functools.partial(inner_step, gradient_fn=make(loss_fn, sampled=True), tx=tx))
    state = aj.init_state(params, tx, jax.random.PRNGKey(1), model_state)
    for rows in batches:
        state, gradient = step(state, rows, jnp.ones(8, bool))
        chex.assert_trees_all_equal(gradient.model_state, state.model_state)
    return state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "pieces"),
    [
        ("nnx", False),
        ("linen", True),
        pytest.param("nnx", True, marks=pytest.mark.exhaustive),
        pytest.param("linen", False, marks=pytest.mark.exhaustive),
    ],
)
def test_a_bad_row_leaves_batch_norm_as_it_was(kind, pieces):
    good, bad, more = batch(0), batch(1, bad_row=6), batch(2)
    tx = optax.with_extra_args_support(optax.apply_if_finite(optax.sgd(0.1), 3))
    skipped = train(kind, tx, pieces, [good, bad, more])
    expected = train(kind, tx, pieces, [good, more])
    chex.assert_trees_all_equal(skipped.model_state, expected.model_state)
    chex.assert_trees_all_equal(skipped.params, expected.params)
    assert int(skipped.num_nonfinite) == 1 == int(skipped.opt_state.total_notfinite)
    # The running mean by hand: 0, then half of the way to the mean of each batch or half.
    mean = np.zeros(NUM_INPUTS)
    for inputs, _ in (good, more):
        for part in np.split(np.asarray(inputs), 1 + pieces):
            mean = (mean + part.mean(axis=0)) / 2
    (found,) = (x for p, x in jax.tree.leaves_with_path(skipped.model_state) if "mean" in str(p))
    np.testing.assert_allclose(found, mean, rtol=1e-5)

    # Without apply_if_finite the parameters are lost, but not the statistics.
    tx = optax.with_extra_args_support(optax.sgd(0.1))
    spoiled = train(kind, tx, pieces, [good, bad])
    kept = train(kind, tx, pieces, [good])
    chex.assert_trees_all_equal(spoiled.model_state, kept.model_state)
    assert not np.isfinite(np.asarray(jax.tree.leaves(spoiled.params)[0])).all()


def one_step(gradient, model_state, tx=None):
    tx = optax.with_extra_args_support(tx or optax.apply_if_finite(optax.sgd(0.5), 3))
    state = aj.init_state(jnp.ones(()), tx, jax.random.PRNGKey(0), model_state)
    gradient_fn = lambda *args: gradient
    step = functools.partial(inner_step, gradient_fn=gradient_fn, tx=tx)
    return jax.jit(step)(state, jnp.ones(2), jnp.ones(2, bool))[0]


@pytest.mark.parametrize(
    ("value", "grad", "new", "kept"),
    [
        (1.0, 2.0, 5.0, 5.0),
        (1.0, np.nan, 5.0, 3.0),  # a skipped step with a finite loss
        (np.nan, 2.0, 5.0, 3.0),
        (1.0, 2.0, np.inf, 3.0),
    ],
)
def test_any_bad_number_keeps_the_model_state(value, grad, new, kept):
    gradient = Gradient(jnp.float32(value), jnp.float32(grad), jnp.float32(new))
    state = one_step(gradient, jnp.float32(3))
    assert float(state.model_state) == kept
    assert float(state.params) == (1.0 if np.isnan(grad) else 0.0)


def test_a_state_with_infinities_of_its_own_goes_on():
    largest = {"largest": jnp.full(2, -jnp.inf), "count": jnp.int32(0), "key": jax.random.key(0)}
    new = {"largest": jnp.array([1.0, -jnp.inf]), "count": jnp.int32(1), "key": jax.random.key(1)}
    state = one_step(Gradient(jnp.float32(1), jnp.float32(2), new), largest)
    chex.assert_trees_all_equal(state.model_state, new)
    state = one_step(Gradient(jnp.float32(jnp.nan), jnp.float32(2), new), largest)
    chex.assert_trees_all_equal(state.model_state, largest)


def test_rules_get_the_model_state_that_is_kept():
    seen = []

    def update_fn(updates, state, params=None, *, model_state, **extra_args):
        jax.debug.callback(lambda x: seen.append(float(x)), model_state)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
    one_step(Gradient(jnp.float32(1), jnp.float32(2), jnp.float32(jnp.nan)), jnp.float32(3), tx)
    jax.effects_barrier()
    assert seen == [3.0]


def test_a_window_without_model_state_has_no_check():
    tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(4))
    state = aj.init_state(jnp.zeros(()), tx, jax.random.PRNGKey(0))
    gradient_fn = masked_value_and_grad(lambda w, x: (w - x) ** 2)
    step = functools.partial(inner_step, gradient_fn=gradient_fn, tx=tx)
    program = str(jax.make_jaxpr(step)(state, jnp.ones(4), jnp.ones(4, bool)))
    assert program.count("is_finite") == 1  # of the loss, for `num_nonfinite`
