"""One window of training: what it computes, what it leaves out, and the three guarantees."""

import functools
import itertools
import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax._numerics import cond_in_place
from arbiter_jax.batching._sampling import permuted_index
from arbiter_jax.gradients import masked_value_and_grad
from arbiter_jax.training import count_compilations
from arbiter_jax.training._inner_step import inner_step
from arbiter_jax.training._state import copy_state

NUM_EXAMPLES, NUM_INPUTS, NUM_CLASSES = 200, 4, 3


def loss_fn(params, batch):
    inputs, labels = batch
    outputs = jax.nn.relu(inputs @ params["w1"]) @ params["w2"]
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


def response_loss(params, response, meta_batch, model_state=None):
    del model_state
    inputs, labels = meta_batch
    outputs = (jax.nn.relu(inputs @ params["w1"]) * (1 + response[None])) @ params["w2"]
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


def arbiter(**options):
    agent = aj.mlp_agent((NUM_INPUTS,), hidden_sizes=(4,))
    limits = {"min_batch_size": 4, "max_batch_size": 32, "initial_batch_size": 13}
    return aj.arbiter(agent, response_loss, num_features=5, **(limits | options))


@functools.cache
def adam_and_arbiter():
    """One transformation for several tests, so that they share its programs."""
    return optax.chain(optax.adam(0.1), arbiter(window=100))


def draw(seed=0, num_examples=NUM_EXAMPLES):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(num_examples, NUM_INPUTS)).astype(np.float32)
    labels = (inputs[:, 0] > 0).astype(np.int32) + (inputs[:, 1] > 0)
    return inputs, labels.astype(np.int32)


def data():
    return jax.tree.map(jnp.asarray, aj.Data(train=draw(0), validation=draw(1)))


def params():
    rng = np.random.default_rng(2)
    shapes = {"w1": (NUM_INPUTS, 5), "w2": (5, NUM_CLASSES)}
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def start(tx, seed=0, **options):
    return aj.init_state(params(), tx, jax.random.PRNGKey(seed), **options)


class RecordedState(NamedTuple):
    batch_size: jax.Array  # shape=(), dtype=int32


def recorder(needed: tuple[str, ...] = (), seen: set[str] | None = None):
    """A rule that asks for some signals and notes the names of those that it gets."""

    class State(RecordedState):
        requires = needed

    def update_fn(updates, state, params=None, **extra_args):
        del params
        if seen is not None:
            seen.update(name for name, value in extra_args.items() if value is not None)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: State(jnp.int32(8)), update_fn)


# The state


def test_init_state_copies_the_callers_arrays(key):
    tx = optax.sgd(0.1, momentum=0.9)
    mine, statistics = jax.tree.map(jnp.asarray, params()), {"mean": jnp.zeros(3)}
    state = aj.init_state(mine, tx, key, statistics)
    again = copy_state(state)
    run = functools.partial(aj.run_window, loss_fn=None, gradient_fn=passive, tx=tx)
    run(state, data(), bucket_size=4, window=1)
    assert state.params["w1"].is_deleted()  # donated
    assert not mine["w1"].is_deleted()
    assert not statistics["mean"].is_deleted()
    assert not key.is_deleted()
    chex.assert_trees_all_equal(again.params, mine)


def passive(params, batch, mask, model_state=None, key=None):
    """A gradient function that uses next to no compilation time."""
    from arbiter_jax.gradients import Gradient

    del batch, mask, key
    return Gradient(jnp.zeros(()), jax.tree.map(jnp.zeros_like, params), model_state)


def test_the_first_state_is_a_function_of_the_key(key):
    tx = optax.sgd(0.1)
    state = aj.init_state(params(), tx, key)
    chex.assert_trees_all_equal(state, aj.init_state(params(), tx, jax.random.wrap_key_data(key)))
    other = aj.init_state(params(), tx, jax.random.PRNGKey(1))
    keys = lambda s: [
        tuple(k.tolist()) for k in (s.train_sampler.key, s.validation_sampler.key, s.key)
    ]
    assert len({*keys(state), *keys(other)}) == 6
    counters = (state.num_steps, state.num_examples, state.num_nonfinite, state.progress)
    assert [float(c) for c in counters] == [0, 0, 0, 0]
    dtypes = [c.dtype for c in jax.tree.leaves(counters)]
    assert dtypes == [jnp.int32, jnp.uint32, jnp.uint32, jnp.int32, jnp.float32]


# What a window computes


