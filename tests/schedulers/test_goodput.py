"""Goodput: the fit of the times, what it is given credit for, and the choice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arbiter_jax as aj
from arbiter_jax import schedulers
from arbiter_jax.schedulers import _goodput, _step_times

NOISE_SCALE = 80.0
STATS = aj.GradStats(*jnp.array([0.5, 0.5 * NOISE_SCALE, 32.0, 1.75, 0.2, 3.0]))


@functools.cache
def compiled(**settings):
    rule = schedulers.goodput(**settings)

    def window(state, seconds, size, stats):
        signals = {"grad_stats": stats, "step_seconds": seconds, "batch_size": size}
        step = lambda _, state: rule.update(None, state, **signals)[1]
        return jax.lax.fori_loop(0, 3, step, state)

    return rule, jax.jit(window)


def simulate(seconds_of, num_windows, stats=STATS, **settings):
    """A run whose steps take `seconds_of(size)`: the applied sizes, window by window."""
    rule, window = compiled(**settings)
    state, seconds, sizes = rule.init(None), jnp.float32(jnp.nan), []
    for _ in range(num_windows):
        size = int(aj.get_batch_size(state))
        sizes.append(size)
        state = window(state, seconds, jnp.int32(size), stats)
        seconds = jnp.float32(seconds_of(size))
    return sizes, state


def best_size(seconds_of, sizes, start):
    phi = NOISE_SCALE
    return max(sizes, key=lambda b: b / seconds_of(b) * (phi + start) / (phi + b))


@pytest.mark.parametrize(("fixed", "each"), [(1e-3, 1e-4), (1e-2, 1e-4), (0.1, 1e-5), (0.0, 1e-4)])
def test_finds_the_best_size_of_a_known_machine(fixed, each):
    seconds_of = lambda b: fixed + each * b
    sizes, state = simulate(seconds_of, 14, initial_batch_size=32)
    powers = [8, 16, 32, 64, 128, 256, 512]
    expected = best_size(seconds_of, powers, 32)
    value = lambda b: b / seconds_of(b) / (NOISE_SCALE + b)
    # Within the gain of 1.05 that a switch must bring.
    assert value(sizes[-1]) * 1.05 >= value(expected)
    assert sizes[-1] == sizes[-2]
    assert float(_step_times.seconds_of(state.times, jnp.float32(300.0))) == pytest.approx(
        seconds_of(300.0), rel=1e-3
    )


def test_explores_by_doubling():
    """A step that costs the same at any size: up, as soon as the last size has been measured."""
    sizes, _ = simulate(lambda b: 0.01, 7, initial_batch_size=8, max_batch_size=100)
    assert sizes == [8, 8, 16, 16, 32, 32, 64]
    sizes, _ = simulate(lambda b: 0.01, 5, initial_batch_size=8, max_growth=4.0)
    assert sizes == [8, 8, 32, 32, 128]


def test_no_decision_without_a_time():
    sizes, state = simulate(lambda b: jnp.nan, 5, initial_batch_size=32)
    assert sizes == [32] * 5
    assert int(state.num_skipped) == 0


def test_needs_a_least_improvement():
    """64 instead of 32 brings 2 * 112 / 144 = 1.556."""
    settings = {"initial_batch_size": 32, "candidates": (32, 64)}
    assert simulate(lambda b: 0.01, 4, min_improvement=1.55, **settings)[0][-1] == 64
    assert simulate(lambda b: 0.01, 4, min_improvement=1.56, **settings)[0][-1] == 32


def test_a_time_counts_for_the_size_it_was_measured_at():
    """At the first step of a window the time is that of the window before, with its size."""
    rule = schedulers.goodput(initial_batch_size=32)
    state = rule.init(None)
    given = [(jnp.nan, 32), (jnp.nan, 32), (0.2, 64), (0.2, 64), (0.3, 16), (0.3, 16)]
    for seconds, size in given:
        _, state = rule.update(
            None, state, grad_stats=STATS, step_seconds=jnp.float32(seconds), batch_size=size
        )
    # 0.2 s for 32, then 0.3 s for 64, weighted by 0.9 / 0.2^2 and 1 / 0.3^2: each once.
    weights = np.array([0.9 / 0.2**2, 1 / 0.3**2])
    assert float(state.times.weight) == pytest.approx(weights.sum(), rel=1e-5)
    assert float(state.times.size) == pytest.approx(weights @ [32, 64] / weights.sum(), rel=1e-5)
    assert float(state.times.seconds) == pytest.approx(weights @ [0.2, 0.3] / weights.sum(), 1e-5)
    assert int(state.times.largest) == 64


def test_equal_times_of_consecutive_windows_count_each():
    """Windows of 3 steps with one size and one time: only their length separates them."""
    rule = schedulers.goodput(min_improvement=1e6, initial_batch_size=32)
    state, weights = rule.init(None), []
    for seconds in [np.nan] * 3 + [0.1] * 9:
        _, state = rule.update(
            None, state, grad_stats=STATS, step_seconds=jnp.float32(seconds), batch_size=32
        )
        weights.append(round(float(state.times.weight), 2))
    assert weights == [0.0] * 3 + [100.0] * 3 + [190.0] * 3 + [271.0] * 3


def test_grows_in_a_loop_of_ones_own():
    """A time at each step, always the same, and no `batch_size`."""
    rule = schedulers.goodput(initial_batch_size=8, max_batch_size=64)
    state, sizes = rule.init(None), []
    for _ in range(8):
        _, state = rule.update(None, state, grad_stats=STATS, step_seconds=0.01)
        sizes.append(int(state.batch_size))
    assert sizes[-1] == 64


def test_the_fit_is_weighted_least_squares():
    """Against numpy, on noisy times: weights 0.9^age / seconds^2."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(8, 512, 12)
    seconds = (0.01 + 1e-4 * sizes) * rng.uniform(0.9, 1.1, 12)
    rule = schedulers.goodput(initial_batch_size=int(sizes[0]))
    state, given = rule.init(None), [np.nan, *seconds]
    for time, size in zip(given, [*sizes, sizes[-1]], strict=True):
        _, state = rule.update(
            None, state, grad_stats=STATS, step_seconds=jnp.float32(time), batch_size=int(size)
        )
    weights = 0.9 ** np.arange(12)[::-1] / seconds**2
    slope, intercept = np.polyfit(sizes, seconds, 1, w=np.sqrt(weights))
    for size in (8.0, 512.0):
        fitted = float(_step_times.seconds_of(state.times, jnp.float32(size)))
        assert fitted == pytest.approx(intercept + slope * size, rel=1e-3)


