"""The batch size as a smooth function of one number, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arbiter_jax as aj

RANGES = [(8, 512), (1, 2), (16, 4096), (32, 65536), (128, 256), (7, 1000), (1, 3)]


@pytest.mark.parametrize("limits", RANGES)
@pytest.mark.parametrize("compiled", [False, True])
def test_round_trip_of_every_integer_in_float32(limits, compiled):
    def round_trip(size):
        logit = aj.to_logit(size, *limits)
        assert logit.dtype == jnp.float32
        return aj.to_batch_size(logit, *limits)

    sizes = np.arange(limits[0], limits[1], dtype=np.int32)
    result = (jax.jit(round_trip) if compiled else round_trip)(sizes)
    assert result.dtype == jnp.int32
    np.testing.assert_array_equal(result, sizes)


def test_round_trip_in_float64():
    with jax.enable_x64(True):
        sizes = np.arange(32, 65536)
        logits = aj.to_logit(sizes, 32, 65536)
        assert logits.dtype == jnp.float64
        np.testing.assert_array_equal(aj.to_batch_size(logits, 32, 65536), sizes)


@pytest.mark.parametrize("limits", RANGES)
def test_the_logit_is_at_the_center_of_the_interval(limits):
    # As far from both neighbours as it can be: moving by 0.4 examples changes nothing.
    low, high = limits
    with jax.enable_x64(True):
        sizes = np.arange(low, high)
        share = jax.nn.sigmoid(aj.to_logit(sizes, low, high)) * (high - low) + low
        np.testing.assert_allclose(share, sizes + 0.5, rtol=1e-9)


def test_to_logit_clips_to_the_sizes_that_have_a_logit():
    logits = aj.to_logit(jnp.array([-3, 8, 511, 512, 10_000]), 8, 512)
    assert np.isfinite(logits).all()
    assert logits[0] == logits[1]
    assert logits[2] == logits[3] == logits[4]


def test_to_batch_size_stays_in_range_whatever_comes():
    logits = jnp.array([jnp.nan, -jnp.inf, -1e30, -1e-30, 0.0, 1e30, jnp.inf])
    sizes = aj.to_batch_size(logits, 8, 512)
    assert sizes.dtype == jnp.int32
    assert sizes.tolist() == [8, 8, 8, 260, 260, 512, 512]


def test_to_batch_size_is_monotone():
    sizes = aj.to_batch_size(jnp.linspace(-30, 30, 20_001), 7, 1000)
    assert np.all(np.diff(sizes) >= 0)
    assert (sizes[0], sizes[-1]) == (7, 1000)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_shapes_are_kept(shape):
    assert aj.to_logit(jnp.full(shape, 64), 8, 512).shape == shape
    assert aj.to_batch_size(jnp.zeros(shape), 8, 512).shape == shape


@pytest.mark.parametrize("function", [aj.to_logit, aj.to_batch_size])
@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ((512, 8), "max_batch_size must be >= min_batch_size, got max_batch_size=8"),
        ((8, 8), "max_batch_size must be > min_batch_size, got 8 for both"),
        ((0, 8), "min_batch_size must be an integer >= 1, got 0"),
        ((8, 64.5), "max_batch_size must be an integer >= 1, got 64.5"),
    ],
)
def test_impossible_ranges_are_named(function, limits, message):
    with pytest.raises(ValueError, match=message):
        function(8, *limits)
