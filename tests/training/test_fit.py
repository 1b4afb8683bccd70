"""A whole run: its budget, its history, its end, and how it goes on."""

import functools
import types
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax.gradients import masked_value_and_grad

NUM_INPUTS = 4


def loss_fn(params, batch):
    inputs, labels = batch
    return (inputs @ params - labels) ** 2


def response_loss(params, response, meta_batch):
    inputs, labels = meta_batch
    return ((inputs * (1 + response[None])) @ params - labels) ** 2


@functools.cache
def constant(batch_size):
    """One transformation for several tests, so that they share its programs."""
    return optax.chain(optax.sgd(0.05), aj.schedulers.constant(batch_size))


@functools.cache
def with_arbiter(window=4):
    agent = aj.mlp_agent((NUM_INPUTS,), hidden_sizes=(4,))
    limits = {"min_batch_size": 4, "max_batch_size": 32, "initial_batch_size": 10}
    rule = aj.arbiter(agent, response_loss, num_features=NUM_INPUTS, window=window, **limits)
    return optax.chain(optax.sgd(0.05, momentum=0.9), rule)


def draw(seed, num_examples):
    inputs = np.random.default_rng(seed).normal(size=(num_examples, NUM_INPUTS))
    inputs = inputs.astype(np.float32)
    return inputs, inputs @ np.arange(NUM_INPUTS, dtype=np.float32)


def data(num_train=50, num_validation=30):
    return aj.Data(draw(0, num_train), draw(1, num_validation))


def fit(tx, **options):
    defaults = {"params": jnp.zeros(NUM_INPUTS), "data": data(), "num_examples": 200, "window": 4}
    return aj.fit(loss_fn, tx=tx, **(defaults | options))


# The budget


@pytest.mark.parametrize(
    ("batch_size", "budget", "steps"),
    [(10, 200, [4] * 5), (10, 199, [4, 4, 4, 4, 3]), (7, 30, [4]), (10, 45, [4]), (10, 10, [1])],
)
def test_a_run_ends_where_a_whole_batch_no_longer_fits(batch_size, budget, steps):
    result = fit(constant(batch_size), num_examples=budget)
    assert [record.num_steps for record in result.history] == steps
    assert budget - batch_size < int(result.state.num_examples) <= budget
    assert int(result.state.num_steps) == sum(steps)


def test_a_budget_below_one_batch_takes_no_step():
    with pytest.warns(UserWarning, match="fit has trained nothing"):
        result = fit(constant(10), num_examples=9)
    assert result.history == []
    assert (int(result.state.num_steps), result.num_compilations) == (0, 0)
    assert result.per_step("loss").shape == (0,)
    np.testing.assert_array_equal(result.state.params, np.zeros(NUM_INPUTS))


@pytest.mark.slow
def test_equal_budgets_differ_by_less_than_a_batch():
    seen = [int(fit(tx).state.num_examples) for tx in (constant(7), with_arbiter(), constant(10))]
    assert all(200 - 32 < n <= 200 for n in seen)


@pytest.mark.usefixtures("no_cached_programs")
def test_the_last_window_needs_no_program_of_its_own():
    tx = optax.chain(optax.sgd(0.05), aj.schedulers.constant(10))
    result = fit(tx, num_examples=75)
    assert [record.num_steps for record in result.history] == [4, 3]
    assert result.num_compilations == 1
    again = fit(tx, num_examples=75)
    assert (again.num_compilations, again.num_cache_hits) == (0, 0)


def test_another_budget_than_the_rules_is_refused():
    """A rule that plans for a number of examples must get them; 0 means that it was given none."""
    message = r"^num_examples must be 200, the budget that the rule in tx was built for, got 75: "
    for budget, fits in ((200, False), (75, True), (0, True)):
        rule = with_budget(jnp.int32(budget))
        if fits:
            assert fit(rule, num_examples=75).history
        else:
            with pytest.raises(ValueError, match=message):
                fit(rule, num_examples=75)


