"""Several seeds in one program: each of them does what it does alone."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from tests.rules import ARBITERS, NUM_FEATURES, RULES
from tests.rules import loss_fn as sum_loss

LIMITS = {"min_batch_size": 5, "max_batch_size": 16, "initial_batch_size": 8}
KEYS = jax.random.split(jax.random.key(1), 3)
STARTS = {"w": jnp.stack([jnp.full(NUM_FEATURES, x) for x in (0.9, 0.0, 9.0)])}
slow = pytest.mark.slow
of = lambda tree, i: jax.tree.map(lambda x: x[i], tree)


def measured_by_examples(**limits):
    """Reads no clock, as `goodput` and `step_cost="measured"` do."""
    return aj.schedulers.expected_gain(sum_loss, measure_every=2, **limits)


CASES = {name: case.make for name, case in (RULES | ARBITERS).items() if name != "goodput"}
CASES["expected_gain"] = measured_by_examples
FAST = ("constant", "gradient_noise_scale", "arbiter")


def loss_fn(params, batch):
    inputs, labels = batch
    return (inputs @ params["w"] - labels) ** 2


@functools.cache
def draw(seed, num_examples=60):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(num_examples, NUM_FEATURES)).astype(np.float32)
    labels = inputs @ np.ones(NUM_FEATURES) + 0.3 * rng.normal(size=num_examples)
    return inputs, labels.astype(np.float32)


def fit(tx, loss=loss_fn, **options):
    defaults = {"params": STARTS, "data": aj.Data(draw(0), draw(1)), "key": KEYS}
    return aj.fit(loss, tx=tx, **(defaults | {"num_examples": 400, "window": 8} | options))


def assert_same(found, alone):
    """The result of a seed against that of its own run."""
    said = lambda result: [
        (r.window_index, r.batch_size, r.bucket_size, r.num_steps, r.num_examples)
        for r in result.history
    ]
    assert said(found) == said(alone)
    # Ratios of measured noise amplify rounding; what is trained does not.
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-3, atol=1e-4)
    for a, b in zip(found.history, alone.history, strict=True):
        np.testing.assert_allclose(a.info.loss, b.info.loss, rtol=1e-5, atol=1e-5)
        close(a.info, b.info)
    close(found.state, alone.state)
    trained = lambda result: (result.state.params, result.state.model_state)
    chex.assert_trees_all_close(trained(found), trained(alone), rtol=1e-5, atol=1e-5)
    stands = lambda result: (result.state.train_sampler, result.state.validation_sampler)
    chex.assert_trees_all_equal(stands(found), stands(alone))


def check_seeds(tx, loss=loss_fn, **options):
    """Trains the seeds together and one by one; returns the common result."""
    together = fit(tx, loss, **options)
    stacked = ("params", "model_state", "state")
    given = {"params": STARTS, "key": KEYS} | options
    for i in range(len(KEYS)):
        own = {name: of(x, i) if name in stacked else x for name, x in given.items()}
        own["key"] = given["key"][i]
        assert_same(together.of_seed(i), fit(tx, loss, **own))
    return together


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in sorted(CASES)
    ],
)
def test_each_seed_equals_its_own_run(name):
    tx = optax.chain(optax.sgd(0.02, momentum=0.5), CASES[name](**LIMITS))
    result = check_seeds(tx)
    sizes = [tuple(r.batch_size for r in history) for history in result.history]
    if name in ("gradient_noise_scale", "noise_floor"):
        assert len(set(sizes)) == len(KEYS)


# What differs between seeds


def stacked(states):
    return jax.tree.map(lambda *x: jnp.stack(x), *states)


@pytest.mark.slow
def test_seeds_go_on_from_where_each_of_them_is():
    """Each has its own budget left, windows, last batches (some of which wait) and end."""
    sizes = lambda step: jnp.where(step < 3, 8, 64)
    tx = optax.chain(optax.sgd(0.02), aj.schedulers.from_schedule(sizes, max_batch_size=64))
    options = {"window": 3, "num_examples": 100}
    legs = [fit(tx, params=of(STARTS, i), key=KEYS[i], stop_at=8 * (i + 1), **options)
            for i in range(3)]  # fmt: skip
    state = stacked([leg.state for leg in legs])
    result = check_seeds(tx, state=state, **options)
    sizes = [[(r.batch_size, r.num_steps) for r in history] for history in result.history]
    assert sizes == [
        [(8, 2), (64, 1), (8, 1)],  # the window that its first leg was stopped in, then its rest
        [(8, 1), (64, 1), (8, 1)],
        [(64, 1), (8, 1)],
    ]
    result = check_seeds(tx, state=state, stop_at=90, **options)
    ends = [history[-1].num_examples for history in result.history]
    assert ends == [88, 88, 88]


@slow
def test_draws_of_a_row_do_not_depend_on_the_bucket():
    """Dropout, augmentation, running averages, `aux` and halves of seeds in different buckets."""

    def loss(params, batch, model_state, mask, key):
        inputs, labels = batch
        kept = jax.random.bernoulli(key, 0.8, inputs.shape)
        losses = (jnp.where(kept, inputs, 0) @ params["w"] - labels) ** 2
        mean = jnp.sum(jnp.where(mask, labels, 0)) / jnp.maximum(jnp.sum(mask), 1)
        return losses, {"mean": 0.9 * model_state["mean"] + 0.1 * mean}, jnp.float32(mean)

    def transform(key, batch):
        inputs, labels = batch
        return inputs + 0.1 * jax.random.normal(key, inputs.shape), labels

    tx = optax.chain(optax.sgd(0.02), aj.schedulers.gradient_noise_scale(decay=0.5, **LIMITS))
    model_state = {"mean": jnp.arange(3.0)}
    options = {"model_state": model_state, "transform_batch": transform, "has_aux": True}
    result = check_seeds(tx, loss, **options)
    windows = zip(*[[r.bucket_size for r in history] for history in result.history], strict=False)
    assert any(len(set(buckets)) > 1 for buckets in windows)
    assert result.of_seed(1).history[0].info.aux.shape == (8,)


@slow
def test_own_gradient_sees_the_rows_of_its_bucket():
    """A `gradient_fn` of one's own is called with the bucket of each seed."""
    tx = optax.chain(optax.sgd(0.02), aj.schedulers.gradient_noise_scale(decay=0.5, **LIMITS))
    check_seeds(tx, None, gradient_fn=aj.gradients.value_grad_and_stats(loss_fn))