def by_hand(state, tx, data, batch_size, num_steps):
    """The same steps as a Python loop of plain optax."""
    p, opt_state, cursor, losses = state.params, state.opt_state, 0, []
    value_and_grad = jax.jit(jax.value_and_grad(lambda p, batch: jnp.mean(loss_fn(p, batch))))
    for _ in range(num_steps):
        position = cursor + np.arange(batch_size, dtype=np.int32)
        epoch, position = position // NUM_EXAMPLES, position % NUM_EXAMPLES
        rows = permuted_index(state.train_sampler.key, epoch, position, NUM_EXAMPLES)
        value, grads = value_and_grad(p, jax.tree.map(lambda x, r=rows: x[r], data.train))
        updates, opt_state = tx.update(grads, opt_state, p)
        p = optax.apply_updates(p, updates)
        cursor += batch_size
        losses.append(float(value))
    return p, opt_state, losses


@pytest.mark.slow
def test_a_window_is_what_a_loop_of_plain_optax_is():
    optimizer = optax.sgd(0.3, momentum=0.9)
    tx = optax.chain(optimizer, aj.schedulers.constant(50))
    state = start(tx)
    expected, (opt_state, _), losses = by_hand(copy_state(state), tx, data(), 50, 6)
    state, info = aj.run_window(state, data(), loss_fn=loss_fn, tx=tx, bucket_size=64, window=6)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(state.opt_state[0], opt_state, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(info.loss, losses, rtol=1e-5)
    assert info.batch_size.tolist() == [50] * 6
    assert (int(state.num_steps), int(state.num_examples)) == (6, 300)
    assert (int(state.train_sampler.epoch), int(state.train_sampler.cursor)) == (1, 100)
    assert float(state.progress) == 6.0


@pytest.mark.slow
def test_steps_not_taken_change_nothing():
    tx = adam_and_arbiter()
    run = functools.partial(aj.run_window, loss_fn=loss_fn, tx=tx, bucket_size=32, window=8)
    state, info = run(start(tx), data(), np.int32(3))
    assert info.batch_size.tolist() == [13] * 3 + [0] * 5
    assert (int(state.num_steps), int(state.num_examples)) == (3, 39)
    assert int(state.opt_state[1].window_step) == 3
    nothing, info = run(start(tx), data(), 0)
    chex.assert_trees_all_equal(nothing, start(tx))
    assert not info.batch_size.any()


@pytest.mark.slow
def test_windows_in_pieces_are_the_whole_bit_for_bit():
    tx = adam_and_arbiter()
    run = functools.partial(aj.run_window, loss_fn=loss_fn, tx=tx, bucket_size=32, window=8)
    whole, info = run(start(tx), data(), 8)
    pieces, infos = start(tx), []
    for num_steps in (3, 1, 4):
        pieces, piece_info = run(pieces, data(), num_steps)
        infos.append(jax.tree.map(lambda x, n=num_steps: x[:n], piece_info))
    chex.assert_trees_all_equal(pieces, whole)
    chex.assert_trees_all_equal(jax.tree.map(lambda *x: np.concatenate(x), *infos), info)


@pytest.mark.slow
def test_num_steps_none_takes_all_of_them():
    tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(8))
    run = functools.partial(aj.run_window, loss_fn=loss_fn, tx=tx, bucket_size=8, window=5)
    expected = run(start(tx), data(), 5)
    chex.assert_trees_all_close(run(start(tx), data()), expected, rtol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_do_if_is_a_condition_on_every_backend(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    double = lambda carry: jax.tree.map(lambda x: 2 * x, carry)
    carry = {"a": jnp.arange(3.0), "b": jnp.array(4)}
    for condition in (True, False):
        out = jax.jit(lambda c, carry: cond_in_place(c, double, carry))(jnp.array(condition), carry)
        chex.assert_trees_all_equal(out, double(carry) if condition else carry)


@pytest.mark.slow
def test_a_shorter_window_copies_no_parameters():
    """A third of the time of a small step, when a condition around it passed the state on."""
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), aj.schedulers.constant(8))

    def num_copies(num_steps):
        lowered = aj.run_window.lower(
            start(tx), data(), num_steps, loss_fn=loss_fn, tx=tx, bucket_size=8, window=5
        )
        text = lowered.compile().as_text()
        shape = ",".join(map(str, params()["w1"].shape))
        return len(re.findall(rf"f32\[{shape}\]\S* copy\(", text))

    assert num_copies(5) <= num_copies(None)