def with_budget(number):
    class State(NamedTuple):
        batch_size: jax.Array  # shape=(), dtype=int32
        budget: jax.Array  # shape=(), dtype=int32
        seen: jax.Array  # shape=(), dtype=int32, the extra argument `budget`
        metrics = ("seen",)

    def update_fn(updates, state, params=None, *, budget, **extra_args):
        return updates, state._replace(seen=budget)

    init_fn = lambda params: State(jnp.int32(10), jnp.array(number), jnp.int32(0))
    rule = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return optax.chain(optax.sgd(0.05), rule)


def test_rules_get_the_budget():
    stop = lambda record, state: True
    result = fit(with_budget(jnp.int32(0)), num_examples=75, callbacks=[stop])
    assert result.per_step("seen").tolist() == [75] * 4


def test_a_budget_may_be_more_than_an_int32_holds():
    class State(NamedTuple):
        batch_size: jax.Array
        left: jax.Array  # shape=(), dtype=float32
        metrics = ("left",)

    def update_fn(updates, state, params=None, *, budget, num_examples, **extra_args):
        return updates, state._replace(left=budget - num_examples)

    init_fn = lambda params: State(jnp.int32(10), jnp.float32(0))
    rule = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    tx = optax.chain(optax.sgd(0.05), rule)
    state = aj.init_state(jnp.zeros(NUM_INPUTS), tx, jax.random.PRNGKey(0))
    state = state._replace(num_examples=aj.base.as_count(2**33 + 3))
    stop = lambda record, state: True
    result = fit(tx, num_examples=2**33 + 75, state=state, callbacks=[stop])
    assert result.per_step("left").tolist() == [72, 62, 52, 42]
    assert int(result.state.num_examples) == result.history[0].num_examples == 2**33 + 43


def test_rules_know_a_budget_beyond_an_int32():
    with pytest.raises(ValueError, match="num_examples must be 8589934592, the budget"):
        fit(aj.schedulers.noise_floor(num_examples=2**33, persistence=1.0), num_examples=2**33 + 1)


def test_a_leg_stops_early_with_the_budget_of_the_run():
    tx = with_budget(jnp.int32(200))
    first = fit(tx, num_examples=200, stop_at=85)
    assert [record.num_examples for record in first.history] == [40, 80]
    second = fit(tx, num_examples=200, state=first.state)
    assert int(second.state.num_examples) == 200
    assert {*first.per_step("seen"), *second.per_step("seen")} == {200}


@pytest.mark.parametrize("stop_at", [0, 201, 10.0])
def test_refuses_a_leg_out_of_range(stop_at):
    with pytest.raises(ValueError, match=r"^stop_at must be an integer >= 1 and <= 200, got "):
        fit(constant(10), stop_at=stop_at)


# The history


@pytest.mark.slow
def test_the_history_says_what_happened_in_each_window():
    result = fit(with_arbiter(), num_examples=300)
    assert isinstance(result, aj.FitResult)
    total = 0
    for index, record in enumerate(result.history):
        assert isinstance(record, aj.WindowRecord)
        assert record.window_index == index
        assert 4 <= record.batch_size <= 32
        assert record.bucket_size >= aj.next_bucket(record.batch_size)
        total += record.num_steps * record.batch_size
        assert record.num_examples == total
        assert record.info.batch_size.tolist() == [record.batch_size] * record.num_steps
        np.testing.assert_allclose(record.loss, record.info.loss.mean(), rtol=1e-6)
        assert record.seconds > 0
        assert record.num_compilations in (0, 1)
        assert isinstance(record.info.loss, np.ndarray)
        assert record.info.metrics["proposals"].shape == (record.num_steps, 4)
    assert total == int(result.state.num_examples) <= 300
    assert sum(record.num_compilations for record in result.history) == result.num_compilations
    assert sum(record.seconds for record in result.history) <= result.seconds
    assert result.history[0].batch_size == 10
    assert len({record.batch_size for record in result.history}) > 1


