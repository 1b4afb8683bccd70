"""Schedules of batch sizes as people write them, and what they say about a run beforehand."""

import jax.numpy as jnp
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import schedulers

S = schedulers


def trained(rule, num_examples, window):
    tx = optax.chain(optax.sgd(0.1), rule)
    loss_fn = lambda w, batch: (w - batch) ** 2 / 2
    data = aj.Data(jnp.ones(64))
    return aj.fit(loss_fn, jnp.zeros(()), tx, data, num_examples=num_examples, window=window)


def test_both_forms_are_one():
    text = S.parse_schedule("0:64 100K:128 1.5M:512")
    assert text == S.parse_schedule([(0, 64), (100_000, 128), (1_500_000, 512)])
    assert text.unique_batch_sizes() == (64, 128, 512)
    assert S.parse_schedule("0:1k 2b:1.5K 1t:2k").starts == (0, 2 * 10**9, 10**12)


def test_a_size_holds_from_its_count_on():
    schedule = S.parse_schedule("0:64 100:128")
    assert [schedule.batch_size_at(n) for n in (0, 99, 100, 10**15)] == [64, 64, 128, 128]


@pytest.mark.slow
@pytest.mark.parametrize(
    "window",
    [
        7,
        pytest.param(1, marks=pytest.mark.exhaustive),
        pytest.param(100, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize(
    "text",
    [
        "0:4",
        pytest.param("0:4 100:8 300:32", marks=pytest.mark.exhaustive),
        "0:32 200:4",
        "0:4 10:8 11:16 500:6",
        "0:4 100:900",
    ],
)
def test_steps_are_those_of_fit(text, window):
    schedule = S.parse_schedule(text)
    result = trained(S.from_schedule(text), 1_001, window)
    assert int(result.state.num_steps) == schedule.num_steps(1_001, window=window)
    for record in result.history:
        if record.num_steps < window:
            break  # cut short by the budget
        step = sum(r.num_steps for r in result.history[: record.window_index + 1])
        assert schedule.num_examples_at(step, window=window) == record.num_examples


def test_a_schedule_counts_beyond_an_int32():
    rule = S.from_schedule("0:64 2.5B:128 6T:256")
    state = rule.init(None)
    seen = (2_500_000_000 - 65, 2_500_000_000 - 64, 6 * 10**12 - 65, 6 * 10**12 - 64)
    sizes = [
        int(rule.update(None, state, num_examples=n, batch_size=64)[1].batch_size) for n in seen
    ]
    assert sizes == [64, 128, 128, 256]


def test_limits_clip_a_schedule():
    rule = S.from_schedule("0:4 100:1024", min_batch_size=8, max_batch_size=64)
    state = rule.init(None)
    _, later = rule.update(None, state, num_examples=100, batch_size=8)
    assert (int(state.batch_size), int(later.batch_size)) == (8, 64)
    assert (int(state.min_batch_size), int(state.max_batch_size)) == (8, 64)


@pytest.mark.parametrize(
    ("schedule", "limits", "size"),
    [
        ("0:64", {"max_batch_size": 16}, 16),
        ([(0, 8), (100, 16)], {"min_batch_size": 32, "max_batch_size": 64}, 32),
        (S.published_ramp("gpt3"), {"max_batch_size": 512}, 512),
    ],
)
def test_limits_hold_for_a_schedule_beyond_them(schedule, limits, size):
    rule = S.from_schedule(schedule, **limits)
    state = rule.init(None)
    _, later = rule.update(None, state, num_examples=10**6, batch_size=8)
    for found in (state, later):
        sizes = found.batch_size, found.min_batch_size, found.max_batch_size
        assert [int(n) for n in sizes] == [size] * 3


@pytest.mark.parametrize(("scaling", "factor"), [("linear", 4.0), ("sqrt", 2.0)])
def test_the_rate_follows_the_size(scaling, factor):
    scale = S.parse_schedule("0:64 100K:256").rate_scale(scaling)
    updates, state = scale.update(jnp.ones(()), scale.init(None), batch_size=jnp.int32(256))
    assert float(updates) == float(state.learning_rate) == factor


@pytest.mark.parametrize(
    ("name", "sizes", "starts"),
    [
        ("gpt3", (56_750, 3_200_000), (0, 12 * 10**9)),
        ("olmo_65b", (2_000_000, 16_000_000), (0, 3 * 10**11)),
        ("llama3.1", (4_000_000, 16_000_000), (0, 2_870 * 10**9)),
        ("deepseek_v3", (12_976_128, 15_360 * 4_096), (0, 469 * 10**9)),
    ],
)
def test_published_ramps(name, sizes, starts):
    ramp = S.published_ramp(name)
    assert (ramp.batch_sizes[0], ramp.batch_sizes[-1]) == sizes
    assert (ramp.starts[0], ramp.starts[-1]) == starts
    rows = S.published_ramp(name, tokens_per_example=4_096)
    assert rows.batch_sizes[-1] == round(sizes[1] / 4_096)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("", "schedule must be pairs"),
        ([], "schedule must be pairs"),
        (3, "schedule must be pairs"),
        (None, "schedule must be pairs"),
        ([(0, 64, 1)], "schedule must be pairs"),
        ("64", "schedule must be pairs such as '100K:128'"),
        ("0:64 1X:128", "schedule must be pairs such as"),
        ("0:64,100:128", "schedule must be pairs such as"),
        ("0:64 -5:128", "schedule must be pairs such as"),
        ("0:64 1.0005K:128", "schedule must count whole examples"),
        ("5:64", "schedule must begin at 0"),
        ("0:64 200:128 100:256", "schedule must begin at 0 examples and its counts must increase"),
        ("0:64 0:128", "schedule must begin at 0 examples and its counts must increase"),
        ("0:0", "batch_size must be an integer >= 1"),
        ([(0, 2.5)], "batch_size must be an integer >= 1"),
        ([(0, True)], "batch_size must be an integer >= 1"),
        (S.BatchSchedule((0, 100), (64,)), "schedule must be pairs"),
        (S.BatchSchedule((0,), (0,)), "batch_size must be an integer >= 1"),
        ([(0, 64), (2**70, 128)], "schedule must be an integer >= 0 and <= 9223372036854775807"),
    ],
)
def test_a_bad_schedule_is_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        S.parse_schedule(schedule)
    with pytest.raises(ValueError, match=message if schedule not in (3, None) else "a function"):
        S.from_schedule(schedule)


def test_pairs_count_examples_and_say_the_start():
    for wrong in ({"count": "progress"}, {"initial_batch_size": 64}):
        with pytest.raises(ValueError, match="count and initial_batch_size belong to"):
            S.from_schedule("0:64", **wrong)
    S.from_schedule("0:64", count="num_examples")
