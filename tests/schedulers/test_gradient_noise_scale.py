"""The gradient noise scale, on numbers worked out by hand."""

import pytest

from arbiter_jax import schedulers
from tests.problems import grad_stats, run_rule

LIMITS = {"min_batch_size": 2, "max_batch_size": 1000, "initial_batch_size": 10}


def test_noise_scale_equation():
    """A ratio of means: c (0.25 * 100 + 0.5 * 400) / (0.25 * 2 + 0.5 * 1) = 225 c."""
    steps = [
        {"grad_stats": grad_stats(variance_trace=100.0, mean_sq_norm=2.0)},
        {"grad_stats": grad_stats(variance_trace=400.0, mean_sq_norm=1.0)},
    ]
    rule = schedulers.gradient_noise_scale(scale=2.0, decay=0.5, **LIMITS)
    sizes, state = run_rule(rule, steps)
    assert sizes == [100, 450]
    assert float(state.variance_trace) == pytest.approx(300.0)
    assert float(state.mean_sq_norm) == pytest.approx(4 / 3)


def test_negative_estimates_count_in_the_mean():
    """One |G|^2 below zero pulls the mean down, as it must; a mean below zero is pure noise."""
    steps = [
        {"grad_stats": grad_stats(variance_trace=100.0, mean_sq_norm=4.0)},
        {"grad_stats": grad_stats(variance_trace=100.0, mean_sq_norm=-1.0)},
        {"grad_stats": grad_stats(variance_trace=100.0, mean_sq_norm=-10.0)},
    ]
    sizes, state = run_rule(schedulers.gradient_noise_scale(decay=0.5, **LIMITS), steps)
    assert sizes == [25, 150, 1000]  # 100 / (2 / 3)
    assert int(state.num_skipped) == 0


def test_noise_scale_default_average():
    state = schedulers.gradient_noise_scale().init(None)
    steps = {"grad_stats": grad_stats(variance_trace=100.0, mean_sq_norm=4.0)}
    _, state = schedulers.gradient_noise_scale().update(None, state, **steps)
    assert float(state.weight) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedulers.gradient_noise_scale(scale=-1), "scale must be a finite number > 0"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
