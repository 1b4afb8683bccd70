"""JAX: a network of plain functions, fed by a `torch.utils.data.DataLoader`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax


def numpy_collate(examples):
    """A batch as NumPy arrays, for the `collate_fn` of a DataLoader: torch would make tensors."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *examples)


def random_layer_params(m, n, key, scale=1e-1):
    w_key, b_key = jax.random.split(key)
    return scale * jax.random.normal(w_key, (m, n)), scale * jax.random.normal(b_key, (n,))


def init_network_params(sizes, key):
    keys = jax.random.split(key, len(sizes) - 1)
    layers = zip(sizes[:-1], sizes[1:], keys, strict=True)
    return [random_layer_params(m, n, k) for m, n, k in layers]


def predict(params, image):
    activations = image
    for w, b in params[:-1]:
        activations = jax.nn.relu(w.T @ activations + b)
    final_w, final_b = params[-1]
    return jax.nn.log_softmax(final_w.T @ activations + final_b)


batched_predict = jax.vmap(predict, in_axes=(None, 0))


def loss(params, batch):
    images, labels = batch
    targets = jax.nn.one_hot(labels, 10)
    return -jnp.mean(jnp.sum(batched_predict(params, images) * targets, axis=-1))


def train(tx, loader, test, num_steps):
    params = init_network_params([64, 32, 10], jax.random.key(0))
    opt_state = tx.init(params)
    losses = []

    @jax.jit
    def update(params, opt_state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    for batch in itertools.islice(loader, num_steps):
        params, opt_state, value = update(params, opt_state, batch)
        losses.append(float(value))

    losses.append(float(jnp.mean(loss(params, test))))
    return params, losses
