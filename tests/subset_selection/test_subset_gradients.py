"""Gradients over a selected subset, without the gradients of the examples."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import arbiter_jax as aj
from arbiter_jax import subset_selection as ss
from arbiter_jax.base import WeightedLoss
from arbiter_jax.gradients import masked_value_and_grad, value_grad_and_stats
from tests.subset_selection.problems import (
    PROBLEMS,
    cross_entropy,
    mlp_problem,
    problem,
    subset_gradient_fn,
)


def totals_and_weights(losses):
    if isinstance(losses, WeightedLoss):
        return jnp.sum(losses.losses * losses.weights, axis=1), jnp.sum(losses.weights, axis=1)
    return losses, jnp.ones_like(losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_the_aggregator(name):
    """Guarantee: equals dynamic_batch_adaptation on per-example gradients, up to rounding."""
    loss_fn, params, batch = problem(name)
    mask = jnp.arange(16) != 5

    def one(p, example, mean_weight):
        (total,), _ = totals_and_weights(loss_fn(p, jax.tree.map(lambda x: x[None], example)))
        return total / mean_weight

    @jax.jit
    def aggregate(params, batch):
        totals, weights = (
            jnp.where(mask, x, 0) for x in totals_and_weights(loss_fn(params, batch))
        )
        mean_weight = jnp.sum(weights) / jnp.sum(mask)
        grads = jax.vmap(jax.grad(one), (None, 0, None))(params, batch, mean_weight)
        aggregator = ss.dynamic_batch_adaptation()
        updates, state = aggregator.update(grads, aggregator.init(params), mask=mask)
        return updates, state, jnp.sum(totals) / jnp.sum(weights)

    got = subset_gradient_fn(name)(params, batch, mask)
    expected, state, value = aggregate(params, batch)
    chex.assert_trees_all_close(got.grads, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(got.num_selected, state.num_selected)
    assert 1 <= int(got.num_selected.min()) < 15  # a selection, not the whole batch
    assert not got.selected[:, 5].any()
    np.testing.assert_allclose(got.value, value, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "weighted"])
def test_min_size_n_is_the_gradient_of_the_mean_loss(name):
    """Guarantee: with min_size at least n, the gradient is that of the mean loss."""
    loss_fn, params, batch = problem(name)
    mask = jnp.arange(16) < 11
    got = subset_gradient_fn(name, min_size=16)(params, batch, mask)
    expected = jax.jit(masked_value_and_grad(loss_fn))(params, batch, mask)
    chex.assert_trees_all_close(got.grads, expected.grads, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.value, expected.value, rtol=1e-6)
    assert got.selected_fraction.tolist() == [1.0] * len(got.selected)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), [("nnx", {}), ("linen", {"factorize": False})])
def test_masked_and_non_finite_examples_change_nothing(name, settings):
    """Guarantee: masked examples, and examples that are not finite, change nothing."""
    _, params, (x, labels) = problem(name)
    gradient_fn = subset_gradient_fn(name, **settings)
    mask = jnp.arange(16) < 13
    expected = gradient_fn(params, (x, labels), mask & (jnp.arange(16) != 2))
    spoiled = x.at[2, 0].set(jnp.nan).at[13:].set(jnp.inf)
    got = gradient_fn(params, (spoiled, labels), mask)
    chex.assert_trees_all_close(got.grads, expected.grads, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(got.selected, expected.selected)
    np.testing.assert_allclose(got.value, expected.value, rtol=1e-6)
    assert int(got.num_skipped) == 1
    lost = gradient_fn(params, (x * jnp.nan, labels), mask)
    assert int(lost.num_skipped) == 13
    assert jnp.isnan(lost.value)
    chex.assert_trees_all_equal(lost.grads, jax.tree.map(jnp.zeros_like, params))


@pytest.mark.slow
def test_statistics_are_those_of_the_batch():
    loss_fn, params, batch = problem("linen")
    mask = jnp.arange(16) < 13
    got = subset_gradient_fn("linen")(params, batch, mask).grad_stats
    expected = jax.jit(value_grad_and_stats(loss_fn, method="per_example"))(
        params, batch, mask
    ).grad_stats
    others = dict.fromkeys(("half_cosine", "abs_deviation", "abs_signal"), 0.0)
    chex.assert_trees_all_close(got._replace(**others), expected._replace(**others), rtol=1e-4)
    gradient_fn = jax.jit(masked_value_and_grad(loss_fn))
    halves = [gradient_fn(params, batch, mask & (jnp.arange(16) % 2 == i)).grads for i in range(2)]
    halves = [np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(half)]) for half in halves]
    cosine = halves[0] @ halves[1] / np.linalg.norm(halves[0]) / np.linalg.norm(halves[1])
    np.testing.assert_allclose(got.half_cosine, cosine, rtol=1e-3)


@pytest.mark.slow
def test_runs_vmap_over_seeds():
    _, params, batch = problem("linen")
    gradient_fn = subset_gradient_fn("linen")
    mask = jnp.ones(16, bool)
    params = jax.tree.map(lambda p: jnp.stack([s * p for s in (1.0, 2.0, 3.0)]), params)
    many = jax.jit(jax.vmap(gradient_fn, (0, None, None)))(params, batch, mask)
    for i in range(3):
        one = gradient_fn(jax.tree.map(lambda p, i=i: p[i], params), batch, mask)
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], many.grads), one.grads, rtol=1e-4, atol=1e-6
        )


# In training


@pytest.mark.slow
def test_fit_reports_the_selected_fraction():
    """With a batch-size rule; the loss falls."""
    loss_fn, params, batch = mlp_problem()
    gradient_fn = ss.subset_gradients(loss_fn, "variance", min_size=4, groups="leaf")
    result = aj.fit(
        None,
        params,
        optax.chain(optax.adam(0.01), aj.schedulers.constant(12)),
        aj.Data(batch),
        gradient_fn=gradient_fn,
        num_examples=12 * 25,
        window=20,
    )
    assert result.per_step("batch_size").tolist() == [12] * 25
    fractions = result.per_step("selected_fraction")
    assert fractions.shape == (25, 2)  # a column per layer
    assert (fractions >= np.float32(4 / 12)).all()
    assert (fractions <= 1).all()
    assert len(np.unique(fractions)) > 2
    loss = result.per_step("loss")
    assert loss[-5:].mean() < 0.7 * loss[:5].mean()


# Losses and models without per-example gradients


def test_bad_max_bytes():
    with pytest.raises(ValueError, match="max_bytes must be an integer >= 1, got 0"):
        ss.subset_gradients(lambda p, b: b, max_bytes=0)


def test_a_loss_may_have_no_signature():
    """Then a model state is found when the gradient is called."""

    class Loss:
        __signature__ = "not one"

        def __call__(self, params, batch):
            return batch * params

    with pytest.raises((TypeError, ValueError)):
        inspect.signature(Loss())
    gradient = jax.jit(ss.subset_gradients(Loss(), metric="norm"))(2.0, jnp.array([1.0, -3.0]))
    assert float(gradient.value) == -2


def test_batch_norm_is_refused():
    with pytest.raises(ValueError, match="BatchNorm"):
        ss.subset_gradients(lambda params, batch, model_state, mask, key: None)
    with pytest.raises(ValueError, match=r"model_state must be None.*BatchNorm"):
        ss.subset_gradients(lambda p, b: b)(0.0, jnp.ones(3), None, model_state={"mean": 0.0})
    with pytest.raises(ValueError, match=r"batch_stats/mean.*BatchNorm"):
        ss.dynamic_batch_adaptation().init({"params": jnp.ones(3), "batch_stats": {"mean": 0.0}})
    state = nnx.state(nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match=r"mean.*BatchNorm"):
        ss.dynamic_batch_adaptation().init(state)


def test_batch_norm_of_linen_is_refused_unless_frozen():
    class Model(linen.Module):
        frozen: bool

        @linen.compact
        def __call__(self, x):
            x = linen.Dense(5)(x)
            return linen.Dense(10)(linen.BatchNorm(use_running_average=self.frozen)(x))

    x, labels = jnp.ones((4, 3)), jnp.arange(4)
    shapes = jax.eval_shape(Model(True).init, jax.random.PRNGKey(0), x)
    variables = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def loss_fn(frozen, params, batch):
        variables_ = {"params": params, "batch_stats": variables["batch_stats"]}
        out, _ = Model(frozen).apply(variables_, batch[0], mutable=["batch_stats"])
        return cross_entropy(out, batch[1])

    def trace(frozen):
        gradient_fn = ss.subset_gradients(functools.partial(loss_fn, frozen))
        return jax.eval_shape(gradient_fn, variables["params"], (x, labels))

    chex.assert_trees_all_equal_shapes(trace(True).grads, variables["params"])
    with pytest.raises(ValueError, match="BatchNorm"):
        trace(False)


def test_a_mean_loss_is_refused():
    with pytest.raises(ValueError, match="one loss per example"):
        ss.subset_gradients(lambda p, b: jnp.mean(b * p))(1.0, jnp.ones(3))
