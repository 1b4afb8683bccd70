"""Stochastic meta-descent of `short_horizon_bias`: offline, online, and its objective's surface."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import arbiter_jax as aj
from arbiter_jax import datasets
from arbiter_jax import stochastic_meta_descent as smd

MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True)
class Network:
    """A perceptron as in the paper, and the training examples that it descends on."""

    sizes: tuple[int, ...]
    data: Any
    batch_size: int
    time_constant: float

    def init(self, key: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        """Weights of standard deviation .1, biases 0."""
        layers = list(zip(self.sizes[:-1], self.sizes[1:], strict=True))
        keys = jax.random.split(key, len(layers))
        return [
            (0.1 * jax.random.normal(key, layer), jnp.zeros(layer[1]))
            for key, layer in zip(keys, layers, strict=True)
        ]

    @property
    def loop(self) -> dict[str, Any]:
        """Arguments of every loop over this network."""
        return {"batch_size": self.batch_size, "time_constant": self.time_constant}


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """The cross-entropy of each example, float[M]."""
    x, labels = batch
    for i, (weight, bias) in enumerate(params):
        x = x @ weight + bias[None]
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return optax.softmax_cross_entropy_with_integer_labels(x, labels)


def network(
    dataset: str, hidden_size: int, num_examples: int, batch_size: int, time_constant: float
) -> Network:
    """The network for a data set: pixels in [0, 1], training and validation split joined."""
    loaded = datasets.load(dataset)
    splits = (loaded.train, loaded.validation)
    inputs, labels = (np.concatenate(parts)[:num_examples] for parts in zip(*splits, strict=True))
    inputs = inputs.reshape(len(inputs), -1)
    inputs = (inputs - inputs.min()) / (inputs.max() - inputs.min())
    data = (jnp.asarray(inputs), jnp.asarray(labels))
    sizes = (inputs.shape[1], hidden_size, hidden_size, loaded.num_classes)
    return Network(sizes, data, batch_size, time_constant)


def effective(hyperparameters: smd.Hyperparameters, step: float, net: Network) -> Any:
    """The effective learning rate at a step of training."""
    rate, momentum, decay = (np.asarray(x, float) for x in hyperparameters)
    return rate / (1 - momentum) * (1 + step / net.time_constant) ** -decay


def _mean_loss(params: Any, net: Network) -> jax.Array:
    return jnp.mean(loss_fn(params, net.data))


def _over_seeds(function: Any, seeds: tuple[int, ...]) -> Any:
    """Maps a function of a seed's two keys over the seeds, in sequence: faster than vmap on CPU."""
    keys = jnp.stack([jax.random.split(jax.random.PRNGKey(seed)) for seed in seeds])
    return jax.tree.map(np.asarray, jax.jit(lambda keys: jax.lax.map(function, keys))(keys))


def offline(
    net: Network,
    seeds: tuple[int, ...],
    horizon: int,
    num_meta_steps: int,
    num_steps: int,
    meta_rate: float,
) -> dict[str, Any]:
    """Learns a schedule over a horizon, then trains with it.

    Returns:
      Arrays with one row per seed: `learned` hyperparameters and their `history`, the batch `losses`
      of the training with them, and the `final_loss` over all examples.
    """
    meta_optimizer = optax.adam(meta_rate)

    def run(keys):
        found = smd.offline(
            loss_fn,
            net.init(keys[0]),
            net.data,
            keys[1],
            horizon=horizon,
            num_meta_steps=num_meta_steps,
            hyperparameters=smd.Hyperparameters(0.01, MOMENTUM, 10.0),
            meta_optimizer=meta_optimizer,
            **net.loop,
        )
        end, losses = smd.train(
            loss_fn, found.state, net.data, found.hyperparameters, num_steps=num_steps, **net.loop
        )
        return {
            "learned": found.hyperparameters,
            "history": found.history,
            "losses": losses,
            "final_loss": _mean_loss(end.params, net),
            "num_skipped": found.num_skipped,
        }

    return _over_seeds(run, seeds)


def online(
    net: Network,
    seeds: tuple[int, ...],
    rates: tuple[float, ...],
    num_steps: int,
    meta_every: int,
    meta_rate: float,
    reset_meta_state: bool,
) -> dict[str, Any]:
    """Trains at every manual rate of a grid, then with meta-descent from the best of them."""
    meta_optimizer = optax.adam(meta_rate)

    def run(keys, rate, **options):
        found = smd.online(
            loss_fn,
            net.init(keys[0]),
            net.data,
            keys[1],
            num_steps=num_steps,
            hyperparameters=smd.Hyperparameters((1 - MOMENTUM) * rate, MOMENTUM, 0.0),
            meta_every=meta_every,
            meta_optimizer=meta_optimizer,
            reset_meta_state=reset_meta_state,
            **options,
            **net.loop,
        )
        history = found.history
        return {
            "rates": history.learning_rate / (1 - history.momentum),
            "momenta": history.momentum,
            "losses": found.losses,
            "final_loss": _mean_loss(found.state.params, net),
        }

    left_alone = lambda keys: jax.lax.map(lambda r: run(keys, r, learned=()), jnp.array(rates))
    manual = _over_seeds(left_alone, seeds)
    grid = manual["final_loss"]  # [seed, rate]
    best = int(np.argmin(np.where(np.isfinite(grid), grid, np.inf).mean(0)))
    return {
        "grid": grid,
        "best": best,
        "manual": jax.tree.map(lambda x: x[:, best], manual),
        "adjusted": _over_seeds(lambda keys: run(keys, rates[best]), seeds),
    }


def surface(
    net: Network, seed: int, horizons: tuple[int, ...], rates: np.ndarray, decays: np.ndarray
) -> np.ndarray:
    """Returns float[horizon, decay, rate]: the loss after T steps of each schedule.

    Every look-ahead starts from the same parameters, pretrained as in :func:`offline`, and uses the
    same batches, so one run to the longest horizon passes through all horizons.
    """

    @jax.jit
    def point(rate, decay):
        init_key, key = jax.random.split(jax.random.PRNGKey(seed))
        inner = lambda rate: optax.sgd(rate, MOMENTUM)
        state = aj.init_state(net.init(init_key), inner(0.1), key)
        pretraining = smd.Hyperparameters(0.1, MOMENTUM, 0.0)
        state, _ = smd.train(loss_fn, state, net.data, pretraining, num_steps=50, **net.loop)
        state = state._replace(
            opt_state=inner(0.1).init(state.params), num_steps=jnp.zeros_like(state.num_steps)
        )
        tried = smd.Hyperparameters((1 - MOMENTUM) * rate, MOMENTUM, decay)
        losses, done = [], 0
        for horizon in horizons:
            state, _ = smd.train(
                loss_fn, state, net.data, tried, num_steps=horizon - done, **net.loop
            )
            losses.append(_mean_loss(state.params, net))
            done = horizon
        return jnp.stack(losses)

    columns = jnp.stack(jnp.meshgrid(jnp.array(rates), jnp.array(decays)), -1).reshape(-1, 2)
    losses = jax.jit(lambda pairs: jax.lax.map(lambda p: point(p[0], p[1]), pairs))(columns)
    return np.asarray(losses).T.reshape(len(horizons), len(decays), len(rates))