def test_the_bucket_limits_and_without_a_rule_is_full():
    for tx in (optax.chain(optax.sgd(0.1), aj.schedulers.constant(50)), optax.sgd(0.1)):
        _, info = aj.run_window(start(tx), data(), loss_fn=loss_fn, tx=tx, bucket_size=16, window=2)
        assert info.batch_size.tolist() == [16, 16]


def test_a_batch_larger_than_the_data_is_even():
    tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(8))
    state = aj.init_state(jnp.zeros(()), tx, jax.random.PRNGKey(0))
    few = aj.Data(train=jnp.array([1.0, 10.0, 100.0]))
    _, info = aj.run_window(
        state, few, loss_fn=lambda w, x: w * 0 + x, tx=tx, bucket_size=8, window=3
    )
    # 24 draws of 3 examples: each 8 times.
    np.testing.assert_allclose(np.sum(info.loss) * 8, 8 * 111.0, rtol=1e-6)


def test_losses_that_are_not_finite_are_counted():
    tx = optax.chain(optax.sgd(0.0), aj.schedulers.constant(2))
    values = jnp.array([1.0, 2.0, jnp.nan, jnp.inf])
    state = aj.init_state(jnp.zeros(()), tx, jax.random.PRNGKey(0))
    loss = lambda w, x: w * 0 + x
    state, info = aj.run_window(
        state, aj.Data(values), loss_fn=loss, tx=tx, bucket_size=2, window=10
    )
    assert int(state.num_nonfinite) == int(np.sum(~np.isfinite(info.loss)))
    assert 5 <= int(state.num_nonfinite) <= 10  # five epochs, each with one or two such batches


def test_transform_batch_gets_its_own_key():
    # In two pieces, each of which has a key as well: no randomness may be used twice.
    def transform_batch(key, batch):
        return {"key": jnp.broadcast_to(key, (len(batch), 2))}

    def loss(params, batch, model_state, mask, key):
        del mask
        used = jnp.all(batch["key"][0] == key)
        return params * 0 + jnp.full(len(batch["key"]), used, float), model_state + batch["key"][0]

    tx = optax.chain(optax.sgd(0.1), recorder(("grad_stats",)))
    state = aj.init_state(jnp.zeros(()), tx, jax.random.PRNGKey(0), jnp.zeros(2, jnp.uint32))
    run = functools.partial(aj.run_window, loss_fn=loss, tx=tx, bucket_size=8)
    states = []
    for _ in range(2):
        state, info = run(state, aj.Data(jnp.zeros(9)), window=1, transform_batch=transform_batch)
        states.append(copy_state(state))
        assert info.loss.tolist() == [0.0]
    first = states[0].model_state
    assert np.any(states[1].model_state - first != first)


def test_model_state_goes_through_the_steps():
    def loss(params, batch, model_state, mask, key):
        del key
        mean = jnp.sum(jnp.where(mask, batch, 0)) / jnp.sum(mask)
        return params * 0 + batch, model_state + mean

    tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(5))
    state = aj.init_state(jnp.zeros(()), tx, jax.random.PRNGKey(0), jnp.zeros(()))
    train = jnp.arange(10.0)
    state, _ = aj.run_window(state, aj.Data(train), loss_fn=loss, tx=tx, bucket_size=8, window=4)
    assert float(state.model_state) == pytest.approx(4 * 4.5)


def test_inner_step_is_a_step_on_a_batch_of_ones_own():
    tx = optax.chain(optax.sgd(0.5), aj.schedulers.constant(2))
    state = aj.init_state(jnp.zeros(()), tx, jax.random.PRNGKey(0))
    loss = lambda w, x: (w - x) ** 2 / 2
    batch, mask = jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])
    state, gradient = inner_step(state, batch, mask, gradient_fn=masked_value_and_grad(loss), tx=tx)
    assert float(gradient.value) == 2.5
    assert float(state.params) == 1.0
    assert (int(state.num_steps), int(state.num_examples)) == (1, 2)


# Signals


def test_signals_are_computed_only_where_a_rule_asks():
    always = {"value", "grad", "batch_size", "num_steps", "num_examples", "progress"}
    always |= {"num_accumulated", "signals_made"}
    asked = ("grad_stats", "gradient_noise", "agent_inputs", "meta_batch", "step_seconds")
    for needed in ((), *((name,) for name in asked)):
        seen = set()
        tx = optax.chain(optax.sgd(0.1), recorder(needed, seen))
        run = functools.partial(aj.run_window.__wrapped__, loss_fn=loss_fn, tx=tx, window=1)
        jax.eval_shape(functools.partial(run, bucket_size=8), start(tx), data())
        extra = {"grad_stats"} if needed == ("gradient_noise",) else set()
        if extra or needed == ("grad_stats",):  # how the chain responds to a gradient is probed
            extra |= {"probe"}
        assert seen - extra == always | set(needed)


