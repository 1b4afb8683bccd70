"""Stochastic meta-descent: its hypergradient, its limits, its memory, and what short horizons do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import stochastic_meta_descent as smd
from arbiter_jax.batching import sample_batch
from arbiter_jax.stochastic_meta_descent._look_ahead import (
    DEFAULT_META_OPTIMIZER,
    LookAheadConfig,
    MetaState,
    from_log_values,
    init_meta_state,
    look_ahead_gradient,
    meta_step,
    to_log_values,
)
from arbiter_jax.training._window import inner_step

OPTIMIZERS = pytest.mark.parametrize("inner_optimizer", [optax.sgd, optax.adam])
HYPERPARAMETERS = smd.Hyperparameters(0.05, 0.8, 0.7)


def regression(num_examples: int = 40):
    """A smooth nonlinear problem, so that finite differences mean something."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(num_examples, 3))
    targets = np.sin(inputs.sum(1)) + 0.1 * rng.normal(size=num_examples)
    dtype = jnp.result_type(float)
    params = {"w": rng.normal(size=(3, 4)) / 2, "v": rng.normal(size=4) / 2}
    as_array = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
    return as_array(params), as_array((inputs, targets))


def loss_fn(params, batch):
    inputs, targets = batch
    return (jnp.tanh(inputs @ params["w"]) @ params["v"] - targets) ** 2


def start(inner_optimizer, key):
    params, data = regression()
    tx = inner_optimizer(*HYPERPARAMETERS[:2])
    return aj.init_state(params, tx, key), data


