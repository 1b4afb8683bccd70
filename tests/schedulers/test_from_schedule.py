"""Sizes that are a function of steps, examples or progress."""

import jax.numpy as jnp
import optax
import pytest

from arbiter_jax import schedulers
from arbiter_jax.base import as_count
from tests.problems import sizes_of


def test_schedule_of_steps():
    schedule = optax.piecewise_constant_schedule(16, {2: 2.0, 4: 2.0})
    assert sizes_of(schedulers.from_schedule(schedule), 6) == [16, 16, 32, 32, 64, 64]


def test_schedule_is_rounded_and_clipped():
    rule = schedulers.from_schedule(
        lambda step: 10.6 + 100.0 * step - 1000.0 * (step > 1), min_batch_size=8, max_batch_size=64
    )
    assert sizes_of(rule, 3) == [11, 64, 8]


def test_schedule_of_examples_counts_applied_sizes():
    rule = schedulers.from_schedule(lambda n: 10 + n, count="num_examples")
    assert sizes_of(rule, 4) == [10, 20, 40, 80]  # in one's own loop: the decisions themselves
    assert sizes_of(rule, 4, batch_size=jnp.int32(3)) == [10, 13, 16, 19]


def test_schedule_of_progress_follows_the_loop():
    rule = schedulers.from_schedule(lambda n: 10 + n, count="progress")
    assert sizes_of(rule, 2, progress=jnp.float32(2.9)) == [10, 12]
    with pytest.raises(TypeError, match="progress"):
        rule.update(None, rule.init(None))


@pytest.mark.parametrize("start", [2**31 - 600, 2**32 - 600, 2**33])
def test_counts_of_examples_go_on_beyond_32_bits(start):
    rule = schedulers.from_schedule(lambda n: jnp.where(n < 2.0**31, 10, 20), count="num_examples")
    state = rule.init(None)._replace(count=as_count(start))
    for step in range(1, 4):  # counted by the rule itself
        _, state = rule.update(None, state, batch_size=jnp.int32(512))
        assert int(state.count) == start + 512 * step
        assert int(state.batch_size) == (10 if start + 512 * step < 2**31 else 20)
    for seen in (start, as_count(start)):  # and read from the loop
        _, state = rule.update(None, state, batch_size=512, num_examples=seen)
        assert int(state.count) == start + 512


def test_a_count_of_steps_stops_at_its_largest_value():
    rule = schedulers.from_schedule(lambda n: 10)
    state = rule.init(None)._replace(count=jnp.int32(2**31 - 2))
    for _ in range(3):
        _, state = rule.update(None, state)
        assert int(state.count) == 2**31 - 1


def test_a_schedule_of_examples_sees_a_float():
    seen = []
    rule = schedulers.from_schedule(lambda n: seen.append(n.dtype) or n, count="num_examples")
    rule.update(None, rule.init(None))
    assert seen == [jnp.float32, jnp.float32]


def test_schedule_starts_at_the_initial_size_if_given():
    rule = schedulers.from_schedule(lambda step: 100 + step, initial_batch_size=5)
    assert sizes_of(rule, 3) == [5, 101, 102]


def test_a_schedule_without_a_value_keeps_the_size():
    rule = schedulers.from_schedule(
        lambda step: jnp.where(step % 2 == 1, jnp.nan, jnp.where(step == 4, jnp.inf, 8.0 + step)),
        min_batch_size=4,
        max_batch_size=64,
    )
    assert sizes_of(rule, 5) == [8, 8, 10, 10, 64]
    state = rule.init(None)
    for _ in range(4):
        _, state = rule.update(None, state)
    assert int(state.num_skipped) == 2
    assert int(state.count) == 4


@pytest.mark.parametrize("initial_batch_size", [None, 8])
@pytest.mark.parametrize(
    ("schedule", "found"),
    [
        (lambda n: jnp.array([8, 8]), r"it returned an array int32\[2\]"),
        (lambda n: None, "it returned None"),
        (lambda n: 8 + 1j, r"it returned \(8\+1j\)"),
        (lambda: 8, "takes 0 positional arguments"),
    ],
)
def test_a_schedule_that_returns_no_scalar_is_refused(schedule, found, initial_batch_size):
    rule = schedulers.from_schedule(schedule, initial_batch_size=initial_batch_size)
    with pytest.raises(ValueError, match=f"schedule must be a function of one count .*{found}"):
        rule.init(None)


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
