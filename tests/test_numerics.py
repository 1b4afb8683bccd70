"""Helpers for keys, trees and convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from arbiter_jax._numerics import extract_patches, raw_key, typed_key


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
