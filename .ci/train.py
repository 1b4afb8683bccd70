"""Trains with the core dependencies alone: two rules, Arbiter on a Flax module, chosen subsets."""

import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import arbiter_jax as aj
from arbiter_jax import datasets, models

assert aj.__file__.startswith(sys.prefix), f"{aj.__file__} is not the installed package"
cross_entropy = optax.softmax_cross_entropy_with_integer_labels
dataset = datasets.synthetic(256, num_classes=3)
# One bucket, and so one program per run.
sizes = {"min_batch_size": 5, "max_batch_size": 8, "initial_batch_size": 6}


class Network(nnx.Module):
    """A network with a state, so that all of the NNX adapter runs."""

    def __init__(self, rngs):
        self.body = nnx.Linear(16, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x, use_running_average):
        return self.head(self.norm(self.body(x), use_running_average=use_running_average))


def train(name, model, rule, **options):
    """Trains briefly and prints the batch sizes."""
    params, model_state = model.init(jax.random.PRNGKey(0))
    loss_fn = None if options else models.make_losses(model, cross_entropy).loss_fn
    tx = optax.chain(optax.sgd(0.1), rule)
    options |= {"num_examples": 100, "window": 5, "model_state": model_state}
    result = aj.fit(loss_fn, params, tx, dataset, **options)
    assert result.history[-1].loss < result.history[0].loss, name
    print(name, [record.batch_size for record in result.history])


mlp = models.mlp(dataset.input_shape, hidden_sizes=(8,), num_classes=3)
loss_fn = models.make_losses(mlp, cross_entropy).loss_fn
train("noise scale", mlp, aj.schedulers.gradient_noise_scale(**sizes))
train("noise floor", mlp, aj.schedulers.noise_floor(loss_fn, num_examples=100, **sizes))
train("subsets", mlp, aj.schedulers.constant(8), gradient_fn=aj.subset_gradients(loss_fn))

network = models.attach(lambda rngs: Network(rngs), "head", jnp.zeros((1, 16)))
response_loss = models.make_losses(network, cross_entropy).response_loss
agent = aj.mlp_agent(dataset.input_shape, hidden_sizes=(8,))
train("arbiter", network, aj.arbiter(agent, response_loss, num_features=8, window=5, **sizes))

tx = optax.experimental.aggregating.process(
    optax.identity(), aj.dynamic_batch_adaptation(), optax.adam(0.1)
)
updates, _ = tx.update(jnp.ones((4, 3)), tx.init(jnp.zeros(3)), jnp.zeros(3))
print("aggregator", updates)
