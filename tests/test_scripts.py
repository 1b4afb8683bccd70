"""Official examples in a loop of one's own: few changed lines, and the losses that `fit` has."""

import functools
import itertools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import arbiter_jax as aj
from tests.script_runs import (
    NUM_VALIDATION,
    RULES,
    SCRIPTS,
    changed_lines,
    load,
    run_fit,
)

NUM_STEPS = 6
IMAGE = (8, 8, 1)


@functools.cache
def digits():
    return aj.datasets.digits()


def examples(form, split="train"):
    """A split of the digits in the form that a script takes."""
    images, labels = getattr(digits(), split)
    if split != "train":
        images, labels = images[:NUM_VALIDATION], labels[:NUM_VALIDATION]
    if form == "dict":
        return {"image": images, "label": labels}
    return (images.reshape(len(images), -1), labels) if form == "flat" else (images, labels)


def pieces(form, chunk_size=50):
    return aj.datasets.epochs(examples(form), chunk_size=chunk_size)


def chain(rule=None, shape=IMAGE):
    return optax.chain(optax.adam(3e-3), *([] if rule is None else [RULES[rule](shape)]))


class Loader:
    """Stands in for a DataLoader of torch: an iterable over lists of arrays, shuffled anew each time."""

    def __init__(self, dataset, batch_size):
        self.dataset, self.batch_size = dataset, batch_size

    def __len__(self):
        return len(self.dataset[1]) // self.batch_size

    def __iter__(self):
        order = np.random.default_rng(0).permutation(len(self.dataset[1]))
        for i in range(len(self)):
            rows = order[i * self.batch_size :][: self.batch_size]
            yield [x[rows] for x in self.dataset]


@pytest.mark.parametrize("name", SCRIPTS)
def test_at_most_eight_lines(name):
    """Besides the rule in the chain, which is given to each script."""
    lines = changed_lines(name)
    assert 3 <= len(lines) <= 8, "\n".join(lines)


def fit_nnx(tx):
    """The script's model as pure functions: everything but the parameters is its state."""
    script = load("nnx_mnist_adaptive")
    model = script.CNN(rngs=nnx.Rngs(0))
    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params, batch, rest, mask, key):
        model = nnx.merge(graph, params, rest, copy=True)
        losses, _ = script.loss_fn(model, batch)
        return losses, nnx.state(model, nnx.Not(nnx.Param))

    return run_fit(
        loss_fn,
        params,
        tx,
        pieces("dict"),
        examples("dict", "validation"),
        NUM_STEPS,
        model_state=rest,
        inputs_of=lambda batch: batch["image"],
    )
