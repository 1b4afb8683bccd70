"""Small tfds data sets, which tfds prepares and reads without TensorFlow or a network.

tfds is imported when a builder is made: without it, the tests that need one are skipped.
"""

import functools

import numpy as np

from arbiter_jax.datasets._digits import read_digits


@functools.cache
def register_digits8x8():
    """Makes tfds know scikit-learn's digits, with the test split of `digits`, as "digits8x8"."""
    import tensorflow_datasets as tfds

    class Digits8x8(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            # Tensor and not Image, which needs TensorFlow to encode an array.
            features = {
                "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            train, test = read_digits()
            return {
                "train": self._generate_examples(*train),
                "test": self._generate_examples(*test),
            }

        def _generate_examples(self, images, labels):
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield index, {"image": image, "label": int(label)}


def small_set(
    splits=("train", "validation", "test"),
    *,
    config=None,
    supervised_keys=("x", "y"),
    label=None,
    lengths=(3,),
):
    """A builder class with 20 training, 6 validation and 4 test examples.

    Args:
      splits: Names of the splits.
      config: Name of the one configuration, or None.
      supervised_keys: Which features are inputs and labels.
      label: The feature of the labels; classes by default.
      lengths: Lengths of the inputs, which the examples have in turn.
    """
    import tensorflow_datasets as tfds

    shape = (lengths[0],) if len(lengths) == 1 else (None,)
    label = tfds.features.ClassLabel(num_classes=4) if label is None else label

    class SmallSet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.0")
        BUILDER_CONFIGS = [] if config is None else [tfds.core.BuilderConfig(name=config)]

        def _info(self):
            features = {"x": tfds.features.Tensor(shape=shape, dtype=np.float32), "y": label}
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=supervised_keys,
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for i in range({"train": 20, "validation": 6, "test": 4}[split]):
                yield i, {"x": np.full(lengths[i % len(lengths)], i, np.float32), "y": i % 3}

    return SmallSet


def prepare(root, config=None, **options):
    """Prepares a small set in `root`."""
    kwargs = {} if config is None else {"config": config}
    builder = small_set(config=config, **options)
    builder(data_dir=str(root), file_format="array_record", **kwargs).download_and_prepare()
