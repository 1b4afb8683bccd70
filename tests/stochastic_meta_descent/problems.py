"""The regression that meta-descent is tested on."""

import jax
import jax.numpy as jnp
import numpy as np

import arbiter_jax as aj
from arbiter_jax import stochastic_meta_descent as smd

HYPERPARAMETERS = smd.Hyperparameters(0.05, 0.8, 0.7)


def regression(num_examples: int = 40):
    """Parameters and data of a smooth nonlinear problem, on which finite differences are exact."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(num_examples, 3))
    targets = np.sin(inputs.sum(1)) + 0.1 * rng.normal(size=num_examples)
    dtype = jnp.result_type(float)
    params = {"w": rng.normal(size=(3, 4)) / 2, "v": rng.normal(size=4) / 2}
    as_array = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
    return as_array(params), as_array((inputs, targets))


def loss_fn(params, batch):
    inputs, targets = batch
    return (jnp.tanh(inputs @ params["w"]) @ params["v"] - targets) ** 2


@jax.jit
def mean_loss(params, batch):
    return loss_fn(params, batch).mean()


def as_arrays(hyperparameters):
    return smd.Hyperparameters(*(jnp.asarray(x) for x in hyperparameters))


def start(inner_optimizer, key):
    """A state at the start of training with HYPERPARAMETERS, and the data."""
    params, data = regression()
    return aj.init_state(params, inner_optimizer(*HYPERPARAMETERS[:2]), key), data
