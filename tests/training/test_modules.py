"""NNX modules as the pure functions of the engine."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from arbiter_jax._numerics import all_finite, tree_where
from arbiter_jax.base import WeightedLoss, as_pure
from arbiter_jax.training._modules import unpacked
from arbiter_jax.training._own_loop import value_grad_and_signals

TX = optax.sgd(0.1)


class Network(nnx.Module):
    """With everything that a module may hold: statistics, streams, shared layers, a count."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs)])
        self.again = self.layers[0]
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.num_calls = nnx.Variable(0)

    def __call__(self, x):
        self.num_calls[...] += 1
        self.seen = nnx.Intermediate(x)
        return self.again(self.dropout(self.norm(self.layers[0](x))))


def loss(model, batch):
    return jnp.sum((model(batch[0]) - batch[1][:, None]) ** 2, axis=1)


def example(rows=4):
    inputs = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
    return jnp.asarray(inputs), jnp.asarray(inputs[:, 0])


def step(loss_fn, model, batch, **options):
    """Value and gradient through the pure functions, and the new state in the module."""
    pure = unpacked(loss_fn, TX, model, (), **options)

    def mean(params):
        losses, model_state, *aux = pure.loss_fn(params, batch, pure.model_state, None, None)
        return jnp.mean(losses), (model_state, *aux)

    (value, (model_state, *aux)), grads = jax.value_and_grad(mean, has_aux=True)(pure.params)
    pure.write(model_state)
    return value, pure.as_grads(grads), *aux