def test_steps_joins_the_windows():
    result = fit(with_arbiter(), num_examples=150)
    num_steps = int(result.state.num_steps)
    assert result.per_step("loss").shape == result.per_step("batch_size").shape == (num_steps,)
    assert result.per_step("batch_size").sum() == int(result.state.num_examples)
    assert result.per_step("mixture_weights").shape == (num_steps, 4)
    np.testing.assert_allclose(result.per_step("mixture_weights").sum(axis=1), 1, rtol=1e-5)
    assert result.per_step("loss")[-1] < result.per_step("loss")[0]
    with pytest.raises(KeyError, match="mixture_of_what"):
        result.per_step("mixture_of_what")


def test_the_batch_size_follows_the_rule():
    result = fit(with_arbiter(), num_examples=300)
    decided = []
    for record in result.history[:-1]:
        chosen = np.argmax(record.info.metrics["mixture_weights"][-1])
        logit = record.info.metrics["proposals"][-1, chosen]
        decided.append(int(aj.to_batch_size(logit, 4, 32)))
    # Up to where alpha is reset the weights are logged, so argmax can be taken by hand.
    assert [record.batch_size for record in result.history[1:]] == decided


# Callbacks


def test_a_callback_ends_the_run():
    calls = []

    def stop(record, state):
        calls.append(("stop", record.window_index, int(state.num_steps)))
        return record.window_index == 1

    def watch(record, state):
        calls.append(("watch", record.window_index, int(state.num_steps)))

    result = fit(constant(10), callbacks=[stop, watch])
    # Every callback sees every window, also the last one.
    expected = [(who, i, 4 * (i + 1)) for i in (0, 1) for who in ("stop", "watch")]
    assert calls == expected
    assert len(result.history) == 2


def test_callbacks_may_be_any_iterable():
    seen = []
    fit(constant(10), callbacks=(callback for callback in [lambda *args: seen.append(args)]))
    assert len(seen) == 5


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_in_a_callback_comes_out_clean(error):
    params = jnp.ones(NUM_INPUTS)

    def interrupt(record, state):
        if record.window_index == 1:
            raise error("enough")

    with pytest.raises(error, match="enough"):
        fit(constant(10), params=params, callbacks=[interrupt])
    assert not params.is_deleted()
    # Nothing is left behind: the next run is like any other.
    result = fit(constant(10), params=params)
    assert (len(result.history), result.num_compilations) == (5, 0)


# Resuming


def same_bits(a, b):
    chex.assert_trees_all_equal(a, b)
    chex.assert_trees_all_equal_dtypes(a, b)


@pytest.mark.parametrize("stop_after", [0, 2])
def test_a_resumed_run_is_bit_identical(stop_after):
    tx = with_arbiter()
    whole = fit(tx, num_examples=300)
    stop = lambda record, state: record.window_index == stop_after
    first = fit(tx, num_examples=300, callbacks=[stop])
    # As a checkpoint does: through plain NumPy arrays.
    saved = jax.tree.map(np.array, first.state)
    second = fit(tx, num_examples=300, state=jax.tree.map(jnp.asarray, saved), key=99)
    same_bits(second.state, whole.state)
    sizes = lambda *results: [r.batch_size for result in results for r in result.history]
    assert sizes(first, second) == sizes(whole)
    losses = np.concatenate([first.per_step("loss"), second.per_step("loss")])
    np.testing.assert_array_equal(losses, whole.per_step("loss"))


def test_resuming_counts_examples_and_keeps_the_state():
    first = fit(constant(10), num_examples=120)
    again = fit(constant(10), num_examples=120, state=first.state)
    assert again.history == []
    more = fit(constant(10), num_examples=160, state=first.state)
    assert more.history[0].num_examples == 160
    assert not first.state.params.is_deleted()
    assert int(first.state.num_examples) == 120


