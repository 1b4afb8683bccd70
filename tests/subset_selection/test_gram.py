"""Inner products of per-example gradients: blocks change nothing, memory and work are bounded."""

import chex
import jax
import jax.numpy as jnp
import pytest

from arbiter_jax import subset_selection as ss
from arbiter_jax.gradients import masked_value_and_grad
from tests.subset_selection.problems import mlp_problem, problem


@pytest.mark.slow
def test_layers_examples_and_blocks_agree_in_float64():
    loss_fn, params, (x, labels) = problem("plain")
    size = 8 * sum(leaf.size for leaf in jax.tree.leaves(params))
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
        batch = x.astype(jnp.float64), labels
        variants = [
            {},  # inputs and errors, and the gradients of the shared parameter
            {"factorize": False},
            {"factorize": False, "max_bytes": 5 * size},  # in blocks of two
            {"max_bytes": 1},  # one at a time
        ]

        @jax.jit
        def run(params, batch):
            return [ss.subset_gradients(loss_fn, **v)(params, batch) for v in variants]

        layers, *others = run(params, batch)
        assert layers.grads["bias"].dtype == jnp.float64
        for other in others:
            chex.assert_trees_all_close(layers, other, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_layers_form_no_per_example_gradient():
    loss_fn, params, batch = mlp_problem()
    mask = jnp.ones(64, bool)

    def compiled(gradient_fn):
        return jax.jit(gradient_fn).lower(params, batch, mask).compile()

    layers = compiled(ss.subset_gradients(loss_fn))
    plain = compiled(masked_value_and_grad(loss_fn))
    examples = compiled(ss.subset_gradients(loss_fn, factorize=False))
    temp = lambda c: c.memory_analysis().temp_size_in_bytes
    flops = lambda c: c.cost_analysis()["flops"]
    rows = 4 * 64 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert temp(layers) < rows / 5
    assert temp(examples) >= rows
    assert flops(layers) < 1.6 * flops(plain)
    assert 5 * flops(layers) < flops(examples)


@pytest.mark.slow
def test_blocks_bound_the_memory():
    loss_fn, params, batch = mlp_problem()
    rows = 4 * 64 * sum(leaf.size for leaf in jax.tree.leaves(params))
    max_bytes = rows // 8
    gradient_fn = ss.subset_gradients(loss_fn, factorize=False, max_bytes=max_bytes)
    compiled = jax.jit(gradient_fn).lower(params, batch, jnp.ones(64, bool)).compile()
    # Activations and the n x n matrices come on top.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * max_bytes + 2**19
