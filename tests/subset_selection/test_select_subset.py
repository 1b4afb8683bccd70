"""The selection for one layer."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbiter_jax import subset_selection as ss
from tests.subset_selection.problems import direct_order, direct_score, gaussian_rows, select_all


@pytest.mark.parametrize("min_size", [1, 4])
def test_best_of_all_prefixes_by_brute_force(min_size):
    """Guarantee: the subset has the best score of all prefixes with min_size examples or more."""
    n = 8
    for seed in range(3):
        grads = gaussian_rows(n, 5, seed)
        ranking = direct_order(grads, "distance")
        prefixes = [tuple(np.sort(ranking[:k])) for k in range(min_size, n + 1)]
        subsets = [np.flatnonzero([code >> i & 1 for i in range(n)]) for code in range(1, 2**n)]
        for metric, (selected, num_selected) in select_all(grads, min_size=min_size).items():
            scores = {tuple(rows): direct_score(grads[rows], metric) for rows in subsets}
            chosen = tuple(np.flatnonzero(selected))
            assert len(chosen) == int(num_selected) >= min_size
            assert chosen in prefixes
            assert scores[chosen] == max(scores[prefix] for prefix in prefixes)
            assert scores[chosen] <= max(scores.values())


def test_scale_does_not_matter():
    grads = gaussian_rows(8, 5)
    for scale in (1e-15, 1e15):
        chex.assert_trees_all_equal(select_all(grads * scale), select_all(grads))


def test_outliers_are_left_out():
    grads = 1 + 1e-3 * gaussian_rows(8, 5)
    grads[[2, 5]] = -30.0
    chosen = select_all(grads)
    for metric in ("signal_to_noise", "variance"):
        selected, num_selected = chosen[metric]
        assert int(num_selected) >= 2
        assert not selected[jnp.array([2, 5])].any()


@pytest.mark.parametrize(
    ("grads", "mask", "min_size"),
    [
        (gaussian_rows(8, 5), np.arange(8) < 3, 4),
        (gaussian_rows(8, 5), np.arange(8) == 6, 1),
        (np.tile(gaussian_rows(1, 5), (8, 1)), np.ones(8, bool), 1),
        (np.zeros((8, 5), np.float32), np.ones(8, bool), 1),
        (gaussian_rows(8, 5), np.zeros(8, bool), 1),
    ],
    ids=["fewer than min_size", "one example", "identical", "zero", "no example"],
)
def test_all_are_selected_if_there_is_no_choice(grads, mask, min_size):
    for selected, num_selected in select_all(grads, mask, min_size=min_size).values():
        np.testing.assert_array_equal(selected, mask)
        assert int(num_selected) == mask.sum()


def test_one_row_without_a_mask():
    selected, num_selected = jax.jit(ss.select_subset)(jnp.ones((1, 3)))
    assert selected.tolist() == [True]
    assert int(num_selected) == 1


def test_masked_and_non_finite_rows_change_nothing():
    """Guarantee: masked rows, and rows that are not finite, are never selected."""
    grads = gaussian_rows(12, 5)
    mask = np.array([1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1], bool)
    usable = mask & ~np.isin(np.arange(12), [4, 8])
    expected = select_all(grads[usable])
    for garbage in (0.0, 1e30, np.nan, np.inf):
        spoiled = grads.copy()
        spoiled[~mask] = garbage
        spoiled[4] = np.nan
        spoiled[8, 1] = -np.inf
        for metric, (selected, num_selected) in select_all(spoiled, mask).items():
            np.testing.assert_array_equal(selected[usable], expected[metric][0])
            assert not selected[~usable].any()
            assert int(num_selected) == int(expected[metric][1])


def test_selection_vmaps():
    grads = jnp.stack([gaussian_rows(8, 5, seed) for seed in range(3)])
    many = jax.vmap(select_all)(grads)
    for i in range(3):
        chex.assert_trees_all_equal(jax.tree.map(lambda x, i=i: x[i], many), select_all(grads[i]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "snr"}, "metric must be one of"),
        ({"min_size": 0}, "min_size must be an integer >= 1, got 0"),
        ({"min_size": 1.5}, "min_size must be an integer >= 1, got 1.5"),
        ({"order": "random"}, "order must be one of"),
        ({"groups": "layer"}, "groups must be one of"),
    ],
)
def test_bad_arguments_of_all_three_functions(arguments, message):
    with pytest.raises(ValueError, match=message):
        ss.dynamic_batch_adaptation(**arguments)
    with pytest.raises(ValueError, match=message):
        ss.subset_gradients(lambda p, b: b, **arguments)
    if "groups" not in arguments:
        with pytest.raises(ValueError, match=message):
            ss.select_subset(jnp.ones((3, 2)), **arguments)
