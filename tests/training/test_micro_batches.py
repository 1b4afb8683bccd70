"""Micro-batches: one program for every batch size, whose results are those of one large bucket."""

import functools
import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import datasets
from arbiter_jax.batching import group_rows, init_sampler
from arbiter_jax.batching._groups import num_groups, take_group
from arbiter_jax.gradients import masked_value_and_grad
from arbiter_jax.gradients._estimators import stats_from_pieces
from arbiter_jax.training import OutOfMemoryError, _auto_micro_batch, _fit
from tests.rules import usual_in_ci

S = aj.schedulers
RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 3)).astype(np.float32)
Y = (X @ np.array([1.0, -2.0, 0.5]) + 0.3 * RNG.normal(size=300)).astype(np.float32)
DATA = jax.tree.map(jnp.asarray, aj.Data((X, Y), (X[::-1], Y[::-1])))
MICRO, LARGE = 16, 256
LIMITS = {"min_batch_size": 4, "max_batch_size": LARGE}


def loss_fn(w, batch):
    inputs, labels = batch
    return (inputs @ w - labels) ** 2


@functools.cache
def plain():
    """One transformation for several tests, so that they share its programs."""
    return optax.chain(optax.sgd(0.1), S.constant(4, max_batch_size=LARGE))


def start(tx, size, seed=0, **options):
    """A state whose rule has decided on this size."""
    state = aj.init_state(jnp.zeros(3), tx, jax.random.PRNGKey(seed), **options)
    replace = lambda path, x: (
        jnp.full_like(x, size) if getattr(path[-1], "name", "") == "batch_size" else x
    )
    return state._replace(opt_state=jax.tree.map_with_path(replace, state.opt_state))


def run(tx, state, bucket_size, micro_batch_size=None, **options):
    options = {"data": DATA, "loss_fn": loss_fn, "window": 3} | options
    return aj.run_window(
        state, tx=tx, bucket_size=bucket_size, micro_batch_size=micro_batch_size, **options
    )


def both(tx, size, **options):
    """A window in groups, and in one large bucket."""
    model_state = options.pop("model_state", None)
    states = [start(tx, size, model_state=model_state) for _ in range(2)]
    return run(tx, states[0], MICRO, MICRO, **options), run(tx, states[1], LARGE, **options)


def close(found, expected, **tolerance):
    chex.assert_trees_all_close(found, expected, **({"rtol": 1e-4, "atol": 1e-6} | tolerance))


# The rows of a group


@pytest.mark.parametrize("size", [1, 7, 16, 17, 33, 100])
@pytest.mark.parametrize("num_parts", [1, 2])
def test_groups_hold_the_batch_evenly(size, num_parts):
    data, sampler = jnp.arange(300), init_sampler(3)
    n = num_parts * int(num_groups(size, MICRO))
    take = jax.jit(take_group, static_argnums=(4, 6))
    groups = [
        take(data, sampler, 0, jnp.int32(size), MICRO, jnp.int32(j), num_parts) for j in range(n)
    ]
    _, whole, mask = aj.sample_batch(sampler, data, size, 128)
    found = np.concatenate([np.asarray(rows)[np.asarray(real)] for rows, real in groups])
    assert sorted(found) == sorted(np.asarray(whole)[np.asarray(mask)])
    counts = [int(real.sum()) for _, real in groups]
    assert max(counts) - min(counts) <= 1
    assert all(rows.shape == (MICRO // num_parts,) for rows, _ in groups)
    assert set(np.concatenate([np.asarray(rows) for rows, _ in groups])) == set(found)  # padding


def test_a_block_holds_the_same_groups():
    rows = group_rows(num_slots=8, batch_size=37, micro_batch_size=MICRO, num_steps=2)
    block = aj.batching.Block(jnp.asarray(rows), jnp.int32(37), jnp.int32(2))
    take = jax.jit(take_group, static_argnums=(4, 6))
    for step in range(2):
        for num_parts in (1, 2):
            args = jnp.int32(step), jnp.int32(37), MICRO
            groups = [
                take(block, None, *args, jnp.int32(j), num_parts) for j in range(3 * num_parts)
            ]
            found = np.concatenate([np.asarray(x)[np.asarray(real)] for x, real in groups])
            assert sorted(found) == list(range(37 * step, 37 * (step + 1)))


# What a step computes


@pytest.mark.parametrize("size", [5, 16, 17, 100, 256])
def test_a_step_is_that_of_one_large_bucket(size):
    (state, info), (expected, wanted) = both(plain(), size)
    assert info.batch_size.tolist() == [size] * 3
    close((state, info), (expected, wanted))
    chex.assert_trees_all_equal(state.train_sampler, expected.train_sampler)


def test_below_the_micro_batch_nothing_changes():
    found = run(plain(), start(plain(), 13), MICRO, 2 * MICRO)
    chex.assert_trees_all_equal(found, run(plain(), start(plain(), 13), MICRO))


def test_a_step_may_take_fewer_examples():
    _, info = run(plain(), start(plain(), 100), MICRO, MICRO, batch_size=40)
    assert info.batch_size.tolist() == [40] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.MultiSteps(optax.adam(0.1), 2), tx),
        lambda tx: optax.chain(optax.apply_if_finite(optax.adam(0.1), 2), tx),
    ],
    ids=["MultiSteps", "apply_if_finite"],
)
def test_inside_wrappers(wrap):
    (state, info), (expected, wanted) = both(wrap(S.constant(4, max_batch_size=LARGE)), 37)
    close((state, info), (expected, wanted))


