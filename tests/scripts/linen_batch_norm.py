"""Flax Linen: a dense network with BatchNorm, whose statistics a `TrainState` carries."""

import itertools
from typing import Any

import flax
import jax
import optax
from flax import linen as nn
from flax.training import train_state


class MLP(nn.Module):
    """Two dense layers with BatchNorm between them."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(features=32)(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.relu(x)
        return nn.Dense(features=10)(x)


class TrainState(train_state.TrainState):
    """The parameters, and the other variables of the model: {"batch_stats": ...}."""

    model_state: Any


def softmax_loss(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def train(tx, source, test, num_steps):
    mlp = MLP()
    variables = mlp.init(jax.random.key(0), test[0], train=False)
    model_state, params = flax.core.pop(variables, "params")
    state = TrainState.create(apply_fn=mlp.apply, params=params, tx=tx, model_state=model_state)
    losses = []

    @jax.jit
    def train_step(state: TrainState, batch):
        def loss_fn(params):
            variables = {"params": params, **state.model_state}
            logits, updates = state.apply_fn(
                variables, batch[0], train=True, mutable=["batch_stats"]
            )
            return softmax_loss(logits, batch[1]).mean(), updates

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, model_state), grads = grad_fn(state.params)
        state = state.apply_gradients(grads=grads, model_state=model_state)
        return state, loss

    @jax.jit
    def eval_step(state: TrainState, batch):
        variables = {"params": state.params, **state.model_state}
        logits = state.apply_fn(variables, batch[0], train=False)
        return softmax_loss(logits, batch[1]).mean()

    for batch in itertools.islice(source, num_steps):
        state, loss = train_step(state, batch)
        losses.append(float(loss))

    losses.append(float(eval_step(state, test)))
    return state, losses
