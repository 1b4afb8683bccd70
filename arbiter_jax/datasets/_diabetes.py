"""Diabetes: ten measurements of 442 patients, and how the disease progressed within a year.

Efron, Hastie, Johnstone and Tibshirani, Least Angle Regression, Annals of Statistics 2004,
https://doi.org/10.1214/009053604000000067. Bundled with scikit-learn.
"""

from __future__ import annotations

import numpy as np

from arbiter_jax.datasets._dataset import Dataset, from_arrays


def diabetes(seed: int = 0) -> Dataset:
    """A small regression task on real data; needs no files and no network.

    Every fifth patient in file order is in the test split (89 patients), independent of the seed.
    A seeded permutation chooses 20% of the other 353 for validation. Targets are normalized like
    the inputs, so that predicting the mean has a squared error of 1 on the training split.

    Args:
      seed: Seed of the validation split, an integer in [0, 2**32).

    Returns:
      A :class:`Dataset`: inputs float32 [n, 10], targets float32 [n], ``num_classes`` 0.

    Raises:
      ImportError: If scikit-learn is not installed.
      ValueError: If the seed is out of range.

    Reference:
      Efron et al., Least Angle Regression, 2004, https://doi.org/10.1214/009053604000000067

    >>> from arbiter_jax import datasets
    >>> data = datasets.diabetes()
    >>> data.train[0].shape, data.train[1].dtype, data.num_classes
    ((282, 10), dtype('float32'), 0)
    """
    try:
        from sklearn.datasets import load_diabetes
    except ImportError as error:
        raise ImportError(
            'diabetes needs scikit-learn: pip install "arbiter-jax[data]".', name="scikit-learn"
        ) from error
    inputs, targets = map(np.asarray, load_diabetes(return_X_y=True, scaled=False))
    test = np.arange(len(inputs)) % 5 == 0
    return from_arrays(
        (inputs[~test], targets[~test]),
        test=(inputs[test], targets[test]),
        normalize_targets=True,
        seed=seed,
    )
