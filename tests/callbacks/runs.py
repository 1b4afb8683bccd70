"""One small run that the tests of the callbacks share, so that its programs compile once."""

import jax.numpy as jnp
import optax

import arbiter_jax as aj

X = jnp.linspace(-1, 1, 50)
SPLIT = (X, 3 * X)


def predict(w, inputs):
    return w * inputs


def loss(outputs, labels):
    return (outputs - labels) ** 2


def loss_fn(w, batch):
    return loss(predict(w, batch[0]), batch[1])


TX = optax.chain(
    optax.sgd(0.1),
    aj.schedulers.constant(6),
    aj.schedulers.shadow(aj.schedulers.constant(9), name="nine"),
)


def fit(callbacks=(), **options):
    """Six windows of 4 steps of 6 examples."""
    options = {"num_examples": 150, "window": 4} | options
    return aj.fit(loss_fn, jnp.zeros(()), TX, aj.Data(SPLIT), callbacks=callbacks, **options)


class KilledError(Exception):
    """Ends a run as an error of the user's would."""


def kill_after(number):
    def kill(record, state):
        if record.window_index + 1 == number:
            raise KilledError

    return kill
