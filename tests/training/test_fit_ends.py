"""How a run ends: what is left of the budget, what goes wrong, what a callback may do."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import datasets
from arbiter_jax.training import OutOfMemoryError, _call_errors, _fit, resume_state

START = {"w": jnp.zeros(3), "b": jnp.zeros(())}


def loss_fn(params, batch):
    inputs, labels = batch
    return (inputs @ params["w"] + params["b"] - labels) ** 2


def draw(num_examples):
    inputs = np.random.default_rng(0).normal(size=(num_examples, 3)).astype(np.float32)
    return inputs, inputs @ np.arange(3, dtype=np.float32) + 1


@functools.cache
def chain(rule=None):
    return optax.chain(optax.sgd(0.01), rule or aj.schedulers.constant(10))


def fit(tx, num_examples=200, **options):
    options = {"window": 4, "data": aj.Data(draw(50)), "params": START} | options
    return aj.fit(loss_fn, tx=tx, num_examples=num_examples, **options)


def leaping(first, then, min_batch_size=1, max_batch_size=8192):
    """A rule that leaps after its first step."""
    sizes = lambda step: jnp.where(step < 1, first, then)
    return aj.schedulers.from_schedule(
        sizes, min_batch_size=min_batch_size, max_batch_size=max_batch_size
    )


def sizes(result):
    return [(record.batch_size, record.num_steps) for record in result.history]


# What is left of the budget


@pytest.mark.slow
def test_a_leap_leaves_less_than_a_tenth():
    result = fit(chain(leaping(250, 4096)), 5000)
    # 4 steps of 250; of the 4,000 that are left 2,048, 1,024 and 512: 416 are less than a tenth.
    assert sizes(result) == [(250, 4), (2048, 1), (1024, 1), (512, 1)]
    assert [record.bucket_size for record in result.history] == [256, 2048, 1024, 512]
    assert int(result.state.num_examples) == result.history[-1].num_examples == 4584
    assert result.per_step("batch_size").tolist() == [250] * 4 + [2048, 1024, 512]


@pytest.mark.slow
def test_the_smaller_batch_is_trained_on_as_any_other():
    """Its step is the one of a rule whose size it is."""
    leap = fit(chain(leaping(8, 64)), 64)
    assert sizes(leap) == [(8, 4), (32, 1)]
    tx = chain(aj.schedulers.from_schedule(lambda step: jnp.where(step < 4, 8, 32)))
    plain = fit(tx, 64)
    assert sizes(plain) == [(8, 4), (32, 1)]
    chex.assert_trees_all_equal(leap.state.params, plain.state.params)
    chex.assert_trees_all_equal(leap.state.train_sampler, plain.state.train_sampler)


@pytest.mark.parametrize(
    ("tx", "num_examples", "expected"),
    [
        (chain(leaping(8, 64, min_batch_size=8)), 44, [(8, 4), (8, 1)]),  # 12 left: one of 8
        (chain(leaping(16, 64, min_batch_size=16)), 76, [(16, 4)]),  # 12 left, below the range
        (chain(leaping(8, 64)), 35, [(8, 4)]),  # 3 left, less than a tenth
        (chain(), 45, [(10, 4)]),  # a constant size has no smaller one
        (chain(leaping(64, 8)), 90, [(64, 1), (8, 3)]),  # smaller ones fit as they are
    ],
)
def test_how_much_of_a_budget_is_used(tx, num_examples, expected):
    assert sizes(fit(tx, num_examples)) == expected


@pytest.mark.slow
def test_a_leg_leaves_the_rest_to_the_next():
    tx = chain(leaping(8, 64))
    first = fit(tx, 200, stop_at=60)
    assert sizes(first) == [(8, 4)]
    rest = fit(tx, 200, state=first.state)
    assert sizes(first) + sizes(rest) == sizes(fit(tx, 200))


def test_nothing_to_train_is_said():
    tx = chain(aj.schedulers.from_schedule(lambda step: 64))  # 64 is no leap
    with pytest.warns(UserWarning, match=r"nothing: the next batch .* than the 50 .* left of 50;"):
        assert fit(tx, 50).history == []
    with pytest.warns(UserWarning, match=r"nothing: the next batch .* than the 9 .* left of 9;"):
        assert fit(chain(), 200, stop_at=9).history == []
    done = fit(chain(), 205)
    assert fit(chain(), 205, state=done.state).history == []  # as it should be: no warning


# What goes wrong


def test_a_source_that_ends_early_is_said():
    chunks = [draw(46)] * 3
    with (
        datasets.host_blocks(iter(chunks), window=4) as blocks,
        pytest.warns(UserWarning, match=r"data\.train ended after 130 of 500 examples: pass ") as w,
    ):
        result = fit(chain(), 500, data=aj.Data(blocks))
    assert int(result.state.num_examples) == 130
    assert w[0].filename == __file__  # it points to the call of fit
    # A source that holds as much as is asked for says nothing.
    with datasets.host_blocks(iter(chunks), window=4) as blocks:
        assert int(fit(chain(), 130, data=aj.Data(blocks)).state.num_examples) == 130


def test_losses_that_are_not_finite_are_said():
    inputs, labels = draw(50)
    labels[7] = np.nan
    tx = optax.apply_if_finite(chain(), 5)
    message = (
        r"^1 of 5 steps had a loss that was not finite, the first was step (\d) of this call: "
    )
    with pytest.warns(UserWarning, match=message) as caught:
        result = fit(tx, 50, data=aj.Data((inputs, labels)))
    bad = np.flatnonzero(np.isnan(result.per_step("loss")))
    assert f"step {bad[0]} of" in str(caught[0].message)
    assert int(result.state.num_nonfinite) == 1
    clean = aj.Data(draw(50))
    fit(tx, 100, data=clean, state=result.state)  # those of the call before are not said again


@pytest.mark.parametrize("when", ["compiling", "running", "donated"])
def test_out_of_memory_keeps_what_there_is(when, monkeypatch):
    original = _fit.run_window
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.")

    def run_window(state, *args, **options):
        if options["bucket_size"] > 16:
            if when == "donated":
                jax.tree.map(lambda x: x.delete(), state)
            raise error
        return original(state, *args, **options)

    monkeypatch.setattr(_fit, "run_window", run_window)
    tx = chain(leaping(10, 40))
    kept = "history" if when == "donated" else "history and the last state"
    message = (
        r"^A window with batch size 40 in a bucket of 64 rows does not fit .* The window before it "
        rf"took 10 in a bucket of 16\. Give the rule a max_batch_size of at most 32; .* the {kept}\.$"
    )
    with pytest.raises(OutOfMemoryError, match=message) as caught:
        fit(tx)
    assert caught.value.__cause__ is error
    assert sizes(caught.value) == [(10, 4)]
    if when == "donated":
        assert caught.value.state is None
        return
    monkeypatch.undo()
    limited = chain(leaping(10, 40, max_batch_size=32))
    result = fit(limited, state=caught.value.state)
    assert result.history[0].batch_size == 32
    assert int(result.state.num_examples) >= 180


def test_really_out_of_memory():
    def huge(params, batch):
        noise = jax.random.normal(jax.random.key(0), (len(batch[1]), 2**20, 2**20))
        return loss_fn(params, batch) + jnp.sort(noise, axis=1).sum((1, 2)) * params["b"]

    with pytest.raises(OutOfMemoryError, match=r"batch size 10 in a bucket of 16 rows") as caught:
        aj.fit(huge, START, chain(), aj.Data(draw(50)), num_examples=40, window=4)
    assert caught.value.history == []
    assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)


def test_a_window_that_ran_out_of_memory_says_so():
    """Its state is donated by then, which is not what went wrong."""
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")

    def jitted(state):
        state.delete()
        raise error

    def explain(state):
        raise ValueError("the state was donated")

    for name in ("lower", "trace", "eval_shape", "clear_cache", "_cache_size"):
        setattr(jitted, name, None)
    jitted.__wrapped__ = lambda state: None
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        _call_errors.explained(explain)(jitted)(jnp.zeros(3))
    assert caught.value is error


@pytest.mark.parametrize("error", [KeyboardInterrupt("now"), RuntimeError("RESOURCE_EXHAUSTED")])
def test_other_errors_pass_as_they_are(error, monkeypatch):
    def run_window(*args, **options):
        raise error

    monkeypatch.setattr(_fit, "run_window", run_window)
    with pytest.raises(type(error)) as caught:
        fit(chain())
    assert caught.value is error


# Callbacks


def test_a_callback_changes_nothing():
    def careless(record, state):
        state.params["w"] = jnp.full(3, jnp.nan)
        del state.params["b"]
        state.model_state["calls"] = jnp.int32(99)
        found.append(state)

    def with_state(params, batch, model_state, mask, key):
        return loss_fn(params, batch), {"calls": model_state["calls"] + 1}

    found: list[Any] = []
    seen = []
    look = lambda record, state: seen.append(sorted(state.params))
    tx, model_state = chain(), {"calls": jnp.int32(0)}
    run = functools.partial(aj.fit, with_state, START, tx, aj.Data(draw(50)), num_examples=120)
    result = run(window=4, model_state=model_state, callbacks=[careless, look])
    expected = run(window=4, model_state=model_state)
    chex.assert_trees_all_equal(result.state, expected.state)
    assert int(result.state.model_state["calls"]) == 12
    assert seen == [["b", "w"]] * 3
    assert len(found) == 3


def test_one_callback_needs_no_list():
    seen = []
    stop = lambda record, state: seen.append(record.window_index) or len(seen) == 2
    assert len(fit(chain(), callbacks=stop).history) == 2
    assert seen == [0, 1]


@pytest.mark.parametrize("callbacks", [3, None, ["log"], [print, None]])
def test_what_is_no_callback_is_named(callbacks):
    with pytest.raises(ValueError, match=r"^callbacks must be functions callback\(record, state\)"):
        fit(chain(), callbacks=callbacks)


# A state from another range


def wide(**options):
    options = {"min_batch_size": 4, "max_batch_size": 64} | options
    return aj.schedulers.gradient_noise_scale(
        initial_batch_size=options.pop("start", None), **options
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [
        lambda rule: rule,
        aj.schedulers.hysteresis,
        lambda rule: optax.chain(aj.schedulers.shadow(wide(start=64)), rule),
    ],
    ids=["alone", "hysteresis", "beside a shadow"],
)
def test_the_range_of_tx_holds_from_the_first_window(wrap):
    saved = aj.init_state(START, chain(wrap(wide(start=64))), 0)
    assert aj.next_window(saved.opt_state)[0] == 64
    narrow = chain(wrap(wide(max_batch_size=8)))
    result = fit(narrow, 200, state=saved)
    assert 0 < max(record.batch_size for record in result.history) <= 8
    assert result.history[0].batch_size == 8
    rule = aj.base.the_rule(aj.base.requests(result.state.opt_state))
    assert (int(rule.min_batch_size), int(rule.max_batch_size)) == (4, 8)
    # And the other way: a range from 16 takes at least that.
    small = aj.init_state(START, narrow, 0)
    result = fit(chain(wrap(wide(min_batch_size=16))), 200, state=small)
    assert result.history[0].batch_size == 16


def test_the_range_of_an_arbiter_under_multi_steps():
    def tx(high):
        agent = aj.mlp_agent((3,), hidden_sizes=(4,))
        response = lambda params, response, batch: loss_fn(params, batch)
        limits = {"min_batch_size": 4, "max_batch_size": high, "initial_batch_size": high}
        rule = aj.arbiter(agent, response, num_features=3, **limits)
        return optax.MultiSteps(optax.chain(optax.sgd(0.01), rule), 2)

    saved = aj.init_state(START, tx(32), jax.random.PRNGKey(0))
    state = resume_state(saved, tx(8))
    inner = state.opt_state.inner_opt_state[1]
    assert (int(inner.batch_size), int(inner.max_batch_size)) == (8, 8)
    assert int(inner.meta_batch_size) == 8
    assert aj.next_window(state.opt_state, 4)[:2] == (8, 8)
    assert int(saved.opt_state.inner_opt_state[1].batch_size) == 32
    chex.assert_trees_all_equal(resume_state(saved, tx(32)), saved)


def test_the_budget_is_that_of_tx():
    class State(NamedTuple):
        batch_size: jax.Array  # shape=(), dtype=int32
        budget: jax.Array  # shape=(), dtype=int32

    def tx(budget):
        init_fn = lambda params: State(jnp.int32(10), jnp.int32(budget))
        keep = lambda updates, state, params=None, **signals: (updates, state)
        return chain(optax.GradientTransformationExtraArgs(init_fn, keep))

    first = fit(tx(100), 100)
    assert int(fit(tx(200), 200, state=first.state).state.num_examples) == 200
    with pytest.raises(
        ValueError, match="num_examples must be 200, the budget that the rule in tx"
    ):
        fit(tx(200), 100, state=first.state)


def test_a_state_beyond_the_budget_is_told():
    tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(4))
    loss_fn = lambda w, x: (w - x) ** 2
    data = aj.Data(jnp.ones(8))
    state = aj.fit(loss_fn, jnp.zeros(()), tx, data, num_examples=80).state
    with pytest.warns(UserWarning, match="state has seen 80 examples, more than the num_examples"):
        result = aj.fit(loss_fn, None, tx, data, num_examples=40, state=state)
    assert not result.history


# Numbers that are not finite although every loss is


def root_loss(params, batch):
    """Its gradient is NaN: that of a square root at 0."""
    inputs, _ = batch
    return jnp.sqrt(jnp.sum(0 * params["w"]) + 0 * inputs[:, 0]) + 1 + inputs @ params["w"]


@pytest.mark.parametrize(
    ("optimizer", "num_examples", "message"),
    [
        (optax.sgd(0.1), 10, "params are not finite at the end, although every loss was"),
        (optax.apply_if_finite(optax.sgd(0.1), 9), 40, "State.total_notfinite is 4 after 4 steps"),
        (aj.sgd_hd(0.1, 0.01), 40, "HypergradientState.num_skipped is 4 after 4 steps"),
    ],
)
def test_a_gradient_that_is_not_finite_is_told(optimizer, num_examples, message):
    tx = optax.chain(optimizer, aj.schedulers.constant(10))
    options = {"window": 4, "num_examples": num_examples}
    with pytest.warns(UserWarning, match=message):
        aj.fit(root_loss, START, tx, aj.Data(draw(50)), **options)


@pytest.mark.slow
def test_so_is_that_of_each_seed():
    tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(10))
    starts = jax.tree.map(lambda x: jnp.stack([x, x]), START)
    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.warns(UserWarning, match="not finite at the end") as caught:
        aj.fit(root_loss, starts, tx, aj.Data(draw(50)), num_examples=10, window=4, key=keys)
    told = [str(warning.message).split(" at the end")[0] for warning in caught]
    assert told == [f"Seed {index}: params are not finite" for index in (0, 1)]


def test_an_argument_that_is_missing_is_explained():
    tx = optax.chain(optax.lbfgs(), aj.schedulers.constant(10))
    with pytest.raises(TypeError, match="value_fn") as caught:
        fit(tx, 40)
    assert any("is passed by extra_args=" in note for note in caught.value.__notes__)
