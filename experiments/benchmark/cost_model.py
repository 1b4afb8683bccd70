"""The time of a step on n devices, on paper: compute, the all-reduce of the gradient, host reads.

    T(n, B) = t + c B / n + 2 (n - 1) / n * P / bandwidth + 2 log2(n) * latency + h / steps

t and c come from step times of one device: what a step costs besides its examples, and an example.
P are the bytes of the gradient, h what the host adds to a window. Nothing overlaps
in the model, so that it is an upper bound where XLA hides the all-reduce behind the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class CostModel(NamedTuple):
    """What :func:`step_seconds` needs to know of a network and of the devices."""

    fixed: float  # t, seconds of a step
    per_example: float  # c, seconds
    gradient_bytes: int  # P
    window_seconds: float = 0.0  # h
    bandwidth: float = 450e9  # bytes a second between devices: NVLink 4, one direction
    latency: float = 5e-6  # seconds of a message


def fit_cost_model(
    batch_sizes: Sequence[int], seconds: Sequence[float], gradient_bytes: int, **options: float
) -> CostModel:
    """The model whose step times on one device have the smallest relative squared error.

    >>> model = fit_cost_model([64, 512, 4096], [3e-3, 10e-3, 66e-3], 4_000_000)
    >>> round(1e3 * model.fixed, 2), round(1e6 * model.per_example, 2)
    (2.0, 15.62)
    """
    sizes, times = np.asarray(batch_sizes, float), np.asarray(seconds, float)
    columns = np.stack([1 / times, sizes / times], axis=1)
    fixed, per_example = np.linalg.lstsq(columns, np.ones(len(times)), rcond=None)[0]
    if fixed < 0:  # no fixed cost at all
        fixed, per_example = 0.0, np.sum(sizes / times) / np.sum((sizes / times) ** 2)
    return CostModel(float(fixed), float(per_example), gradient_bytes, **options)


def step_seconds(
    model: CostModel, batch_size: float, num_devices: int = 1, window: int = 100
) -> float:
    """Seconds of one step of `batch_size` examples on all devices together."""
    n = num_devices
    all_reduce = 2 * (n - 1) / n * model.gradient_bytes / model.bandwidth
    all_reduce += 2 * math.log2(n) * model.latency
    compute = model.fixed + model.per_example * batch_size / n
    return compute + all_reduce + model.window_seconds / window


def weak_efficiency(model: CostModel, batch_size: int, num_devices: int) -> float:
    """Time of a step on one device, over that on n devices with n times the batch."""
    many = step_seconds(model, batch_size * num_devices, num_devices)
    return step_seconds(model, batch_size) / many


def strong_speedup(model: CostModel, batch_size: int, num_devices: int) -> float:
    """Time of a step on one device, over that of the same batch on n devices."""
    return step_seconds(model, batch_size) / step_seconds(model, batch_size, num_devices)