def test_signals_have_the_promised_shapes():
    shapes = {}

    def update_fn(updates, state, params=None, **extra_args):
        shapes.update(jax.tree.map(jnp.shape, extra_args))
        return updates, state

    class State(RecordedState):
        requires = ("agent_inputs", "meta_batch", "step_seconds", "grad_stats")

    rule = optax.GradientTransformationExtraArgs(lambda params: State(jnp.int32(8)), update_fn)
    run = functools.partial(aj.run_window.__wrapped__, loss_fn=loss_fn, tx=rule, window=1)
    jax.eval_shape(functools.partial(run, bucket_size=8, num_agent_inputs=5), start(rule), data())
    assert shapes["agent_inputs"] == (5, NUM_INPUTS)
    assert shapes["meta_batch"] == ((8, NUM_INPUTS), (8,))
    assert shapes["step_seconds"] == shapes["value"] == shapes["batch_size"] == ()
    assert set(shapes["grad_stats"]) == {()}


def test_update_noise_is_the_optimizers_response():
    class State(NamedTuple):
        batch_size: jax.Array
        ratio: jax.Array
        requires = ("gradient_noise", "update_noise")

    def update_fn(updates, state, params=None, *, gradient_noise, update_noise, **extra_args):
        ratio = jax.tree.map(lambda a, b: jnp.mean(b / a), gradient_noise, update_noise)
        return updates, state._replace(ratio=jnp.stack(jax.tree.leaves(ratio)))

    init_fn = lambda params: State(jnp.int32(8), jnp.zeros(2))
    rule = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    tx = optax.chain(optax.sgd(0.25, momentum=0.9), rule)
    state, _ = aj.run_window(start(tx), data(), loss_fn=loss_fn, tx=tx, bucket_size=8, window=3)
    np.testing.assert_allclose(state.opt_state[1].ratio, [-0.25, -0.25], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("hyper_every", [1, 3])
def test_the_validation_sampler_moves_by_what_was_used(hyper_every):
    tx = optax.chain(optax.sgd(0.1), arbiter(window=100, hyper_every=hyper_every))
    state, info = aj.run_window(
        start(tx), data(), loss_fn=loss_fn, tx=tx, bucket_size=16, window=4, num_agent_inputs=6
    )
    looked_at = [13, *info.metrics["meta_batch_size"].tolist()[:-1]]
    used = sum(6 + min(size, 16) for size in looked_at[::hyper_every])
    sampler = state.validation_sampler
    assert int(sampler.epoch) * NUM_EXAMPLES + int(sampler.cursor) == used


@pytest.mark.slow
def test_the_logged_fields_of_every_step_are_reported():
    tx = optax.chain(optax.sgd(0.1), arbiter(window=2))
    state, info = aj.run_window(start(tx), data(), loss_fn=loss_fn, tx=tx, bucket_size=16, window=5)
    assert info.metrics["proposals"].shape == (5, 4)
    assert info.metrics["meta_batch_size"].shape == (5,)
    assert float(info.metrics["mixture"][-1]) == float(state.opt_state[1].mixture)


# The guarantees


def statistics_loss(params, batch, model_state, mask, key):
    """The loss of a model with running statistics of its batches."""
    del key
    mean = jnp.sum(jnp.where(mask[:, None], batch[0], 0), axis=0) / jnp.sum(mask)
    return loss_fn(params, batch), 0.9 * model_state + 0.1 * mean


@pytest.mark.slow
@pytest.mark.parametrize("needed", [(), ("grad_stats",)], ids=["plain", "pieces"])
def test_guarantee_1_padding_contributes_exactly_zero(needed):
    """Rows that the window does not select may hold anything: no bit of the result changes."""
    window, batch_size, bucket_size, num_agent_inputs = 4, 13, 16, 6
    tx = optax.chain(optax.adam(0.1), arbiter(window=100), asking(needed))
    run = functools.partial(
        aj.run_window,
        loss_fn=statistics_loss,
        tx=tx,
        bucket_size=bucket_size,
        window=window,
        num_agent_inputs=num_agent_inputs,
    )
    make_start = lambda: start(tx, model_state=jnp.zeros(NUM_INPUTS))
    first = make_start()
    expected = run(make_start(), data())
    chex.assert_tree_all_finite(expected[0].params)

    rows = functools.partial(permuted_index, dataset_size=NUM_EXAMPLES)
    position = jnp.arange(window * batch_size)
    trained_on = rows(first.train_sampler.key, jnp.zeros_like(position), position)
    sizes = [batch_size, *expected[1].metrics["meta_batch_size"].tolist()]
    cursor, seen = 0, []
    for before, now in itertools.pairwise(sizes):
        seen.extend(range(cursor, cursor + num_agent_inputs + min(now, bucket_size)))
        cursor += num_agent_inputs + min(before, bucket_size)
    position = jnp.array(sorted(set(seen)))
    validated_on = rows(first.validation_sampler.key, jnp.zeros_like(position), position)
    assert len(trained_on) == 52
    assert 0 < len(validated_on) < NUM_EXAMPLES

    for garbage in (np.nan, np.inf, -1e30):

        def spoil(examples, used, garbage=garbage):
            inputs, labels = jax.tree.map(np.array, examples)
            unused = np.setdiff1d(np.arange(NUM_EXAMPLES), used)
            inputs[unused], labels[unused] = garbage, -(2**31)
            return jnp.asarray(inputs), jnp.asarray(labels)

        clean = data()
        spoilt = aj.Data(spoil(clean.train, trained_on), spoil(clean.validation, validated_on))
        assert not np.isfinite(np.asarray(spoilt.train[0])).all() or garbage == -1e30
        chex.assert_trees_all_equal(run(make_start(), spoilt), expected)


def asking(needed):
    """A transformation that asks for signals and decides nothing."""

    class State(NamedTuple):
        norm: jax.Array
        requires = needed

    def update_fn(updates, state, params=None, *, grad_stats=None, **extra_args):
        if grad_stats is not None:
            state = state._replace(norm=grad_stats.variance_trace)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: State(jnp.zeros(())), update_fn)


