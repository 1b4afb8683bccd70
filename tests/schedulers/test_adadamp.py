"""AdaDamp, on numbers worked out by hand."""

import jax.numpy as jnp
import pytest

from arbiter_jax import schedulers
from tests.problems import run_rule

LIMITS = {"min_batch_size": 2, "max_batch_size": 1000, "initial_batch_size": 10}


def test_adadamp_equation():
    """B_0 (F_0 - F*) / (F - F*) = 10 * (2.5 - 0.5) / (1.1 - 0.5) = 33.3, rounded up."""
    rule = schedulers.adadamp(optimal_loss=0.5, decay=0.0, **LIMITS)
    sizes, state = run_rule(rule, [{"value": x} for x in (2.5, 1.1, 1.5, 5.0, 0.5)])
    assert sizes == [10, 34, 20, 5, 1000]
    assert float(state.initial_loss) == 2.5


def test_adadamp_averages_the_loss():
    """(0.25 * 2 + 0.5 * 0.5) / 0.75 = 1: half of the first loss, twice the size."""
    rule = schedulers.adadamp(decay=0.5, **LIMITS)
    assert run_rule(rule, [{"value": 2.0}, {"value": 0.5}])[0] == [10, 20]


def test_waits_for_a_first_loss_above_the_optimum():
    rule = schedulers.adadamp(decay=0.0, **LIMITS)
    sizes, state = run_rule(rule, [{"value": x} for x in (-1.0, jnp.nan, 4.0, 2.0)])
    assert sizes == [10, 10, 10, 20]
    assert int(state.num_skipped) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedulers.adadamp(optimal_loss=float("nan")), r"optimal_loss must be in \(-inf"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
