"""Flax Linen: a dense network with BatchNorm, whose statistics a `TrainState` carries."""

import itertools
from typing import Any

import flax
import jax
import optax
from flax import linen as nn

import arbiter_jax as aj


class MLP(nn.Module):
    """Two dense layers with BatchNorm between them."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(features=32)(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.relu(x)
        return nn.Dense(features=10)(x)


class TrainState(aj.models.TrainState):
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
    loss_fn = aj.models.make_losses(aj.models.attach(mlp, "Dense_1", test[0]), softmax_loss).loss_fn

    @jax.jit
    def train_step(state: TrainState, batch):
        grad_fn = aj.value_grad_and_signals(loss_fn, tx)
        loss, grads, signals = grad_fn(
            state.params, state.opt_state, batch, validation=test, model_state=state.model_state
        )
        state = state.apply_gradients(grads=grads, **signals)
        return state, loss

    @jax.jit
    def eval_step(state: TrainState, batch):
        variables = {"params": state.params, **state.model_state}
        logits = state.apply_fn(variables, batch[0], train=False)
        return softmax_loss(logits, batch[1]).mean()

    source = aj.datasets.batches(source, lambda: aj.get_batch_size(state.opt_state))
    for batch in itertools.islice(source, num_steps):
        state, loss = train_step(state, batch)
        losses.append(float(loss))

    losses.append(float(eval_step(state, test)))
    return state, losses