@pytest.mark.slow
def test_guarantee_2_one_program_a_bucket():
    class State(RecordedState):
        pass

    init_fn = lambda params: State(jnp.int32(9))
    rule = optax.GradientTransformationExtraArgs(init_fn, lambda u, s, p=None, **_: (u, s))
    tx = optax.chain(optax.sgd(0.1), rule)
    run = functools.partial(aj.run_window, loss_fn=loss_fn, tx=tx, window=2)
    everything = data()

    def programs_of(batch_size, num_steps=2):
        state = start(tx)
        state = state._replace(opt_state=(state.opt_state[0], State(jnp.int32(batch_size))))
        with count_compilations() as compilations:
            _, info = run(state, everything, num_steps, bucket_size=aj.next_bucket(batch_size))
        assert info.batch_size[0] == batch_size
        return compilations.num_programs

    assert programs_of(9) == 1
    assert [programs_of(size) for size in (10, 13, 16, 9)] == [0, 0, 0, 0]
    assert programs_of(12, num_steps=1) == 0  # nor does a window that is cut short need its own
    assert programs_of(17) == 1
    assert [programs_of(size) for size in (32, 16, 18)] == [0, 0, 0]


@pytest.mark.slow
def test_guarantee_3_updates_are_the_optimizers():
    results = []
    for rule in (arbiter(window=3), aj.schedulers.constant(13)):
        tx = optax.chain(optax.adam(0.1), rule)
        state, info = aj.run_window(
            start(tx), data(), loss_fn=loss_fn, tx=tx, bucket_size=16, window=3
        )
        results.append((state.params, state.opt_state[0], state.train_sampler, info.loss))
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_plain_window_has_the_flops_of_a_scan():
    sizes, window, batch_size = (784, 256, 10), 5, 64
    rng = np.random.default_rng(0)
    network = {
        "w1": rng.normal(size=sizes[:2]).astype(np.float32),
        "w2": rng.normal(size=sizes[1:]).astype(np.float32),
    }
    train = (jnp.zeros((1000, sizes[0])), jnp.zeros(1000, jnp.int32))
    tx = optax.sgd(0.1, momentum=0.9)

    def hand_written(carry, data, indices):
        def step(carry, rows):
            params, opt_state = carry
            batch = jax.tree.map(lambda x: x[rows], data)
            mean_loss = lambda params: jnp.mean(loss_fn(params, batch))
            value, grads = jax.value_and_grad(mean_loss)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        return jax.lax.scan(step, carry, indices)

    flops = lambda lowered: lowered.compile().cost_analysis()["flops"]
    indices = jnp.zeros((window, batch_size), jnp.int32)
    expected = flops(jax.jit(hand_written).lower((network, tx.init(network)), train, indices))
    options = {"loss_fn": loss_fn, "bucket_size": batch_size, "window": window}
    for chain in (tx, optax.chain(tx, aj.schedulers.constant(batch_size))):
        state = aj.init_state(network, chain, jax.random.PRNGKey(0))
        lowered = aj.run_window.lower(state, aj.Data(train), tx=chain, **options)
        assert flops(lowered) == pytest.approx(expected, rel=0.01)
    # The products of the network dominate both, forward and backward.
    products = 2 * batch_size * (2 * 784 * 256 + 3 * 256 * 10)
    assert expected > products


