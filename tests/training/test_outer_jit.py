"""`run_window` inside `scan`, `vmap` and `jit` of one's own, as reinforcement learning is written."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from tests import arbiter_runs
from tests.problems import proposing

BUCKET, WINDOW, NUM_WINDOWS = 16, 4, 3
LIMITS = {"min_batch_size": 4, "max_batch_size": BUCKET, "initial_batch_size": 8}
RULES = {
    "gradient_noise_scale": lambda: aj.schedulers.gradient_noise_scale(decay=0.5, **LIMITS),
    "arbiter": lambda: arbiter_runs.make(
        window=WINDOW, agent_optimizer=optax.adam(0.1), hyper_every=1, **LIMITS
    ),
}


def losses(params, batch):
    inputs, labels = batch
    outputs = jax.nn.relu(inputs @ params["w1"]) @ params["w2"]
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


def examples(key, *shape):
    """New data for every window, as a rollout brings it: labels that the inputs do not explain."""
    inputs = jax.random.normal(key, (*shape, arbiter_runs.NUM_INPUTS))
    labels = jax.random.randint(key, shape, 0, arbiter_runs.NUM_CLASSES)
    return aj.Data(*2 * [(inputs, labels)])


ROLLOUTS = examples(jax.random.key(1), NUM_WINDOWS, 48)


def run_window(tx, state, data):
    return aj.run_window(
        state, data, loss_fn=losses, tx=tx, bucket_size=BUCKET, window=WINDOW, num_agent_inputs=8
    )


def chain(name):
    return optax.chain(optax.sgd(0.1, momentum=0.9), RULES[name]())


def first_state(tx, key=0):
    return aj.init_state(arbiter_runs.problem().params, tx, key)


NAMES = ["gradient_noise_scale", pytest.param("arbiter", marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gradient_noise_scale", pytest.param("arbiter", marks=pytest.mark.exhaustive)]
)
def test_scan_equals_calls(name):
    tx = chain(name)
    state, infos = first_state(tx), []
    for t in range(NUM_WINDOWS):
        state, info = run_window(tx, state, jax.tree.map(lambda x, t=t: x[t], ROLLOUTS))
        infos.append(info)

    @jax.jit
    def train(state, rollouts):
        return jax.lax.scan(lambda state, data: run_window(tx, state, data), state, rollouts)

    scanned, stacked = train(first_state(tx), ROLLOUTS)
    called = state, jax.tree.map(lambda *x: jnp.stack(x), *infos)
    if name == "arbiter":  # another program rounds another way in its many small sums
        chex.assert_trees_all_close((scanned, stacked), called, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(stacked.batch_size, called[1].batch_size)
    else:
        chex.assert_trees_all_equal((scanned, stacked), called)
    sizes = stacked.batch_size[:, 0]
    assert len(set(map(int, sizes))) > 1  # masks move, the shape does not
    assert (stacked.batch_size == sizes[:, None]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_vmap_equals_each_alone(name):
    tx = chain(name)
    data = jax.tree.map(lambda x: x[0], ROLLOUTS)
    step = lambda state: run_window(tx, state, data)
    states, infos = jax.vmap(step)(jax.vmap(lambda key: first_state(tx, key))(jnp.arange(2)))
    for i in range(2):
        state, info = step(first_state(tx, i))
        mine = jax.tree.map(lambda x, i=i: x[i], (states, infos))
        np.testing.assert_array_equal(mine[1].batch_size, info.batch_size)
        chex.assert_trees_all_close(mine[0].params, state.params, rtol=1e-4, atol=1e-6)
        chex.assert_trees_all_close(mine[1].metrics, info.metrics, rtol=1e-3, atol=1e-5)


def test_a_decision_above_the_bucket_is_clipped():
    """It stays in the state, and holds where the bucket has room for it."""
    tx = optax.chain(optax.sgd(0.1), proposing(8, 1000))
    scan = lambda state: jax.lax.scan(lambda s, d: run_window(tx, s, d), state, ROLLOUTS)
    state, info = jax.jit(scan, donate_argnums=0)(first_state(tx))
    assert info.batch_size[:, 0].tolist() == [8, BUCKET, BUCKET]
    assert int(aj.get_batch_size(state.opt_state)) > BUCKET


def test_micro_batches_take_any_size():
    """The bucket is fixed, but the number of its groups is not."""
    tx = optax.chain(optax.sgd(0.1), proposing(4, 4, 4, 24))
    options = {"loss_fn": losses, "tx": tx, "bucket_size": 8, "micro_batch_size": 8, "window": 2}
    step = lambda state, data: aj.run_window(state, data, **options)
    _, info = jax.jit(lambda state: jax.lax.scan(step, state, ROLLOUTS))(first_state(tx))
    assert info.batch_size[:, 0].tolist() == [4, 4, 24]


@pytest.mark.slow
def test_the_outer_jit_donates():
    """Inside it nothing is: whoever calls it says what may be overwritten."""
    tx = chain("gradient_noise_scale")
    data = jax.tree.map(lambda x: x[0], ROLLOUTS)
    step = lambda state: run_window(tx, state, data)[0]
    kept = first_state(tx)
    kept_after = jax.jit(step)(kept)
    given = first_state(tx)
    after = jax.jit(step, donate_argnums=0)(given)
    assert not kept.params["w1"].is_deleted()
    assert given.params["w1"].is_deleted()
    chex.assert_trees_all_equal(after, kept_after)
