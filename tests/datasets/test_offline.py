"""The data sets that need no files and no network: sizes, splits, normalization."""

import numpy as np
import pytest

from arbiter_jax import datasets
from arbiter_jax.datasets import _text


def sizes(data):
    return [len(labels) for _, labels in (data.train, data.validation, data.test)]


class TestDigits:
    def test_shapes(self):
        data = datasets.digits()
        assert sizes(data) == [1146, 287, 364]
        assert data.input_shape == (8, 8, 1)
        assert data.num_classes == 10
        assert (data.train[0].dtype, data.train[1].dtype) == (np.float32, np.int32)
        assert data.train[0].mean() == pytest.approx(0, abs=1e-5)
        assert data.train[0].std() == pytest.approx(1, abs=1e-5)

    def test_the_test_split_does_not_depend_on_the_seed(self):
        """It is stratified, too."""
        first, other = datasets.digits(seed=0), datasets.digits(seed=1)
        np.testing.assert_array_equal(first.test[1], other.test[1])
        assert not np.array_equal(first.validation[1], other.validation[1])
        counts = np.bincount(first.test[1])
        assert counts.min() >= 35
        assert counts.max() <= 37

    def test_no_image_is_in_two_splits(self):
        splits = datasets.digits()[:3]
        images = {image.tobytes() for inputs, _ in splits for image in inputs}
        assert len(images) == 1797  # no two of the images are equal

    def test_bad_seed(self):
        with pytest.raises(ValueError, match="seed must be an integer >= 0"):
            datasets.digits(seed=-1)


class TestDiabetes:
    def test_targets_are_normalized_numbers(self):
        data = datasets.diabetes()
        assert sizes(data) == [282, 71, 89]
        assert data.num_classes == 0
        for inputs, targets in (data.train, data.validation, data.test):
            assert (inputs.dtype, targets.dtype) == (np.float32, np.float32)
        assert data.train[1].mean() == pytest.approx(0, abs=1e-6)
        assert data.train[1].std() == pytest.approx(1, abs=1e-6)

    def test_a_linear_model_learns_something(self):
        data = datasets.load("diabetes")
        inputs, targets = data.train
        weights, *_ = np.linalg.lstsq(inputs, targets, rcond=None)
        assert np.mean(np.square(data.test[0] @ weights - data.test[1])) < 0.7

    def test_the_test_split_does_not_depend_on_the_seed(self):
        first, other = datasets.diabetes(seed=0), datasets.diabetes(seed=1)
        ranks = [split.test[1].argsort().tolist() for split in (first, other)]
        assert ranks[0] == ranks[1]


class TestSynthetic:
    @pytest.mark.parametrize("shape", [None, 16, "16"])
    def test_a_shape_is_a_tuple(self, shape):
        with pytest.raises(ValueError, match="input_shape must be a tuple of integers"):
            datasets.synthetic(100, input_shape=shape)

    def test_noise_determines_the_difficulty(self):
        def accuracy_of_nearest_mean(noise):
            data = datasets.synthetic(2000, 5, (8,), noise=noise)
            inputs, labels = data.train
            means = np.stack([inputs[labels == c].mean(0) for c in range(5)])
            distances = np.square(data.test[0][:, None] - means[None]).sum(-1)
            return (distances.argmin(1) == data.test[1]).mean()

        accuracies = [accuracy_of_nearest_mean(noise) for noise in (0.0, 1.0, 5.0)]
        assert accuracies[0] == 1.0
        assert accuracies[0] > accuracies[1] > accuracies[2] + 0.2

    def test_label_noise(self):
        clean, noisy = (datasets.synthetic(5000, 4, label_noise=p) for p in (0.0, 0.4))
        changed = np.mean(clean.test[1] != noisy.test[1])
        assert changed == pytest.approx(0.4 * (1 - 1 / 4), abs=0.05)
        np.testing.assert_array_equal(clean.test[0], noisy.test[0])

    def test_classes_are_equally_frequent(self):
        data = datasets.synthetic(100, 10)
        counts = np.bincount(np.concatenate([labels for _, labels in data[:3]]))
        np.testing.assert_array_equal(counts, 10)

    def test_images(self):
        data = datasets.synthetic(30, 2, (4, 4, 3))
        assert data.input_shape == (4, 4, 3)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_examples": 2}, "num_examples must be an integer >= 3"),
            ({"num_classes": 0}, "num_classes must be an integer >= 1"),
            ({"input_shape": (0,)}, "input_shape must be an integer >= 1"),
            ({"noise": -1.0}, "noise must be a finite number >= 0"),
            ({"label_noise": 2.0}, r"label_noise must be in \[0, 1\]"),
            ({"seed": "a"}, "seed must be an integer"),
        ],
    )
    def test_bad_arguments_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            datasets.synthetic(**options)


class TestText:
    def test_contexts(self):
        data = datasets.text(8, stride=1)
        inputs, labels = data.test
        assert inputs.shape[1:] == (8,)
        assert labels.shape == inputs.shape[:1]
        np.testing.assert_array_equal(labels[:-1], inputs[1:, -1])  # last token of the next context
        assert data.input_shape == (8,)
        assert data.num_classes == len(datasets.text_vocabulary()) > 60
        assert (inputs.dtype, labels.dtype) == (np.int32, np.int32)

    def test_sequences(self):
        data = datasets.text(64, form="sequence")
        inputs, labels = data.validation
        np.testing.assert_array_equal(inputs[:, 1:], labels[:, :-1])
        assert labels.max() < data.num_classes

    def test_the_text_is_english(self):
        data = datasets.text(200, form="sequence")
        written = "".join(datasets.decode_text(row) for row in data.train[0])
        assert len(written) > 200_000
        assert "lambda" in written
        assert written.count(" the ") > 1000

    def test_splits_are_disjoint_parts_of_the_text(self):
        data = datasets.text(4095, form="sequence")
        whole = _text._text()
        pieces = [datasets.decode_text(row) for row in (*data.train[0], *data.validation[0])]
        starts = sorted(whole.index(piece) for piece in pieces)
        assert (np.diff(starts) >= 4096).all()
        test_start = whole.index(datasets.decode_text(data.test[0][0]))
        assert test_start >= starts[-1] + 4096
        assert len(pieces) * 4096 >= 0.78 * len(whole)
        assert len(data.validation[0]) == pytest.approx(0.2 * len(pieces), abs=1)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"context_length": 0}, r"context_length must be an integer >= 1 and <= 4095"),
            ({"context_length": 4096}, "context_length must be"),
            ({"form": "words"}, "form must be one of 'context', 'sequence'"),
            ({"stride": 0}, "stride must be an integer >= 1"),
        ],
    )
    def test_bad_arguments_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            datasets.text(**options)


@pytest.mark.parametrize("tokens", [None, 3, [-1], [10**6], [0.5], ["a"]])
def test_what_is_no_token(tokens):
    """A negative one would count from the end of the vocabulary."""
    with pytest.raises(ValueError, match="tokens must be"):
        datasets.decode_text(tokens)