@pytest.mark.parametrize(("low_time", "high_time"), [(0.5, 0.1), (0.01, 1.0)])
def test_times_of_the_fit_are_never_negative(low_time, high_time):
    """Neither a slope below zero nor an intercept below zero, whatever was measured."""
    rule = schedulers.goodput(initial_batch_size=32)
    state = rule.init(None)
    for seconds, size in [(jnp.nan, 32), (low_time, 64), (high_time, 64)]:
        _, state = rule.update(
            None, state, grad_stats=STATS, step_seconds=jnp.float32(seconds), batch_size=size
        )
    at = lambda size: float(_step_times.seconds_of(state.times, jnp.float32(size)))
    assert 0 <= at(0.0) <= at(1.0) <= at(512.0)
    assert at(512.0) > 0


def test_pure_noise_asks_for_throughput_alone():
    """With |G|^2 <= 0 every example is worth the same: the largest size within reach."""
    noise = STATS._replace(mean_sq_norm=jnp.float32(-1.0))
    sizes, _ = simulate(lambda b: 0.01, 9, stats=noise, initial_batch_size=8, max_batch_size=64)
    assert sizes[-1] == 64


def test_candidates_fill_their_bucket():
    assert _goodput._candidates(None, 8, 100) == (8, 16, 32, 64, 100)
    assert _goodput._candidates(None, 5, 64) == (5, 8, 16, 32, 64)
    assert _goodput._candidates(None, 7, 7) == (7,)
    assert _goodput._candidates((10, 20), 8, 100) == (10, 20)


@pytest.mark.parametrize("make", [np.int64, np.int32, np.uint8])
def test_a_size_may_be_a_number_of_numpy(make):
    sizes = {"min_batch_size": make(8), "max_batch_size": make(64), "initial_batch_size": make(16)}
    state = schedulers.goodput(**sizes).init(None)
    found = state.batch_size, state.min_batch_size, state.max_batch_size
    assert [int(size) for size in found] == [16, 8, 64]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_improvement": 0.9}, "min_improvement must be a finite number >= 1, got 0.9"),
        ({"max_growth": 1.0}, "max_growth must be a finite number > 1, got 1.0"),
        ({"candidates": ()}, "candidates must increase and not be empty"),
        ({"candidates": (16, 8)}, r"candidates must increase and not be empty, got \(16, 8\)"),
        ({"candidates": (4, 8)}, "candidates must be an integer >= 8 and <= 512, got 4"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedulers.goodput(**arguments)
