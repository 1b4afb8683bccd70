"""Data sets from arrays and .npz files: their guarantees, and what is refused."""

import numpy as np
import pytest

from arbiter_jax import datasets


def numbered(num_examples, num_classes=2):
    """Examples whose first feature is their index."""
    inputs = np.stack([np.arange(num_examples), np.arange(num_examples) % 7], axis=1)
    return inputs.astype(np.float64), np.arange(num_examples) % num_classes


def indices(split):
    return set(split[0][:, 0].astype(int).tolist())


class TestFromArrays:
    def test_splits_are_disjoint_and_complete(self):
        data = datasets.from_arrays(numbered(101), normalize=False)
        parts = [indices(split) for split in (data.train, data.validation, data.test)]
        assert [len(part) for part in parts] == [65, 16, 20]
        assert set.union(*parts) == set(range(101))
        assert sum(map(len, parts)) == 101

    def test_inputs_and_labels_stay_together(self):
        data = datasets.from_arrays(numbered(60, num_classes=5), normalize=False)
        for inputs, labels in (data.train, data.validation, data.test):
            np.testing.assert_array_equal(inputs[:, 0].astype(int) % 5, labels)

    def test_statistics_ignore_validation_and_test(self):
        train = np.random.RandomState(0).normal(3.0, 2.0, (50, 4))
        labels = np.zeros(50, int)
        others = (train[:5] * 1000, labels[:5])
        data = datasets.from_arrays((train, labels), others, others, num_classes=1)
        expected = (train - train.mean(0)) / train.std(0)
        np.testing.assert_allclose(data.train[0], expected, atol=1e-6)
        np.testing.assert_allclose(
            data.test[0], (others[0] - train.mean(0)) / train.std(0), rtol=1e-6
        )

    def test_statistics_ignore_held_out_examples(self):
        data = datasets.from_arrays(numbered(100))
        np.testing.assert_allclose(data.train[0].mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(data.train[0].std(0), 1, atol=1e-6)
        assert abs(data.validation[0].mean()) > 1e-4

    def test_images_are_normalized_per_channel(self):
        random = np.random.RandomState(1)
        images = random.randint(0, 256, (9000, 3, 2, 3)).astype(np.uint8)
        images[..., 1] //= 4
        data = datasets.from_arrays((images, np.arange(9000) % 10))
        inputs = data.train[0].astype(np.float64)
        np.testing.assert_allclose(inputs.mean((0, 1, 2)), 0, atol=1e-6)
        np.testing.assert_allclose(inputs.std((0, 1, 2)), 1, atol=1e-6)
        assert inputs.reshape(-1, 3).shape[0] > 4096  # more than one chunk

    def test_a_constant_feature_becomes_zero(self):
        inputs = np.concatenate([np.full((30, 1), 0.1), np.arange(30.0)[:, None]], axis=1)
        data = datasets.from_arrays((inputs, np.zeros(30, int)))
        np.testing.assert_allclose(data.train[0][:, 0], 0, atol=1e-6)
        assert data.train[0][:, 1].std() == pytest.approx(1, abs=1e-6)

    def test_the_arrays_passed_in_are_not_modified(self):
        inputs, labels = numbered(20)
        copies = inputs.copy(), labels.copy()
        datasets.from_arrays((inputs, labels))
        np.testing.assert_array_equal(inputs, copies[0])
        np.testing.assert_array_equal(labels, copies[1])

    def test_dtypes_and_shapes(self):
        data = datasets.from_arrays(numbered(20, num_classes=4))
        assert data.input_shape == (2,)
        assert data.num_classes == 4
        for inputs, labels in (data.train, data.validation, data.test):
            assert (inputs.dtype, labels.dtype) == (np.float32, np.int32)

    def test_seed_determines_the_split(self):
        first, again, other = (
            datasets.from_arrays(numbered(50), normalize=False, seed=seed) for seed in (3, 3, 4)
        )
        assert indices(first.validation) == indices(again.validation)
        assert indices(first.validation) != indices(other.validation)

    def test_passed_splits_are_kept(self):
        data = datasets.from_arrays(numbered(10), numbered(4), numbered(1), normalize=False)
        sizes = [len(labels) for _, labels in (data.train, data.validation, data.test)]
        assert sizes == [10, 4, 1]

    def test_one_example_if_all_splits_are_passed(self):
        data = datasets.from_arrays(numbered(1), numbered(1), numbered(1), num_classes=2)
        np.testing.assert_array_equal(data.train[0], 0)

    def test_float_labels_are_regression_targets(self):
        inputs, _ = numbered(20)
        data = datasets.from_arrays((inputs, inputs[:, 0] * 0.5), normalize=False)
        assert data.num_classes == 0
        assert data.train[1].dtype == np.float32
        np.testing.assert_array_equal(data.test[1], data.test[0][:, 0] * 0.5)

    def test_regression_targets_can_be_normalized(self):
        inputs, _ = numbered(40)
        targets = np.stack([inputs[:, 0], 1000 - inputs[:, 0]], axis=1)
        data = datasets.from_arrays((inputs, targets), normalize_targets=True)
        np.testing.assert_allclose(data.train[1].mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(data.train[1].std(0), 1, atol=1e-6)
        np.testing.assert_allclose(data.test[1][:, 0], -data.test[1][:, 1], atol=1e-5)

    def test_tokens_stay_integers(self):
        tokens = np.arange(40).reshape(10, 4)
        data = datasets.from_arrays((tokens, tokens + 1), normalize=False)
        assert data.train[0].dtype == np.int32
        assert data.train[1].shape == (6, 4)
        assert data.num_classes == 41

    def test_vectors_of_scalars(self):
        data = datasets.from_arrays((np.arange(10.0), np.arange(10) % 2))
        assert data.input_shape == ()
        assert data.train[0].std() == pytest.approx(1, abs=1e-6)


ROWS = np.ones((6, 2))
LABELS = np.array([0, 1, 2, 0, 1, 2])


def changed(array, index, value):
    array = array.astype(type(value)).copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (((ROWS[:0], LABELS[:0]),), {}, "train must not be empty"),
        (((ROWS, LABELS), (ROWS[:0], LABELS[:0])), {}, "validation must not be empty"),
        (((ROWS[:, :0], LABELS),), {}, "train must not be empty"),
        (((ROWS, LABELS[:3]),), {}, "same number of rows, got 6 and 3"),
        (((ROWS[:1], LABELS[:1]),), {}, ">= 2 examples to hold out a test split, got 1"),
        (((ROWS[:2], LABELS[:2]),), {}, "hold out a validation split, got 1"),
        (((changed(ROWS, (4, 1), np.nan), LABELS),), {}, r"finite in float32, got nan.*\(4, 1\)"),
        (((changed(ROWS, (2, 0), np.inf), LABELS),), {}, "train inputs must be finite"),
        (((changed(ROWS, (2, 0), 1e39), LABELS),), {}, "finite in float32, got 1e"),
        (((ROWS, changed(LABELS, 1, np.nan)),), {}, "train labels must be finite"),
        (((ROWS, LABELS),), {"num_classes": 2}, r"labels must be in \[0, 2\), got 2"),
        (((ROWS, changed(LABELS, 0, -1)),), {}, r"in \[0, 3\), got -1"),
        (((ROWS, LABELS),), {"num_classes": 0}, "num_classes must be an integer >= 1"),
        (((ROWS, LABELS / 2),), {"num_classes": 3}, "num_classes must be None or 0"),
        (((ROWS, LABELS), None, (ROWS, LABELS / 2)), {}, "test labels must be classes"),
        (((ROWS, LABELS), (ROWS[:, :1], LABELS)), {}, "validation inputs must have the same shape"),
        (
            ((ROWS, LABELS), None, (ROWS, LABELS[:, None])),
            {},
            "test labels must have the same shape",
        ),
        ((("ab", "cd"),), {}, "must be real numbers"),
        (((ROWS.astype(object), LABELS),), {}, "must be real numbers, got dtype object"),
        (((ROWS * 1j, LABELS),), {}, "must be real numbers, got dtype complex"),
        (((1.0, 2),), {}, "must have a leading axis of examples"),
        ((([[1, 2], [3]], [0, 1]),), {}, "train inputs must be an array, or nested lists of equal"),
        (((np.ma.array(ROWS, mask=True), LABELS),), {}, "train inputs must have no masked entries"),
        ((ROWS,), {}, r"train must be a pair \(inputs, labels\), got ndarray"),
        (((ROWS, LABELS, LABELS),), {}, "train must be a pair"),
        ((None,), {}, "train must be a pair"),
        (((ROWS, LABELS),), {"validation_fraction": 0}, r"validation_fraction must be in \(0, 1\)"),
        (((ROWS, LABELS),), {"test_fraction": 1.0}, r"test_fraction must be in \(0, 1\)"),
        (((ROWS, LABELS),), {"seed": -1}, "seed must be an integer"),
        (((ROWS, LABELS),), {"seed": 0.5}, "seed must be an integer"),
        (
            ((np.full((9, 2), 2**31), np.arange(9)),),
            {"normalize": False},
            r"train inputs must be in \[-2147483648, 2147483647\]",
        ),
    ],
)
def test_bad_arrays_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        datasets.from_arrays(*arguments, **options)


