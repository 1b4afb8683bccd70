"""The batch sizes that lower a loss the most for a given rate."""

import numpy as np
import pytest

from arbiter_jax.schedulers import optimal_schedule


def noise(rates, sizes):
    after = np.append(np.cumsum(rates[::-1])[::-1][1:], rates[-1])
    return np.sum(rates**2 / (after * sizes))


@pytest.mark.parametrize("decay", [lambda x: 1 + 0 * x, lambda x: 1 - 0.9 * x, lambda x: 0.1**x])
def test_no_other_sizes_have_less_noise(decay):
    rates = decay(np.linspace(0, 1, 50))
    best = optimal_schedule(rates, 10_000)
    assert best.sum() == pytest.approx(10_000)
    rng = np.random.default_rng(0)
    for _ in range(200):
        other = best * np.exp(rng.normal(scale=0.05, size=50))
        assert noise(rates, best) < noise(rates, other * 10_000 / other.sum())


def test_a_constant_rate_grows_as_an_inverse_root():
    sizes = optimal_schedule(np.ones(1_000), 1.0)
    left = np.arange(1_000, 0, -1) - 1
    np.testing.assert_allclose(sizes[:-1] / sizes[0], np.sqrt(999 / left[:-1]))


def test_a_linear_decay_keeps_its_size():
    sizes = optimal_schedule(np.linspace(1, 0, 1_001), 1.0)[:-50]
    assert sizes.max() / sizes.min() < 1.02


def test_a_step_without_a_rate_has_the_size_before():
    sizes = optimal_schedule([1.0, 0.0, 0.5, 0.0, 0.0], 10)
    assert sizes[1] == sizes[0]
    assert sizes[3] == sizes[4] == sizes[2]
    assert np.all(np.isfinite(sizes))


@pytest.mark.parametrize(
    ("rates", "num_examples", "message"),
    [
        ([], 10, "learning_rates must be a sequence"),
        ([1.0, -1.0], 10, "learning_rates must be a sequence of finite numbers >= 0"),
        ([1.0, np.nan], 10, "learning_rates must be a sequence of finite numbers >= 0"),
        ([[1.0]], 10, "learning_rates must be a sequence"),
        (None, 10, "learning_rates must be a sequence"),
        ("fast", 10, "learning_rates must be a sequence"),
        ([0.0, 1.0], 10, "learning_rates must begin with a rate > 0"),
        ([0.0], 10, "learning_rates must begin with a rate > 0"),
        ([1.0], 0, "num_examples must be a finite number > 0"),
    ],
)
def test_bad_rates_are_refused(rates, num_examples, message):
    with pytest.raises(ValueError, match=message):
        optimal_schedule(rates, num_examples)