def test_the_callers_parameters_are_not_donated():
    params, statistics = jnp.ones(NUM_INPUTS), jnp.zeros(3)
    result = fit(constant(10), params=params, key=jax.random.PRNGKey(0))
    assert np.any(result.state.params != params)
    np.testing.assert_array_equal(params, np.ones(NUM_INPUTS))

    def loss(params, batch, model_state, mask, key):
        del mask, key
        return loss_fn(params, batch), model_state + 1

    result = aj.fit(
        loss, params, constant(10), data(), num_examples=20, window=4, model_state=statistics
    )
    np.testing.assert_array_equal(result.state.model_state, np.full(3, 2.0))
    np.testing.assert_array_equal(statistics, np.zeros(3))


# The key


def test_a_run_is_a_pure_function_of_its_key():
    tx = with_arbiter()
    first = fit(tx, key=3)
    same_bits(fit(tx, key=3).state, first.state)
    same_bits(fit(tx, key=jax.random.PRNGKey(3)).state, first.state)
    same_bits(fit(tx, key=jax.random.key(3)).state, first.state)
    assert np.any(fit(tx, key=4).state.params != first.state.params)


# Data of all kinds


def test_data_is_anything_with_train_and_validation():
    everything = types.SimpleNamespace(
        name="mine", num_classes=3, train=draw(0, 50), validation=draw(1, 30), test=None
    )
    same_bits(fit(with_arbiter(), data=everything).state, fit(with_arbiter()).state)
    no_validation = types.SimpleNamespace(train=draw(0, 50))
    same_bits(fit(constant(10), data=no_validation).state, fit(constant(10)).state)


@pytest.mark.slow
@pytest.mark.parametrize(("num_train", "num_validation"), [(1, 1), (3, 5), (1, 30)])
def test_tiny_data_is_repeated(num_train, num_validation):
    result = fit(with_arbiter(), num_examples=100, data=data(num_train, num_validation))
    assert 100 - 32 < int(result.state.num_examples) <= 100
    chex.assert_tree_all_finite(result.state)
    assert int(result.state.opt_state[1].num_skipped) == 0
    # Every example was used as often as any other, but for the epoch that is not over.
    epoch, cursor = result.state.train_sampler.epoch, result.state.train_sampler.cursor
    assert int(epoch) * num_train + int(cursor) == int(result.state.num_examples)


def test_one_example_is_trained_on_as_it_is():
    result = fit(constant(10), num_examples=80, data=data(num_train=1))
    (inputs, labels), params = draw(0, 1), np.zeros(NUM_INPUTS)
    for loss in result.per_step("loss"):
        error = inputs[0] @ params - labels[0]
        np.testing.assert_allclose(loss, error**2, rtol=1e-3)
        params = params - 0.05 * 2 * error * inputs[0]
    np.testing.assert_allclose(result.state.params, params, rtol=1e-4)


# Numbers that are not finite


def test_losses_that_are_not_finite_are_counted():
    # An outlier that the first step cannot survive: everything after it is NaN.
    inputs, labels = draw(0, 50)
    labels[:] = np.inf
    with pytest.warns(UserWarning, match="20 of 20 steps had a loss that was not finite"):
        result = fit(constant(10), data=aj.Data((inputs, labels)))
    assert int(result.state.num_nonfinite) == int(result.state.num_steps) == 20
    assert len(result.history) == 5
    assert int(fit(constant(10)).state.num_nonfinite) == 0


