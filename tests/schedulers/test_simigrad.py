"""SimiGrad, on numbers worked out by hand."""

import pytest

from arbiter_jax import schedulers
from tests.problems import grad_stats, run_rule

LIMITS = {"min_batch_size": 2, "max_batch_size": 1000, "initial_batch_size": 10}


def cosines(*values, **more):
    return [{"grad_stats": grad_stats(half_cosine=value), **more} for value in values]


def test_simigrad_equation():
    """Means of two cosines against .7: .65 grows to ceil(1.5 B), .75 shrinks to floor(B / 1.5)."""
    rule = schedulers.simigrad(decide_every=2, **LIMITS)
    assert run_rule(rule, cosines(0.4, 0.9, 0.6, 0.9))[0] == [10, 15, 15, 10]


def test_simigrad_moves_the_smallest_sizes():
    rule = schedulers.simigrad(decide_every=1, factor=1.1, min_batch_size=1, max_batch_size=9)
    assert run_rule(rule, cosines(0.1, 0.1, 0.9, 0.9, 0.9))[0] == [3, 4, 3, 2, 2]


def test_one_factor_per_decision():
    rule = schedulers.simigrad(decide_every=1, **LIMITS)
    assert run_rule(rule, cosines(*[0.1] * 20, batch_size=100))[0] == [150] * 20
    assert run_rule(rule, cosines(*[0.9] * 20, batch_size=100))[0] == [66] * 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedulers.simigrad(target=1.0), r"target must be in \(-1, 1\), got 1.0"),
        (lambda: schedulers.simigrad(factor=1.0), "factor must be a finite number > 1, got 1.0"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
