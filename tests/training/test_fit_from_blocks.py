"""Training on blocks from the host: as on the same examples from the device."""

import functools
import itertools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import datasets
from arbiter_jax.batching import Block
from arbiter_jax.batching._sampling import examples_ahead

NUM_INPUTS, NUM_EXAMPLES, WINDOW = 4, 50, 4


def loss_fn(params, batch):
    inputs, labels = batch
    return (inputs @ params - labels) ** 2


def response_loss(params, response, meta_batch):
    inputs, labels = meta_batch
    return ((inputs * (1 + response[None])) @ params - labels) ** 2


def draw(seed, num_examples=NUM_EXAMPLES):
    inputs = np.random.default_rng(seed).normal(size=(num_examples, NUM_INPUTS))
    inputs = inputs.astype(np.float32)
    return inputs, inputs @ np.arange(NUM_INPUTS, dtype=np.float32)


def data():
    return aj.Data(draw(0), draw(1, 30))


@functools.cache
def chain(growing=False):
    """One of Arbiter with statistics as signals, one whose size leaves its bucket."""
    if growing:
        sizes = optax.piecewise_constant_schedule(5, {8: 11 / 5})
        return optax.chain(optax.sgd(0.05), aj.schedulers.from_schedule(sizes))
    agent = aj.mlp_agent((NUM_INPUTS,), hidden_sizes=(4,))
    limits = {"min_batch_size": 4, "max_batch_size": 32, "initial_batch_size": 10}
    rule = aj.arbiter(agent, response_loss, num_features=NUM_INPUTS, window=WINDOW, **limits)
    noise = aj.schedulers.shadow(aj.schedulers.gradient_noise_scale(), name="noise")
    return optax.chain(optax.sgd(0.05, momentum=0.9), noise, rule)


def start(tx):
    return aj.init_state(jnp.zeros(NUM_INPUTS), tx, jax.random.PRNGKey(3))


def same_order(tx, num_examples, chunk_size=7, skip=0):
    """The examples in the order in which the sampler of a run on resident data draws them."""
    order = jnp.arange(skip, num_examples, dtype=jnp.int32)
    rows = jax.tree.map(np.asarray, examples_ahead(start(tx).train_sampler, draw(0), order))
    for begin in range(0, len(rows[1]), chunk_size):
        yield jax.tree.map(lambda x: x[begin : begin + chunk_size], rows)  # noqa: B023


def fit(tx, train, num_examples=200, **options):
    options = {"state": start(tx), "window": WINDOW} | options
    data_ = aj.Data(train, draw(1, 30))
    return aj.fit(loss_fn, None, tx, data_, num_examples=num_examples, **options)


def assert_same_training(state, expected):
    """All but the sampler of the training data, which blocks leave where it was, and the steps that
    the budget has left of the last window, which another end does not leave."""
    leave = {"train_sampler": None, "unfinished": None}
    chex.assert_trees_all_close(state._replace(**leave), expected._replace(**leave), atol=1e-6)


def columns(result):
    return [(r.batch_size, r.bucket_size, r.num_steps, r.num_examples) for r in result.history]


