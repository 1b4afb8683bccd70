"""Blocks: the batches of one window in one array."""

import jax
import numpy as np
import pytest

from arbiter_jax.batching import Block, bit_reversed, block_rows, group_rows
from arbiter_jax.batching._blocks import block_batch, check_block, interleave_block, num_real_rows

ROWS = np.arange(100, 124).reshape(2, 4, 3)  # [window, bucket_size, features]


def block(batches=ROWS, batch_size=3):
    return Block(batches, np.int32(batch_size), np.int32(2))


@pytest.mark.parametrize(("batch_size", "num_steps"), [(1, 1), (3, 2), (8, 3)])
def test_block_rows_hold_every_example_once(batch_size, num_steps):
    rows = block_rows(3, batch_size, 8, num_steps)
    assert rows.shape == (3, 8)
    mask = bit_reversed(8) < batch_size
    real = np.sort(rows[:num_steps, mask], axis=1).ravel()
    np.testing.assert_array_equal(real, np.arange(num_steps * batch_size))
    first = np.arange(num_steps)[:, None] * batch_size
    assert (rows[:num_steps, ~mask] == first).all()  # padding repeats the first row of its step
    assert (rows[num_steps:] == 0).all()


@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 6, 8])
def test_block_rows_of_several_processes(batch_size, num_processes):
    """Each numbers its own examples; together they are those of one process, dealt out in turn."""
    window, num_steps, bucket_size = 3, 2, 8
    shares = []
    for rows in np.split(np.arange(bucket_size), num_processes):
        share = num_real_rows(batch_size, bucket_size, rows)
        numbers = block_rows(window, batch_size, bucket_size, num_steps, rows=rows)
        real = bit_reversed(bucket_size)[rows] < batch_size
        assert np.count_nonzero(real) == share
        found = np.sort(numbers[:num_steps, real], axis=1).ravel()
        np.testing.assert_array_equal(found, np.arange(num_steps * share))
        # The examples of a step keep their order: the rank of a row is that of its position.
        order = np.argsort(bit_reversed(bucket_size)[rows][real])
        np.testing.assert_array_equal(numbers[0, real][order], np.arange(share))
        first = np.arange(num_steps)[:, None] * share
        assert (numbers[:num_steps, ~real] == first).all()
        assert (numbers[num_steps:] == 0).all()
        shares.append(share)
    assert sum(shares) == batch_size
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [9, 16, 37])
def test_group_rows_of_several_processes(batch_size, num_processes):
    """Each numbers its own examples, in the rows that are real on all."""
    bucket_size, num_steps, n = 8, 2, -(-batch_size // 8)
    sizes = [each.size for each in np.array_split(np.arange(batch_size), n)]
    shares = []
    for rows in np.split(np.arange(bucket_size), num_processes):
        share = num_real_rows(batch_size, bucket_size, rows)
        numbers = group_rows(2 * n + 1, batch_size, bucket_size, num_steps, rows=rows)
        real = bit_reversed(bucket_size)[rows] < np.array(sizes)[:, None]
        for step in range(num_steps):
            slots = numbers[step * n : (step + 1) * n]
            expected = step * share + np.arange(share)
            np.testing.assert_array_equal(np.sort(slots[real]), expected)
            assert (slots[~real] == step * share).all()
        assert (numbers[-1] == 0).all()
        shares.append(share)
    assert sum(shares) == batch_size
    assert max(shares) - min(shares) <= n


def test_block_batch_is_one_step():
    batch, mask = block_batch(block({"x": ROWS, "y": ROWS[..., 0]}), 1, 4)
    np.testing.assert_array_equal(batch["x"], ROWS[1])
    np.testing.assert_array_equal(batch["y"], ROWS[1, :, 0])
    assert mask.tolist() == [True, True, True, False]


def test_check_block():
    assert check_block(block(), 2, 4) == 2
    assert check_block(block(), 3, 4) == 2  # fewer steps than the window may have
    for window, bucket_size in ((1, 4), (2, 8)):
        message = rf"\[{window}, {bucket_size}, \.\.\.\], got shapes \[\(2, 4, 3\)\]; request it"
        with pytest.raises(ValueError, match=message):
            check_block(block(), window, bucket_size)
    with pytest.raises(ValueError, match="must be a block of shape"):
        check_block(block((ROWS, ROWS[:1])), 2, 4)


@pytest.mark.parametrize("made_for_one", [False, True])
def test_blocks_on_a_mesh(made_for_one):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    rows = block_rows(2, 3, 4, 2)
    given = Block(rows, np.int32(3), np.int32(2))
    given = given if made_for_one else interleave_block(given)
    with jax.set_mesh(mesh):
        batch, mask = jax.jit(block_batch, static_argnums=2)(given, 1, 4)
    assert batch.sharding.spec == jax.P("data")
    assert batch.tolist() == [3, 4, 5, 3]  # each half of even and odd rows lies on both devices
    assert mask.tolist() == [True, True, True, False]
    back, mask = block_batch(given, 1, 4)  # and on one device
    np.testing.assert_array_equal(back, rows[1])
    assert mask.tolist() == (bit_reversed(4) < 3).tolist()
