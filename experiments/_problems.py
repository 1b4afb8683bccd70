"""The four tasks of :mod:`experiments.tasks`, two of which :mod:`experiments.noise_rules` shares.

Each is a function `small -> Definition`: with `small` the network compiles in a second.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import arbiter_jax as aj
from arbiter_jax import datasets, models
from experiments import _training


class Definition(NamedTuple):
    """A task, and how it is trained and scored."""

    task: _training.Task
    agent: aj.Agent
    optimizer: optax.GradientTransformation
    epochs: float  # of the default config
    max_batch_size: int
    score_name: str  # unit of the score
    score: Callable[[dict[str, Any]], float]  # row -> a number that people know
    transform_batch: Callable[[jax.Array, Any], Any] | None = None  # augmentation


def task_of(dataset: datasets.Dataset, model: models.Model, loss: Callable) -> _training.Task:
    """A task from a data set, a model and a loss per example."""
    data = jax.tree.map(jnp.asarray, aj.Data(dataset.train, dataset.validation))
    return _training.Task(dataset, data, model, models.make_losses(model, loss), loss)


CONTEXT = 8  # characters that `next_character` sees


def next_character() -> _training.Task:
    """Predicts an English character from the eight before it, with a perceptron."""
    dataset = datasets.text(CONTEXT, form="context")
    size = dataset.num_classes
    one_hot = lambda tokens: jax.nn.one_hot(tokens, size).reshape(tokens.shape[0], -1)
    model = models.mlp((CONTEXT * size,), (128,), size)
    task = task_of(dataset, model, optax.softmax_cross_entropy_with_integer_labels)
    plain = task.losses
    losses = plain._replace(
        loss_fn=lambda params, batch: plain.loss_fn(params, (one_hot(batch[0]), batch[1])),
        predict=lambda params, tokens: plain.predict(params, one_hot(tokens)),
    )
    return dataclasses.replace(task, losses=losses)


def token_agent(input_shape: tuple[int, ...], num_tokens: int) -> aj.Agent:
    """A perceptron agent on token numbers, scaled to [-1/2, 1/2].

    Their order means nothing, but an agent only has to distinguish one batch from another.
    """
    agent = aj.mlp_agent(input_shape)
    scaled = lambda params, tokens: agent.apply(params, tokens / num_tokens - 0.5)
    return agent._replace(apply=scaled)


def _shift(key: jax.Array, batch: Any) -> Any:
    """Augmentation inside the scan: shifts each image by at most one pixel."""
    images, labels = batch
    return datasets.pad_crop_flip(key, images, padding=1, flip=False), labels


def _classification(small: bool) -> Definition:
    dataset = datasets.digits()
    make = models.mlp if small else models.lenet
    model = make(dataset.input_shape, num_classes=dataset.num_classes)
    return Definition(
        task_of(dataset, model, optax.softmax_cross_entropy_with_integer_labels),
        aj.mlp_agent(dataset.input_shape),
        optax.sgd(0.03, momentum=0.9),
        epochs=40,
        max_batch_size=256,
        score_name="% correct",
        score=lambda row: 100 * row["test_accuracy"],
        transform_batch=_shift,
    )


def _explained(test: tuple[np.ndarray, np.ndarray]) -> Callable[[dict[str, Any]], float]:
    """row -> R^2, from the mean squared error and the variance of the test targets."""
    variance = float(np.mean(np.square(test[1] - test[1].mean(0))))
    return lambda row: 1 - row["test_loss"] / variance


def _regression(small: bool) -> Definition:
    del small  # it is small anyway
    dataset = datasets.diabetes()
    return Definition(
        task_of(
            dataset,
            models.mlp(dataset.input_shape, (32,), num_classes=1),
            lambda outputs, targets: jnp.square(outputs[:, 0] - targets),
        ),
        aj.mlp_agent(dataset.input_shape),
        optax.sgd(0.003, momentum=0.9),
        epochs=100,
        max_batch_size=64,
        score_name="R²",
        score=_explained(dataset.test),
    )


def _language(small: bool) -> Definition:
    num_layers, width = (1, 16) if small else (2, 64)
    length = 32
    dataset = datasets.text(length, form="sequence")
    size = dataset.num_classes
    model = models.transformer(size, length, num_layers=num_layers, num_heads=4, width=width)
    return Definition(
        task_of(dataset, model, models.token_cross_entropy),
        token_agent(dataset.input_shape, size),
        optax.adam(2e-3),
        epochs=4,
        max_batch_size=128,
        score_name="bits/char",
        score=lambda row: row["test_loss"] / math.log(2),
    )


class Autoencoder(nnx.Module):
    """Compresses images to a few numbers. Written without this library: it has no marked head."""

    def __init__(self, num_pixels: int, code_size: int, *, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, rngs=rngs)
        self.encoder = nnx.Sequential(linear(num_pixels, 64), nnx.relu, linear(64, code_size))
        self.decoder = nnx.Sequential(linear(code_size, 64), nnx.relu, linear(64, num_pixels))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the reconstructed images, in the shape of `images`."""
        codes = self.encoder(images.reshape(images.shape[0], -1))
        return self.decoder(codes).reshape(images.shape)


def _autoencoder(small: bool, code_size: int = 8) -> Definition:
    del small  # it is small anyway
    digits = datasets.digits()
    inputs = {name: getattr(digits, name)[0] for name in ("train", "validation", "test")}
    dataset = digits._replace(num_classes=0, **{name: (x, x) for name, x in inputs.items()})
    num_pixels = math.prod(dataset.input_shape)
    model = models.attach(
        lambda rngs: Autoencoder(num_pixels, code_size, rngs=rngs),
        "decoder.layers.2",
        jax.ShapeDtypeStruct((1, *dataset.input_shape), jnp.float32),
    )
    model = model._replace(init=jax.jit(model.init))
    return Definition(
        task_of(dataset, model, lambda y, x: jnp.mean(jnp.square(y - x), axis=(1, 2, 3))),
        aj.mlp_agent(dataset.input_shape),
        optax.adam(2e-3),
        epochs=60,
        max_batch_size=256,
        score_name="R²",
        score=_explained(dataset.test),
    )


DEFINITIONS: dict[str, Callable[[bool], Definition]] = {
    "classification": _classification,
    "regression": _regression,
    "language": _language,
    "autoencoder": _autoencoder,
}
