"""Gaussian classes: generated data with adjustable difficulty."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arbiter_jax import _validate
from arbiter_jax.datasets._dataset import Dataset, from_arrays


def synthetic(
    num_examples: int = 2000,
    num_classes: int = 10,
    input_shape: Sequence[int] = (16,),
    *,
    noise: float = 1.0,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Dataset:
    r"""Gaussian classes with adjustable noise, for tests and quick experiments.

    .. math:: x = \mu_y + \text{noise} \cdot \epsilon, \quad \mu_c, \epsilon \sim N(0, I)

    Classes are equally frequent, up to one example. A fifth of the examples is for testing, and a
    fifth of the rest for validation.

    Args:
      num_examples: Number of examples in all splits together, an integer >= 3.
      num_classes: Number of classes, an integer >= 1.
      input_shape: Shape of one example, such as (16,) or (height, width, channels).
      noise: Standard deviation within a class, relative to that of the class means, >= 0. With 0
        all examples of a class are equal.
      label_noise: Fraction of the labels, in all splits, that are replaced by a random class, in
        [0, 1]. The best possible accuracy is then 1 - label_noise * (1 - 1 / num_classes).
      seed: Seed of all random numbers, an integer in [0, 2**32).

    Returns:
      A :class:`Dataset`: inputs float32 ``[n, *input_shape]``, labels int32 [n].

    Raises:
      ValueError: If an argument is out of range.

    >>> from arbiter_jax import datasets
    >>> data = datasets.synthetic(100, num_classes=3, input_shape=(4,))
    >>> data.train[0].shape, data.num_classes
    ((64, 4), 3)
    """
    num_examples = _validate.integer(num_examples=num_examples, minimum=3)
    num_classes = _validate.integer(num_classes=num_classes, minimum=1)
    if not isinstance(input_shape, Sequence) or isinstance(input_shape, str):
        raise ValueError(f"input_shape must be a tuple of integers, got {input_shape!r}.")
    shape = tuple(_validate.integer(input_shape=size, minimum=1) for size in input_shape)
    noise = _validate.non_negative(noise=noise)
    label_noise = _validate.in_range(0, 1, label_noise=label_noise)
    seed = _validate.integer(seed=seed, minimum=0, maximum=2**32 - 1)

    random = np.random.RandomState(seed)  # NumPy guarantees its stream
    means = random.standard_normal((num_classes, *shape))
    labels = random.permutation(np.arange(num_examples) % num_classes)
    inputs = means[labels] + noise * random.standard_normal((num_examples, *shape))
    replaced = random.uniform(size=num_examples) < label_noise
    labels = np.where(replaced, random.randint(num_classes, size=num_examples), labels)
    return from_arrays((inputs, labels), num_classes=num_classes, seed=seed)
