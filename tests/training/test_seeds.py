"""Several seeds in one program: each of them does what it does alone."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from tests.rules import ARBITERS, NUM_FEATURES, RULES
from tests.rules import loss_fn as sum_loss

LIMITS = {"min_batch_size": 5, "max_batch_size": 16, "initial_batch_size": 8}
KEYS = jax.random.split(jax.random.key(1), 3)
STARTS = {"w": jnp.stack([jnp.full(NUM_FEATURES, x) for x in (0.9, 0.0, 9.0)])}
slow = pytest.mark.slow
of = lambda tree, i: jax.tree.map(lambda x: x[i], tree)


def measured_by_examples(**limits):
    """Reads no clock, as `goodput` and `step_cost="measured"` do."""
    return aj.schedulers.expected_gain(sum_loss, measure_every=2, **limits)


CASES = {name: case.make for name, case in (RULES | ARBITERS).items() if name != "goodput"}
CASES["expected_gain"] = measured_by_examples
FAST = ("constant", "gradient_noise_scale", "noise_floor", "arbiter")


def loss_fn(params, batch):
    inputs, labels = batch
    return (inputs @ params["w"] - labels) ** 2


@functools.cache
def draw(seed, num_examples=60):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(num_examples, NUM_FEATURES)).astype(np.float32)
    labels = inputs @ np.ones(NUM_FEATURES) + 0.3 * rng.normal(size=num_examples)
    return inputs, labels.astype(np.float32)


def fit(tx, loss=loss_fn, **options):
    defaults = {"params": STARTS, "data": aj.Data(draw(0), draw(1)), "key": KEYS}
    return aj.fit(loss, tx=tx, **(defaults | {"num_examples": 400, "window": 8} | options))


def assert_same(found, alone):
    """The result of a seed against that of its own run."""
    said = lambda result: [
        (r.window_index, r.batch_size, r.bucket_size, r.num_steps, r.num_examples)
        for r in result.history
    ]
    assert said(found) == said(alone)
    for a, b in zip(found.history, alone.history, strict=True):
        chex.assert_trees_all_close(a.info, b.info, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(found.state, alone.state, rtol=1e-5, atol=1e-5)


def check_seeds(tx, loss=loss_fn, **options):
    """Trains the seeds together and one by one; returns the common result."""
    together = fit(tx, loss, **options)
    stacked = ("params", "model_state", "state")
    given = {"params": STARTS, "key": KEYS} | options
    for i in range(len(KEYS)):
        own = {name: of(x, i) if name in stacked else x for name, x in given.items()}
        own["key"] = given["key"][i]
        assert_same(together.of_seed(i), fit(tx, loss, **own))
    return together


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=slow) for name in sorted(CASES)]
)
def test_each_seed_equals_its_own_run(name):
    tx = optax.chain(optax.sgd(0.02, momentum=0.5), CASES[name](**LIMITS))
    result = check_seeds(tx)
    sizes = [tuple(r.batch_size for r in history) for history in result.history]
    if name in ("gradient_noise_scale", "noise_floor"):
        assert len(set(sizes)) == len(KEYS)


