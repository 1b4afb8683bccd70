"""Data sets as arrays: three splits of normalized inputs and labels, for any training loop."""

from arbiter_jax.batching import Batches, HostBlocks, MaskedBatch, batches, host_blocks, take
from arbiter_jax.datasets._augmentation import pad_crop_flip
from arbiter_jax.datasets._dataset import Dataset, from_arrays
from arbiter_jax.datasets._diabetes import diabetes
from arbiter_jax.datasets._digits import digits
from arbiter_jax.datasets._epochs import Epochs, epochs
from arbiter_jax.datasets._errors import DatasetNotFoundError
from arbiter_jax.datasets._load import load
from arbiter_jax.datasets._mnist import fashion_mnist, mnist
from arbiter_jax.datasets._mnist10k import mnist10k
from arbiter_jax.datasets._npz import from_npz
from arbiter_jax.datasets._synthetic import synthetic
from arbiter_jax.datasets._text import decode_text, text, text_vocabulary
from arbiter_jax.datasets._tfds import from_tfds

__all__ = [
    "Batches",
    "Dataset",
    "DatasetNotFoundError",
    "Epochs",
    "HostBlocks",
    "MaskedBatch",
    "batches",
    "decode_text",
    "diabetes",
    "digits",
    "epochs",
    "fashion_mnist",
    "from_arrays",
    "from_npz",
    "from_tfds",
    "host_blocks",
    "load",
    "mnist",
    "mnist10k",
    "pad_crop_flip",
    "synthetic",
    "take",
    "text",
    "text_vocabulary",
]
