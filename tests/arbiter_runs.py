"""One small Arbiter and its data, compiled once for all tests that share its options."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import arbiter_jax as aj

NUM_INPUTS, NUM_FEATURES, NUM_CLASSES, NUM_META = 4, 6, 3, 64
AGENT = aj.mlp_agent((NUM_INPUTS,), hidden_sizes=(5,))


def response_loss(params, response, meta_batch):
    inputs, labels = meta_batch
    features = jax.nn.relu(inputs @ params["w1"])
    outputs = (features * (1 + response[None, :])) @ params["w2"]
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


def make(loss=response_loss, **options):
    defaults = {"num_features": NUM_FEATURES, "window": 100, "max_batch_size": 64}
    defaults["initial_batch_size"] = 32
    return aj.arbiter(AGENT, loss, **(defaults | options))


class Problem(NamedTuple):
    params: Any
    grads: Any
    signals: dict[str, Any]


def problem(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)
    params = {"w1": draw(NUM_INPUTS, NUM_FEATURES), "w2": draw(NUM_FEATURES, NUM_CLASSES)}
    grads = jax.tree.map(lambda x: draw(*x.shape), params)
    labels = rng.integers(NUM_CLASSES, size=NUM_META).astype(np.int32)
    meta_batch = (draw(NUM_META, NUM_INPUTS), labels)
    return Problem(params, grads, {"agent_inputs": draw(8, NUM_INPUTS), "meta_batch": meta_batch})


@functools.cache
def compiled(**options):
    """(its compiled update, its first state) for hashable options; of the same program, one."""
    tx = make(**options)
    return jax.jit(tx.update), tx.init(problem().params)


def trace(tx, params, grads, signals):
    """Raises what an update raises, without a single program for it."""
    state = jax.eval_shape(tx.init, params)
    return jax.eval_shape(tx.update, grads, state, params, **signals)


def run(num_steps, **options):
    """Some updates on changing data; the state before the first and after each."""
    update, state = compiled(**options)
    states = [state]
    for step in range(num_steps):
        params, grads, signals = problem(step)
        states.append(update(grads, states[-1], params, **signals)[1])
    return states


def step(state=None, **options):
    """(state before, state after) one update on the first data."""
    update, start = compiled(**options)
    params, grads, signals = problem()
    before = start if state is None else state
    return before, update(grads, before, params, **signals)[1]
