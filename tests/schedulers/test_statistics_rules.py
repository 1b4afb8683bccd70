"""The equations of the rules that read statistics, on numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import schedulers

LIMITS = {"min_batch_size": 2, "max_batch_size": 1000, "initial_batch_size": 10}
FIELDS = aj.GradStats._fields
SUMS = ("gradient_sum", "sq_norm_sum", "num_examples")


def stats(batch_size=10.0, **fields):
    """Statistics of ten examples; what a test does not name is NaN, so that nothing reads it."""
    fields = {"batch_size": batch_size, **fields}
    return aj.GradStats(*(jnp.float32(fields.get(name, jnp.nan)) for name in FIELDS))


def run(rule, steps, updates=None):
    """The sizes after each step and the last state."""
    state, sizes = rule.init(jax.tree.map(jnp.zeros_like, updates)), []
    update = jax.jit(lambda state, signals: rule.update(updates, state, **signals)[1])
    for signals in steps:
        state = update(state, signals)
        sizes.append(int(aj.get_batch_size(state)))
    return sizes, state


# CABS


def test_cabs_equation():
    """xi = 9/10 tr S: 0.1 * 900 / 1.5 = 60, then with averages 0.1 * 600 / (5 / 6) = 72."""
    steps = [
        {"value": 1.5, "grad_stats": stats(variance_trace=1000.0)},
        {"value": 0.5, "grad_stats": stats(variance_trace=500.0)},
    ]
    # xi: (0.25 * 900 + 0.5 * 450) / 0.75 = 600; F: (0.25 * 1.5 + 0.5 * 0.5) / 0.75 = 5 / 6.
    sizes, state = run(schedulers.cabs(0.1, decay=0.5, **LIMITS), steps)
    assert sizes == [60, 72]
    assert float(state.gradient_variance) == pytest.approx(600.0)
    assert float(state.loss) == pytest.approx(5 / 6)


def test_cabs_follows_a_schedule_of_the_learning_rate():
    steps = [{"value": 1.0, "grad_stats": stats(variance_trace=1000.0)}] * 3
    rule = schedulers.cabs(optax.linear_schedule(0.1, 0.3, 2), **LIMITS)
    assert run(rule, steps)[0] == [90, 180, 270]


def test_cabs_schedule_goes_on_through_skipped_steps():
    good = {"value": 1.0, "grad_stats": stats(variance_trace=1000.0)}
    rule = schedulers.cabs(optax.linear_schedule(0.1, 0.3, 2), **LIMITS)
    sizes, state = run(rule, [good, good | {"value": jnp.nan}, good])
    assert sizes == [90, 90, 270]
    assert int(state.num_skipped) == 1


def test_cabs_defaults_are_the_published_ones():
    state = schedulers.cabs(0.1).init(None)
    assert int(state.batch_size) == 16
    _, state = schedulers.cabs(1e6).update(
        None, state, value=1.0, grad_stats=stats(variance_trace=1000.0)
    )
    assert int(state.batch_size) == 2048
    assert float(state.weight) == pytest.approx(0.05)


# Gradient noise scale


def test_noise_scale_equation():
    """A ratio of means: c (0.25 * 100 + 0.5 * 400) / (0.25 * 2 + 0.5 * 1) = 225 c."""
    steps = [
        {"grad_stats": stats(variance_trace=100.0, mean_sq_norm=2.0)},
        {"grad_stats": stats(variance_trace=400.0, mean_sq_norm=1.0)},
    ]
    rule = schedulers.gradient_noise_scale(scale=2.0, decay=0.5, **LIMITS)
    sizes, state = run(rule, steps)
    assert sizes == [100, 450]
    assert float(state.variance_trace) == pytest.approx(300.0)
    assert float(state.mean_sq_norm) == pytest.approx(4 / 3)


def test_noise_scale_uses_a_negative_estimate_but_not_a_negative_mean():
    """One |G|^2 below zero pulls the mean down, as it must; a mean below zero is pure noise."""
    steps = [
        {"grad_stats": stats(variance_trace=100.0, mean_sq_norm=4.0)},
        {"grad_stats": stats(variance_trace=100.0, mean_sq_norm=-1.0)},
        {"grad_stats": stats(variance_trace=100.0, mean_sq_norm=-10.0)},
    ]
    sizes, state = run(schedulers.gradient_noise_scale(decay=0.5, **LIMITS), steps)
    assert sizes == [25, 150, 1000]  # 100 / (2 / 3)
    assert int(state.num_skipped) == 0


def test_noise_scale_default_average():
    state = schedulers.gradient_noise_scale().init(None)
    steps = {"grad_stats": stats(variance_trace=100.0, mean_sq_norm=4.0)}
    _, state = schedulers.gradient_noise_scale().update(None, state, **steps)
    assert float(state.weight) == pytest.approx(0.01)


# Norm test and inner-product test

TESTS = {
    "norm_test": (
        lambda **k: schedulers.norm_test(eta=0.5, **LIMITS, **k),
        lambda ratio: stats(variance_trace=ratio, batch_sq_norm=4.0),
    ),
    "inner_product_test": (
        lambda **k: schedulers.inner_product_test(theta=0.5, **LIMITS, **k),
        lambda ratio: stats(inner_product_variance=ratio, batch_sq_norm=2.0),
    ),
}


@pytest.mark.parametrize("name", TESTS)
def test_both_tests_equation(name):
    """Passed at ratio / B = 1 (10 / 10); failed above it: the ratio, rounded up."""
    rule, given = TESTS[name]
    sizes, _ = run(rule(), [{"grad_stats": given(x)} for x in (5.0, 10.0, 10.5, 77.7)])
    assert sizes == [10, 10, 11, 78]


@pytest.mark.parametrize("name", TESTS)
def test_grows_only(name):
    rule, given = TESTS[name]
    for in_force in (10, 40, 200):
        signals = [{"grad_stats": given(x), "batch_size": in_force} for x in (50.0, 1.0, 150.0)]
        sizes, _ = run(rule(), signals)
        assert min(sizes) >= in_force
        assert sizes == [max(in_force, 50), in_force, max(in_force, 150)]
    # The epoch's rule makes the same promise.
    dive = schedulers.dive_batch(10, delta=1e-3, **LIMITS)
    signals = {"grad_stats": stats(variance_trace=1.0, batch_sq_norm=1.0), "batch_size": 200}
    assert run(dive, [signals] * 3, jnp.ones(()))[0] == [200, 200, 200]


@pytest.mark.parametrize("name", TESTS)
def test_decisions_that_are_not_applied_do_not_ratchet(name):
    """The last step of a window decides, not the largest: noise would only ever push up."""
    rule, given = TESTS[name]
    signals = [{"grad_stats": given(x), "batch_size": 10} for x in (900.0, 20.0)]
    assert run(rule(), signals)[0] == [900, 20]


@pytest.mark.parametrize("name", TESTS)
def test_both_tests_average(name):
    rule, given = TESTS[name]
    signals = [{"grad_stats": given(x), "batch_size": 10} for x in (30.0, 90.0)]
    assert run(rule(decay=0.5), signals)[0] == [30, 70]  # (0.25 * 30 + 0.5 * 90) / 0.75


def test_published_tolerances():
    """eta = 0.1 and theta = 0.9: 4 / (0.01 * 1) and 81 / (0.81 * 1)."""
    norm = schedulers.norm_test(max_batch_size=1000)
    assert run(norm, [{"grad_stats": stats(variance_trace=4.0, batch_sq_norm=1.0)}])[0] == [400]
    inner = schedulers.inner_product_test()
    given = stats(inner_product_variance=81.0, batch_sq_norm=1.0)
    assert run(inner, [{"grad_stats": given}])[0] == [pytest.approx(100, abs=1)]


# SimiGrad


def cosines(*values, **more):
    return [{"grad_stats": stats(half_cosine=value), **more} for value in values]


def test_simigrad_equation():
    """Means of two cosines against .7: .65 grows to ceil(1.5 B), .75 shrinks to floor(B / 1.5)."""
    rule = schedulers.simigrad(decide_every=2, **LIMITS)
    assert run(rule, cosines(0.4, 0.9, 0.6, 0.9))[0] == [10, 15, 15, 10]


def test_simigrad_moves_the_smallest_sizes():
    rule = schedulers.simigrad(decide_every=1, factor=1.1, min_batch_size=1, max_batch_size=9)
    assert run(rule, cosines(0.1, 0.1, 0.9, 0.9, 0.9))[0] == [2, 3, 2, 1, 1]


def test_one_factor_per_decision():
    rule = schedulers.simigrad(decide_every=1, **LIMITS)
    assert run(rule, cosines(*[0.1] * 20, batch_size=100))[0] == [150] * 20
    assert run(rule, cosines(*[0.9] * 20, batch_size=100))[0] == [66] * 20


# DiveBatch


def test_dive_batch_equation():
    """Two steps of 10 examples are an epoch of N = 20.

    The gradient is (1, 0), then (0, 2). Sums of squared norms: 9 * 5 + 10 * 1 and 9 * 3 + 10 * 4;
    squared norm of the sum: (10 * 1)^2 + (10 * 2)^2 = 500. delta N D = 3 * 20 * 122 / 500 = 14.64.
    """
    rule = schedulers.dive_batch(20, delta=3.0, **LIMITS)
    params = jnp.zeros(2)
    state = rule.init(params)
    first = stats(variance_trace=5.0, batch_sq_norm=1.0)
    _, state = rule.update(jnp.array([1.0, 0.0]), state, grad_stats=first)
    assert int(state.batch_size) == 10
    assert float(state.sq_norm_sum) == pytest.approx(55.0)
    second = stats(variance_trace=3.0, batch_sq_norm=4.0)
    _, after = rule.update(jnp.array([0.0, 2.0]), state, grad_stats=second)
    assert int(after.batch_size) == 14
    assert [float(jnp.sum(getattr(after, name))) for name in SUMS] == [0.0, 0.0, 0.0]  # a new epoch
    # Behind an optimizer the updates are no gradients: `grad` says what they were.
    _, told = rule.update(jnp.full(2, -0.1), state, grad_stats=second, grad=jnp.array([0.0, 2.0]))
    assert int(told.batch_size) == 14


def test_dive_batch_is_exact_for_per_example_statistics():
    """Against the definition, from the gradients themselves."""
    gradients = np.random.default_rng(0).normal(0.5, 1.0, (3, 8, 5))  # 3 batches of 8 examples
    diversity = np.sum(gradients**2) / np.sum(np.sum(gradients, axis=(0, 1)) ** 2)
    rule = schedulers.dive_batch(24, delta=10.0, min_batch_size=1, max_batch_size=10_000)
    state = rule.init(jnp.zeros(5))
    for batch in gradients:
        mean = np.mean(batch, axis=0)
        trace = np.sum(np.var(batch, axis=0, ddof=1))
        given = stats(8.0, variance_trace=trace, batch_sq_norm=np.sum(mean**2))
        _, state = rule.update(jnp.asarray(mean, jnp.float32), state, grad_stats=given)
    assert int(state.batch_size) == int(10.0 * 24 * diversity)


def test_dive_batch_on_cancelling_gradients_takes_the_largest_size():
    given = {"grad_stats": stats(variance_trace=1.0, batch_sq_norm=1.0)}
    rule = schedulers.dive_batch(20, **LIMITS)
    state = rule.init(jnp.zeros(()))
    for gradient in (1.0, -1.0):
        _, state = rule.update(jnp.float32(gradient), state, **given)
    assert int(state.batch_size) == 1000


def test_dive_batch_sums_low_precision_gradients_in_float32():
    rule = schedulers.dive_batch(10_000, **LIMITS)
    params = jnp.zeros(3, jnp.bfloat16)
    given = stats(variance_trace=1.0, batch_sq_norm=3.0)
    step = lambda _, state: rule.update(jnp.ones_like(params), state, grad_stats=given)[1]
    state = jax.lax.fori_loop(0, 300, step, rule.init(params))  # a bfloat16 sum stops at 2560
    assert state.gradient_sum.tolist() == [3000.0] * 3


# AdaDamp


def test_adadamp_equation():
    """B_0 (F_0 - F*) / (F - F*) = 10 * (2.5 - 0.5) / (1.1 - 0.5) = 33.3, rounded up."""
    rule = schedulers.adadamp(optimal_loss=0.5, decay=0.0, **LIMITS)
    sizes, state = run(rule, [{"value": x} for x in (2.5, 1.1, 1.5, 5.0, 0.5)])
    assert sizes == [10, 34, 20, 5, 1000]
    assert float(state.initial_loss) == 2.5


def test_adadamp_averages_the_loss():
    """(0.25 * 2 + 0.5 * 0.5) / 0.75 = 1: half of the first loss, twice the size."""
    rule = schedulers.adadamp(decay=0.5, **LIMITS)
    assert run(rule, [{"value": 2.0}, {"value": 0.5}])[0] == [10, 20]


def test_adadamp_waits_for_a_first_loss_above_the_optimum():
    rule = schedulers.adadamp(decay=0.0, **LIMITS)
    sizes, state = run(rule, [{"value": x} for x in (-1.0, jnp.nan, 4.0, 2.0)])
    assert sizes == [10, 10, 10, 20]
    assert int(state.num_skipped) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedulers.cabs(0.0), "learning_rate must be a finite number > 0, got 0.0"),
        (lambda: schedulers.cabs(0.1, decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
        (lambda: schedulers.gradient_noise_scale(scale=-1), "scale must be a finite number > 0"),
        (lambda: schedulers.norm_test(eta=0), "eta must be a finite number > 0"),
        (lambda: schedulers.inner_product_test(theta=-0.9), "theta must be a finite number > 0"),
        (lambda: schedulers.simigrad(target=1.0), r"target must be in \(-1, 1\), got 1.0"),
        (lambda: schedulers.simigrad(factor=1.0), "factor must be a finite number > 1, got 1.0"),
        (
            lambda: schedulers.simigrad(decide_every=0),
            "decide_every must be an integer >= 1, got 0",
        ),
        (lambda: schedulers.dive_batch(0), "dataset_size must be an integer >= 1, got 0"),
        (lambda: schedulers.dive_batch(10, delta=0), "delta must be a finite number > 0"),
        (lambda: schedulers.adadamp(optimal_loss=float("nan")), r"optimal_loss must be in \(-inf"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