# The result


@functools.cache
def constant():
    return optax.chain(optax.sgd(0.02), aj.schedulers.constant(8))


@pytest.mark.slow
def test_one_program_for_all_seeds(no_cached_programs):
    weak = jax.tree.map(lambda x: jnp.full(x.shape, 0.5), STARTS)  # weakly typed, as `full` makes
    tx = optax.chain(optax.sgd(0.02), aj.schedulers.constant(8))
    result = fit(tx, params=weak, num_examples=200)
    assert [len(history) for history in result.history] == [4, 4, 4]
    assert result.num_compilations == 1
    assert fit(tx, key=jax.random.key_data(KEYS)).num_compilations == 0
    assert len(result.of_seed(2).per_step("loss")) == 25
    with pytest.raises(ValueError, match=r"per_step must be asked of one seed, got .* of 3: call"):
        result.per_step("loss")
    with pytest.raises(ValueError, match="index must be an integer >= 0 and <= 2, got 3"):
        result.of_seed(3)
    with pytest.raises(ValueError, match="of_seed must be called on the result of several keys"):
        result.of_seed(0).of_seed(0)


@pytest.mark.slow
def test_callbacks_get_a_record_of_each_seed():
    first = fit(constant(), params=of(STARTS, 0), key=KEYS[0], num_examples=200).state
    states = [first, *(aj.init_state(of(STARTS, i), constant(), KEYS[i]) for i in (1, 2))]
    seen = []

    def callback(records, state):
        seen.append([record and record.num_examples for record in records])
        assert state.params["w"].shape == (3, NUM_FEATURES)
        return len(seen) == 2

    result = fit(constant(), state=stacked(states), num_examples=240, callbacks=callback)
    assert seen == [[240, 64, 64], [None, 128, 128]]
    assert [int(n) for n in np.asarray(result.state.num_examples)] == [240, 128, 128]


@pytest.mark.filterwarnings("ignore:overflow")
def test_what_went_wrong_names_the_seed():
    params = {"w": STARTS["w"].at[1].set(jnp.inf)}
    with pytest.warns(UserWarning, match="^Seed 1: 50 of 50 steps had a loss that was not") as w:
        fit(constant(), params=params)
    assert len(w) == 1
    assert w[0].filename == __file__


# What it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": {"w": jnp.ones(3)[:2]}}, r"params must have a leading axis of 3, .* got shape "
         r"\[2\] at params\['w'\]: pass jax\.vmap\(init\)\(keys\)"),
        ({"model_state": {"m": jnp.ones(())}}, r"model_state must have a leading axis of 3, .*"),
        ({"key": KEYS[:0]}, "key must hold at least one PRNG key, got none"),
        ({"key": jax.random.split(jax.random.key(0, impl="rbg"), 3)}, "of the implementation"),
        ({"tx": optax.chain(optax.sgd(0.1), aj.schedulers.goodput())}, "tx must hold no rule that "
         "reads the measured time of a step"),
        ({"state": "constant"}, "state must be an aj.TrainState"),
        ({"num_examples": 0}, "num_examples must be an integer >= 1"),
        ({"params": jax.ShapeDtypeStruct((3, 3), jnp.float32)}, "params must be an array of num"),
    ],
)  # fmt: skip
def test_what_several_seeds_cannot_be_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        fit(**({"tx": constant()} | options))


def test_blocks_are_for_one_run():
    message = r"data\.train must be arrays if key holds several keys"
    with (
        aj.datasets.host_blocks(iter([draw(0)]), window=8) as blocks,
        pytest.raises(ValueError, match=message),
    ):
        fit(constant(), data=aj.Data(blocks))


def test_a_state_of_as_many_seeds_as_keys():
    state = aj.init_state(of(STARTS, 0), constant(), 0)
    with pytest.raises(ValueError, match=r"state must have a leading axis of 3, .* got shape"):
        fit(constant(), state=state)
