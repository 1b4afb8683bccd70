"""Programs of neighboring buckets, compiled while a window trains; and why programs are made."""

import logging
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import datasets
from arbiter_jax.training import _ahead

WINDOW = 2


class GrowingState(NamedTuple):
    batch_size: jax.Array  # shape=(), dtype=int32
    min_batch_size: jax.Array  # shape=(), dtype=int32
    max_batch_size: jax.Array  # shape=(), dtype=int32
    step: jax.Array  # shape=(), dtype=int32


def growing(sizes, low, high):
    """A rule that goes through a list of sizes, one a window."""

    def init_fn(params):
        del params
        return GrowingState(*(jnp.int32(x) for x in (sizes[0], low, high, 0)))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        size = jnp.asarray(sizes)[(state.step + 1) // WINDOW % len(sizes)]
        return updates, state._replace(batch_size=size, step=state.step + 1)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def loss_fn(params, batch):
    inputs, labels = batch
    return (inputs @ params - labels) ** 2


def arrays():
    inputs = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
    return inputs, inputs.sum(axis=1)


def run(sizes=(4, 8, 16, 8), low=3, high=16, train=None, loss_fn=loss_fn):
    tx = optax.chain(optax.sgd(0.01), growing(sizes, low, high))
    data = aj.Data(arrays() if train is None else train)
    budget = WINDOW * sum(sizes)
    return aj.fit(loss_fn, jnp.zeros(3), tx, data, num_examples=budget, window=WINDOW)


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(_ahead, "_is_worth_it", lambda: True)


def compiled_in_windows(result):
    return [record.num_compilations for record in result.history]


@pytest.mark.slow
@pytest.mark.usefixtures("no_cached_programs")
def test_a_change_of_bucket_finds_its_program(as_on_an_accelerator, monkeypatch):
    result = run(sizes=(4, 8), low=3, high=8)
    assert [record.bucket_size for record in result.history] == [4, 8]
    assert compiled_in_windows(result) == [1, 0]
    # 4 and 8: 2 and 16 are outside of the rule's range.
    assert (result.num_compilations, result.num_cache_hits) == (2, 0)
    monkeypatch.setattr(_ahead, "_is_worth_it", lambda: False)
    alone = run(sizes=(4, 8), low=3, high=8)
    assert (alone.num_compilations, alone.num_cache_hits) == (0, 2)
    np.testing.assert_array_equal(result.state.params, alone.state.params)
    np.testing.assert_array_equal(result.per_step("loss"), alone.per_step("loss"))


@pytest.mark.slow
@pytest.mark.usefixtures("no_cached_programs")
def test_buckets_are_compiled_once_up_and_down(as_on_an_accelerator):
    result = run(sizes=(8, 4, 8, 16, 32, 16), low=4, high=64)
    assert compiled_in_windows(result) == [1, 0, 0, 0, 0, 0]
    assert 4 <= result.num_compilations <= 5  # 64 is begun, and need not be ready at the end


@pytest.mark.usefixtures("no_cached_programs")
@pytest.mark.slow
def test_a_block_of_another_bucket_has_its_program(as_on_an_accelerator):
    result = run(train=datasets.host_blocks(datasets.epochs(arrays()), window=WINDOW))
    assert compiled_in_windows(result) == [1, 0, 0, 0]
    assert (result.num_compilations, result.num_cache_hits) == (3, 0)


@pytest.mark.usefixtures("no_cached_programs")
def test_what_cannot_be_traced_ahead_is_no_error(as_on_an_accelerator):
    def particular(params, batch):
        if len(batch[1]) != 4:
            raise ValueError("no other bucket")
        return loss_fn(params, batch)

    result = run(sizes=(4, 3), loss_fn=particular)
    assert compiled_in_windows(result) == [1, 0]
    assert result.num_compilations == 1


@pytest.mark.usefixtures("no_cached_programs")
def test_a_cpu_compiles_no_bucket_ahead():
    result = run(sizes=(4, 4))
    assert result.num_compilations == 1
    assert not [t for t in threading.enumerate() if t.name.startswith("arbiter_jax compiles")]


def test_the_log_says_why_a_program_was_made(as_on_an_accelerator, caplog):
    with caplog.at_level(logging.DEBUG, "arbiter_jax"):
        run(sizes=(4, 8), low=4, high=8)
    first, ahead, second = [r.message for r in caplog.records if r.name == "arbiter_jax"]
    assert first.startswith("run_window is traced for bucket 4, window 2; ")
    assert ahead == "bucket 8 is made ahead of time, a neighbor of 4"
    assert second == "run_window is traced for bucket 8, window 2; new: bucket_size 8, was 4"
