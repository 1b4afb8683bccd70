"""A perceptron in plain JAX: parameters in a list, pure functions, one jitted update of optax."""

import jax
import jax.numpy as jnp
import optax


def init_params(key, sizes):
    params = []
    for layer_key, fan_in, fan_out in zip(
        jax.random.split(key, len(sizes) - 1), sizes[:-1], sizes[1:], strict=True
    ):
        weight = jax.random.normal(layer_key, (fan_in, fan_out)) * jnp.sqrt(2 / fan_in)
        params.append({"weight": weight, "bias": jnp.zeros(fan_out)})
    return params


def predict(params, inputs):
    x = inputs.reshape(len(inputs), -1)
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["weight"] + layer["bias"][None])
    return x @ params[-1]["weight"] + params[-1]["bias"][None]


def cross_entropy(params, batch):
    inputs, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(predict(params, inputs), labels)


def loss_fn(params, batch):
    return jnp.mean(cross_entropy(params, batch))


def train(tx, source, validation, num_steps):
    params = init_params(jax.random.key(0), (64, 32, 10))
    opt_state = tx.init(params)
    grad_fn = jax.value_and_grad(loss_fn)

    @jax.jit
    def update(params, opt_state, batch):
        value, grads = grad_fn(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    losses = []
    for batch in source:
        params, opt_state, value = update(params, opt_state, batch)
        losses.append(float(value))
        if len(losses) == num_steps:
            break
    losses.append(float(loss_fn(params, validation)))
    return (params, opt_state), losses
