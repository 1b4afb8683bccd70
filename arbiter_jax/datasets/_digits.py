"""Handwritten digits: 1,797 images of 8x8 pixels, bundled with scikit-learn.

Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository,
1998, https://doi.org/10.24432/C50P49.
"""

from __future__ import annotations

import numpy as np

from arbiter_jax.datasets._dataset import Dataset, Split, every_fifth_of_each_class, from_arrays


def read_digits() -> tuple[Split, Split]:
    """(training, test) before normalization: images are uint8 [n, 8, 8, 1] in [0, 16]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'digits needs scikit-learn: pip install "arbiter-jax[data]".', name="scikit-learn"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    images = np.reshape(pixels, (-1, 8, 8, 1)).astype(np.uint8)
    labels = np.asarray(labels, np.int32)
    test = every_fifth_of_each_class(labels)
    return (images[~test], labels[~test]), (images[test], labels[test])


def digits(seed: int = 0) -> Dataset:
    """Handwritten digits, 8x8 gray images of ten classes; needs no files and no network.

    scikit-learn's copy has no test split. Here it is every fifth image of each class in file order
    (364 images), independent of the seed, so that all seeds are tested on the same images. A seeded
    permutation chooses 20% of the other 1,433 for validation.

    Args:
      seed: Seed of the validation split, an integer in [0, 2**32).

    Returns:
      A :class:`Dataset`: inputs float32 [n, 8, 8, 1], labels int32 [n] in [0, 10).

    Raises:
      ImportError: If scikit-learn is not installed.
      ValueError: If the seed is out of range.

    Reference:
      Alpaydin and Kaynak, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49

    >>> from arbiter_jax import datasets
    >>> data = datasets.digits()
    >>> [inputs.shape for inputs, _ in (data.train, data.validation, data.test)]
    [(1146, 8, 8, 1), (287, 8, 8, 1), (364, 8, 8, 1)]
    """
    train, test = read_digits()
    return from_arrays(train, test=test, num_classes=10, seed=seed)
