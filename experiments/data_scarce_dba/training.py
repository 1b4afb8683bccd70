"""Training on a few examples, all of them or selected ones: all seeds in one program."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import arbiter_jax as aj
from arbiter_jax import gradients, subset_selection
from experiments._runner import UsageError
from experiments._training import Task

_prefix_scores = jax.jit(subset_selection.prefix_scores, static_argnums=2)
TX = {"sgd": optax.identity(), "adam": optax.scale_by_adam()}


class Curves(NamedTuple):
    """The curves of one run: W points in time, G layers, n training examples."""

    params: Any
    train_loss: jax.Array  # [W]
    validation_loss: jax.Array  # [W]
    validation_accuracy: jax.Array  # [W]
    fraction: jax.Array  # [W, G], share of the batch that was chosen
    rate: jax.Array  # [G, n], how often an example was chosen when it was drawn
    difficulty: jax.Array  # [n], mean loss of an example over time


def draw(train: tuple[np.ndarray, np.ndarray], regime: str, seed: int):
    """A small training set: "1%" of the official one, or "10 per class"."""
    inputs, labels = train
    order = np.random.default_rng(seed).permutation(len(labels))
    if regime == "1%":
        rows = order[: round(len(labels) / 80)]  # the other 20% of the official set validate
    elif regime == "10 per class":
        rows = np.concatenate([order[labels[order] == c][:10] for c in np.unique(labels)])
    else:
        raise UsageError(f"--regimes must be among '1%', '10 per class', got {regime!r}.")
    return inputs[rows], labels[rows]


def make_training(
    task: Task,
    optimizer: str,
    metric: str | None,
    *,
    min_size: int,
    batch_size: int,
    num_steps: int,
    window: int,
) -> Callable[..., Curves]:
    """(keys [S], examples [S, n, ...], validation, learning rate) -> Curves with a leading [S]."""
    loss_fn, predict = task.losses.loss_fn, task.losses.predict
    tx = TX[optimizer]
    plain = gradients.masked_value_and_grad(loss_fn)
    choosing = metric and aj.subset_gradients(loss_fn, metric, min_size)

    def train(key, examples, validation, learning_rate):
        params, _ = task.model.init(key)
        num_layers, n = len(subset_selection.group_names(params)), len(examples[1])

        def step(carry, _):
            params, opt_state, sampler, drawn, chosen = carry
            sampler, (x, y, row), mask = aj.sample_batch(
                sampler, (*examples, jnp.arange(n)), batch_size, batch_size
            )
            out = (choosing or plain)(params, (x, y), mask)
            selected = out.selected if choosing else jnp.ones((num_layers, batch_size), bool)
            updates, opt_state = tx.update(out.grads, opt_state, params)
            params = jax.tree.map(lambda p, u: p - learning_rate * u, params, updates)
            drawn, chosen = drawn.at[row].add(1), chosen.at[:, row].add(selected)
            return (params, opt_state, sampler, drawn, chosen), jnp.mean(selected, axis=1)

        def window_of_steps(carry, _):
            carry, fraction = jax.lax.scan(step, carry, None, length=window)
            losses = loss_fn(carry[0], examples)
            outputs = predict(carry[0], validation[0])
            validation_loss = jnp.mean(task.per_example_loss(outputs, validation[1]))
            hits = jnp.argmax(outputs, axis=1) == validation[1]
            hits &= ~jnp.isnan(outputs).any(axis=1)  # to argmax a nan is the largest of all
            return carry, (losses, validation_loss, jnp.mean(hits), jnp.mean(fraction, axis=0))

        counts = jnp.zeros(n), jnp.zeros((num_layers, n))
        carry = (params, tx.init(params), aj.init_sampler(key), *counts)
        carry, (losses, *curves) = jax.lax.scan(
            window_of_steps, carry, None, length=num_steps // window
        )
        rate = carry[4] / jnp.maximum(carry[3], 1)[None]
        return Curves(carry[0], jnp.mean(losses, axis=1), *curves, rate, jnp.mean(losses, axis=0))

    return jax.jit(jax.vmap(train, (0, 0, None, None)))


def records(curves: Curves, window: int) -> list[dict[str, float]]:
    """The rows of metrics.csv of one run."""
    names = subset_selection.group_names(curves.params)
    return [
        {
            "num_steps": (w + 1) * window,
            "train_loss": float(curves.train_loss[w]),
            "validation_loss": float(curves.validation_loss[w]),
            **{f"fraction {g}": float(x) for g, x in zip(names, curves.fraction[w], strict=True)},
        }
        for w in range(len(curves.train_loss))
    ]


def share_of_best(task: Task, params: Any, examples: Any, metric: str, n: int = 10) -> float:
    """How good the best prefix is in comparison with the best of all subsets, in (0, 1].

    The ratio of their metrics (inverted for the variance, which is minimized), a mean over the layers
    and over five batches of n examples.
    """
    subsets = np.array(list(itertools.product([0.0, 1.0], repeat=n)))[1:]
    k = subsets.sum(axis=1)
    shares = []
    per_example_grads = jax.jit(gradients.per_example_grads(task.losses.loss_fn))
    for rows in np.random.default_rng(0).permutation(len(examples[1]))[: 5 * n].reshape(5, n):
        batch = jax.tree.map(lambda x, rows=rows: x[rows], examples)
        grads = per_example_grads(params, batch)
        layers: dict[Any, list[np.ndarray]] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
            layers.setdefault(path[:-1], []).append(np.asarray(leaf, float).reshape(n, -1))
        for gram in (sum(g @ g.T for g in layer) for layer in layers.values()):
            square = ((subsets @ gram) * subsets).sum(axis=1) / k**2
            with np.errstate(invalid="ignore", divide="ignore"):
                variance = (subsets @ np.diag(gram) - k * square) / np.where(k > 1, k - 1, np.nan)
                scores = {"norm": square, "variance": -variance / k}
                best = np.nanmax(scores.get(metric, square * k / variance))
            found = _prefix_scores(jnp.array(gram), jnp.ones(n, bool), metric)
            ratio = float(jnp.max(found.score)) / best
            shares.append(1 / ratio if metric == "variance" else ratio)
    return float(np.mean(shares))
