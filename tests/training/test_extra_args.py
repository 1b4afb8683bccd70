"""Optimizers that evaluate the loss of the batch themselves: lbfgs, sophia and line searches."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import batching, schedulers

SIZE, BUCKET, STEPS = 12, 16, 6  # padded batches
X = jax.random.normal(jax.random.key(0), (64, 3))
DATA = aj.Data((X, X @ jnp.array([1.0, -2.0, 0.5]) + 0.1 * jnp.sin(17 * X[:, 0])))
START = {"w": jnp.zeros(3), "b": jnp.zeros(())}
SEARCH = optax.scale_by_backtracking_linesearch(4)  # it compiles faster than the default one
OPTIMIZERS = {
    "backtracking": ("value_fn", lambda: optax.chain(optax.sgd(1.0), SEARCH)),
    "sophia": ("obj_fn", lambda: optax.contrib.sophia(0.1, update_interval=2)),
    "lbfgs": ("value_fn", lambda: optax.lbfgs(memory_size=3)),
}


def losses(params, batch):
    inputs, labels = batch
    return jnp.cosh(inputs @ params["w"] + params["b"] - labels) - 1


def takes(name):
    return lambda batch_loss: {name: batch_loss}


TAKES = {name: takes(name) for name in ("value_fn", "obj_fn")}


def train(name, *rules, rule=None, **options):
    argument, make = OPTIMIZERS[name]
    tx = optax.chain(make(), rule or schedulers.constant(SIZE), *rules)
    options = {"loss_fn": losses, "params": START, "extra_args": TAKES[argument]} | options
    return aj.fit(tx=tx, data=DATA, num_examples=SIZE * STEPS, window=STEPS, **options)


@functools.cache
def by_hand(name):
    return by_hand_from(name, 0)


def by_hand_from(name, key):
    """The loop of the documentation of optax, on the batches that `fit` draws."""
    argument, make = OPTIMIZERS[name]
    tx = make()
    sampler = aj.init_state(START, tx, key).train_sampler
    params, state = START, tx.init(START)

    @jax.jit
    def step(params, state, batch):
        mean_loss = lambda params: jnp.mean(losses(params, batch))
        value, grad = jax.value_and_grad(mean_loss)(params)
        given = {"value": value, "grad": grad} if argument == "value_fn" else {}
        updates, state = tx.update(grad, state, params, **given, **{argument: mean_loss})
        return optax.apply_updates(params, updates), state, value

    values = []
    for _ in range(STEPS):
        sampler, batch, mask = batching.sample_batch(sampler, DATA.train, SIZE, BUCKET)
        batch = jax.tree.map(lambda x, mask=mask: x[np.asarray(mask)], batch)
        params, state, value = step(params, state, batch)
        values.append(value)
    return params, np.array(values)


# Two programs of a line search by zooming.
BEFORE_A_RELEASE = pytest.param("lbfgs", marks=pytest.mark.exhaustive)


@pytest.mark.slow
def test_in_a_loop_of_ones_own():
    argument, make = OPTIMIZERS["backtracking"]
    tx = optax.chain(make(), schedulers.shadow(schedulers.gradient_noise_scale()))
    grad_fn = aj.value_grad_and_signals(losses, tx, extra_args=TAKES[argument])
    sampler, params = aj.init_state(START, tx, 0).train_sampler, START
    state, values = tx.init(START), []

    @jax.jit
    def step(params, state, batch, mask):
        value, grads, signals = grad_fn(params, state, batch, mask=mask)
        updates, state = tx.update(grads, state, params, **signals)
        return optax.apply_updates(params, updates), state, value

    for _ in range(STEPS):
        sampler, batch, mask = batching.sample_batch(sampler, DATA.train, SIZE, BUCKET)
        params, state, value = step(params, state, batch, mask)
        values.append(value)
    expected, expected_values = by_hand("backtracking")
    np.testing.assert_allclose(values, expected_values, rtol=2e-4)
    chex.assert_trees_all_close(params, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["backtracking", "sophia", BEFORE_A_RELEASE])
def test_equals_a_loop_by_hand(name):
    params, values = by_hand(name)
    result = train(name)
    np.testing.assert_allclose(result.per_step("loss"), values, rtol=2e-4)
    chex.assert_trees_all_close(result.state.params, params, rtol=1e-3, atol=1e-5)
    assert len(set(values)) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["backtracking", BEFORE_A_RELEASE])
def test_beside_rules_that_measure(name):
    """The line search refuses no signal that is there for others, and the steps stay the same."""
    scale = schedulers.gradient_noise_scale(min_batch_size=SIZE, max_batch_size=SIZE)
    watched = schedulers.shadow({"test": schedulers.norm_test(measure_every=2)})
    result = train(name, watched, rule=scale)
    np.testing.assert_allclose(result.per_step("loss"), by_hand(name)[1], rtol=2e-3)
    assert np.isfinite(result.per_step("variance_trace")).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["backtracking", "sophia", BEFORE_A_RELEASE])
def test_several_seeds(name):
    keys = jax.random.split(jax.random.key(3), 2)
    starts = jax.tree.map(lambda x: jnp.stack([x, x]), START)
    result = train(name, params=starts, key=keys)
    for i in range(2):
        alone = by_hand_from(name, keys[i])[1]
        np.testing.assert_allclose(result.of_seed(i).per_step("loss"), alone, rtol=2e-3)


@pytest.mark.slow
def test_the_noise_of_second_order_updates():
    """Sophia moves by m / max(gamma h, eps), clipped: `update_noise` follows it."""
    floor = schedulers.noise_floor(persistence=30.0, min_batch_size=SIZE, max_batch_size=SIZE)
    result = train("sophia", rule=floor)
    np.testing.assert_allclose(result.per_step("loss"), by_hand("sophia")[1], rtol=2e-3)
    assert int(result.state.opt_state[1].num_skipped) == 0


def test_a_model_with_state_and_dropout():
    """The loss at the current parameters is the value of the step: same state, mask and key."""

    def stateful(params, batch, model_state, mask, key):
        keep = jax.random.bernoulli(key, 0.5, batch[1].shape)
        shifted = {**params, "b": params["b"] + model_state["count"]}
        return losses(shifted, batch) * keep, {"count": model_state["count"] + 1}

    def reports(value_at_params):
        def update(updates, state, params=None, *, loss, value, **others):
            del state, others
            return updates, loss(params) - value + value_at_params

        init = lambda params: jnp.zeros(())
        return optax.GradientTransformationExtraArgs(init, update)

    tx = optax.chain(optax.sgd(0.1), reports(7.0), schedulers.constant(SIZE))
    options = {"tx": tx, "num_examples": 3 * SIZE, "window": 3, "extra_args": takes("loss")}
    model_state = {"count": jnp.zeros(())}
    result = aj.fit(stateful, START, data=DATA, model_state=model_state, **options)
    np.testing.assert_allclose(result.state.opt_state[1], 7.0, rtol=1e-6)
    assert float(result.state.model_state["count"]) == 3


def one_argument_too_many(batch_loss, batch):
    return {"value_fn": batch_loss, "batch": batch}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"extra_args": {"a": 1}},
            "extra_args must be a function .*, got a dict of 1: define once",
        ),
        ({"extra_args": 3}, "extra_args must be a function .*, got 3"),
        ({"extra_args": one_argument_too_many}, "takes one argument .*missing a required argument"),
        ({"extra_args": lambda batch_loss: batch_loss}, "extra_args must return a dict"),
        (
            {"extra_args": takes("value")},
            "must not return 'value', which the training loop supplies",
        ),
        ({"micro_batch_size": 8}, "micro_batch_size must be None where extra_args is given, got 8"),
        (
            {"rule": schedulers.noise_floor()},
            "persistence of the optimizer could not be measured .*give the rule a number",
        ),
    ],
)
def test_refused_in_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        train("backtracking", **options)


def test_run_window_refuses_a_dict():
    """JAX would say that a static argument is not hashable."""
    tx = optax.sgd(0.1)
    options = {"loss_fn": losses, "tx": tx, "bucket_size": 8, "window": 1}
    with pytest.raises(ValueError, match=r"extra_args must be a function .*, got a dict of 1"):
        aj.run_window(aj.init_state(START, tx, 0), DATA, extra_args={"a": 1}, **options)