class TestFromNpz:
    def save(self, path, **arrays):
        np.savez(path, **arrays)
        return path

    def test_one_pair(self, tmp_path):
        inputs, labels = numbered(30)
        data = datasets.from_npz(self.save(tmp_path / "a.npz", inputs=inputs, labels=labels))
        expected = datasets.from_arrays((inputs, labels))
        np.testing.assert_array_equal(data.train[0], expected.train[0])

    @pytest.mark.parametrize(
        "names",
        [
            "train_inputs train_labels validation_inputs validation_labels test_inputs test_labels",
            "inputs labels validation_inputs validation_labels test_inputs test_labels",
            "x_train y_train x_val y_val x_test y_test",
        ],
    )
    def test_three_pairs(self, tmp_path, names):
        arrays = [part for size in (9, 5, 3) for part in numbered(size)]
        named = dict(zip(names.split(), arrays, strict=True))
        data = datasets.from_npz(str(self.save(tmp_path / "a.npz", **named)))
        sizes = [len(labels) for _, labels in (data.train, data.validation, data.test)]
        assert sizes == [9, 5, 3]

    def test_options_are_passed_on(self, tmp_path):
        inputs, labels = numbered(30)
        path = self.save(tmp_path / "a.npz", inputs=inputs, labels=labels)
        data = datasets.from_npz(path, num_classes=9, validation_fraction=0.5)
        assert data.num_classes == 9
        assert len(data.train[1]) == len(data.validation[1])

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"x": ROWS}, "training arrays .* are missing, found"),
            ({"inputs": ROWS}, "'labels' of inputs/labels is missing"),
            (
                {"inputs": ROWS, "labels": LABELS, "test_labels": LABELS},
                "'test_inputs' of .* is missing",
            ),
            ({"inputs": ROWS, "labels": LABELS - 1}, "labels must be in"),
            ({"inputs": changed(ROWS, (0, 0), np.nan), "labels": LABELS}, "must be finite"),
            ({"inputs": ROWS[:0], "labels": LABELS[:0]}, "must not be empty"),
            ({"inputs": ROWS.astype(object), "labels": LABELS}, "got pickled objects"),
            ({"inputs": ROWS.astype(str), "labels": LABELS}, "must be real numbers, got dtype <U"),
            ({"inputs": ROWS, "labels": LABELS.astype("S")}, "must be real numbers, got dtype"),
        ],
    )
    def test_bad_arrays_are_refused(self, tmp_path, arrays, message):
        path = self.save(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ValueError, match=message) as caught:
            datasets.from_npz(path)
        assert "bad.npz" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1

    @pytest.mark.parametrize("content", [b"", b"no archive", b"\x93NUMPY\x01\x00"])
    def test_other_files_are_refused(self, tmp_path, content):
        path = tmp_path / "bad.npz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"must be an \.npz file"):
            datasets.from_npz(path)

    def test_damaged_files_are_refused(self, tmp_path):
        path = self.save(tmp_path / "bad.npz", inputs=ROWS, labels=LABELS)
        content = bytearray(path.read_bytes())
        content[100:140] = b"\xff" * 40  # within the data of the first array: its checksum is wrong
        path.write_bytes(bytes(content))
        with pytest.raises(ValueError, match=r"bad\.npz"):
            datasets.from_npz(path)

    def test_missing_file(self, tmp_path):
        with pytest.raises(datasets.DatasetNotFoundError, match="there is no file"):
            datasets.from_npz(tmp_path / "missing.npz")


def test_not_found_is_a_file_error_and_a_value_error():
    assert issubclass(datasets.DatasetNotFoundError, FileNotFoundError)
    assert issubclass(datasets.DatasetNotFoundError, ValueError)
