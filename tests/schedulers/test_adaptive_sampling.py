"""The norm test and the inner-product test, on numbers worked out by hand."""

import jax.numpy as jnp
import pytest

from arbiter_jax import schedulers
from tests.problems import grad_stats, run_rule

LIMITS = {"min_batch_size": 2, "max_batch_size": 1000, "initial_batch_size": 10}


TESTS = {
    "norm_test": (
        lambda **k: schedulers.norm_test(eta=0.5, **LIMITS, **k),
        lambda ratio: grad_stats(variance_trace=ratio, batch_sq_norm=4.0),
    ),
    "inner_product_test": (
        lambda **k: schedulers.inner_product_test(theta=0.5, **LIMITS, **k),
        lambda ratio: grad_stats(inner_product_variance=ratio, batch_sq_norm=2.0),
    ),
}


@pytest.mark.parametrize("name", TESTS)
def test_both_tests_equation(name):
    """Passed at ratio / B = 1 (10 / 10); failed above it: the ratio, rounded up."""
    rule, given = TESTS[name]
    sizes, _ = run_rule(rule(), [{"grad_stats": given(x)} for x in (5.0, 10.0, 10.5, 77.7)])
    assert sizes == [10, 10, 11, 78]


@pytest.mark.parametrize("name", TESTS)
def test_grows_only(name):
    rule, given = TESTS[name]
    for in_force in (10, 40, 200):
        signals = [{"grad_stats": given(x), "batch_size": in_force} for x in (50.0, 1.0, 150.0)]
        sizes, _ = run_rule(rule(), signals)
        assert min(sizes) >= in_force
        assert sizes == [max(in_force, 50), in_force, max(in_force, 150)]
    # The epoch's rule makes the same promise.
    dive = schedulers.dive_batch(10, delta=1e-3, **LIMITS)
    signals = {"grad_stats": grad_stats(variance_trace=1.0, batch_sq_norm=1.0), "batch_size": 200}
    assert run_rule(dive, [signals] * 3, jnp.ones(()))[0] == [200, 200, 200]


@pytest.mark.parametrize("name", TESTS)
def test_decisions_that_are_not_applied_do_not_ratchet(name):
    """The last step of a window decides, not the largest: noise would only ever push up."""
    rule, given = TESTS[name]
    signals = [{"grad_stats": given(x), "batch_size": 10} for x in (900.0, 20.0)]
    assert run_rule(rule(), signals)[0] == [900, 20]


@pytest.mark.parametrize("name", TESTS)
def test_both_tests_average(name):
    rule, given = TESTS[name]
    signals = [{"grad_stats": given(x), "batch_size": 10} for x in (30.0, 90.0)]
    assert run_rule(rule(decay=0.5), signals)[0] == [30, 70]  # (0.25 * 30 + 0.5 * 90) / 0.75


def test_published_tolerances():
    """eta = 0.1 and theta = 0.9: 4 / (0.01 * 1) and 81 / (0.81 * 1)."""
    norm = schedulers.norm_test(max_batch_size=1000)
    assert run_rule(norm, [{"grad_stats": grad_stats(variance_trace=4.0, batch_sq_norm=1.0)}])[
        0
    ] == [400]
    inner = schedulers.inner_product_test()
    given = grad_stats(inner_product_variance=81.0, batch_sq_norm=1.0)
    assert run_rule(inner, [{"grad_stats": given}])[0] == [pytest.approx(100, abs=1)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedulers.norm_test(eta=0), "eta must be a finite number > 0"),
        (lambda: schedulers.inner_product_test(theta=-0.9), "theta must be a finite number > 0"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