@pytest.mark.slow
def test_vmapped_seeds_have_sizes_of_their_own():
    sizes = (5, 100)
    states = [start(plain(), size, seed) for seed, size in enumerate(sizes)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    many, info = jax.vmap(lambda state: run(plain(), state, MICRO, MICRO))(stacked)
    assert info.batch_size[:, 0].tolist() == list(sizes)
    for lane, state in enumerate(states):
        alone, _ = run(plain(), state, MICRO, MICRO)
        close(jax.tree.map(lambda x, lane=lane: x[lane], many), alone)


# Statistics


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 40, 100])
def test_groups_are_the_pieces_of_the_statistics(size):
    tx = optax.chain(optax.sgd(0.1), S.gradient_noise_scale(**LIMITS))
    state = start(tx, size)
    pieces, sizes = [], []
    for j in range(2 * int(num_groups(size, MICRO))):
        rows, real = take_group(
            DATA.train, state.train_sampler, 0, jnp.int32(size), MICRO, jnp.int32(j), 2
        )
        pieces.append(masked_value_and_grad(loss_fn)(jnp.zeros(3), rows, real).grads)
        sizes.append(real.sum())
    expected = stats_from_pieces(pieces, jnp.stack(sizes).astype(float))
    _, info = run(tx, state, MICRO, MICRO, window=1)
    for name in ("variance_trace", "mean_sq_norm"):
        np.testing.assert_allclose(info.metrics[name][0], getattr(expected, name), rtol=1e-4)


def response_loss(w, response, batch, model_state=None):
    del model_state
    return (batch[0] @ (w * (1 + response)) - batch[1]) ** 2


LARGE_START = {"initial_batch_size": 40}
MEASURING = {
    "noise_floor": lambda: S.noise_floor(loss_fn, persistence=1.0, **LIMITS, **LARGE_START),
    "expected_gain": lambda: S.expected_gain(loss_fn, persistence=1.0, **LIMITS, **LARGE_START),
    "arbiter": lambda: aj.arbiter(
        aj.mlp_agent((3,), hidden_sizes=(4,)),
        response_loss,
        num_features=3,
        window=3,
        **LIMITS,
        **LARGE_START,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", usual_in_ci(MEASURING))
def test_rules_measure_in_groups(name):
    tx = optax.chain(optax.adam(0.02), MEASURING[name]())
    result = aj.fit(
        loss_fn, jnp.zeros(3), tx, DATA, num_examples=2000, window=3, micro_batch_size=MICRO
    )
    sizes = result.per_step("batch_size")
    assert sizes[0] == 40
    assert {r.bucket_size for r in result.history} <= {4, 8, 16}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.state.params))
    assert result.per_step("loss")[-1] < result.per_step("loss")[0]
    assert int(result.state.num_nonfinite) == 0


# Models with state, augmentation, other gradients


def stateful(w, batch, model_state, mask, key):
    mean = jnp.sum(jnp.where(mask, batch[1], 0)) / jnp.sum(mask)
    new = {"calls": model_state["calls"] + 1, "mean": 0.9 * model_state["mean"] + 0.1 * mean}
    return loss_fn(w, batch) * (1 + jax.random.bernoulli(key, 0.5)), new