@OPTIMIZERS
def test_train_is_the_plain_optimizer_with_a_decaying_rate(inner_optimizer, key):
    state, data = start(inner_optimizer, key)
    trained, losses = smd.train(
        loss_fn,
        state,
        data,
        HYPERPARAMETERS,
        num_steps=6,
        inner_optimizer=inner_optimizer,
        batch_size=4,
        time_constant=3.0,
    )
    params, sampler = state.params, state.train_sampler
    # A schedule inside of the optimizer must give the same as a new optimizer at every step.
    schedule = lambda t: 0.05 * (1 + t / 3.0) ** -0.7
    tx = inner_optimizer(schedule, 0.8)
    opt_state = tx.init(params)
    for t in range(6):
        sampler, batch, _ = sample_batch(sampler, data, 4, 4)
        value, grads = jax.value_and_grad(lambda p, b: loss_fn(p, b).mean())(params, batch)
        np.testing.assert_allclose(losses[t], value, rtol=1e-5)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    for ours, theirs in zip(jax.tree.leaves(trained.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert int(trained.num_steps) == 6
    assert int(trained.num_examples) == 24


@OPTIMIZERS
def test_hypergradient_equals_finite_differences_and_reverse_mode(inner_optimizer, key):
    with jax.enable_x64(True):
        state, data = start(inner_optimizer, key)
        options = {"inner_optimizer": inner_optimizer, "batch_size": 4, "time_constant": 3.0}

        def loss_after(hyperparameters):
            after, _ = smd.train(loss_fn, state, data, hyperparameters, num_steps=7, **options)
            return loss_fn(after.params, data).mean()

        value, gradient = smd.hypergradient(
            loss_fn, state, data, data, HYPERPARAMETERS, horizon=7, **options
        )
        at = smd.Hyperparameters(*(jnp.asarray(x) for x in HYPERPARAMETERS))
        np.testing.assert_allclose(value, loss_after(at), rtol=1e-12)
        # train validates only what is concrete, so reverse mode can trace it
        reverse = jax.grad(loss_after)(at)
        for name, x in HYPERPARAMETERS._asdict().items():
            higher = loss_after(at._replace(**{name: jnp.asarray(x + 1e-5)}))
            lower = loss_after(at._replace(**{name: jnp.asarray(x - 1e-5)}))
            ours = getattr(gradient, name)
            assert abs(ours) > 1e-4
            np.testing.assert_allclose(ours, (higher - lower) / 2e-5, rtol=1e-5)
            np.testing.assert_allclose(ours, getattr(reverse, name), rtol=1e-9)


def test_hypergradient_uses_the_inner_step_of_training(key, monkeypatch):
    from arbiter_jax.stochastic_meta_descent import _look_ahead as look_ahead

    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return inner_step(*args, **kwargs)

    monkeypatch.setattr(look_ahead, "inner_step", counted)
    state, data = start(optax.sgd, key)
    smd.hypergradient(loss_fn, state, data, data, HYPERPARAMETERS, horizon=3, batch_size=5)
    assert calls


def gradient_memory(horizon: int, reverse: bool = False) -> int:
    """Temporary memory of one compiled hypergradient, in bytes."""
    state, data = start(optax.sgd, jax.random.PRNGKey(0))
    params = jax.tree.map(lambda x: jnp.zeros((50, *x.shape)), state.params)
    fn = lambda params, batch: jax.vmap(loss_fn, (0, None))(params, batch).mean(0)
    state = aj.init_state(params, optax.sgd(0.1, 0.9), jax.random.PRNGKey(0))

    def forward(hyperparameters):
        return smd.hypergradient(
            fn, state, data, data, hyperparameters, horizon=horizon, batch_size=8
        )

    def backward(hyperparameters):
        def loss(hyperparameters):
            after, _ = smd.train(fn, state, data, hyperparameters, num_steps=horizon, batch_size=8)
            return fn(after.params, data).mean()

        return jax.value_and_grad(loss)(hyperparameters)

    at = smd.Hyperparameters(*(jnp.asarray(x) for x in HYPERPARAMETERS))
    compiled = jax.jit(backward if reverse else forward).lower(at).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_depend_on_the_horizon():
    short, long = gradient_memory(10), gradient_memory(1000)
    assert short > 0
    assert long == short
    # The same measure does see what reverse mode stores.
    assert gradient_memory(1000, reverse=True) > 10 * gradient_memory(10, reverse=True)


def setting(**changes) -> LookAheadConfig:
    options = {
        "loss_fn": loss_fn,
        "inner_optimizer": optax.sgd,
        "learned": ("learning_rate", "momentum", "decay"),
        "horizon": 3,
        "batch_size": 4,
        "time_constant": 3.0,
        "effective": True,
    }
    return LookAheadConfig(**(options | changes))


def test_log_values_are_of_the_effective_rate_and_of_one_minus_momentum():
    with jax.enable_x64(True):
        hyperparameters = smd.Hyperparameters(*(jnp.asarray(x) for x in (0.05, 0.8, 0.7)))
        log_values = to_log_values(setting(), hyperparameters)
        np.testing.assert_allclose(jnp.exp(log_values["learning_rate"]), 0.25)
        np.testing.assert_allclose(jnp.exp(log_values["momentum"]), 0.2)
        np.testing.assert_allclose(jnp.exp(log_values["decay"]), 0.7)
        back = from_log_values(setting(), log_values, HYPERPARAMETERS)
        np.testing.assert_allclose(back, hyperparameters)
        plain = to_log_values(setting(effective=False), hyperparameters)
        np.testing.assert_allclose(jnp.exp(plain["learning_rate"]), 0.05)
        # what is not learned stays as it is, whatever the coordinates of the others
        only = setting(learned=("decay",))
        back = from_log_values(only, {"decay": jnp.log(2.0)}, hyperparameters)
        np.testing.assert_allclose(back, (0.05, 0.8, 2.0))


def test_gradient_in_log_space_is_the_chain_rule_of_the_plain_one(key):
    with jax.enable_x64(True):
        state, data = start(optax.sgd, key)
        at = smd.Hyperparameters(*(jnp.asarray(x) for x in HYPERPARAMETERS))
        log_values = to_log_values(setting(), at)
        decode = lambda log_values: from_log_values(setting(), log_values, at)
        _, ours = look_ahead_gradient(setting(), log_values, decode, state, data, data)
        _, plain = smd.hypergradient(
            loss_fn, state, data, data, at, horizon=3, batch_size=4, time_constant=3.0
        )
        jacobian = jax.jacobian(decode)(log_values)
        for name in log_values:
            expected = sum(
                getattr(plain, field) * getattr(jacobian, field)[name] for field in at._fields
            )
            np.testing.assert_allclose(ours[name], expected, rtol=1e-9)


def meta_of(**values) -> MetaState:
    log_values = {name: jnp.log(x) for name, x in values.items()}
    return MetaState(log_values, optax.sgd(1.0).init(log_values), jnp.zeros((), jnp.int32))


def test_derivatives_are_limited_to_ten_and_values_to_their_ranges():
    meta = meta_of(learning_rate=0.5, momentum=0.1, decay=0.2)
    # derivatives with respect to the logarithm; of the values themselves 200, -3 and -500
    gradient = {"learning_rate": 100.0, "momentum": -0.3, "decay": -100.0}
    gradient = jax.tree.map(jnp.asarray, gradient)
    after = meta_step(meta, gradient, optax.sgd(1.0), False).log_values
    np.testing.assert_allclose(after["learning_rate"], jnp.log(0.5) - 10 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(after["momentum"], jnp.log(0.1) + 0.3, rtol=1e-6)
    np.testing.assert_allclose(after["decay"], jnp.log(0.2) + 10 * 0.2, rtol=1e-6)
    for sign, limits in ((1.0, (1e-4, 1e-4, 1e-4)), (-1.0, (10.0, 1.0, 1e3))):
        meta = meta_of(learning_rate=1.0, momentum=0.9, decay=1.0)
        gradient = {name: jnp.asarray(9.0 * sign) for name in meta.log_values}
        for _ in range(3):
            meta = meta_step(meta, gradient, optax.sgd(5.0), False)
        values = [jnp.exp(meta.log_values[name]) for name in ("learning_rate", "momentum", "decay")]
        np.testing.assert_allclose(values, limits, rtol=1e-5)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_hypergradient_that_is_not_finite_is_skipped_and_counted(bad):
    log_values = {"decay": jnp.asarray(0.3), "learning_rate": jnp.asarray(-1.0)}
    meta = MetaState(log_values, optax.adam(0.1).init(log_values), jnp.zeros((), jnp.int32))
    gradient = {"decay": jnp.asarray(1.0), "learning_rate": jnp.asarray(bad)}
    after = meta_step(meta, gradient, optax.adam(0.1), False)
    assert int(after.num_skipped) == 1
    for new, old in zip(
        jax.tree.leaves((after.log_values, after.opt_state)),
        jax.tree.leaves((meta.log_values, meta.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(new, old)


def test_reset_meta_state_makes_every_step_of_adam_one_of_its_rate():
    gradients = [{"decay": jnp.asarray(x)} for x in (1.0, 1e-3, -0.5)]
    for reset in (True, False):
        meta = init_meta_state(
            setting(learned=("decay",)),
            smd.Hyperparameters(*(jnp.asarray(x) for x in HYPERPARAMETERS)),
            DEFAULT_META_OPTIMIZER,
        )
        moves = []
        for gradient in gradients:
            after = meta_step(meta, gradient, DEFAULT_META_OPTIMIZER, reset)
            moves.append(float(after.log_values["decay"] - meta.log_values["decay"]))
            meta = after
        if reset:
            np.testing.assert_allclose(moves, [-0.01, -0.01, 0.01], rtol=1e-3)
        else:
            assert abs(moves[1] + 0.01) > 1e-3


@OPTIMIZERS
def test_offline_descends_and_begins_every_look_ahead_at_the_same_parameters(inner_optimizer, key):
    params, data = regression()
    options = {
        "horizon": 10,
        "num_meta_steps": 30,
        "num_pretraining_steps": 3,
        "inner_optimizer": inner_optimizer,
        "effective_learning_rate": inner_optimizer is optax.sgd,
        "batch_size": 10,
        "hyperparameters": smd.Hyperparameters(0.002, 0.5, 0.1),
        "pretraining": smd.Hyperparameters(0.01, 0.5, 0.0),
        "meta_optimizer": optax.adam(0.1),
    }
    result = smd.offline(loss_fn, params, data, key, **options)
    assert result.losses.shape == result.history.decay.shape == (30,)
    assert result.losses[-3:].mean() < 0.95 * result.losses[:3].mean()
    assert result.hyperparameters.learning_rate > 1.5 * 0.002
    np.testing.assert_allclose(result.history.momentum, 0.5)  # not learned
    assert int(result.num_skipped) == 0
    # Pretraining really is three steps of training, after which the velocity is dropped.
    state = aj.init_state(params, inner_optimizer(0.01, 0.5), key)
    state, _ = smd.train(
        loss_fn, state, data, smd.Hyperparameters(0.01, 0.5, 0.0),
        num_steps=3, inner_optimizer=inner_optimizer, batch_size=10,
    )  # fmt: skip
    for ours, theirs in zip(
        jax.tree.leaves(result.state.params), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert all(not jnp.any(x) for x in jax.tree.leaves(result.state.opt_state))
    assert int(result.state.num_steps) == 0
    # the first look-ahead, again
    again, _ = smd.train(
        loss_fn, result.state, data, jax.tree.map(lambda x: x[0], result.history),
        num_steps=10, inner_optimizer=inner_optimizer, batch_size=10,
    )  # fmt: skip
    np.testing.assert_allclose(result.losses[0], loss_fn(again.params, data).mean(), rtol=1e-5)


def noisy_quadratic_loss(params, batch):
    """Half h (theta - c)^2 with curvatures 1 and .01, for batches of centres c."""
    curvature = jnp.array([[1.0, 0.01]])
    return 0.5 * (curvature * (params[None] - batch) ** 2).sum(1)


def test_offline_learns_a_larger_final_rate_with_a_longer_horizon(key):
    centres = jax.random.normal(key, (512, 2)) * jnp.array([[1.0, 10.0]])
    centres = centres - centres.mean(0, keepdims=True)
    finals = []
    for horizon in (5, 100):
        result = smd.offline(
            noisy_quadratic_loss,
            jnp.array([3.0, 30.0]),
            centres,
            key,
            horizon=horizon,
            num_meta_steps=200,
            hyperparameters=smd.Hyperparameters(0.1, 0.0, 1.0),
            num_pretraining_steps=0,
            meta_optimizer=optax.adam(0.05),
            batch_size=1,
            time_constant=20.0,
        )
        rate, _, decay = result.hyperparameters
        finals.append(float(rate * (1 + 100 / 20.0) ** -decay))
    assert finals[1] > 3 * finals[0]


def test_online_lowers_the_rate_and_ends_worse_than_the_rate_left_alone(key):
    params, data = regression(200)
    options = {
        "num_steps": 400,
        "batch_size": 2,
        "hyperparameters": smd.Hyperparameters(0.02, 0.9, 0.0),
        "final_learning_rate": 1e-3,
        "meta_optimizer": optax.adam(0.03),
    }
    adjusted = smd.online(loss_fn, params, data, key, **options)
    left = smd.online(loss_fn, params, data, key, learned=(), **options)
    effective = lambda history: history.learning_rate / (1 - history.momentum)
    assert effective(adjusted.history)[199] < 0.7 * effective(adjusted.history)[0]
    np.testing.assert_allclose(left.history.learning_rate[:200], 0.02, rtol=1e-5)
    np.testing.assert_allclose(effective(left.history)[-1], 1e-3, rtol=0.05)
    assert adjusted.losses.shape == (400,)
    assert int(adjusted.state.num_steps) == 400
    assert loss_fn(adjusted.state.params, data).mean() > loss_fn(left.state.params, data).mean()


def test_online_adjusts_only_when_it_is_due_and_only_in_the_first_part(key):
    params, data = regression()
    result = smd.online(
        loss_fn, params, data, key, num_steps=40, meta_every=8, learning_fraction=0.5,
        batch_size=4, num_evaluation_batches=2, num_meta_steps=2, final_learning_rate=0.5,
        hyperparameters=smd.Hyperparameters(0.05, 0.9, 0.0), reset_meta_state=True,
    )  # fmt: skip
    momenta = result.history.momentum
    changes = np.flatnonzero(np.diff(momenta)) + 1
    np.testing.assert_array_equal(changes, [8, 16])
    assert momenta[0] != 0.9  # step 0 is due
    # Each adjustment takes two steps of .01 in the logarithm of 1 - momentum.
    logs = np.log(1 - np.asarray(momenta)[[7, 8]])
    assert abs(logs[1] - logs[0]) == pytest.approx(0.02, rel=1e-2)
    # Look-ahead and evaluation use up examples of the sampler: 3 adjustments of (5 + 2) batches.
    used = result.state.train_sampler.epoch * 40 + result.state.train_sampler.cursor
    assert int(used) == 40 * 4 + 3 * (5 + 2) * 4


def test_online_is_a_pure_function_that_vmaps(key):
    params, data = regression()
    options = {"num_steps": 12, "meta_every": 4, "batch_size": 4}
    keys = jax.random.split(key, 2)
    run = lambda key: smd.online(loss_fn, params, data, key, **options).losses
    together = jax.vmap(run)(keys)
    np.testing.assert_allclose(together, jnp.stack([run(key) for key in keys]), rtol=1e-4)


def test_a_model_with_state_is_trained_and_evaluated_with_it(key):
    params, data = regression()

    def stateful(params, batch, model_state, mask, key):
        del mask, key
        return loss_fn(params, batch) * model_state, model_state

    result = smd.offline(
        stateful, params, data, key, horizon=2, num_meta_steps=2, num_pretraining_steps=0,
        batch_size=40, model_state=jnp.asarray(2.0),
    )  # fmt: skip
    again = smd.offline(
        loss_fn, params, data, key, horizon=2, num_meta_steps=2, num_pretraining_steps=0,
        batch_size=40, hyperparameters=smd.Hyperparameters(0.02, 0.9, 0.1),
    )  # fmt: skip
    # Twice the loss at rate .01 is the same path as the loss at rate .02.
    np.testing.assert_allclose(result.losses[0], 2 * again.losses[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "horizon must be an integer >= 1"),
        ({"num_meta_steps": 0}, "num_meta_steps must be"),
        ({"num_pretraining_steps": -1}, "num_pretraining_steps must be"),
        ({"learned": ()}, "learned must name"),
        ({"learned": ("rate",)}, "learned must be one of 'learning_rate', 'momentum', 'decay'"),
        ({"hyperparameters": smd.Hyperparameters(0.0, 0.9, 0.1)}, "learning_rate must be"),
        ({"hyperparameters": smd.Hyperparameters(0.1, 1.0, 0.1)}, "momentum must be in"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"time_constant": 0.0}, "time_constant must be"),
    ],
)
def test_bad_arguments_of_offline_are_named(options, message, key):
    params, data = regression()
    with pytest.raises(ValueError, match=message):
        smd.offline(loss_fn, params, data, key, **({"horizon": 2} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be"),
        ({"learning_fraction": 1.5}, "learning_fraction must be in"),
        ({"meta_every": 0}, "meta_every must be"),
        ({"num_evaluation_batches": 0}, "num_evaluation_batches must be"),
        ({"final_learning_rate": 0.0}, "final_learning_rate must be"),
    ],
)
def test_bad_arguments_of_online_are_named(options, message, key):
    params, data = regression()
    with pytest.raises(ValueError, match=message):
        smd.online(loss_fn, params, data, key, **({"num_steps": 10} | options))
