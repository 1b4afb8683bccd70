"""Batches of changing sizes from data that comes in pieces."""

import numpy as np
import pytest

from arbiter_jax import datasets


def chunks(*lengths):
    """Pieces of these lengths of the examples 0, 1, 2, ..."""
    ends = np.cumsum(lengths)
    return [{"x": np.arange(end - n, end)} for n, end in zip(lengths, ends, strict=True)]


def test_each_example_is_used_once():
    """*Guarantees*: in the order of the source, however the sizes change."""
    sizes = [3, 1, 5, 4, 2]
    wanted = iter([*sizes, 2])
    found = list(datasets.batches(chunks(4, 1, 7, 4), lambda: next(wanted)))
    real = [batch["x"][mask] for batch, mask in found]
    assert [len(x) for x in real] == sizes
    np.testing.assert_array_equal(np.concatenate(real), np.arange(15))  # of 16: 1 is left
    assert [mask.size for _, mask in found] == [4, 1, 8, 4, 2]


def test_padding_repeats_the_first_row():
    ((batch, mask),) = datasets.batches(chunks(3, 3), 5)
    np.testing.assert_array_equal(batch["x"], [0, 1, 2, 3, 4, 0, 0, 0])
    np.testing.assert_array_equal(mask, [True] * 5 + [False] * 3)


def test_goes_on_where_it_stood():
    make = lambda: datasets.batches(datasets.epochs(np.arange(10), chunk_size=4), 3)
    first = make()
    next(first), next(first)
    state, rest = first.get_state(), [next(first)[0] for _ in range(4)]
    second = make()
    second.set_state(state)
    np.testing.assert_array_equal([next(second)[0] for _ in range(4)], rest)
    assert second.num_examples == first.num_examples == 18


def test_a_source_that_cannot_say_where_it_is():
    with pytest.raises(ValueError, match="source must be an iterator with get_state"):
        datasets.batches(iter(chunks(3)), 2).get_state()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {},
            r"state must be what get_state\(\) has returned, .*'num_examples', got \{\}",
        ),
        (lambda state: None, r"state must be what get_state\(\) has returned, .* got None"),
        (lambda state: {**state, "skip": -1}, r"state\['skip'\] must be an integer >= 0, got -1"),
        (
            lambda state: {**state, "num_examples": 2.5},
            r"state\['num_examples'\] must be an integer",
        ),
    ],
)
def test_a_place_that_it_has_not_saved(change, message):
    source = datasets.batches(datasets.epochs(np.arange(10), chunk_size=4), 3)
    next(source)
    with pytest.raises(ValueError, match=message):
        source.set_state(change(source.get_state()))
    assert source.num_examples == 3


@pytest.mark.parametrize("size", [0, -1, 2.5, True, np.zeros(2, np.int32)])
def test_sizes_that_no_batch_has(size):
    with pytest.raises(ValueError, match="batch_size must be an integer"):
        next(datasets.batches(chunks(3), lambda: size))
    with pytest.raises(ValueError, match="batch_size must be an integer"):
        datasets.batches(chunks(3), size)


def test_examples_of_a_list_again_and_again():
    source = datasets.batches([np.int32(i) for i in range(3)], 2, batched=False, repeat=True)
    assert [next(source)[0].tolist() for _ in range(4)] == [[0, 1], [2, 0], [1, 2], [0, 1]]


def test_data_itself_is_no_source():
    with pytest.raises(ValueError, match=r"datasets\.epochs"):
        datasets.batches((np.ones(3), np.ones(3)), 2)


def test_a_size_that_needs_an_argument():
    with pytest.raises(ValueError, match=r"batch_size must be .* a function without arguments"):
        datasets.batches(chunks(3), lambda opt_state: 2)


def test_a_source_smaller_than_a_batch_is_told():
    with pytest.warns(UserWarning, match="the source holds 3 examples, fewer than .* batch of 4"):
        assert list(datasets.batches(chunks(3), 4)) == []
