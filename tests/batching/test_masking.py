"""Masks and masked reductions: padding never has an effect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arbiter_jax as aj
from arbiter_jax.batching import batch_mask, masked_mean
from arbiter_jax.batching._masking import num_rows, replace_padding, total_weight

NAN, INF = np.nan, np.inf

masked_value_and_grad = jax.jit(jax.value_and_grad(masked_mean))
jitted_total_weight = jax.jit(total_weight)


class TestNumRows:
    def test_counts_the_leading_axis(self):
        assert num_rows({"x": np.zeros((3, 2)), "y": (jnp.zeros(3),)}) == 3

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (np.zeros((0, 3)), r"data must hold at least 1 example, got shapes data: \(0, 3\)"),
            ((np.zeros(3), np.zeros(4)), r"one leading axis of equal length, got shapes"),
            (np.zeros(()), r"one leading axis of equal length, got shapes"),
            ((), r"one leading axis of equal length, got shapes"),
        ],
    )
    def test_empty_and_ragged_data_is_refused(self, data, message):
        with pytest.raises(ValueError, match=message):
            num_rows(data)

    def test_the_error_names_the_data(self):
        with pytest.raises(ValueError, match="validation must hold at least 1 example"):
            num_rows(np.zeros(0), name="validation")


@pytest.mark.parametrize(
    ("batch_size", "expected"), [(-1, "0000"), (0, "0000"), (2, "1100"), (4, "1111"), (9, "1111")]
)
def test_batch_mask(batch_size, expected):
    assert batch_mask(batch_size, 4).tolist() == [digit == "1" for digit in expected]


class TestReplacePadding:
    def test_padding_becomes_the_first_row(self):
        batch = {
            "x": np.array([[1.0, 2.0], [3.0, 4.0], [NAN, INF], [9.0, 9.0]]),
            "y": np.array([5, 6, -1, 1 << 30]),
        }
        clean = replace_padding(batch, np.array([True, True, False, False]))
        assert clean["x"].tolist() == [[1, 2], [3, 4], [1, 2], [1, 2]]
        assert clean["y"].tolist() == [5, 6, 5, 5]

    def test_the_first_row_may_be_padding(self):
        clean = replace_padding(np.array([NAN, 2.0, INF, 4.0]), np.array([0, 1, 0, 1], bool))
        assert clean.tolist() == [2, 2, 2, 4]

    @pytest.mark.parametrize(("real", "expected"), [(True, [1, 2, 3]), (False, [1, 1, 1])])
    def test_all_or_no_rows_are_real(self, real, expected):
        assert replace_padding(np.array([1, 2, 3]), np.full(3, real)).tolist() == expected


# losses, weights (or None), mask, expected mean, expected gradient
MEANS = {
    "all real": ([1, 2, 6], None, [1, 1, 1], 3, [1 / 3, 1 / 3, 1 / 3]),
    "padding is ignored": ([1, 2, 9], None, [1, 1, 0], 1.5, [0.5, 0.5, 0]),
    "padding is nan": ([1, 2, NAN], None, [1, 1, 0], 1.5, [0.5, 0.5, 0]),
    "padding is infinite": ([1, -INF, INF], None, [1, 0, 0], 1, [1, 0, 0]),
    "padding is huge": ([1, 2, 3e38], None, [1, 1, 0], 1.5, [0.5, 0.5, 0]),
    "nothing is real": ([NAN, 1, 2], None, [0, 0, 0], 0, [0, 0, 0]),
    "a real loss is nan": ([NAN, 1, 2], None, [1, 1, 0], NAN, [0.5, 0.5, 0]),
    "a real loss is infinite": ([INF, 1, 2], None, [1, 1, 0], INF, [0.5, 0.5, 0]),
    "weighted": ([1, 3, 9], [3, 1, 7], [1, 1, 0], 1.5, [0.75, 0.25, 0]),
    "a weight is zero": ([1, NAN, 3], [1, 0, 1], [1, 1, 1], 2, [0.5, 0, 0.5]),
    "a padded weight is nan": ([1, 3, 9], [1, 1, NAN], [1, 1, 0], 2, [0.5, 0.5, 0]),
    "all weights are zero": ([1, NAN, INF], [0, 0, 0], [1, 1, 1], 0, [0, 0, 0]),
}


class TestMaskedMean:
    @pytest.mark.parametrize("case", MEANS)
    def test_edge_cases(self, case):
        losses, weights, mask, expected, expected_grads = MEANS[case]
        losses, mask = np.array(losses, np.float32), np.array(mask, bool)
        if weights is None:
            value, grads = masked_value_and_grad(losses, mask)
            total = np.sum(mask)
        else:
            weights = np.array(weights, np.float32)
            value, (grads, _) = masked_value_and_grad(aj.WeightedLoss(losses, weights), mask)
            losses, total = aj.WeightedLoss(losses, weights), np.sum(weights[mask])
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(grads, expected_grads, rtol=1e-6)
        assert float(jitted_total_weight(losses, mask)) == total

    def test_weighted_tokens(self):
        """Neither padded rows nor padded tokens of real rows have an effect."""
        rng = np.random.default_rng(0)
        losses, weights = rng.normal(size=(4, 5)), rng.uniform(size=(4, 5))
        weights[0, 3:] = 0
        weights[1, 1:] = 0
        expected = np.sum(losses[:3] * weights[:3]) / np.sum(weights[:3])
        losses[3] = NAN  # a padded row
        losses[0, 3:] = INF  # padded tokens of a real row
        weighted = aj.WeightedLoss(jnp.asarray(losses), jnp.asarray(weights))
        mask = batch_mask(3, 4)
        np.testing.assert_allclose(masked_mean(weighted, mask), expected, rtol=1e-6)
        np.testing.assert_allclose(total_weight(weighted, mask), np.sum(weights[:3]), rtol=1e-6)

    def test_several_axes(self):
        losses = np.arange(12.0).reshape(3, 2, 2)
        assert float(jax.jit(masked_mean)(losses, batch_mask(2, 3))) == np.arange(8).mean()

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_half_precision_is_summed_in_float32(self, dtype):
        losses, mask = np.full(1001, 100, dtype), np.ones(1001, bool)
        mean, total = masked_mean(losses, mask), total_weight(losses, mask)
        assert (float(mean), float(total)) == (100.0, 1001.0)
        assert mean.dtype == total.dtype == jnp.float32

    @pytest.mark.parametrize("shape", [(), (3,)])
    def test_a_mean_instead_of_losses_is_refused(self, shape):
        message = r"one loss per example, shape \(4,\) or \(4, ...\), got .*not their mean"
        with pytest.raises(ValueError, match=message):
            masked_mean(jnp.zeros(shape), jnp.ones(4, bool))
