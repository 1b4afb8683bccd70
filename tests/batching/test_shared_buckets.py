"""Batches in a bucket that is larger than a seed needs, against those in a bucket of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbiter_jax.batching import init_sampler, sample_batch
from arbiter_jax.batching._shared_buckets import halves_apart, sample_shared

DATA = jnp.arange(1, 12)
BUCKET_SIZE = 16
SAMPLER = init_sampler(jax.random.PRNGKey(3))._replace(cursor=jnp.int32(5))
shared = jax.jit(functools.partial(sample_shared, SAMPLER, DATA, bucket_size=BUCKET_SIZE))
apart = jax.jit(halves_apart)


@pytest.mark.parametrize("own", [1, 2, 8, 16])
def test_rows_are_those_of_a_bucket_of_its_own(own):
    alone = jax.jit(lambda size: sample_batch(SAMPLER, DATA, size, own))
    for size in {0, 1, own // 2 + 1, own}:
        sampler, batch, mask = shared(jnp.int32(size), jnp.int32(own))
        expected_sampler, expected, expected_mask = alone(size)
        np.testing.assert_array_equal(batch[:own], expected)
        np.testing.assert_array_equal(mask, [*expected_mask.tolist(), *[False] * (16 - own)])
        assert jax.tree.map(int, sampler[1:]) == jax.tree.map(int, expected_sampler[1:])
        # And each half holds the same examples in the same order, in its first rows.
        rows, real = apart((batch, mask), jnp.int32(own))
        for half in range(2):
            kept = slice(half * BUCKET_SIZE // 2, (half + 1) * BUCKET_SIZE // 2)
            own_half = slice(half * own // 2, (half + 1) * own // 2) if own > 1 else slice(half, 1)
            found, wanted = rows[kept][real[kept]], expected[own_half][expected_mask[own_half]]
            np.testing.assert_array_equal(found, wanted)
            assert int(real[kept][: max(own // 2, 1)].sum()) == len(wanted)


def test_a_bucket_of_one_row_has_no_halves():
    assert halves_apart(jnp.array([7]), jnp.int32(1)).tolist() == [7]
