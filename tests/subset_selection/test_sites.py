"""Where each parameter enters a function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from arbiter_jax import _parameter_sites, models
from arbiter_jax.subset_selection import _sites
from tests.subset_selection.problems import cross_entropy


def find(fn, leaves, *args):
    return _parameter_sites.find_sites(jax.make_jaxpr(fn)(leaves, *args), len(leaves))


@pytest.mark.parametrize("build", [models.mlp, models.lenet], ids=["mlp", "lenet"])
def test_the_models_of_the_library_are_layers(build):
    """No parameter falls back to per-example gradients, although the head runs twice."""
    model = build((16, 16, 1))
    loss_fn = models.make_losses(model, cross_entropy).loss_fn
    params, _ = jax.eval_shape(model.init, jax.random.PRNGKey(0))
    batch = jax.ShapeDtypeStruct((1, 16, 16, 1), float), jax.ShapeDtypeStruct((1,), int)
    leaves, treedef = jax.tree.flatten(params)
    sites = find(lambda leaves, *b: loss_fn(jax.tree.unflatten(treedef, leaves), b), leaves, *batch)
    assert len(sites.by_leaf) == len(leaves)
    for leaf, site in sites.by_leaf.items():
        assert (_sites.as_matrix(site) is not None) == (leaves[leaf].ndim > 1)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda w, x: w[0] @ x + w[0].sum(), "used twice"),
        (lambda w, x: w[0] @ x + w[0].T @ x, "used twice, once through a view"),
        (lambda w, x: (w[0] @ x, w[0]), "an output"),
        (lambda w, x: lax.sort((w[0], x[:, :2]), num_keys=1)[0], "two results"),
        (lambda w, x: x, "unused"),
        (lambda w, x: x[w[0].argmax()], "used as an integer"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_leaves_without_a_site(fn, reason):
    sites = find(fn, [jnp.ones((2, 2))], jnp.ones((2, 3)))
    assert sites.by_leaf == {}, reason


def test_leaves_that_meet_have_no_site():
    sites = find(lambda w, x: (w[0] * w[1]) @ x + w[2], [jnp.ones((2, 2))] * 3, jnp.ones((2, 2)))
    assert list(sites.by_leaf) == [2]


def test_probes_add_to_the_results_of_the_sites():
    def fn(leaves, x):
        return jax.jit(lambda w, x: jnp.tanh(x @ w.T))(leaves[0], x)

    w, x = jnp.ones((3, 2)), jnp.array([[0.1, 0.2]])
    sites = find(fn, [w], x)
    site = sites.by_leaf[0]
    assert (site.op.name, site.output.shape, site.operand.shape) == ("dot_general", (1, 3), (2, 3))
    probe = jnp.array([[0.0, 1.0, 2.0]])
    (out,), seen = _sites.evaluate(sites, [w, x], {0: probe})
    np.testing.assert_allclose(out, np.tanh(0.3 + np.asarray(probe)), rtol=1e-6)
    np.testing.assert_array_equal(seen[0][0], x)
    np.testing.assert_allclose(site.apply(w, seen[0]), [[0.3, 0.3, 0.3]], rtol=1e-6)
    np.testing.assert_array_equal(site.view(w), w.T)


def conv(w, x, by=lax.conv_general_dilated, **settings):
    return by(x, w, (1, 1), "VALID", **settings)


IMAGES, KERNEL = jnp.ones((2, 4, 5, 5)), jnp.ones((6, 4, 3, 3))


@pytest.mark.parametrize(
    ("fn", "shape", "x", "is_matrix"),
    [
        (lambda w, x: w @ x, (3, 2), jnp.ones((2, 5)), True),
        (lambda w, x: x @ w.astype(jnp.float16), (3, 2), jnp.ones((5, 3), jnp.float16), True),
        (lambda w, x: w.reshape(3, 2) @ x, (6,), jnp.ones((2, 5)), True),
        (lambda w, x: (2 * w) @ x, (3, 2), jnp.ones((2, 5)), False),  # changes inner products
        (lambda w, x: jnp.broadcast_to(w, (4, 2)) @ x, (2,), jnp.ones((2, 5)), False),
        (lambda w, x: jnp.einsum("bij,bjk->bik", w, x), (3, 2, 2), jnp.ones((3, 2, 5)), False),
        (lambda w, x: w + x, (3,), jnp.ones((3,)), False),
        (lambda w, x: w.astype(int) @ x, (3, 2), jnp.ones((2, 5)), False),  # gradient zero
        (
            lambda w, x: lax.scan(lambda c, _: (w @ c, None), x, None, 2)[0],
            (2, 2),
            jnp.ones(2),
            False,
        ),
        (lambda w, x: conv(w, x), (6, 4, 3, 3), IMAGES, True),
        (lambda w, x: conv(w, x, feature_group_count=2), (6, 2, 3, 3), IMAGES, False),
        (lambda w, x: conv(w, x, by=models.conv_general_dilated), (6, 4, 3, 3), IMAGES, True),
        (lambda w, x: conv(x, w, by=models.conv_general_dilated), IMAGES.shape, KERNEL, False),
        (lambda w, x: conv(x, w), IMAGES.shape, KERNEL, False),  # w is the image
    ],
)
def test_which_sites_are_matrix_products(fn, shape, x, is_matrix):
    sites = find(lambda leaves, x: fn(leaves[0], x), [jnp.ones(shape)], x)
    assert (_sites.as_matrix(sites.by_leaf[0]) is not None) == is_matrix
