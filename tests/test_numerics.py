"""Helpers for keys, trees, products and convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import arbiter_jax as aj
from arbiter_jax._numerics import extract_patches, raw_key, tree_dot, typed_key
from arbiter_jax.gradients._estimators import stats_from_gram


def test_keys_of_both_kinds(key):
    typed = jax.random.wrap_key_data(key)
    for given in (key, typed):
        np.testing.assert_array_equal(raw_key(given), key)
        assert typed_key(given) == typed
    assert typed_key(None) == jax.random.key(0)


def test_patches_times_kernel_is_a_convolution():
    """Both ways to cut them, with few and with many features."""
    draw = np.random.default_rng(0).normal
    strides, dilation = (2, 1), (1, 2)
    for num_features in (3, 16):
        x = draw(size=(2, 7, 9, num_features)).astype(np.float32)
        kernel = draw(size=(3, 2, num_features, 5)).astype(np.float32)
        patches = extract_patches(jnp.asarray(x), (3, 2), strides, dilation)
        expected = lax.conv_general_dilated(
            x,
            kernel,
            strides,
            "VALID",
            rhs_dilation=dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        assert patches.shape == (*expected.shape[:3], 6 * num_features)
        got = patches @ kernel.reshape(1, -1, 5)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_window_larger_than_its_input_has_no_patches():
    assert extract_patches(jnp.ones((2, 2, 5, 3)), (3, 3), (1, 1), (1, 1)).shape == (2, 0, 3, 27)


def all_products_are_precise(function, *arguments):
    """Whether every matrix product of a program asks for the highest precision."""
    text = jax.jit(function).lower(*arguments).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    return bool(products) and all("[HIGHEST, HIGHEST]" in line for line in products)


def test_inner_products_ask_for_full_precision():
    """By default a GPU may multiply in TF32 and a TPU in bfloat16, too coarse to subtract."""
    x = jnp.arange(3.0)
    assert not all_products_are_precise(jnp.vdot, x, x)
    assert all_products_are_precise(tree_dot, [x, x], [x, x])
    assert all_products_are_precise(tree_dot, x.astype(jnp.bfloat16), x.astype(jnp.bfloat16))
    assert all_products_are_precise(stats_from_gram, jnp.eye(3), x)
    tx = aj.sgd_hd(0.1, 0.01, multiplicative=True)
    assert all_products_are_precise(tx.update, x, tx.init(x))


@pytest.mark.parametrize("method", ["pieces", "per_example", "normalization"])
def test_gradient_statistics_ask_for_full_precision(method):
    """A loss without a matrix product: those of the program are the statistics' own."""
    loss = lambda gain, x: jnp.sum(gain[None] * x, axis=1) ** 2
    stats = lambda gain, x: aj.gradient_stats(loss, gain, x, method=method)
    assert all_products_are_precise(stats, jnp.ones(3), jnp.ones((4, 3)))
