"""How often the loss function is called while a window is traced."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj

NUM_EXAMPLES = 64


def counted_loss():
    calls: list[Any] = []

    def loss_fn(w, batch):
        calls.append(None)
        inputs, labels = batch
        return (inputs @ w - labels) ** 2

    return loss_fn, calls


def traces(make_rule, **options) -> int:
    """The calls of the loss function while one window of `num_steps` steps is traced."""
    loss_fn, calls = counted_loss()
    tx = optax.chain(optax.sgd(0.1), make_rule(loss_fn))
    inputs = np.ones((NUM_EXAMPLES, 3), np.float32)
    data = aj.Data((inputs, inputs[:, 0]), (inputs, inputs[:, 0]))
    state = aj.init_state(jnp.zeros(3), tx, jax.random.PRNGKey(0))
    run = functools.partial(
        aj.run_window.__wrapped__, loss_fn=loss_fn, tx=tx, bucket_size=8, window=4, **options
    )
    jax.eval_shape(run, state, data, jnp.int32(3))
    return len(calls)


LIMITS = {"min_batch_size": 4, "max_batch_size": 8}
S = aj.schedulers


@pytest.mark.parametrize(
    ("make_rule", "expected"),
    [
        (lambda loss_fn: S.constant(8), 1),
        (lambda loss_fn: S.adadamp(**LIMITS), 1),
        # Once per piece: two halves.
        (lambda loss_fn: S.gradient_noise_scale(**LIMITS), 2),
        # The plain step, two pieces.
        (lambda loss_fn: S.noise_floor(persistence=1.0, num_examples=NUM_EXAMPLES, **LIMITS), 3),
        # The plain step, two pieces, validation examples.
        (lambda loss_fn: S.noise_floor(loss_fn, persistence=1.0, **LIMITS), 4),
        (lambda loss_fn: S.expected_gain(loss_fn, persistence=1.0, **LIMITS), 4),
    ],
)
def test_loss_is_traced_once_per_use(make_rule, expected):
    assert traces(make_rule) == expected


def test_another_gradient_is_traced_once():
    """Also to learn what it reports."""
    loss_fn, calls = counted_loss()

    def gradient_fn(params, batch, mask, model_state=None, key=None):
        value, grads = jax.value_and_grad(lambda w: jnp.mean(loss_fn(w, batch)))(params)
        return aj.gradients.Gradient(value, grads)

    tx = optax.sgd(0.1)
    state = aj.init_state(jnp.zeros(3), tx, jax.random.PRNGKey(0))
    data = aj.Data((jnp.ones((NUM_EXAMPLES, 3)), jnp.ones(NUM_EXAMPLES)))
    run = functools.partial(
        aj.run_window.__wrapped__, gradient_fn=gradient_fn, tx=tx, bucket_size=8, window=4
    )
    jax.eval_shape(run, state, data, jnp.int32(3))
    assert len(calls) == 1
