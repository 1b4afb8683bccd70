"""Gradients and losses that the tests of this folder share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

from arbiter_jax import subset_selection
from arbiter_jax.base import WeightedLoss
from arbiter_jax.models import conv_general_dilated

METRICS = ("signal_to_noise", "variance", "norm")
ORDERS = ("distance", "norm", "alignment")
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def gaussian_rows(n, d, seed=0, signal=0.5):
    return signal + np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


@functools.partial(jax.jit, static_argnames="min_size")
def _select(grads, mask, min_size):
    return {m: subset_selection.select_subset(grads, m, min_size, mask) for m in METRICS}


def select_all(grads, mask=None, min_size=1):
    """The selection by each metric, in one program per shape."""
    return _select(grads, np.ones(len(grads), bool) if mask is None else mask, min_size)


def direct_score(grads, metric):
    """The metric of one subset, from its definition."""
    k = len(grads)
    mean = grads.mean(axis=0)
    if metric == "norm":
        return mean @ mean
    if k == 1:
        return -np.inf
    variance = np.trace(np.atleast_2d(np.cov(grads, rowvar=False)))
    return -variance / k if metric == "variance" else mean @ mean / (variance / k)


def direct_order(grads, order):
    mean = grads.mean(axis=0)
    key = {
        "distance": ((grads - mean) ** 2).sum(axis=1),
        "norm": (grads**2).sum(axis=1),
        "alignment": -grads @ mean,
    }[order]
    return np.argsort(key, kind="stable")


# Losses, with parameters and 16 examples.


class Network(nnx.Module):
    """Convolutions, a LayerNorm and a dense layer: every kind of site."""

    def __init__(self, rngs, **settings):
        self.first = nnx.Conv(1, 4, (3, 3), rngs=rngs, **settings)
        self.second = nnx.Conv(
            4, 6, (2, 3), strides=2, padding="VALID", kernel_dilation=(1, 1), rngs=rngs, **settings
        )
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.head = nnx.Linear(36, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(x))
        x = nnx.relu(self.norm(self.second(x)))
        return self.head(x.reshape(x.shape[0], -1))


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.attend = nnx.MultiHeadAttention(2, 12, decode=False, keep_rngs=False, rngs=rngs)
        self.head = nnx.Linear(12, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(self.attend(x)).mean(axis=1)


def filled(shapes, scale=0.3):
    """Arrays of these shapes; unlike the initializers of a model it compiles nothing."""
    rng = np.random.default_rng(0)
    fill = lambda s: jnp.array(scale * rng.normal(size=s.shape), jnp.float32)
    return jax.tree.map(fill, shapes)


def inputs(*shape):
    return jnp.array(np.random.default_rng(1).normal(size=shape), jnp.float32)


def nnx_problem(make, x):
    graph, shapes = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return lambda p, b: cross_entropy(nnx.merge(graph, p)(b[0]), b[1]), filled(shapes), x


def linen_problem(wrap=lambda f: f, num_positions=1):
    model = linen.Sequential([linen.Dense(12), linen.relu, linen.Dense(10)])
    x = inputs(16, num_positions * 20)
    shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0), x[:, :20])

    def loss_fn(p, batch):
        positions = batch[0].reshape(-1, num_positions, 20)
        return cross_entropy(model.apply(p, positions).mean(axis=1), batch[1])

    return wrap(loss_fn), filled(shapes), x


def plain_problem():
    sizes = {
        "transposed": (12, 20),
        "positive": (12, 10),
        "table": (10, 10),
        "shared": (10, 10),
        "bias": (10,),
        "unused": (3,),
    }
    params = filled({name: jax.ShapeDtypeStruct(size, float) for name, size in sizes.items()})

    def loss_fn(p, batch):
        hidden = jnp.tanh(p["transposed"] @ batch[0].T).T @ jax.nn.softplus(p["positive"])
        hidden += p["table"][batch[1]] + p["bias"][None]
        return cross_entropy(jnp.tanh(hidden @ p["shared"]) @ p["shared"], batch[1])

    return loss_fn, params, inputs(16, 20)


def penalized_problem():
    loss_fn, params, x = linen_problem()
    return lambda p, b: loss_fn(p, b) + 0.01 * optax.tree.norm(p, squared=True), params, x


def weighted_problem():
    loss_fn, params, x = linen_problem()

    def weighted(p, batch):
        tokens = loss_fn(p, batch)[:, None] * jnp.arange(1.0, 4.0)[None]
        return WeightedLoss(tokens, (jnp.abs(batch[0][:, :3]) > 0.3).astype(float))

    return weighted, params, x


PROBLEMS = {
    "nnx": lambda: nnx_problem(Network, inputs(16, 6, 6, 1)),
    "patches": lambda: nnx_problem(
        functools.partial(Network, conv_general_dilated=conv_general_dilated), inputs(16, 6, 6, 1)
    ),
    "attention": lambda: nnx_problem(Attention, inputs(16, 7, 12)),
    "linen": lambda: linen_problem(lambda f: jax.checkpoint(jax.jit(f)), num_positions=2),
    "plain": plain_problem,
    "penalized": penalized_problem,
    "weighted": weighted_problem,
}


@functools.cache
def problem(name):
    loss_fn, params, x = PROBLEMS[name]()
    return loss_fn, params, (x, jnp.array(np.random.default_rng(2).integers(0, 10, 16)))


@functools.cache
def subset_gradient_fn(name, **settings):
    """Jitted, and kept: the tests of one problem share its program."""
    return jax.jit(subset_selection.subset_gradients(problem(name)[0], **settings))


def mlp_problem(n=64):
    def loss_fn(p, batch):
        hidden = jax.nn.relu(batch[0] @ p["in"])
        return cross_entropy(hidden @ p["out"], batch[1])

    sizes = {"in": (400, 128), "out": (128, 10)}
    params = {name: jax.ShapeDtypeStruct(size, float) for name, size in sizes.items()}
    return loss_fn, filled(params, 0.05), (inputs(n, 400), jnp.arange(n) % 10)