# Company


@pytest.mark.slow
def test_seeds_vmap_to_what_each_of_them_does_alone():
    tx = optax.chain(optax.sgd(0.1), arbiter(window=2))
    keys = jax.random.split(jax.random.PRNGKey(7), 3)
    everything = data()
    run = functools.partial(aj.run_window, loss_fn=loss_fn, tx=tx, bucket_size=16, window=3)

    def train(key):
        return run(aj.init_state(params(), tx, key), everything)

    together, infos = jax.jit(jax.vmap(train))(keys)
    alone = [run(aj.init_state(params(), tx, key), everything) for key in keys]
    states, alone_infos = jax.tree.map(lambda *x: np.stack(x), *alone)
    chex.assert_trees_all_close(together, states, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(infos.loss, alone_infos.loss, rtol=1e-4)
    assert len({tuple(row) for row in infos.loss.tolist()}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("as_transformation", [False, True])
def test_multi_steps_decides_once_per_whole_batch(as_transformation):
    chain = optax.chain(optax.sgd(0.1), arbiter(window=100))
    tx = optax.MultiSteps(chain, every_k_schedule=2)
    tx = tx.gradient_transformation() if as_transformation else tx
    state, info = aj.run_window(start(tx), data(), loss_fn=loss_fn, tx=tx, bucket_size=16, window=5)
    assert int(state.opt_state.inner_opt_state[1].window_step) == 2
    assert info.batch_size.tolist() == [13] * 5


# What it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bucket_size": 12}, "bucket_size must be a power of two >= 1, got 12"),
        ({"bucket_size": 0}, "bucket_size must be a power of two >= 1, got 0"),
        ({"bucket_size": 2**40}, "bucket_size must be an integer <= 2147483647, got 1099511627776"),
        ({"window": 2**40}, "window must be an integer <= 2147483647, got 1099511627776"),
        ({"window": 0}, "window must be an integer >= 1, got 0"),
        ({"num_steps": 2.5}, "num_steps must be an integer, got a number of type float32"),
        ({"batch_size": np.nan}, "batch_size must be an integer, got a number of type float32"),
        ({"num_agent_inputs": 0}, "num_agent_inputs must be an integer >= 1, got 0"),
        (
            {"loss_fn": None},
            "loss_fn must be given, or gradient_fn in its place, got None for both",
        ),
        ({"gradient_fn": passive}, "loss_fn must be None where gradient_fn is given, got both"),
    ],
)
def test_bad_arguments_are_named(options, message):
    tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(8))
    defaults = {"loss_fn": loss_fn, "tx": tx, "bucket_size": 8}
    with pytest.raises(ValueError, match=message):
        aj.run_window(start(tx), data(), **(defaults | options))


@pytest.mark.parametrize(
    "train", [(), (np.zeros((0, 4)), np.zeros(0)), (np.zeros((5, 4)), np.zeros(6))]
)
def test_empty_and_ragged_data_is_refused(train):
    tx = aj.schedulers.constant(8)
    with pytest.raises(ValueError, match=r"data\.train must "):
        aj.run_window(start(tx), aj.Data(train), loss_fn=loss_fn, tx=tx, bucket_size=8)


def test_validation_data_is_asked_for_if_needed():
    tx = optax.chain(optax.sgd(0.1), arbiter())
    run: Any = functools.partial(aj.run_window, loss_fn=loss_fn, tx=tx, bucket_size=16)
    with pytest.raises(ValueError, match=r"data\.validation must be given"):
        run(start(tx), aj.Data(draw()))
    with pytest.raises(ValueError, match=r"data\.validation must hold at least 1 "):
        run(start(tx), aj.Data(draw(), (np.zeros((0, 4)), np.zeros(0))))
