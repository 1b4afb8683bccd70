"""English text, one token per character: the help topics of Python.

The text is part of the standard library (``pydoc_data.topics``, about 465,000 characters), and so
differs a little between releases of Python.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np

from arbiter_jax import _validate
from arbiter_jax.datasets._dataset import Dataset, from_arrays, permutation

_SEGMENT_LENGTH = 4096  # the unit of the validation split, in characters


@functools.cache
def _text() -> str:
    from pydoc_data.topics import topics

    # A fifth of the text repeats paragraphs of earlier topics. Keep each paragraph once (ignoring
    # indentation); otherwise validation and test would reward a model for memorizing them.
    paragraphs = {}
    for name in sorted(topics):
        for paragraph in topics[name].strip().split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(paragraphs.values())


@functools.cache
def text_vocabulary() -> str:
    """The characters of the text, in the order of their tokens.

    Returns:
      A string whose character i is token i; its length is the ``num_classes`` of :func:`text`.

    >>> from arbiter_jax import datasets
    >>> "e" in datasets.text_vocabulary()
    True
    """
    return "".join(sorted(set(_text())))


def decode_text(tokens: Iterable[int]) -> str:
    """Converts tokens back to text, for example to read what a model has generated.

    Args:
      tokens: Integers in [0, num_classes) of :func:`text`.

    Returns:
      A string with one character per token.

    Raises:
      ValueError: If a token is not an integer in [0, num_classes).

    >>> from arbiter_jax import datasets
    >>> tokens = [datasets.text_vocabulary().index(character) for character in "help"]
    >>> datasets.decode_text(tokens)
    'help'
    """
    vocabulary = text_vocabulary()
    last = len(vocabulary) - 1
    try:
        checked = [_validate.integer(tokens=token, minimum=0, maximum=last) for token in tokens]
    except TypeError:
        raise ValueError(f"tokens must be a sequence of integers, got {tokens!r}.") from None
    return "".join(vocabulary[token] for token in checked)


def _windows(segments: list[np.ndarray], length: int, stride: int) -> np.ndarray:
    """All windows of `length` tokens that start every `stride` tokens and stay in one segment."""
    views = [np.lib.stride_tricks.sliding_window_view(s, length)[::stride] for s in segments]
    return np.concatenate(views)


def text(
    context_length: int = 32, *, form: str = "context", stride: int | None = None, seed: int = 0
) -> Dataset:
    r"""English text for predicting the next character; needs no files and no network.

    The text is about 370,000 characters of the Python documentation, prose and code, without
    repeated paragraphs. The last fifth is for testing. The rest is cut into segments of 4,096
    characters, of which a seeded permutation chooses 20% for validation. Examples do not cross the
    border of a segment, so no character of one split is seen in another.

    Args:
      context_length: L, number of characters in an input, an integer in [1, 4095].
      form: ``"context"``: inputs [n, L] and the one character that follows, labels [n], for any
        classifier. ``"sequence"``: inputs [n, L] and the character that follows each of theirs,
        labels [n, L], for a causal model with one loss per token.
      stride: Number of characters between the starts of neighboring examples, an integer >= 1. If
        None, 4 for contexts, and L for sequences, which then do not overlap.
      seed: Seed of the validation split, an integer in [0, 2**32).

    Returns:
      A :class:`Dataset`: inputs and labels are int32 tokens in [0, num_classes), the positions in
      :func:`text_vocabulary`. ``input_shape`` is (L,).

    Raises:
      ValueError: If an argument is out of range.

    >>> from arbiter_jax import datasets
    >>> data = datasets.text(16, form="sequence")
    >>> inputs, labels = data.train
    >>> inputs.shape == labels.shape, bool((inputs[:, 1:] == labels[:, :-1]).all())
    (True, True)
    """
    maximum = _SEGMENT_LENGTH - 1
    length = _validate.integer(context_length=context_length, minimum=1, maximum=maximum)
    _validate.one_of(("context", "sequence"), form=form)
    default_stride = 4 if form == "context" else length
    stride = _validate.integer(stride=default_stride if stride is None else stride, minimum=1)

    index = {character: token for token, character in enumerate(text_vocabulary())}
    tokens = np.array([index[character] for character in _text()], np.int32)
    border = len(tokens) - len(tokens) // 5
    count = border // _SEGMENT_LENGTH
    segments = list(tokens[: count * _SEGMENT_LENGTH].reshape(count, _SEGMENT_LENGTH))
    order = permutation(count, seed)
    held = round(0.2 * count)

    def examples(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        windows = _windows(parts, length + 1, stride)
        return windows[:, :-1], windows[:, -1 if form == "context" else slice(1, None)]

    return from_arrays(
        train=examples([segments[i] for i in sorted(order[held:])]),
        validation=examples([segments[i] for i in sorted(order[:held])]),
        test=examples([tokens[border:]]),
        num_classes=len(index),
        normalize=False,
    )
