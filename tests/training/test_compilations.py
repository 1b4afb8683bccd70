"""The compile budget of a run, counted."""

import json
import os
import pathlib
import subprocess
import sys
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax.training import count_compilations

# As a batch size may wander: every bucket of 8-512, in no order, and most of them twice.
SIZES = (64, 8, 512, 9, 33, 17, 100, 200, 257, 16, 500, 128, 31, 8)


class CyclingState(NamedTuple):
    batch_size: jax.Array  # shape=(), dtype=int32
    step: jax.Array  # shape=(), dtype=int32


def cycling(sizes, every):
    """A rule that goes through a list of sizes, one every few updates."""
    sizes = np.asarray(sizes, np.int32)

    def init_fn(params):
        del params
        return CyclingState(jnp.int32(sizes[0]), jnp.int32(0))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        step = state.step + 1
        size = jnp.asarray(sizes)[(step // every) % len(sizes)]
        return updates, CyclingState(size, step)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def loss_fn(params, batch):
    inputs, labels = batch
    return (inputs @ params - labels) ** 2


def response_loss(params, response, meta_batch):
    inputs, labels = meta_batch
    return ((inputs * (1 + response[None])) @ params - labels) ** 2


def data():
    inputs = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
    return aj.Data((inputs, inputs.sum(axis=1)), (inputs, inputs.sum(axis=1)))


def run_through_all_buckets():
    tx = optax.chain(optax.sgd(0.01), cycling(SIZES, every=2))
    budget = 2 * sum(SIZES)
    return aj.fit(loss_fn, jnp.zeros(3), tx, data(), num_examples=budget, window=2)


def run_arbiter():
    agent = aj.mlp_agent((3,), hidden_sizes=(4,))
    rule = aj.arbiter(agent, response_loss, num_features=3, window=3)
    tx = optax.chain(optax.sgd(0.01), rule)
    return aj.fit(loss_fn, jnp.zeros(3), tx, data(), num_examples=64 * 3, window=3)


@pytest.mark.slow
@pytest.mark.usefixtures("no_cached_programs")
def test_guarantee_2_one_program_per_bucket():
    result = run_through_all_buckets()
    assert [record.batch_size for record in result.history] == list(SIZES)
    buckets = [record.bucket_size for record in result.history]
    assert buckets == [aj.next_bucket(size) for size in SIZES]
    assert len(set(buckets)) == len(aj.all_buckets(8, 512)) == 7
    assert result.num_compilations == 7
    # One each time a bucket is new.
    first = [buckets.index(bucket) == i for i, bucket in enumerate(buckets)]
    assert [record.num_compilations for record in result.history] == [int(f) for f in first]


SECOND_PROCESS = """
import json, sys
sys.path.insert(0, {path!r})
from tests.training.test_compilations import run_arbiter, run_through_all_buckets
results = [run_through_all_buckets(), run_arbiter()]
print(json.dumps([[r.num_compilations, r.num_cache_hits] for r in results]))
"""


@pytest.mark.slow
def test_guarantee_2_second_process_compiles_nothing(tmp_path):
    environment = dict(
        os.environ,
        JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    )
    script = SECOND_PROCESS.format(path=str(pathlib.Path(__file__).parents[2]))
    counts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        counts.append(json.loads(done.stdout))
    assert counts == [[[7, 0], [1, 0]], [[0, 7], [0, 1]]]


# Compiled once: nothing at all is asked of the compiler again, also no small operation


def noisy(rate=0.01):
    rule = aj.schedulers.gradient_noise_scale(max_batch_size=8)  # one bucket
    return optax.chain(optax.inject_hyperparams(optax.sgd)(rate), rule)


def plain(rate=0.01):
    return optax.chain(optax.inject_hyperparams(optax.sgd)(rate), aj.schedulers.constant(8))


def counted(function, *args, **kwargs):
    with count_compilations() as compilations:
        jax.block_until_ready(jax.tree.leaves(function(*args, **kwargs)))
    return compilations.num_programs


def test_a_second_fit_compiles_nothing():
    tx, arrays = noisy(), data()
    run = lambda seed: (
        aj.fit(loss_fn, jnp.zeros(3), tx, arrays, num_examples=48, window=2, key=seed).state
    )
    assert counted(run, 0) > 0
    assert counted(run, 0) == 0
    assert counted(run, 1) == 0


def set_rate(state, rate):
    return state._replace(opt_state=optax.tree.set(state.opt_state, learning_rate=rate))


@pytest.mark.slow
def test_a_sweep_of_rates_and_seeds_is_one_program():
    tx, arrays = plain(), data()

    def run(rate, seed):
        state = set_rate(aj.init_state(jnp.zeros(3), tx, seed), jnp.array(rate, jnp.float32))
        return aj.fit(loss_fn, None, tx, arrays, num_examples=48, window=2, state=state).state

    assert counted(run, 0.01, 0) > 0
    assert counted(run, 0.02, 1) == 0
    # And it trains with that rate.
    usual = aj.fit(loss_fn, jnp.zeros(3), plain(0.02), arrays, num_examples=48, window=2, key=1)
    np.testing.assert_array_equal(run(0.02, 1).params, usual.state.params)


@pytest.mark.slow
def test_a_sweep_over_rates_and_seeds_is_one_program():
    """Several rates and seeds are trained at once."""
    tx, arrays = plain(), data()

    def run(rates, seed):
        keys = jax.random.split(jax.random.key(seed), 2)
        states = jax.vmap(lambda key: aj.init_state(jnp.zeros(3), tx, key))(keys)
        states = set_rate(states, jnp.array(rates, jnp.float32))
        return aj.fit(
            loss_fn, None, tx, arrays, num_examples=48, window=2, key=keys, state=states
        ).state

    assert counted(run, [0.01, 0.02], 0) > 0
    assert counted(run, [0.03, 0.04], 1) == 0


def test_a_loop_of_ones_own_compiles_once():
    tx = noisy()
    params, opt_state = jnp.zeros(3), tx.init(jnp.zeros(3))
    batch = jax.tree.map(lambda x: jnp.asarray(x[:8]), data().train)
    grad_fn = aj.value_grad_and_signals(loss_fn, tx)
    assert counted(grad_fn, params, opt_state, batch) == 1
    assert counted(grad_fn, params, opt_state, batch) == 0

    @jax.jit
    def step(params, opt_state, batch):
        value, grads, signals = aj.value_grad_and_signals(loss_fn, tx)(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **signals)
        return optax.apply_updates(params, updates), opt_state, value

    assert counted(step, params, opt_state, batch) == 1
    params, opt_state, _ = step(params, opt_state, batch)
    assert counted(step, params, opt_state, batch) == 0


@pytest.mark.slow
def test_programs_of_a_deleted_chain_can_be_freed():
    """Those of a transformation that nobody holds any longer."""
    aj.fit(loss_fn, jnp.zeros(3), plain(), data(), num_examples=48, window=2)
    assert aj.run_window._cache_size() > 0  # pyright: ignore
    aj.run_window.clear_cache()  # pyright: ignore
    assert aj.run_window._cache_size() == 0  # pyright: ignore


# The counter


def programs(n):
    """n functions that nobody has compiled yet."""
    return [jax.jit(lambda x, i=i: x * 2 + i) for i in range(n)]


@pytest.fixture
def x():
    return jax.block_until_ready(jnp.arange(5.0))


@pytest.mark.usefixtures("no_cached_programs")
def test_blocks_count_what_is_compiled_inside_of_them(x):
    first, second, third = programs(3)
    first(x)
    with count_compilations() as outer:
        second(x)
        with count_compilations() as inner:
            third(x)
            third(x)
        first(x)
    assert (outer.num_programs, inner.num_programs) == (2, 1)
    assert (outer.num_compilations, inner.num_compilations) == (2, 1)
    assert outer.num_cache_hits == 0
    for program in programs(1):
        program(x)
    assert outer.num_programs == 2  # no longer counting


def test_an_exception_ends_the_count(x):
    with pytest.raises(KeyboardInterrupt), count_compilations() as counter:
        raise KeyboardInterrupt
    for program in programs(1):
        program(x)
    assert counter.num_programs == 0


def test_other_threads_count_for_themselves(x):
    ours, theirs = programs(2)
    counters = []

    def other():
        with count_compilations() as counter:
            theirs(x)
        counters.append(counter)

    with count_compilations() as counter:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert counter.num_programs == 0
        ours(x)
    assert counter.num_programs == counters[0].num_programs == 1
