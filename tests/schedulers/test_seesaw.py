"""A decay of the rate traded for batch size."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import schedulers
from arbiter_jax.schedulers._rate import scale_by_rate

S = schedulers
D = 64_000
COSINE = optax.cosine_decay_schedule(0.1, D)
QUARTER = lambda n: 0.1 * jnp.cos(jnp.pi / 2 * jnp.minimum(n / D, 1))
WSD = optax.join_schedules(
    [optax.constant_schedule(0.1), optax.linear_schedule(0.1, 0.0, D // 5)], [D - D // 5]
)
PLAN = {"num_examples": D, "batch_size": 32, "max_batch_size": 512}
SMALL = PLAN | {"max_batch_size": 64}  # two programs
loss_fn = lambda w, batch: (w - batch) ** 2 / 2


def fit(tx, num_examples=D, **options):
    data = aj.Data(jnp.ones(64))
    return aj.fit(loss_fn, jnp.zeros(()), tx, data, num_examples=num_examples, **options)


@pytest.mark.parametrize(
    ("schedule", "share"),
    [
        (COSINE, 0.5),
        (optax.cosine_decay_schedule(0.1, D, alpha=0.1), 0.55),
        (optax.linear_schedule(0.1, 0.0, D), 0.5),
        (QUARTER, 2 / math.pi),
        (WSD, 0.9),
    ],
)
def test_steps_left_are_the_mean_of_the_decay(schedule, share):
    plan = S.seesaw_schedule(schedule, num_examples=D, batch_size=16, max_batch_size=D, trade=1.0)
    assert plan.num_steps(D) / (D / 16) == pytest.approx(share, abs=0.01)


@pytest.mark.slow
def test_counts_as_predicted():
    plan = PLAN | {"max_batch_size": 128}
    for schedule, window in ((COSINE, 100), (WSD, 7)):
        predicted = S.seesaw_schedule(schedule, **plan).num_steps(D, window=window)
        result = fit(aj.seesaw(optax.sgd(1.0), schedule, **plan), window=window)
        assert int(result.state.num_steps) == predicted


@pytest.mark.slow
def test_sizes_and_rates_are_those_of_the_equations():
    result = fit(aj.seesaw(optax.sgd(1.0), COSINE, exponent=0.5, trade=0.8, **PLAN))
    sizes = result.per_step("batch_size")
    seen = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    alpha = (1 + np.cos(np.pi * seen / D)) / 2
    wanted = np.round(np.clip(32 * np.maximum(alpha, 1e-12) ** -0.8, 32, 512))
    starts = np.cumsum([0] + [r.num_steps for r in result.history])[:-1]
    np.testing.assert_array_equal(sizes[starts], wanted[starts])
    rates = 0.1 * alpha * np.sqrt(sizes / 32)
    np.testing.assert_allclose(result.per_step("learning_rate"), rates, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_no_trade_no_change():
    optimizer = optax.sgd(1.0, momentum=0.9)
    ours = fit(aj.seesaw(optimizer, COSINE, trade=0.0, **PLAN))
    rate = aj.learning_rate.scale_by_schedule(COSINE)
    theirs = fit(optax.chain(optimizer, rate, S.constant(32)))
    np.testing.assert_array_equal(ours.state.params, theirs.state.params)
    assert int(ours.state.num_steps) == int(theirs.state.num_steps) == D // 32


def test_warm_up_keeps_the_size():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 6_400, D)
    plan = S.seesaw_schedule(schedule, **PLAN)
    assert plan.starts[1] > 6_400
    assert plan.batch_size_at(6_400) == 32


@pytest.mark.slow
def test_a_cap_hands_the_rest_back_to_the_rate():
    plan = PLAN | {"max_batch_size": 64}
    result = fit(aj.seesaw(optax.sgd(1.0), COSINE, exponent=1.0, trade=1.0, **plan))
    sizes, rates = result.per_step("batch_size"), result.per_step("learning_rate")
    seen = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    alpha = (1 + np.cos(np.pi * seen / D)) / 2
    assert sizes.max() == 64
    np.testing.assert_allclose(rates, 0.1 * alpha * sizes / 32, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_never_above_its_limit():
    limit = S.constant(48)
    result = fit(aj.seesaw(optax.sgd(1.0), COSINE, limit=limit, **PLAN))
    plan = S.seesaw_schedule(COSINE, **PLAN)
    assert result.per_step("batch_size").max() == 48
    assert int(result.state.num_steps) > plan.num_steps(D)
    assert int(aj.get_batch_size(result.state.opt_state)) == 48


TINY = lambda n: 1e-3 * COSINE(n)
linear = lambda w, x: (x * w[None]).sum(-1)  # its gradient is the batch


def noisy(signal, tx, num_examples=D):
    """Trains on gradients of mean `signal` and variance 1."""
    data = aj.Data(signal + jax.random.normal(jax.random.key(0), (4096, 8)))
    return aj.fit(linear, jnp.zeros(8), tx, data, num_examples=num_examples)


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [1.0, pytest.param(0.5, marks=pytest.mark.exhaustive)])
def test_the_noise_scale_is_a_limit(exponent):
    tx = aj.seesaw(optax.sgd(1.0), TINY, exponent=exponent, limit="noise_scale", **SMALL)
    clear, hidden = noisy(10.0, tx), noisy(0.01, tx)
    assert clear.per_step("batch_size").max() == 32  # no noise to average away
    assert hidden.per_step("batch_size").max() > 60


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_measured_exponent_is_between_both_ends():
    tx = aj.seesaw(optax.sgd(1.0), TINY, trade=1.0, exponent="measured", **SMALL)
    for signal, power in ((10.0, 1.0), (1e-3, 0.5)):
        result = noisy(signal, tx)
        sizes, rates = result.per_step("batch_size"), result.per_step("learning_rate")
        seen = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        middle = slice(len(sizes) // 2, -len(sizes) // 4)
        shares = rates[middle] / np.asarray(TINY(seen[middle]))
        powers = np.log(shares) / np.log(sizes[middle] / 32)
        np.testing.assert_allclose(np.median(powers), power, atol=0.1)


def test_a_rate_that_is_not_finite_is_counted():
    broken = lambda n: jnp.where(n > 1_000, jnp.nan, 0.1)
    scale = scale_by_rate(broken, 32, 1.0)
    state = scale.init(None)
    updates, state = scale.update(jnp.ones(()), state, batch_size=64, num_examples=0)
    assert float(updates) == pytest.approx(0.2)
    updates, state = scale.update(jnp.ones(()), state, batch_size=64, num_examples=2_000)
    assert float(updates) == pytest.approx(0.2)
    assert int(state.num_skipped) == 1


def test_a_rate_that_rises_again_takes_its_batch_back():
    restarts = lambda n: 0.1 * (1 - (n % (D // 2)) / (D // 2))
    plan = S.seesaw_schedule(restarts, **PLAN)
    assert plan.batch_size_at(D // 2 - 1) == 512
    assert plan.batch_size_at(D // 2) == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": 0.1}, "schedule must be a function of the number of examples"),
        ({"schedule": lambda n: "a"}, "schedule must be a function of one count"),
        ({"schedule": lambda n: 0.1 if n < 5 else 0.0}, "schedule must be a function of one count"),
        ({"schedule": lambda n: jnp.ones(3)}, "schedule must be a function of one count"),
        ({"schedule": lambda n: -0.1 + 0 * n}, "schedule must be finite, >= 0 and not always 0"),
        ({"schedule": lambda n: n * jnp.nan}, "schedule must be finite, >= 0 and not always 0"),
        ({"schedule": lambda n: 0.0 * n}, "0 throughout"),
        ({"num_examples": 0}, "num_examples must be an integer >= 1"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"max_batch_size": 16}, "max_batch_size must be an integer >= 32"),
        ({"trade": 1.1}, "trade must be in"),
        ({"doubling": "no"}, "doubling must be True or False, got 'no'"),
        ({"exponent": 0.0}, "exponent must be in"),
        ({"exponent": "adam"}, "exponent must be one of 'measured'"),
        ({"limit": "critical"}, "limit must be one of 'noise_scale', 'noise_scale_l1'"),
        ({"limit": 512}, "limit must be None, .* got 512: the largest size is max_batch_size"),
        ({"limit": np.array([1, 2])}, "limit must be None"),
        ({"num_examples": 2**70}, "num_examples must be an integer >= 1 and <= 9223"),
        ({"optimizer": optax.MultiSteps(optax.sgd(1.0), 4)}, "wrap seesaw instead"),
        ({"optimizer": 0.1}, "optimizer must be an optax optimizer"),
    ],
)
def test_a_bad_argument_is_refused(arguments, message):
    good = {"optimizer": optax.sgd(1.0), "schedule": COSINE, **PLAN}
    with pytest.raises(ValueError, match=message):
        aj.seesaw(**good | arguments)


def test_doublings_need_no_padding():
    plan = S.seesaw_schedule(COSINE, **PLAN, doubling=True)
    free = S.seesaw_schedule(COSINE, **PLAN)
    assert plan.unique_batch_sizes() == (32, 64, 128, 256, 512)
    assert all(size == aj.next_bucket(size) for size in plan.batch_sizes)
    for seen in range(0, D, 1_000):  # the largest doubling that the plan allows
        assert (
            plan.batch_size_at(seen) <= free.batch_size_at(seen) < 2 * plan.batch_size_at(seen) + 1
        )
    odd = PLAN | {"batch_size": 48, "max_batch_size": 500}
    assert S.seesaw_schedule(COSINE, **odd, doubling=True).unique_batch_sizes() == (
        48,
        96,
        192,
        384,
    )


@pytest.mark.slow
def test_doubling_leaves_the_rest_to_the_rate():
    result = fit(aj.seesaw(optax.sgd(1.0), COSINE, **PLAN, doubling=True))
    sizes, rates = result.per_step("batch_size"), result.per_step("learning_rate")
    assert set(sizes[:-1]) == {32, 64, 128, 256, 512}
    seen = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    np.testing.assert_allclose(rates, COSINE(seen) * sizes / 32, rtol=1e-4)
    assert rates.max() <= 0.1
    planned = S.seesaw_schedule(COSINE, **PLAN, doubling=True)
    assert planned.num_steps(D) == int(result.state.num_steps)


@pytest.mark.parametrize(("limit", "expected"), [(300, 256), (64, 64), (40, 32), (8, 32)])
def test_a_limit_is_rounded_down_to_a_doubling(limit, expected):
    rule = S.seesaw(COSINE, **PLAN, doubling=True, limit=S.constant(limit))
    state = rule.init({"w": 0.0})
    _, state = rule.update({"w": 1.0}, state, num_examples=D - 100, batch_size=32)
    assert int(aj.get_batch_size(state)) == expected


# Mistakes that raise nothing: what the first update of the optimizer and the schedule show

ADAM = optax.adamw(1.0)
WARM_UP = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 100, D // 32)
ACCUMULATED = optax.MultiSteps(optax.sgd(0.1), 8).gradient_transformation()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": optax.sgd(0.1, momentum=0.9)}, "a learning rate of its own, about 0.1, and"),
        ({"optimizer": optax.adamw(3e-4, weight_decay=0.1)}, "of its own, about 0.0003, and"),
        ({"optimizer": optax.adamw(WARM_UP)}, "of its own, about 3e-06, and"),
        ({"optimizer": ACCUMULATED}, "of its own, about 0.1, and"),
        ({"optimizer": optax.scale_by_adam()}, "optimizer adds the gradient to the parameters"),
        ({"optimizer": ADAM, "limit": "noise_scale"}, 'pass limit="noise_scale_l1"'),
        ({"schedule": optax.cosine_decay_schedule(0.1, D // 32)}, "after 2,000 of 64,000 examples"),
        ({"schedule": WARM_UP}, r"schedule\(num_examples / 32\)"),
        (
            {"schedule": optax.cosine_decay_schedule(0.1, 32 * D)},
            "too little within 64,000 examples",
        ),
        (
            {"schedule": optax.linear_schedule(0.0, 0.1, 500)},
            "for the batch to grow: it stays at 32",
        ),
    ],
)
def test_a_likely_mistake_is_a_warning(arguments, message):
    given = {"optimizer": optax.sgd(1.0), "schedule": COSINE, **PLAN} | arguments
    with pytest.warns(UserWarning, match=message) as found:
        aj.seesaw(**given)
    assert [warning.filename for warning in found] == [__file__]


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(1.0, momentum=0.9, nesterov=True),
        optax.chain(
            optax.clip_by_global_norm(0.1), optax.add_decayed_weights(5e-4), optax.sgd(1.0)
        ),
        optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(1.0)),
        optax.lars(1.0),
        optax.adafactor(1.0),
        optax.MultiSteps(ADAM, 4).gradient_transformation(),
        aj.adamw_in_examples(1.0, 32, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
        optax.masked(optax.sgd(0.1), {"kernel": True}),  # of a tree that is not known here
    ],
)
def test_a_rate_of_1_is_no_mistake(optimizer):
    aj.seesaw(optimizer, COSINE, **PLAN)  # a warning is an error


def test_a_schedule_may_be_a_factor_of_the_rate():
    aj.seesaw(optax.sgd(0.1), lambda n: 10 * COSINE(n), **PLAN)


def test_a_decay_that_ends_early_may_count_examples():
    aj.seesaw(optax.sgd(1.0), optax.linear_schedule(0.1, 0.01, D // 10), **PLAN)
    S.seesaw_schedule(optax.constant_schedule(0.1), **PLAN, trade=0.0)
