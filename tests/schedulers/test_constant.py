"""The constant size."""

import pytest

from arbiter_jax import schedulers
from tests.problems import sizes_of


def test_constant_takes_its_size_by_either_name():
    assert sizes_of(schedulers.constant(64), 3) == [64, 64, 64]
    assert sizes_of(schedulers.constant(batch_size=64), 1) == [64]
    rule = schedulers.constant(min_batch_size=8, max_batch_size=512, initial_batch_size=64)
    assert sizes_of(rule, 1) == [64]


@pytest.mark.parametrize("arguments", [{}, {"batch_size": 8, "initial_batch_size": 8}])
def test_constant_needs_one_size(arguments):
    with pytest.raises(ValueError, match="one of batch_size and initial_batch_size"):
        schedulers.constant(**arguments)


def test_constant_out_of_range_names_the_size():
    with pytest.raises(ValueError, match="batch_size must be an integer >= 8 and <= 512, got 4"):
        schedulers.constant(4, min_batch_size=8, max_batch_size=512)
