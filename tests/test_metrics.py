"""Loss and accuracy of a split, and intervals over seeds."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import arbiter_jax as aj
from arbiter_jax import metrics

PARAMS = np.float32(2.0)
INPUTS = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
LABELS = np.arange(7, dtype=np.int32) % 4


def predict(params, inputs):
    return params * inputs


def squares(outputs, labels):
    return jnp.sum(outputs**2, axis=-1) + labels


class TestEvaluate:
    @pytest.mark.parametrize("chunk_size", [1, 3, 7, 1000])
    def test_means_do_not_depend_on_the_chunks(self, chunk_size):
        """7 examples, so that chunks of 3 leave one with padding."""
        data = (INPUTS, LABELS)
        result = metrics.evaluate(predict, squares, PARAMS, data, chunk_size=chunk_size)
        outputs = 2 * INPUTS
        assert result.loss == pytest.approx(np.mean(np.sum(outputs**2, -1) + LABELS), rel=1e-6)
        assert result.accuracy == pytest.approx(np.mean(outputs.argmax(-1) == LABELS), rel=1e-6)
        assert type(result.loss) is type(result.accuracy) is float

    def test_weighted_losses(self):
        weights = np.float32([1, 0, 2, 0, 1, 0, 3])

        def weighted(outputs, labels):
            return aj.WeightedLoss(squares(outputs[:, :4], labels), outputs[:, 4] / 2)

        inputs = np.concatenate([INPUTS, weights[:, None]], axis=1)
        loss, _ = metrics.evaluate(predict, weighted, PARAMS, (inputs, LABELS), chunk_size=3)
        expected = np.average(np.sum((2 * INPUTS) ** 2, -1) + LABELS, weights=weights)
        assert loss == pytest.approx(expected, rel=1e-6)

    def test_accuracy_over_all_tokens_of_sequences(self):
        inputs = np.random.default_rng(1).normal(size=(5, 3, 4)).astype(np.float32)
        labels = np.arange(15, dtype=np.int32).reshape(5, 3) % 4
        data = (inputs, labels)
        _, accuracy = metrics.evaluate(predict, squares, PARAMS, data, chunk_size=2)
        assert accuracy == pytest.approx(np.mean(inputs.argmax(-1) == labels), rel=1e-6)

    @pytest.mark.parametrize("chunk_size", [2, 100])
    def test_accuracy_leaves_out_padding_tokens(self, chunk_size):
        """Every real token is right; tokens with the label -1 are padding, of weight 0."""
        labels = np.arange(15, dtype=np.int32).reshape(5, 3) % 4
        inputs = np.eye(4, dtype=np.float32)[labels]
        labels[:, 2] = labels[4, 1] = -1

        def tokens(outputs, labels):
            return aj.WeightedLoss(labels.astype(jnp.float32), labels >= 0)

        result = metrics.evaluate(predict, tokens, PARAMS, (inputs, labels), chunk_size=chunk_size)
        assert result.accuracy == 1.0
        assert result.loss == pytest.approx(np.mean(labels[labels >= 0]), rel=1e-6)

    @pytest.mark.parametrize("labels", [LABELS, np.stack([LABELS, LABELS], axis=1)])
    def test_accuracy_takes_the_weights_of_examples(self, labels):
        of_class = np.float32([1, 0, 2, 3])
        inputs = np.random.default_rng(2).normal(size=(*labels.shape, 4)).astype(np.float32)

        def weighted(outputs, labels):
            of_example = jnp.asarray(of_class)[labels.reshape(len(labels), -1)[:, 0]]
            return aj.WeightedLoss(jnp.ones(len(labels)), of_example)

        result = metrics.evaluate(predict, weighted, PARAMS, (inputs, labels), chunk_size=3)
        hits = (inputs.argmax(-1) == labels).reshape(7, -1).mean(1)
        assert result.accuracy == pytest.approx(
            np.average(hits, weights=of_class[LABELS]), rel=1e-6
        )

    def test_inputs_labels_and_outputs_may_be_pytrees(self):
        inputs = {"image": INPUTS, "scale": LABELS.astype(np.float32)}
        labels = {"class": LABELS, "target": INPUTS[:, 0]}

        def predict(params, inputs):
            return {"logits": params * inputs["image"], "value": inputs["scale"]}

        def loss(outputs, labels):
            return (outputs["value"] - labels["target"]) ** 2 + outputs["logits"][:, 0]

        result = metrics.evaluate(predict, loss, PARAMS, [inputs, labels], chunk_size=3)
        expected = np.mean((LABELS - INPUTS[:, 0]) ** 2 + 2 * INPUTS[:, 0])
        assert result.loss == pytest.approx(expected, rel=1e-6)
        assert math.isnan(result.accuracy)

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_sums_of_half_precision_do_not_saturate(self, dtype):
        data = (np.ones((70_000, 2), dtype), np.zeros(70_000, np.int32))
        loss = lambda outputs, labels: jnp.sum(outputs, -1)
        result = metrics.evaluate(lambda params, x: x, loss, PARAMS, data, chunk_size=40_000)
        assert result == (2.0, 1.0)

    @pytest.mark.slow
    def test_more_examples_than_float32_counts(self):
        """2^24 + 3 of them, of which the last one is wrong."""
        n = 2**24 + 3
        labels = np.zeros(n, np.int8)
        labels[-1] = 1
        predict = lambda params, x: jnp.stack([x == 0, x == 2], axis=-1).astype(jnp.float32)
        loss = lambda outputs, labels: labels.astype(jnp.float32)
        result = metrics.evaluate(predict, loss, PARAMS, (labels, labels), chunk_size=2**20)
        assert result == (1 / n, 1 - 1 / n)

    def test_what_is_not_finite_is_reported(self):
        bad = INPUTS.copy()
        bad[5, 2] = np.nan
        result = metrics.evaluate(predict, squares, PARAMS, (bad, LABELS), chunk_size=3)
        assert math.isnan(result.loss)
        nothing = lambda outputs, labels: aj.WeightedLoss(jnp.ones(7), jnp.zeros(7))
        result = metrics.evaluate(predict, nothing, PARAMS, (INPUTS, LABELS))
        assert math.isnan(result.loss)
        assert math.isnan(result.accuracy)

    def test_outputs_that_are_not_numbers_are_wrong(self):
        """argmax finds the nan: at the label in row 2, and at label 0 in a row of them."""
        outputs = np.eye(4, dtype=np.float32)[LABELS]
        outputs[2, LABELS[2]] = outputs[4] = np.nan
        assert LABELS[4] == 0
        result = metrics.evaluate(predict, squares, PARAMS, (outputs, LABELS), chunk_size=3)
        assert result.accuracy == pytest.approx(5 / 7)
        whole = metrics.evaluate(predict, squares, 2, (np.eye(4, dtype=int), LABELS[:4]))
        assert whole.accuracy == 1

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (lambda outputs, labels: outputs[:, :1] - labels[None], r"got shape \(7, 7\)"),
            (lambda outputs, labels: outputs[:, :1], r"got shape \(7, 1\)"),
            (lambda outputs, labels: jnp.mean(outputs), r"got shape \(\)"),
            (lambda outputs, labels: None, "got NoneType"),
            (lambda outputs, labels: (labels, {}), "got tuple"),
            (
                lambda outputs, labels: aj.WeightedLoss(outputs[:, :1] - labels[None], labels),
                r"got losses \(7, 7\) and weights \(7,\)",
            ),
        ],
    )
    def test_losses_of_another_form_are_refused(self, loss, message):
        with pytest.raises(ValueError, match=f"per_example_loss must return .*{message}"):
            metrics.evaluate(predict, loss, PARAMS, (INPUTS, LABELS))

    @pytest.mark.parametrize("labels", [LABELS.astype(np.float32), np.stack([LABELS] * 4, axis=1)])
    def test_no_accuracy_without_classes(self, labels):
        """Labels that are floats, or have as many axes as the outputs."""
        zero = lambda outputs, labels: jnp.zeros(len(outputs))
        result = metrics.evaluate(predict, zero, PARAMS, (INPUTS, labels))
        assert result.loss == 0
        assert math.isnan(result.accuracy)

    def test_the_model_state_is_passed_on(self):
        shifted = lambda params, inputs, shift: params * inputs + shift
        data = (np.zeros((2, 4), np.float32), np.zeros(2, np.int32))
        loss, _ = metrics.evaluate(shifted, squares, PARAMS, data, np.float32(3.0))
        assert loss == 4 * 3.0**2

    @pytest.mark.parametrize(
        ("data", "chunk_size", "message"),
        [
            ((INPUTS[:0], LABELS[:0]), 8, "data must hold at least 1 example"),
            ((INPUTS, LABELS), 0, "chunk_size must be an integer >= 1, got 0"),
            (INPUTS, 8, r"data must be a pair \(inputs, labels\), .* got ndarray"),
            (None, 8, r"data must be a pair \(inputs, labels\), .* got NoneType"),
            ((INPUTS, LABELS, LABELS), 8, r"data must be a pair .* got 3 parts"),
            ({"x": INPUTS, "y": LABELS}, 8, r"data must be a pair .* keys \['x', 'y'\]"),
            ((INPUTS, LABELS.astype(str)), 8, "must be an array of numbers, got dtype <U"),
        ],
    )
    def test_bad_arguments_are_refused(self, data, chunk_size, message):
        with pytest.raises(ValueError, match=message):
            metrics.evaluate(predict, squares, PARAMS, data, chunk_size=chunk_size)


class TestMeanAndInterval:
    @pytest.mark.parametrize(
        ("confidence", "quantile"),
        [(0.95, 4.302653), (0.5, 0.816497)],  # of Student's t with two degrees of freedom
    )
    def test_three_values(self, confidence, quantile):
        mean, half_width = metrics.mean_and_interval([1.0, 2.0, 6.0], confidence)
        assert mean == 3.0
        assert half_width == pytest.approx(quantile * math.sqrt(7 / 3), rel=1e-6)

    def test_equal_values(self):
        assert metrics.mean_and_interval([2.0, 2.0]) == (2.0, 0.0)

    def test_one_value_has_no_interval(self):
        mean, half_width = metrics.mean_and_interval([5.0])
        assert mean == 5.0
        assert math.isnan(half_width)

    @pytest.mark.parametrize(
        ("values", "confidence", "message"),
        [
            ([], 0.95, "values must hold at least one value"),
            (None, 0.95, "values must be numbers, one per seed, got None"),
            (3.0, 0.95, "values must be numbers, one per seed"),
            (["a"], 0.95, "values must be numbers, one per seed"),
            (np.ones((2, 2)), 0.95, "values must be numbers, one per seed"),
            ([1.0, 2.0], 1.0, r"confidence must be in \(0, 1\), got 1\.0"),
        ],
    )
    def test_bad_arguments_are_refused(self, values, confidence, message):
        with pytest.raises(ValueError, match=message):
            metrics.mean_and_interval(values, confidence)
