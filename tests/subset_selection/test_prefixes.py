"""Scores of the first k examples, and which parameters form a layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arbiter_jax import subset_selection
from tests.subset_selection.problems import (
    METRICS,
    ORDERS,
    direct_order,
    direct_score,
    gaussian_rows,
)


@jax.jit
def all_scores(gram):
    valid = jnp.ones(len(gram), bool)
    return {
        (m, o): subset_selection.prefix_scores(gram, valid, m, o) for m in METRICS for o in ORDERS
    }


@pytest.mark.parametrize("d", [4, 30])
def test_scores_are_the_metric_by_definition(d):
    n = 8
    grads = gaussian_rows(n, d)
    for (metric, order), scores in all_scores(jnp.array(grads @ grads.T)).items():
        ranking = direct_order(grads, order)
        np.testing.assert_array_equal(np.argsort(scores.size), ranking)
        expected = [direct_score(grads[ranking[:k]], metric) for k in range(1, n + 1)]
        np.testing.assert_allclose(scores.score[ranking], expected, rtol=2e-4, atol=1e-6)


PARAMS = {"body": [{"kernel": 0.0, "bias": 0.0}, {"kernel": 0.0}], "scale": 0.0}


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        ("module", ("body/0", "body/1", "model")),
        ("leaf", ("body/0/bias", "body/0/kernel", "body/1/kernel", "scale")),
        ("model", ("model",)),
    ],
)
def test_names_of_the_groups(groups, names):
    assert subset_selection.group_names(PARAMS, groups) == names


def test_groups_of_an_nnx_state():
    state = nnx.state(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu))
    assert subset_selection.group_names(state) == ("layers/0",)
    assert subset_selection.group_names(state, "leaf") == ("layers/0/bias", "layers/0/kernel")


def test_unknown_groups_are_an_error():
    with pytest.raises(ValueError, match="groups must be one of"):
        subset_selection.group_names(PARAMS, "layer")
