"""Schedules: what they count, what their learning rates do, what they refuse."""

import itertools

import jax
import jax.numpy as jnp
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import schedulers


def sizes(rule, num_steps, **signals):
    """The size before each step, as a window of one step would read it."""
    state, found = rule.init(None), []
    for _ in range(num_steps):
        found.append(int(aj.get_batch_size(state)))
        _, state = rule.update(None, state, **signals)
    return found


def test_constant_takes_its_size_by_either_name():
    assert sizes(schedulers.constant(64), 3) == [64, 64, 64]
    assert sizes(schedulers.constant(batch_size=64), 1) == [64]
    rule = schedulers.constant(min_batch_size=8, max_batch_size=512, initial_batch_size=64)
    assert sizes(rule, 1) == [64]


@pytest.mark.parametrize("arguments", [{}, {"batch_size": 8, "initial_batch_size": 8}])
def test_constant_needs_one_size(arguments):
    with pytest.raises(ValueError, match="one of batch_size and initial_batch_size"):
        schedulers.constant(**arguments)


def test_constant_out_of_range_names_the_size():
    with pytest.raises(ValueError, match="batch_size must be an integer >= 8 and <= 512, got 4"):
        schedulers.constant(4, min_batch_size=8, max_batch_size=512)


def test_schedule_of_steps():
    schedule = optax.piecewise_constant_schedule(16, {2: 2.0, 4: 2.0})
    assert sizes(schedulers.from_schedule(schedule), 6) == [16, 16, 32, 32, 64, 64]


def test_schedule_is_rounded_and_clipped():
    rule = schedulers.from_schedule(
        lambda step: 10.6 + 100.0 * step - 1000.0 * (step > 1), min_batch_size=8, max_batch_size=64
    )
    assert sizes(rule, 3) == [11, 64, 8]


def test_schedule_of_examples_counts_the_sizes_in_force():
    rule = schedulers.from_schedule(lambda n: 10 + n, count="num_examples")
    assert sizes(rule, 4) == [10, 20, 40, 80]  # in one's own loop: the decisions themselves
    assert sizes(rule, 4, batch_size=jnp.int32(3)) == [10, 13, 16, 19]


def test_schedule_of_progress_follows_the_ledger():
    rule = schedulers.from_schedule(lambda n: 10 + n, count="progress")
    assert sizes(rule, 2, progress=jnp.float32(2.9)) == [10, 12]
    with pytest.raises(TypeError, match="progress"):
        rule.update(None, rule.init(None))


def test_count_of_examples_stops_at_its_largest_value():
    rule = schedulers.from_schedule(lambda n: 10, count="num_examples")
    state = rule.init(None)._replace(count=jnp.int32(2**31 - 2))
    for _ in range(3):
        _, state = rule.update(None, state, batch_size=jnp.int32(512))
        assert int(state.count) == 2**31 - 1


def test_schedule_starts_at_the_initial_size_if_given():
    rule = schedulers.from_schedule(lambda step: 100 + step, initial_batch_size=5)
    assert sizes(rule, 3) == [5, 101, 102]


def test_a_schedule_that_is_no_number_keeps_the_size():
    rule = schedulers.from_schedule(
        lambda step: jnp.where(step % 2 == 1, jnp.nan, jnp.where(step == 4, jnp.inf, 8.0 + step)),
        min_batch_size=4,
        max_batch_size=64,
    )
    assert sizes(rule, 5) == [8, 8, 10, 10, 64]
    state = rule.init(None)
    for _ in range(4):
        _, state = rule.update(None, state)
    assert int(state.num_skipped) == 2
    assert int(state.count) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": 64}, "schedule must be a function"),
        (
            {"schedule": abs, "count": "epochs"},
            "count must be one of 'num_steps', 'num_examples', 'progress', got",
        ),
    ],
)
def test_from_schedule_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedulers.from_schedule(**arguments)


def test_adabatch_doubles_every_k_epochs():
    """N = 100, k = 2: at 200, 400 and 600 examples, clipped at 50."""
    rule = schedulers.adabatch(100, epochs=2, max_batch_size=50, initial_batch_size=8)
    assert sizes(rule, 8, batch_size=jnp.int32(100)) == [8, 8, 16, 16, 32, 32, 50, 50]


def test_adabatch_learning_rate():
    """lr_0 0.75^floor(n / (k N)), and it jits."""
    rate = jax.jit(schedulers.adabatch_learning_rate(0.2, 100, epochs=2))
    assert [round(float(rate(n)), 5) for n in (0, 199, 200, 400)] == [0.2, 0.2, 0.15, 0.1125]


def test_adabatch_interval_must_be_countable():
    with pytest.raises(ValueError, match=r"epochs \* dataset_size must be <= 2147483647"):
        schedulers.adabatch(10**9, epochs=20)


SMITH = {"boundaries": (60, 120, 160), "dataset_size": 50_000, "initial_batch_size": 128}


def test_smith_grows_to_a_tenth_of_the_data_then_decays():
    """128 -> 640 -> 3200; 16000 would exceed 50000 / 10, so the third time the rate falls."""
    settings = SMITH | {"max_batch_size": 10_000}
    rule = schedulers.smith(**settings)
    assert sizes(rule, 4, batch_size=jnp.int32(60)) == [128, 640, 3200, 3200]
    rate = jax.jit(schedulers.smith_learning_rate(0.1, **settings))
    assert [round(float(rate(n)), 6) for n in (0, 60, 120, 160)] == [0.1, 0.1, 0.1, 0.02]


def test_smith_stops_at_the_largest_size():
    settings = SMITH | {"max_batch_size": 700}
    assert sizes(schedulers.smith(**settings), 4, batch_size=jnp.int32(60)) == [128, 640, 640, 640]
    rate = schedulers.smith_learning_rate(0.1, **settings)
    assert [round(float(rate(n)), 6) for n in (59, 60, 120, 160)] == [0.1, 0.1, 0.02, 0.004]


def test_smith_counts_steps_on_request():
    settings = {"boundaries": (2, 3), "dataset_size": 10_000, "factor": 2}
    rule = schedulers.smith(**settings, count="num_steps", initial_batch_size=8)
    assert sizes(rule, 5) == [8, 8, 16, 32, 32]


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
