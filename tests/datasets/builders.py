"""The digits as a tfds data set of the project's own.

It is prepared and read without TensorFlow and without a network, so that the way through tfds is
walked for real wherever the tests run.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from arbiter_jax.datasets._digits import read_digits

NAME = "digits8x8"


def builder(**options: Any) -> Any:
    """A builder of the set; `options` as for any builder of tfds, `data_dir` among them."""
    import tensorflow_datasets as tfds  # tfds is optional: the class exists when it is asked for

    class Digits8x8(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """scikit-learn's 1,797 handwritten digits with the test split of `digits`."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            # Tensor and not Image: that one needs TensorFlow to encode an array.
            features = {
                "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description="Handwritten digits, 8x8 grey images with values from 0 to 16.",
                homepage="https://doi.org/10.24432/C50P49",
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            train, test = read_digits()
            return {
                "train": self._generate_examples(*train),
                "test": self._generate_examples(*test),
            }

        def _generate_examples(self, images, labels):
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield index, {"image": image, "label": int(label)}

    return Digits8x8(**options)
