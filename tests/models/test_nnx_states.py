"""The losses of an attached NNX module on the states that a rule inside `nnx.Optimizer` sees."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arbiter_jax import models
from arbiter_jax.base import as_pure


class Network(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)])
        self.again = self.layers[1]
        self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(self.norm(self.layers[0](x)))
        return self.head(self.again(nnx.relu(self.layers[1](x))))


def squared(outputs, labels):
    return jnp.sum((outputs - labels[:, None]) ** 2, axis=-1)


@functools.cache
def attached():
    module = Network(nnx.Rngs(0))
    model = models.attach(module, "head", jax.ShapeDtypeStruct((1, 3), jnp.float32))
    return module, model, models.make_losses(model, squared)


def batch():
    inputs = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    return jnp.asarray(inputs), jnp.asarray(inputs[:, 0])


def forms(kind):
    """Parameters and model state of the same module, as nested dicts and in another form."""
    module, model, losses = attached()
    if kind == "module":
        other = module, None
    elif kind == "variables":
        other = nnx.split(module, nnx.Param, ...)[1:]
    else:  # what nnx.Optimizer hands on, of an optimizer of all parameters, or of one layer
        wrt = nnx.Param if kind == "arrays" else nnx.All(nnx.Param, nnx.PathContains("head"))
        other = as_pure(nnx.split(module, wrt, ...)[1:])
    return losses, model.init(jax.random.key(0)), other


@pytest.mark.parametrize("kind", ["module", "variables", "arrays", "part"])
def test_losses_take_the_states_of_nnx(kind):
    losses, (params, model_state), (other, other_state) = forms(kind)
    mask, key = jnp.arange(6) < 5, jax.random.key(3)
    expected, new = losses.loss_fn(params, batch(), model_state, mask, key)
    found, other_new = losses.loss_fn(other, batch(), other_state, mask, key)
    chex.assert_trees_all_equal(found, expected)
    assert expected.std() > 0
    for name in ("mean", "var"):
        chex.assert_trees_all_equal(other_new["norm"][name], new["norm"][name])
    if other_state is not None:  # the new state has the form of the old one
        other_state = as_pure(other_state)
        assert jax.tree.structure(other_new) == jax.tree.structure(other_state)
        streams = other_new["dropout"]["rngs"]["count"], other_state["dropout"]["rngs"]["count"]
        assert int(streams[0]) == int(streams[1])  # seeded at each call by the key
    response = jnp.linspace(-1, 1, 4)
    found = losses.response_loss(other, response, batch(), other_state)
    expected = losses.response_loss(params, response, batch(), model_state)
    chex.assert_trees_all_equal(found, expected)
    found = losses.predict(other, batch()[0], other_state)
    chex.assert_trees_all_equal(found, losses.predict(params, batch()[0], model_state))


@pytest.mark.slow
def test_gradients_come_as_the_state_of_the_parameters():
    losses, (params, model_state), (other, other_state) = forms("arrays")
    mask, key = jnp.ones(6, bool), jax.random.key(3)
    mean = lambda p, s: losses.loss_fn(p, batch(), s, mask, key)[0].mean()
    expected, found = jax.grad(mean)(params, model_state), jax.grad(mean)(other, other_state)
    assert jax.tree.structure(found) == jax.tree.structure(other)
    chex.assert_trees_all_equal(found["norm"]["scale"], expected["norm"]["scale"])
    chex.assert_trees_all_equal(found["head"]["kernel"], expected["head"]["kernel"])


def test_the_state_of_another_module_is_refused():
    losses = attached()[2]
    with pytest.raises(ValueError, match=r"must be those of the module that attach was given"):
        losses.predict(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), batch()[0])
