"""Random shifts and mirrors of images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbiter_jax import datasets

pad_crop_flip = jax.jit(datasets.pad_crop_flip, static_argnames=("padding", "flip"))


def numbered_images(n, height=6, width=5, channels=2):
    shape = (n, height, width, channels)
    return np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)


def all_outcomes(image, padding):
    """All possible results for an image, with their shift and whether they are mirrored."""
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    height, width, _ = image.shape
    for i in range(2 * padding + 1):
        for j in range(2 * padding + 1):
            crop = padded[i : i + height, j : j + width]
            yield (i, j, False), crop
            yield (i, j, True), crop[:, ::-1]


def outcome(result, image, padding):
    (found,) = [k for k, v in all_outcomes(image, padding) if np.array_equal(v, result)]
    return found


class TestPadCropFlip:
    def test_shifts_and_mirrors_are_uniform(self, key):
        """Every result is one of the 18 possible ones, which are about equally frequent."""
        images = numbered_images(400)
        results = np.asarray(pad_crop_flip(key, images, padding=1))
        outcomes = [outcome(r, x, 1) for r, x in zip(results, images, strict=True)]
        counts = {k: outcomes.count(k) for k in set(outcomes)}
        assert len(counts) == 9 * 2
        assert max(counts.values()) < 3 * 400 / 18
        assert sum(mirrored for *_, mirrored in outcomes) == pytest.approx(200, abs=40)

    def test_padding_rows_change_nothing(self, key):
        """The result for an image depends only on the key and its index."""
        images = numbered_images(16)
        expected = pad_crop_flip(key, images[:5])
        np.testing.assert_array_equal(np.asarray(pad_crop_flip(key, images))[:5], expected)
        images[5:] = np.nan
        np.testing.assert_array_equal(np.asarray(pad_crop_flip(key, images))[:5], expected)

    def test_the_key_determines_the_result(self, key):
        images = numbered_images(16)
        first = pad_crop_flip(key, images)
        assert not np.array_equal(first, pad_crop_flip(jax.random.fold_in(key, 1), images))
        np.testing.assert_array_equal(first, pad_crop_flip(key, images))

    def test_no_padding_and_no_flip_is_the_identity(self, key):
        images = numbered_images(4)
        results = pad_crop_flip(key, images, padding=0, flip=False)
        np.testing.assert_array_equal(results, images)

    def test_typed_keys(self):
        images = numbered_images(16)
        results = pad_crop_flip(jax.random.key(0), images)
        expected = pad_crop_flip(jax.random.PRNGKey(0), images)
        np.testing.assert_array_equal(results, expected)

    @pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bfloat16, jnp.float32])
    def test_dtype_is_kept(self, key, dtype):
        images = jax.ShapeDtypeStruct((2, 4, 4, 1), dtype)
        assert jax.eval_shape(datasets.pad_crop_flip, key, images) == images

    def test_inside_a_scan_and_under_vmap(self, key):
        images = numbered_images(16)
        keys = np.stack([np.asarray(jax.random.fold_in(key, i)) for i in range(3)])

        def step(carry, key):
            return carry, datasets.pad_crop_flip(key, carry)

        _, scanned = jax.jit(lambda: jax.lax.scan(step, images, keys))()
        mapped = jax.jit(jax.vmap(datasets.pad_crop_flip, in_axes=(0, None)))(keys, images)
        direct = np.stack([pad_crop_flip(key, images) for key in keys])
        np.testing.assert_array_equal(scanned, direct)
        np.testing.assert_array_equal(mapped, direct)

    def test_the_same_in_64_bits(self, key):
        images = numbered_images(16)
        expected = pad_crop_flip(key, images)
        with jax.enable_x64(True):
            results = pad_crop_flip(key, np.asarray(images, np.float64))
        assert results.dtype == np.float64
        np.testing.assert_array_equal(results, expected)

    def test_bad_arguments_are_refused(self, key):
        with pytest.raises(ValueError, match=r"shape \[n, height, width, channels\], got \(8, 8\)"):
            pad_crop_flip(key, jnp.ones((8, 8)))
        with pytest.raises(ValueError, match="padding must be an integer >= 0"):
            pad_crop_flip(key, jnp.ones((1, 8, 8, 1)), padding=-1)
        with pytest.raises(ValueError, match=r"images must have the shape .*, got NoneType"):
            pad_crop_flip(key, None)
        for bad in (None, 3, jax.random.split(key, 2)):
            with pytest.raises(ValueError, match="key must be one PRNG key"):
                pad_crop_flip(bad, jnp.ones((1, 8, 8, 1)))
