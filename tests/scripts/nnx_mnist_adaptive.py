"""Flax NNX: a convolutional network with BatchNorm and dropout, trained on images of digits."""

import itertools
from functools import partial

import optax
from flax import nnx

import arbiter_jax as aj


class CNN(nnx.Module):
    """Two convolutions and two dense layers."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 8, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(8, rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.05, rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm2 = nnx.BatchNorm(16, rngs=rngs)
        self.avg_pool = partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(64, 32, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate=0.1, rngs=rngs)
        self.linear2 = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = self.avg_pool(nnx.relu(self.batch_norm1(self.dropout1(self.conv1(x)))))
        x = self.avg_pool(nnx.relu(self.batch_norm2(self.conv2(x))))
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(self.dropout2(self.linear1(x)))
        return self.linear2(x)


def loss_fn(model: CNN, batch):
    logits = model(batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return loss, logits


def train(tx, source, test, num_steps):
    model = CNN(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
    history = []

    @nnx.jit
    def train_step(model: CNN, optimizer: nnx.Optimizer, metrics: nnx.MultiMetric, batch):
        grad_fn = aj.value_grad_and_signals(loss_fn, tx, has_aux=True)
        loss, grads, signals, logits = grad_fn(model, optimizer.opt_state, batch, validation=test)
        metrics.update(loss=loss, logits=logits, labels=batch.examples["label"], mask=batch.mask)
        optimizer.update(model, grads, **signals)

    @nnx.jit
    def eval_step(model: CNN, metrics: nnx.MultiMetric, batch):
        loss, logits = loss_fn(model, batch)
        metrics.update(loss=loss, logits=logits, labels=batch["label"])

    source = aj.datasets.batches(source, lambda: aj.get_batch_size(optimizer.opt_state))
    model.train()
    for batch in itertools.islice(source, num_steps):
        train_step(model, optimizer, metrics, batch)
        history.append(metrics.compute())
        metrics.reset()

    model.eval()
    eval_step(model, metrics, test)
    history.append(metrics.compute())
    return model, history
