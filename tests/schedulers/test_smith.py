"""Smith's schedule of sizes and its learning rate."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from arbiter_jax import schedulers
from tests.problems import sizes_of

SMITH = {"boundaries": (60, 120, 160), "dataset_size": 50_000, "initial_batch_size": 128}


def test_grows_to_a_tenth_of_the_data_then_decays():
    """128 -> 640 -> 3200; 16000 would exceed 50000 / 10, so the third time the rate falls."""
    settings = SMITH | {"max_batch_size": 10_000}
    rule = schedulers.smith(**settings)
    assert sizes_of(rule, 4, batch_size=jnp.int32(60)) == [128, 640, 3200, 3200]
    rate = jax.jit(schedulers.smith_learning_rate(0.1, **settings))
    assert [round(float(rate(n)), 6) for n in (0, 60, 120, 160)] == [0.1, 0.1, 0.1, 0.02]


def test_smith_stops_at_the_largest_size():
    settings = SMITH | {"max_batch_size": 700}
    assert sizes_of(schedulers.smith(**settings), 4, batch_size=jnp.int32(60)) == [
        128,
        640,
        640,
        640,
    ]
    rate = schedulers.smith_learning_rate(0.1, **settings)
    assert [round(float(rate(n)), 6) for n in (59, 60, 120, 160)] == [0.1, 0.1, 0.02, 0.004]


def test_smith_counts_steps_on_request():
    settings = {"boundaries": (2, 3), "dataset_size": 10_000, "factor": 2}
    rule = schedulers.smith(**settings, count="num_steps", initial_batch_size=8)
    assert sizes_of(rule, 5) == [8, 8, 16, 32, 32]


@pytest.mark.parametrize("max_batch_size", [128, 700, 10_000])
def test_noise_scale_falls_alike(max_batch_size):
    """Whether the size grows or the rate falls, rate over size falls by a at every boundary."""
    settings = SMITH | {"max_batch_size": max_batch_size}
    rule, rate = schedulers.smith(**settings), schedulers.smith_learning_rate(0.1, **settings)
    state, noise = rule.init(None), []
    for n in (0, *SMITH["boundaries"]):
        state = rule.update(None, state._replace(count=jnp.int32(n)), batch_size=jnp.int32(0))[1]
        noise.append(float(rate(n)) / int(state.batch_size))
    ratios = [a / b for a, b in itertools.pairwise(noise)]
    assert ratios == pytest.approx([5.0, 5.0, 5.0], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"boundaries": (3, 2)}, r"boundaries must increase, got \(3, 2\)"),
        ({"boundaries": (0, 2)}, "boundaries must be an integer >= 1"),
        ({"factor": 1.0}, "factor must be a finite number > 1, got 1.0"),
        ({"dataset_size": 0}, "dataset_size must be an integer >= 1"),
    ],
)
def test_smith_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedulers.smith(**({"boundaries": (2, 3), "dataset_size": 10_000} | arguments))