@pytest.mark.slow
def test_a_model_sees_each_group_by_itself():
    tx = plain()
    state = start(tx, 40, model_state={"calls": jnp.int32(0), "mean": jnp.zeros(())})
    doubled, mean = [], 0.0
    step_key = jax.random.fold_in(state.key, 0)
    for j in range(3):
        rows, real = take_group(
            DATA.train, state.train_sampler, 0, jnp.int32(40), MICRO, jnp.int32(j)
        )
        losses, size = loss_fn(jnp.zeros(3), rows)[real], int(real.sum())
        factor = 1 + float(jax.random.bernoulli(jax.random.fold_in(step_key, j), 0.5))
        doubled.append(factor * float(losses.sum()))
        mean = 0.9 * mean + 0.1 * float(rows[1][real].sum()) / size
    state, info = run(tx, state, MICRO, MICRO, loss_fn=stateful, window=1)
    assert int(state.model_state["calls"]) == 3
    np.testing.assert_allclose(state.model_state["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(info.loss[0], sum(doubled) / 40, rtol=1e-5)


def test_augmentation_has_a_key_for_each_group():
    def scale(key, batch):
        return batch[0], batch[1] * 0 + jax.random.uniform(key)

    state = start(plain(), 32)
    step_key = jax.random.fold_in(state.key, 0)
    keys = [jax.random.fold_in(jax.random.fold_in(step_key, j), 2**32 - 1) for j in range(2)]
    expected = np.mean([float(jax.random.uniform(key)) ** 2 for key in keys])
    _, info = run(plain(), state, MICRO, MICRO, transform_batch=scale, window=1)
    np.testing.assert_allclose(info.loss[0], expected, rtol=1e-5)


@pytest.mark.slow
def test_subset_selection_is_bounded_as_well():
    gradient_fn = aj.subset_gradients(loss_fn, min_size=LARGE)  # all examples
    options = {"loss_fn": None, "gradient_fn": gradient_fn}
    (state, info), (expected, wanted) = both(plain(), 37, **options)
    close((state, info.loss), (expected, wanted.loss))
    np.testing.assert_allclose(info.metrics["selected_fraction"], 1, rtol=1e-6)


# Whole runs


def leaping(*sizes):
    """A rule with a size for each window of three steps."""
    table = jnp.asarray(sizes)
    schedule = lambda t: table[jnp.minimum(t // 3, len(sizes) - 1)]
    return S.from_schedule(schedule, min_batch_size=8, max_batch_size=4096)


def fit(tx, micro_batch_size, data=DATA, **options):
    options = {"num_examples": 20_000, "window": 3} | options
    return aj.fit(loss_fn, jnp.zeros(3), tx, data, micro_batch_size=micro_batch_size, **options)


def windows(result):
    return [(r.batch_size, r.num_steps, r.num_examples) for r in result.history]


@pytest.mark.slow
def test_compile_budget(no_cached_programs):
    """max(1, log2(micro / next_bucket(min)) + 1), whatever the largest batch is."""
    tx = optax.chain(optax.sgd(0.01), leaping(8, 32, 4096, 16, 64, 1000, 2048, 9))
    result = fit(tx, 64, num_examples=30_000)
    assert result.num_compilations == 4  # of 8, 16, 32 and 64
    leap = result.history[2]
    assert (leap.batch_size, leap.bucket_size, leap.num_compilations) == (4096, 64, 1)
    assert [r.num_compilations for r in result.history[3:]] == [1, *[0] * (len(result.history) - 4)]
    assert fit(optax.chain(optax.sgd(0.01), leaping(32, 4096)), 8).num_compilations == 1


@pytest.mark.slow
@pytest.mark.parametrize("num_examples", [4200, 5200])
def test_the_rest_of_a_budget(num_examples):
    """Fits no batch of the rule: one that is larger, or smaller, than the micro-batch is taken."""
    tx = optax.chain(optax.sgd(0.01), leaping(8, 300, 4096))
    results = [fit(tx, micro, num_examples=num_examples) for micro in (None, 512)]
    assert windows(results[0]) == windows(results[1])
    assert results[0].history[-1].num_steps == 1
    assert int(results[1].state.num_examples) == results[1].history[-1].num_examples
    close(results[0].state.params, results[1].state.params, rtol=1e-3)


@pytest.mark.slow
def test_from_blocks():
    tx = optax.chain(optax.sgd(0.01), leaping(8, 40, 100, 24))
    found = []
    for micro in (None, MICRO):
        with datasets.host_blocks(datasets.epochs((X, Y)), window=3) as blocks:
            found.append(fit(tx, micro, aj.Data(blocks), num_examples=1000))
            assert blocks.num_examples == int(found[-1].state.num_examples)
    plain, grouped = found
    assert plain.per_step("batch_size").tolist() == grouped.per_step("batch_size").tolist()
    np.testing.assert_allclose(plain.per_step("loss"), grouped.per_step("loss"), rtol=1e-4)
    # As many steps as three groups hold, and at least one.
    assert {(r.batch_size, r.num_steps) for r in grouped.history} >= {(40, 1), (100, 1), (8, 3)}


@pytest.mark.slow
def test_memory_does_not_depend_on_the_batch():
    def wide(w, batch):
        hidden = jnp.sin((batch[0] @ w)[:, None] * jnp.arange(256.0)[None])
        return jnp.sum(jnp.tanh(hidden), axis=1) - batch[1]

    def temp(size, bucket_size, micro):
        tx = optax.chain(optax.sgd(0.1), S.constant(size))
        lowered = aj.run_window.lower(
            start(tx, size), DATA, tx=tx, loss_fn=wide, bucket_size=bucket_size, window=3,
            micro_batch_size=micro,
        )  # fmt: skip
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temp(65_536, 64, 64) <= 1.5 * temp(64, 64, None)


# "auto"


@pytest.mark.slow
def test_auto_takes_the_largest_that_fits(monkeypatch, caplog):
    tx = optax.chain(optax.sgd(0.01), leaping(8, 200, 1024, 2048, 17))
    monkeypatch.setattr(_auto_micro_batch, "_memory", lambda: 60_000)
    with caplog.at_level(logging.INFO, "arbiter_jax"):
        result = fit(tx, "auto", num_examples=9000)
    (line,) = caplog.messages
    assert line.startswith("micro_batch_size='auto': 512 rows, because the program of 1024 does")
    sizes = [(r.batch_size, r.bucket_size) for r in result.history[:4]]
    assert sizes == [(8, 8), (200, 256), (1024, 512), (2048, 512)]
    close(result.state.params, fit(tx, 512, num_examples=9000).state.params, rtol=1e-6)


def test_auto_with_memory_for_everything_is_none(caplog):
    with caplog.at_level(logging.INFO, "arbiter_jax"):
        results = [fit(plain(), micro, num_examples=50) for micro in ("auto", None)]
    assert not caplog.messages
    chex.assert_trees_all_equal(*(result.state for result in results))


def test_auto_tries_half_where_no_program_is_made(monkeypatch):
    """Where the compiler itself runs out of memory, it does not say how much a row needs."""
    tried = []

    def needed(compile_window):
        tried.append(compile_window.args)
        return (0.0, np.inf if compile_window.args[0] > 16 else 0.0)

    monkeypatch.setattr(_auto_micro_batch, "_needed", needed)
    micro = _auto_micro_batch.MicroBatch("auto")
    search = lambda size, rows: micro.fitting_bucket(size, rows, aj.Data(jnp.ones(9)), 4, None)
    assert search(60, 64) == 16
    assert tried == [(64, None), (32, 32), (16, 16)]
    assert search(5, 8) == 8
    assert len(tried) == 3  # a smaller bucket fits, too


@pytest.mark.parametrize("donated", [False, True])
def test_auto_is_halved_where_memory_runs_out(donated, monkeypatch, caplog):
    original = _fit.run_window
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.")

    def run_window(state, *args, **options):
        if options["bucket_size"] > 16:
            if donated:
                jax.tree.map(lambda x: x.delete(), state)
            raise error
        return original(state, *args, **options)

    run_window.lower = original.lower
    monkeypatch.setattr(_fit, "run_window", run_window)
    tx = optax.chain(optax.sgd(0.01), leaping(8, 60, 12))
    if donated:
        with pytest.raises(OutOfMemoryError, match="carries the history"):
            fit(tx, "auto", num_examples=400)
        return
    result = fit(tx, "auto", num_examples=400)
    assert [(r.batch_size, r.bucket_size) for r in result.history[:3]] == [
        (8, 8),
        (60, 16),
        (12, 16),
    ]
    lines = [
        f"{a} rows, because the device ran out of memory with {b}." for a, b in [(32, 64), (16, 32)]
    ]
    assert caplog.messages == [f"micro_batch_size='auto': {line}" for line in lines]
    with pytest.raises(OutOfMemoryError):  # a size that the user chose stays
        fit(tx, 32, num_examples=400)


# Errors


@pytest.mark.parametrize("micro", [0, 48, 2.0, True, "large"])
def test_refuses_what_is_no_micro_batch(micro):
    with pytest.raises(ValueError, match=r"^micro_batch_size must be a power of two >= 1"):
        fit(plain(), micro)
    with pytest.raises(ValueError, match=r"^micro_batch_size must be a power of two"):
        run(plain(), start(plain(), 8), 8, micro)
    with pytest.raises(ValueError, match=r"^micro_batch_size must be a power of two"):
        aj.next_window(start(plain(), 8).opt_state, 3, micro)


def test_refuses_a_bucket_above_the_micro_batch():
    message = (
        r"^bucket_size must be at most micro_batch_size = 8, got 16: pass the micro_batch_size"
    )
    with pytest.raises(ValueError, match=message):
        run(plain(), start(plain(), 16), 16, 8)
    with pytest.raises(ValueError, match=r"'auto': aj\.fit finds the size"):
        run(plain(), start(plain(), 16), 16, "auto")
    assert aj.next_window(start(plain(), 100).opt_state, 3, 8) == (100, 8, 3)
