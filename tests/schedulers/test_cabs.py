"""CABS, on numbers worked out by hand."""

import jax.numpy as jnp
import optax
import pytest

from arbiter_jax import schedulers
from tests.problems import grad_stats, run_rule

LIMITS = {"min_batch_size": 2, "max_batch_size": 1000, "initial_batch_size": 10}


def test_cabs_equation():
    """xi = 9/10 tr S: 0.1 * 900 / 1.5 = 60, then with averages 0.1 * 600 / (5 / 6) = 72."""
    steps = [
        {"value": 1.5, "grad_stats": grad_stats(variance_trace=1000.0)},
        {"value": 0.5, "grad_stats": grad_stats(variance_trace=500.0)},
    ]
    # xi: (0.25 * 900 + 0.5 * 450) / 0.75 = 600; F: (0.25 * 1.5 + 0.5 * 0.5) / 0.75 = 5 / 6.
    sizes, state = run_rule(schedulers.cabs(0.1, decay=0.5, **LIMITS), steps)
    assert sizes == [60, 72]
    assert float(state.gradient_variance) == pytest.approx(600.0)
    assert float(state.loss) == pytest.approx(5 / 6)


def test_cabs_follows_a_schedule_of_the_learning_rate():
    steps = [{"value": 1.0, "grad_stats": grad_stats(variance_trace=1000.0)}] * 3
    rule = schedulers.cabs(optax.linear_schedule(0.1, 0.3, 2), **LIMITS)
    assert run_rule(rule, steps)[0] == [90, 180, 270]


def test_cabs_schedule_goes_on_through_skipped_steps():
    good = {"value": 1.0, "grad_stats": grad_stats(variance_trace=1000.0)}
    rule = schedulers.cabs(optax.linear_schedule(0.1, 0.3, 2), **LIMITS)
    sizes, state = run_rule(rule, [good, good | {"value": jnp.nan}, good])
    assert sizes == [90, 90, 270]
    assert int(state.num_skipped) == 1


def test_cabs_defaults_are_the_published_ones():
    state = schedulers.cabs(0.1).init(None)
    assert int(state.batch_size) == 16
    _, state = schedulers.cabs(1e6).update(
        None, state, value=1.0, grad_stats=grad_stats(variance_trace=1000.0)
    )
    assert int(state.batch_size) == 2048
    assert float(state.weight) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedulers.cabs(0.0), "learning_rate must be a finite number > 0, got 0.0"),
        (lambda: schedulers.cabs(0.1, decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