def test_labels_out_of_range_show_as_nonfinite():
    def loss(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(batch[0] * params[None], batch[1])

    inputs = draw(0, 50)[0]
    labels = np.zeros(50, np.int32)
    labels[17] = NUM_INPUTS  # one too large
    options = {"num_examples": 50, "window": 5}
    start = jnp.zeros(NUM_INPUTS)
    with pytest.warns(UserWarning, match="of 5 steps had a loss that was not finite"):
        result = aj.fit(loss, start, constant(10), aj.Data((inputs, labels)), **options)
    assert int(result.state.num_nonfinite) >= 1


def test_a_nan_in_validation_data_spares_training():
    clean, (inputs, labels) = data(), draw(1, 30)
    inputs[::2] = np.nan
    with pytest.warns(UserWarning, match=r"ArbiterState\.num_skipped is \d+ after \d+ steps"):
        result = fit(with_arbiter(), data=aj.Data(clean.train, (inputs, labels)), num_examples=100)
    arbiter_state = result.state.opt_state[1]
    assert int(arbiter_state.num_skipped) > 0
    assert int(result.state.num_nonfinite) == 0
    chex.assert_tree_all_finite(result.state)
    assert all(4 <= record.batch_size <= 32 for record in result.history)


# Options


def test_gradient_fn_replaces_the_gradient():
    gradient_fn = masked_value_and_grad(loss_fn)
    options = {"num_examples": 80, "window": 4}
    start = jnp.zeros(NUM_INPUTS)
    result = aj.fit(None, start, constant(10), data(), gradient_fn=gradient_fn, **options)
    same_bits(result.state, fit(constant(10), num_examples=80).state)


def test_transform_batch_changes_what_is_trained_on():
    zero = lambda key, batch: jax.tree.map(jnp.zeros_like, batch)
    result = fit(constant(10), num_examples=80, transform_batch=zero)
    assert not result.per_step("loss").any()
    np.testing.assert_array_equal(result.state.params, np.zeros(NUM_INPUTS))


@pytest.mark.slow
def test_num_agent_inputs_may_exceed_validation():
    result = fit(with_arbiter(), num_examples=40, num_agent_inputs=64, data=data(50, 3))
    chex.assert_tree_all_finite(result.state)
    assert int(result.state.num_steps) == 4


def test_step_seconds_come_without_compilation():
    class State(NamedTuple):
        batch_size: jax.Array  # shape=(), dtype=int32
        seconds: jax.Array  # shape=(), dtype=float32
        requires = ("step_seconds",)
        metrics = ("seconds",)

    init_fn = lambda params: State(jnp.int32(10), jnp.float32(0))

    def update_fn(updates, state, params=None, *, step_seconds, **extra_args):
        return updates, state._replace(seconds=step_seconds)

    rule = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    result = fit(optax.chain(optax.sgd(0.05), rule))
    seconds = [record.info.metrics["seconds"][0] for record in result.history]
    # Unknown in the first window, and after it, because it held the compilation.
    assert np.isnan(seconds[:2]).all()
    expected = [record.seconds / record.num_steps for record in result.history[1:-1]]
    np.testing.assert_allclose(seconds[2:], expected, rtol=1e-5)


# What it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_examples": 0}, "num_examples must be an integer >= 1, got 0"),
        ({"num_examples": 1e4}, "num_examples must be an integer >= 1, got 10000.0"),
        ({"window": 0}, "window must be an integer >= 1, got 0"),
        ({"num_agent_inputs": 0}, "num_agent_inputs must be an integer >= 1, got 0"),
        ({"gradient_fn": masked_value_and_grad(loss_fn)}, "loss_fn must be None where "),
        (
            {"data": aj.Data((np.zeros((0, 4)), np.zeros(0)))},
            "data.train must hold at least 1 example",
        ),
        ({"data": aj.Data((np.zeros((5, 4)), np.zeros(4)))}, "one leading axis of equal length"),
        ({"data": aj.Data(())}, "one leading axis of equal length"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        fit(constant(10), **options)


def test_a_run_needs_exactly_one_rule():
    with pytest.raises(ValueError, match=r"exactly one batch-size rule .* found none"):
        fit(optax.sgd(0.1))
    two = optax.chain(optax.sgd(0.1), aj.schedulers.constant(8), aj.schedulers.constant(8))
    with pytest.raises(ValueError, match="found ConstantState, ConstantState"):
        fit(two)


def test_a_rule_that_needs_validation_data_says_so():
    with pytest.raises(ValueError, match=r"data\.validation must be given"):
        fit(with_arbiter(), data=aj.Data(draw(0, 50)))
    with pytest.raises(ValueError, match=r"data\.validation must hold at least 1 example"):
        fit(with_arbiter(), data=aj.Data(draw(0, 50), (np.zeros((0, 4)), np.zeros(0))))