@pytest.mark.slow
@pytest.mark.usefixtures("no_cached_programs")
@pytest.mark.parametrize("growing", [False, True], ids=["arbiter", "growing"])
def test_equals_training_from_the_device(growing):
    """Masks, signals, ledger, sizes, programs: the source of the rows is all that differs."""
    tx = chain(growing)
    expected = fit(tx, draw(0))
    with datasets.host_blocks(same_order(tx, 400), window=WINDOW) as blocks:
        result = fit(tx, blocks)
        assert blocks.num_examples == int(result.state.num_examples)
    assert columns(result) == columns(expected)
    assert {bucket for _, bucket, *_ in columns(result)} == ({8, 16} if growing else {16})
    assert result.num_compilations == expected.num_compilations == 1 + growing
    assert_same_training(result.state, expected.state)
    np.testing.assert_allclose(result.per_step("loss"), expected.per_step("loss"), rtol=1e-5)
    if not growing:
        for name in ("proposals", "meta_loss", "shadow/noise"):
            np.testing.assert_allclose(result.per_step(name), expected.per_step(name), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("no_cached_programs")
@pytest.mark.parametrize(
    "growing", [pytest.param(False, marks=pytest.mark.slow), True], ids=["arbiter", "growing"]
)
def test_few_bytes_make_short_windows(growing):
    """2 steps of a bucket of 8 rows, 1 of a bucket of 16, and one program each."""
    tx, row_bytes = chain(growing), 4 * (NUM_INPUTS + 1)
    expected = fit(tx, draw(0))
    limit = {"window": WINDOW, "max_bytes": 2 * 8 * row_bytes}
    with datasets.host_blocks(same_order(tx, 400), **limit) as blocks:
        result = fit(tx, blocks)
    assert result.num_compilations == 1 + growing
    assert {(r.bucket_size, r.num_steps) for r in result.history} <= {(8, 2), (16, 1)}
    np.testing.assert_array_equal(result.per_step("batch_size"), expected.per_step("batch_size"))
    # What the budget leaves of the last window: none of a short one.
    assert_same_training(result.state, expected.state._replace(unfinished=result.state.unfinished))


@pytest.mark.parametrize(
    ("micro_batch_size", "first_leg", "num_steps"), [(None, [3, 2], 3), (4, [2, 2, 1], 2)]
)
def test_legs_on_short_blocks_are_one_run(micro_batch_size, first_leg, num_steps):
    """A window is as long as its block, also if it is cut in two."""
    tx = optax.chain(optax.sgd(0.01), aj.schedulers.constant(6))
    limit = {"window": WINDOW, "max_bytes": 6 * 4 * 4 * (NUM_INPUTS + 1)}
    options = {"num_examples": 120, "micro_batch_size": micro_batch_size}
    with datasets.host_blocks(same_order(tx, 400), **limit) as blocks:
        whole = fit(tx, blocks, **options)
    with datasets.host_blocks(same_order(tx, 400), **limit) as blocks:
        legs = [fit(tx, blocks, stop_at=30, **options)]
        legs += [fit(tx, blocks, state=legs[0].state, **options)]
    steps = lambda result: [record.num_steps for record in result.history]
    assert steps(whole)[:-1] == [num_steps] * (19 // num_steps)
    assert steps(legs[0]) == first_leg
    assert steps(legs[1]) == [1, *steps(whole)[len(first_leg) :]]
    chex.assert_trees_all_equal(legs[1].state, whole.state)


@pytest.mark.slow
def test_an_own_loop_takes_a_block_a_window():
    tx = chain()
    expected = fit(tx, draw(0), num_examples=80)
    state, validation = start(tx), jax.tree.map(jnp.asarray, draw(1, 30))
    with datasets.host_blocks(same_order(tx, 400), window=WINDOW) as blocks:
        for _ in expected.history:
            size, bucket_size, _ = aj.next_window(state.opt_state)
            num_steps = min(WINDOW, (80 - int(state.num_examples)) // size)
            block = blocks.next_block(size, bucket_size, num_steps)
            state, info = aj.run_window(
                state,
                aj.Data(block, validation),
                loss_fn=loss_fn,
                tx=tx,
                bucket_size=bucket_size,
                window=WINDOW,
            )
            # The block alone says how many steps there are.
            assert np.count_nonzero(info.batch_size) == num_steps
    assert_same_training(state, expected.state)


@pytest.mark.slow
def test_the_run_ends_with_the_last_whole_batch():
    tx = chain(growing=True)
    with datasets.host_blocks(same_order(tx, 73), window=WINDOW) as blocks:
        with pytest.warns(UserWarning, match=r"data\.train ended after 73 of 200 examples"):
            result = fit(tx, blocks)
        with pytest.warns(UserWarning, match=r"data\.train ended after 73 of 200 examples"):
            again = fit(tx, blocks, state=result.state)
    # 8 steps of 5, and of the 33 that are left 3 of 11; nothing at all is left after those.
    assert [(size, steps) for size, _, steps, _ in columns(result)] == [(5, 4), (5, 4), (11, 3)]
    assert int(result.state.num_examples) == blocks.num_examples == 73
    assert again.history == []
    # A budget leaves the rest of its last window for a larger budget, a source has nothing left.
    expected = fit(tx, draw(0), num_examples=73).state
    assert_same_training(result.state, expected._replace(unfinished=result.state.unfinished))


@pytest.mark.slow
def test_goes_on_after_an_interrupt():
    tx = chain()
    expected = fit(tx, draw(0))

    def stop(record, state):
        return record.window_index == 1

    with datasets.host_blocks(same_order(tx, 400), window=WINDOW) as blocks:
        first = fit(tx, blocks, callbacks=[stop])
        second = fit(tx, blocks, state=first.state)
    assert_same_training(second.state, expected.state)
    seen = int(first.state.num_examples)
    with datasets.host_blocks(same_order(tx, 400, skip=seen), window=WINDOW) as blocks:
        second = fit(tx, blocks, state=first.state)
    assert_same_training(second.state, expected.state)


def test_a_block_of_other_sizes_is_an_error():
    tx = chain(growing=True)
    with datasets.host_blocks(same_order(tx, 400), window=WINDOW) as blocks:
        with pytest.raises(ValueError, match="window must be that of the blocks, 4, got 5"):
            fit(tx, blocks, window=5)
        block = blocks.next_block(5, 8)
    for bucket_size, window in ((16, WINDOW), (8, 3)):
        with pytest.raises(ValueError, match=r"data.train must be a block of shape \[window, buck"):
            aj.run_window(
                start(tx),
                aj.Data(block),
                loss_fn=loss_fn,
                tx=tx,
                bucket_size=bucket_size,
                window=window,
            )


def test_an_error_of_the_source_comes_out_of_fit():
    def source():
        yield from itertools.islice(same_order(chain(True), 400), 5)
        raise OSError("the disk is gone")

    seen = []
    with (
        datasets.host_blocks(source(), window=WINDOW) as blocks,
        pytest.raises(OSError, match="the disk is gone"),
    ):
        fit(chain(True), blocks, callbacks=[lambda record, state: seen.append(record.num_steps)])
    assert seen == [4]  # 20 of the 35 examples; for another window they are too few


def test_any_source_with_the_two_names_will_do():
    class Ones:
        window = WINDOW

        def next_block(self, batch_size, bucket_size, num_steps=None):
            shape = (WINDOW, bucket_size)
            batches = (np.ones((*shape, NUM_INPUTS), np.float32), np.ones(shape, np.float32))
            return Block(batches, np.int32(batch_size), np.int32(num_steps))

    result = aj.fit(
        loss_fn,
        jnp.zeros(NUM_INPUTS),
        chain(True),
        types.SimpleNamespace(train=Ones()),
        num_examples=60,
        window=WINDOW,
    )
    assert int(result.state.num_examples) == 59  # 8 of 5, one of 11, and of the 9 left 8
    assert result.history[-1].loss < result.history[0].loss
