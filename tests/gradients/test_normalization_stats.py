"""Gradient statistics from the gains of normalization layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import arbiter_jax as aj
from arbiter_jax import models
from arbiter_jax.batching import batch_mask
from arbiter_jax.gradients import masked_value_and_grad, per_example_grads, value_grad_and_stats

TOKENS = jax.random.randint(jax.random.key(0), (8, 9), 0, 12)
BATCH = TOKENS[:, :-1], jnp.where(jnp.arange(8)[None] < jnp.arange(8)[:, None], TOKENS[:, 1:], -1)


def transformer():
    model = models.transformer(12, 8, num_layers=1, num_heads=2, width=8)
    params, _ = jax.jit(model.init)(jax.random.key(1))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), params)
    return models.make_losses(model, models.token_cross_entropy).loss_fn, params


def gains_of(grads):
    found = jax.tree_util.tree_leaves_with_path(grads)
    return [x for path, x in found if "scale" in jax.tree_util.keystr(path)]


@pytest.mark.slow
@pytest.mark.parametrize("num_real", [5])
def test_value_and_gradient_are_those_of_the_batch(num_real):
    loss_fn, params = transformer()
    mask = batch_mask(num_real, 8)
    plain = jax.jit(masked_value_and_grad(loss_fn))(params, BATCH, mask)
    ours = jax.jit(value_grad_and_stats(loss_fn, method="normalization"))(params, BATCH, mask)
    np.testing.assert_allclose(ours.value, plain.value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        ours.grads,
        plain.grads,
    )


@pytest.mark.slow
def test_statistics_are_those_of_the_gains():
    loss_fn, params = transformer()
    labels = jnp.where(BATCH[1] < 0, 0, BATCH[1])  # all tokens count: every example weighs the same
    batch = BATCH[0], labels
    fn = jax.jit(value_grad_and_stats(loss_fn, method="normalization"))
    found = fn(params, batch, jnp.ones(8, bool)).grad_stats
    grads = jax.jit(per_example_grads(loss_fn))(params, batch)
    each = [g.reshape(8, -1) for g in gains_of(grads)]
    assert len(each) == 3  # two in the block, and the last one
    rows = np.concatenate(each, axis=1).astype(np.float64)
    trace = rows.var(axis=0, ddof=1).sum()
    np.testing.assert_allclose(found.variance_trace, trace, rtol=1e-3)
    square = np.sum(rows.mean(axis=0) ** 2) - trace / 8
    np.testing.assert_allclose(found.mean_sq_norm, square, rtol=1e-2, atol=1e-6)
    np.testing.assert_allclose(found.batch_size, 8)


@pytest.mark.slow
def test_padding_changes_nothing():
    loss_fn, params = transformer()
    fn = jax.jit(value_grad_and_stats(loss_fn, method="normalization"))
    whole = fn(params, jax.tree.map(lambda x: x[:5], BATCH), jnp.ones(5, bool))
    padded = fn(params, BATCH, batch_mask(5, 8))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        whole.grad_stats,
        padded.grad_stats,
    )


@pytest.mark.slow
def test_gains_are_found_in_linen_and_nnx():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.RMSNorm()(nn.Dense(4)(x)))[:, 0]

    x = jax.random.normal(jax.random.key(0), (8, 3))
    linen_params = Net().init(jax.random.key(1), x)
    module = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    graphdef, nnx_params = nnx.split(module)
    losses = (
        (lambda p, x: Net().apply(p, x) ** 2, linen_params),
        (lambda p, x: (nnx.merge(graphdef, p)(x) ** 3).sum(-1), nnx_params),
    )
    for loss_fn, params in losses:
        fn = value_grad_and_stats(loss_fn, method="normalization")
        assert float(fn(params, x, jnp.ones(8, bool)).grad_stats.variance_trace) > 0


@pytest.mark.slow
def test_a_run_takes_its_noise_scale_from_the_gains():
    loss_fn, params = transformer()
    tx = optax.chain(optax.sgd(0.1), aj.schedulers.gradient_noise_scale(max_batch_size=8))
    result = aj.fit(
        None,
        params,
        tx,
        aj.Data(BATCH),
        num_examples=200,
        window=5,
        gradient_fn=value_grad_and_stats(loss_fn, method="normalization"),
    )
    assert np.all(np.isfinite(result.per_step("loss")))
    assert np.all(result.per_step("variance_trace") > 0)


def test_a_model_without_normalization_is_refused():
    fn = value_grad_and_stats(lambda w, x: (x @ w) ** 2, method="normalization")
    with pytest.raises(ValueError, match="for a model without LayerNorm or RMSNorm"):
        fn(jnp.ones(3), jnp.ones((4, 3)), jnp.ones(4, bool))


@pytest.mark.parametrize("options", [{"trainable": True}, {"has_aux": True}])
def test_what_it_cannot_do_is_refused(options):
    with pytest.raises(ValueError, match="method must be 'pieces' with"):
        value_grad_and_stats(lambda w, x: x, method="normalization", **options)
