"""The cost model of the benchmark: step times on n devices, on paper."""

import pytest

from experiments.benchmark.cost_model import (
    CostModel,
    fit_cost_model,
    step_seconds,
    strong_speedup,
    weak_efficiency,
)

# 1 ms a step, 10 us an example, 100 MB at 100 GB/s, no latency, a window costs the host 50 ms.
MODEL = CostModel(1e-3, 1e-5, 10**8, window_seconds=0.05, bandwidth=1e11, latency=0.0)


def test_one_device_has_no_all_reduce():
    assert step_seconds(MODEL, 100, window=100) == pytest.approx(1e-3 + 1e-3 + 5e-4)


def test_a_ring_moves_the_gradient_almost_twice():
    """Each device sends the gradient twice, but for its own share."""
    # 2 * 3/4 * 1 ms of all-reduce, a quarter of the examples on each of 4 devices.
    assert step_seconds(MODEL, 400, 4, window=100) == pytest.approx(1e-3 + 1e-3 + 1.5e-3 + 5e-4)
    late = MODEL._replace(latency=1e-4)
    more = step_seconds(late, 400, 4) - step_seconds(MODEL, 400, 4)
    assert more == pytest.approx(2 * 2 * 1e-4)


def test_scaling_of_equal_shares_and_of_one_batch():
    assert weak_efficiency(MODEL, 100, 4) == pytest.approx(2.5 / 4.0)
    assert strong_speedup(MODEL, 400, 4) == pytest.approx(5.5 / 4.0)
    assert weak_efficiency(MODEL, 100, 1) == strong_speedup(MODEL, 100, 1) == 1


def test_the_fit_finds_what_made_the_times():
    sizes = [64, 512, 8192]
    times = [1e-3 + 1e-5 * size for size in sizes]
    model = fit_cost_model(sizes, times, 4, bandwidth=1.0)
    assert (model.fixed, model.per_example) == pytest.approx((1e-3, 1e-5))
    assert (model.gradient_bytes, model.bandwidth) == (4, 1.0)


def test_the_fit_has_no_negative_cost():
    model = fit_cost_model([1, 2, 4], [1.0, 2.1, 4.4], 4)
    assert model.fixed == 0
    assert model.per_example == pytest.approx(1.05, abs=0.02)