def numbers(state):
    """All variables but the one that a call adds, with the numbers of typed keys."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    leaves = {
        str(p): x for p, x in jax.tree.leaves_with_path(as_pure(state)) if "seen" not in str(p)
    }
    return {p: jax.random.key_data(x) if is_key(x) else x for p, x in leaves.items()}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_equals_value_and_grad_of_nnx(mode):
    mine, theirs = Network(nnx.Rngs(0)), Network(nnx.Rngs(0))
    for model in (mine, theirs):
        getattr(model, mode)()
    value, grads = nnx.jit(step, static_argnums=0)(loss, mine, example())
    mean = lambda model, batch: jnp.mean(loss(model, batch))
    expected = nnx.jit(nnx.value_and_grad(mean))(theirs, example())
    chex.assert_trees_all_close((value, grads), expected, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(grads) == jax.tree.structure(expected[1])
    chex.assert_trees_all_close(*(numbers(nnx.state(m)) for m in (mine, theirs)), rtol=1e-5)
    assert int(mine.num_calls[...]) == 1
    assert mine.again is mine.layers[0]
    (drawn,) = jax.tree.leaves(nnx.state(mine, nnx.RngCount))
    assert int(drawn) == (mode == "train")
    assert float(mine.norm.mean[...][0]) != 0 or mode == "eval"


def test_the_module_changes_only_when_written():
    model = Network(nnx.Rngs(0))
    before = jax.tree.map(jnp.array, as_pure(nnx.state(model)))
    pure = unpacked(loss, TX, model, ())
    _, after = pure.loss_fn(pure.params, example(), pure.model_state, None, None)
    chex.assert_trees_all_equal(as_pure(nnx.state(model)), before)
    assert int(after["num_calls"]) == 1


def test_the_state_goes_through_where_cond_and_scan():
    """Typed keys and Python numbers included: they keep their types."""
    pure = unpacked(loss, TX, Network(nnx.Rngs(0)), ())
    call = lambda state: pure.loss_fn(pure.params, example(), state, None, None)[1]
    unless = lambda flag, state: jax.lax.cond(flag, call, lambda state: state, state)

    def twice(state, flag):
        new = tree_where(all_finite(state), unless(flag, state), state)
        return new, None

    flags = jnp.array([True, False, True])
    state, _ = jax.jit(lambda s: jax.lax.scan(twice, s, flags))(pure.model_state)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, pure.model_state)
    assert int(state["num_calls"]) == int(state["dropout"]["rngs"]["count"]) == 2
    expected = call(call(pure.model_state))
    chex.assert_trees_all_close(numbers(state), numbers(expected), rtol=1e-5)


def test_mask_and_key_reach_a_loss_that_names_them():
    seen = {}

    def named(model, batch, *, key, mask):
        seen.update(key=key, mask=mask)
        return WeightedLoss(loss(model, batch), mask.astype(jnp.float32)), {"rows": mask.sum()}

    model = Network(nnx.Rngs(0))
    pure = unpacked(named, TX, model, (), has_aux=True)
    mask, key = jnp.arange(4) < 3, jax.random.key(1)
    losses, _, aux = pure.loss_fn(pure.params, example(), pure.model_state, mask, key)
    assert seen["mask"] is mask
    assert seen["key"] is key
    assert isinstance(losses, WeightedLoss)
    assert int(aux["rows"]) == 3
    pure.loss_fn(pure.params, example(), pure.model_state, None, None)
    assert seen["mask"].tolist() == [True] * 4


def test_a_filter_says_what_is_trained():
    model = Network(nnx.Rngs(0))
    pure = unpacked(loss, TX, model, (), wrt=nnx.All(nnx.Param, nnx.PathContains("norm")))
    assert list(pure.params) == ["norm"]
    assert "again" in pure.model_state  # the other name of the shared layer
    with pytest.raises(ValueError, match=r"wrt must select .* got .*LoRAParam.* none of Network"):
        unpacked(loss, TX, model, (), wrt=nnx.LoRAParam)


@pytest.mark.parametrize(
    ("loss_fn", "has_aux", "message"),
    [
        (lambda model: 0.0, False, r"must take \(model, batch\).*got one that takes \(model\)"),
        (lambda m, b, s, mask, key: 0.0, False, r"got one that takes \(m, b, s, mask, key\)"),
        (lambda m, b: (b[1], 1), False, r"losses, float\[M\], got a tuple of 2: pass has_aux"),
        (lambda m, b: b[1], True, r"must return \(losses, aux\), got an array"),
    ],
)
def test_a_loss_of_another_form_is_refused(loss_fn, has_aux, message):
    with pytest.raises(ValueError, match=message):
        step(loss_fn, nnx.Linear(3, 1, rngs=nnx.Rngs(0)), example(), has_aux=has_aux)


def test_a_variable_must_be_an_array_or_a_number():
    class Named(Network):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.note = nnx.Variable("a name")

    model = Named(nnx.Rngs(0))
    with pytest.raises(ValueError, match="must be arrays or numbers, got 'a name'"):
        unpacked(loss, TX, model, ())


def test_two_splits_of_a_module_are_traced_once():
    model = Network(nnx.Rngs(0))
    losses = [unpacked(loss, TX, model, ()).loss_fn for _ in range(2)]
    assert losses[0] == losses[1]
    assert hash(losses[0]) == hash(losses[1])
    model.eval()
    assert unpacked(loss, TX, model, ()).loss_fn != losses[0]


def test_a_module_holds_its_own_state_and_key():
    model = Network(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"model_state must be None .*, got a dict"):
        unpacked(loss, TX, model, (), {})
    with pytest.raises(ValueError, match=r"key must be None .* no parameter `key`"):
        unpacked(loss, TX, model, (), key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"wrt must be None unless params is an NNX module"):
        unpacked(loss, TX, {"w": jnp.ones(())}, (), wrt=nnx.Param)


class Stacked(nnx.Module):
    """Two layers that nnx.scan goes through."""

    def __init__(self, rngs):
        make = nnx.vmap(lambda rngs: nnx.BatchNorm(3, momentum=0.5, rngs=rngs))
        self.layers = nnx.split_rngs(splits=2)(make)(rngs)

    def __call__(self, x):
        through = nnx.scan(lambda norm, x: norm(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return through(self.layers, x)


def test_the_mask_reaches_stacked_layers():
    inputs, labels = example(4)
    padded = np.concatenate([inputs, np.full((1, 3), 9.0)]), np.append(labels, 0.0)
    found, expected = [], []
    for batch, mask, out in ((padded, np.arange(5) < 4, found), ((inputs, labels), None, expected)):
        model = Stacked(nnx.Rngs(0))
        grad_fn = value_grad_and_signals(loss, TX)
        value, grads, _ = grad_fn(model, TX.init(nnx.state(model, nnx.Param)), batch, mask=mask)
        out += [value, *jax.tree.leaves((grads, nnx.state(model, nnx.BatchStat)))]
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
