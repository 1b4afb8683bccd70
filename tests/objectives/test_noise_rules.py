"""The noise floor and expected gain: their equations by hand, their statistics, what they find."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import schedulers
from arbiter_jax.objectives import _expected_gain, _noise_floor
from arbiter_jax.objectives import _objective as statistics
from arbiter_jax.schedulers._step_times import step_cost
from arbiter_jax.training import next_window

LIMITS = {"min_batch_size": 2, "max_batch_size": 4096}
PACE, CURVE = 0.12, 30.0  # F = 3 - .12 log t, and xi . du = -30 / B


def signals_at(t, size, shift=0.0, noise=CURVE):
    """What a run reports at step t = 1, 2, ... whose loss falls evenly in log time."""
    value = jnp.asarray(3 - PACE * math.log(t) + shift, jnp.float32)
    return {"value": value} | noise_signals(noise / size)


def noise_signals(product, signal=0.0):
    """xi . du = -product, and |G|^2 = signal tr S."""
    root = jnp.sqrt(jnp.asarray(product, jnp.float32))
    stats = aj.GradStats(*map(jnp.float32, (signal, 1.0, 2.0, 1.0, 0.0, 1.0)))
    return {"gradient_noise": root, "update_noise": -root, "grad_stats": stats}


@functools.cache
def floor_rule(**options):
    rule = schedulers.noise_floor(**(LIMITS | options))
    update = lambda state, signals: rule.update(jnp.ones(()), state, **signals)[1]
    return rule, jax.jit(update)


def follow(num_steps=math.inf, *, window=20, shift=0.0, noise=lambda t: CURVE, **options):
    """A run of windows as long as the rule asks for, at most `window` steps: (examples, size) of each.

    Without a number of steps it ends with the budget.
    """
    rule, update = floor_rule(**options)
    state, seen, t, path = rule.init(None), 0, 0, []
    while t < num_steps if num_steps < math.inf else seen < options["num_examples"]:
        size = int(aj.get_batch_size(state))
        path.append((seen, size))
        for _ in range(next_window(state, window)[2]):
            t += 1
            signals = signals_at(t, size, shift, noise(t))
            state = update(state, signals | {"batch_size": size, "num_examples": seen})
            seen += size
    return path, state


def size_by_hand(noise=CURVE, share=0.3, persistence=1.0, *, t=1, left=0):
    """Eqs. 10 and 16: the size after t steps, with so many examples left of a budget."""
    now = persistence * noise / (4 * share * 4 * PACE)
    b = now
    for _ in range(100):
        b = math.sqrt(b * now * (1 + left / b / t) ** 0.1)
    return b


# The noise floor


def test_equation_10_by_hand():
    path, state = follow(400, initial_batch_size=32)
    assert path[-1][1] == pytest.approx(size_by_hand(), rel=0.03)
    assert float(state.statistics.noise) == pytest.approx(CURVE / 4, rel=1e-4)
    assert float(_noise_floor.pace_of_loss(state.statistics)) == pytest.approx(PACE, rel=0.03)
    more, _ = follow(400, initial_batch_size=32, persistence=10.0, share=0.8)
    assert more[-1][1] == pytest.approx(size_by_hand(share=0.8, persistence=10.0), rel=0.03)


@pytest.mark.parametrize("budget", [20_000, 2_000_000])
def test_equation_16_counts_with_the_pace_at_the_end_of_the_budget(budget):
    path = follow_by_steps(budget)
    for seen, t, size in path:
        if 0.02 * budget < seen < 0.6 * budget and t > 100:
            expected = size_by_hand(t=t, left=budget - seen)
            assert size == pytest.approx(expected, rel=0.1)
            assert size > 1.05 * size_by_hand()
    assert t > 100


@pytest.mark.parametrize(("optimal_loss", "factor"), [(0.0, 10), (-math.inf, 1), (-0.3, 1)])
def test_equation_17_noise_holds_no_more_than_all_of_the_loss(optimal_loss, factor):
    """A loss that is a tenth of what (10) would let noise hold."""
    objective, scale = _noise_floor.floor_objective(optimal_loss=optimal_loss), 1.2 * PACE
    state = objective.init()._replace(noise=jnp.array(CURVE / 4), num_steps=jnp.array(100))
    state = state._replace(noisy_loss=jnp.array(0.1 * scale), recent_loss=jnp.array(scale))
    state = state._replace(older_loss=state.recent_loss + PACE / 4)
    signals = {"value": scale} | noise_signals(CURVE / 64)
    state = objective.update(state, (CURVE / 4, 0.0), jnp.array(False), jnp.asarray(64), signals)
    size = factor * size_by_hand()
    assert float(objective.best(state)) == pytest.approx(size, rel=0.15)


@pytest.mark.parametrize(("persistence", "signal"), [(1.0, 1 / 64), (10.0, 19 / 32)])
def test_equation_15_a_gradient_that_noise_keeps_up_tells_of_more_noise(persistence, signal):
    """B |G|^2 = (2 k - 1) tr S where the loss stands still: 1 + 1 times the floor."""
    objective = _noise_floor.floor_objective(persistence=persistence)
    state, size = objective.init(), jnp.asarray(64)
    factor = 1 + 64 * signal / (2 * persistence - 1)
    for _ in range(3):
        signals = {"value": jnp.float32(1.0)} | noise_signals(CURVE / 64, signal)
        state, usable = statistics.update_objective(
            objective, state, jnp.ones(()), jnp.ones(()), size, signals
        )
        assert bool(usable)
    assert float(state.noise) == pytest.approx(factor * persistence * CURVE / 4, rel=1e-5)


def test_equation_15_a_gradient_that_makes_progress_is_no_noise():
    """|G|^2 = pace / (lr t): all of it moves the loss; and a negative estimate takes nothing away."""
    objective, rate = _noise_floor.floor_objective(), 0.1
    states = {"drift": objective.init(), "negative": objective.init()}
    for t in range(1, 200):
        for name, state in states.items():
            square = PACE / (rate * t) if name == "drift" else -5.0
            # tr S = 1 and B = 64, so that xi . du = -lr / 64
            signals = signals_at(t, 64) | noise_signals(rate / 64, square)
            states[name] = statistics.update_objective(
                objective, state, jnp.ones(()), jnp.ones(()), jnp.asarray(64), signals
            )[0]
    for state in states.values():
        assert float(state.noise) == pytest.approx(rate / 4, rel=0.05)


@pytest.mark.parametrize(("rate", "m"), [(0.1, 0.0), (1.5, 0.0), (0.2, 0.9), (3.0, 0.9)])
def test_equation_15_is_exact_for_heavy_ball_on_a_quadratic(rate, m):
    """h V / 2 in equilibrium, by the stationary covariance of (w, u), however large the rate."""
    # u' = m u - lr g and w' = w + u', of curvature 1 and gradient noise of variance 1.
    step, kick = np.array([[1 - rate, m], [-rate, m]]), -rate * np.ones(2)
    covariance = np.linalg.solve(np.eye(4) - np.kron(step, step), np.kron(kick, kick))
    variance = covariance[0]  # of w, and of the mean gradient
    objective = _noise_floor.floor_objective(persistence=1 / (1 - m))
    signals = {"value": jnp.float32(1.0)} | noise_signals(rate, variance)  # B = 1, tr S = 1
    state, _ = statistics.update_objective(
        objective, objective.init(), jnp.ones(()), jnp.ones(()), jnp.asarray(1), signals
    )
    assert float(state.noise) == pytest.approx(0.5 * variance, rel=1e-4)


@pytest.mark.parametrize("start", [8, 64, 512, 2048])
def test_finds_the_scale_from_any_start_in_a_few_short_windows(start):
    path, _ = follow(60, initial_batch_size=start, num_examples=100_000)
    examples, found = path[6]
    expected = size_by_hand(t=30, left=100_000 - examples)
    assert expected / 1.6 < found < expected * 1.6
    assert examples <= 0.1 * 100_000
    assert path[1][0] <= 2048  # one step from the largest start


@pytest.mark.parametrize(("start", "first"), [(2, [2, 8, 32]), (64, [64]), (512, [512, 128])])
def test_the_first_steps_see_a_fortieth_of_the_budget(start, first):
    """20 batches of an 800th of it at least, reached in windows of a step; then what is wanted."""
    options = {"initial_batch_size": start, "noise": lambda t: 0.6 * CURVE}
    path, _ = follow(60, num_examples=80_000, **options)
    sizes = [size for _, size in path]
    free = next(i for i, size in enumerate(sizes) if i >= len(first) and size != 100)
    assert sizes[: len(first)] == first
    assert 40 < sizes[free] < 100
    assert 15 <= (path[free][0] - path[len(first)][0]) / 100 <= 20  # steps
    # Without a budget it is not known how many examples would be few.
    assert max(size for _, size in follow(60, **options)[0]) <= max(start, 64)


def test_the_first_steps_see_no_more_than_twice_what_is_wanted():
    path, _ = follow(20, num_examples=80_000, initial_batch_size=8, noise=lambda t: 0.05 * CURVE)
    wanted = size_by_hand(0.05 * CURVE, t=15, left=80_000)
    assert path[-1][1] == pytest.approx(2 * wanted, rel=0.1)
    assert 4 * wanted < 100


def test_no_window_sees_more_than_a_50th_of_the_budget():
    path, state = follow(num_examples=100_000, initial_batch_size=64, noise=lambda t: 10 * CURVE)
    starts, sizes = np.array([*path, (float(state.statistics.num_examples), 0)]).T
    seen = np.diff(starts)
    assert np.all(seen <= np.maximum(100_000 / 50, sizes[:-1]))
    assert np.median(seen[sizes[:-1] < 2000]) > 0.7 * 100_000 / 50  # not one step each
    # Without a budget, windows are as long as the caller's once the first steps are over.
    path, _ = follow(200, noise=lambda t: 10 * CURVE)
    (*_, (before, size), (after, _)) = path
    assert after - before == 20 * size


def test_a_constant_added_to_the_loss_changes_nothing():
    path, _ = follow(60, initial_batch_size=32)
    for shift in (-4.0, 8.0):
        shifted, _ = follow(60, initial_batch_size=32, shift=shift, optimal_loss=shift)
        # But for rounding.
        for (_, a), (_, b) in zip(path, shifted, strict=True):
            assert a == pytest.approx(b, rel=0.02)


def test_the_size_in_force_is_not_read_back():
    """The same noise measured at another size leads to the same decision."""
    decisions = []
    for size in (16, 64, 256):
        rule, update = floor_rule(initial_batch_size=size, max_change=1e3)
        state = rule.init(None)
        for t in range(1, 30):
            state = update(state, signals_at(t, size) | {"batch_size": jnp.asarray(size)})
        decisions.append(int(aj.get_batch_size(state)))
    assert max(decisions) - min(decisions) <= 1


def test_noise_that_comes_at_another_time_leads_elsewhere():
    """The control: the same statistics, permuted in time, are not the same schedule."""
    falling = lambda t: CURVE * 20 / (20 + t)
    path, _ = follow(400, initial_batch_size=32, every=1, noise=falling)
    order = np.random.default_rng(0).permutation(500)
    permuted, _ = follow(
        400, initial_batch_size=32, every=1, noise=lambda t: falling(1 + order[t % 500])
    )
    late = [size for _, size in path[-10:]]
    late_permuted = [size for _, size in permuted[-10:]]
    assert np.mean(late_permuted) > 1.5 * np.mean(late)


def size_after_growth(left, num_steps, b, in_force, share=0.3, growth=32.0):
    """Eq. 12: what is to be taken when the held size b has been grown."""
    factor = growth * math.sqrt(b / in_force)
    return factor * in_force / (1 + factor * left / (2 * share * b * num_steps))


def follow_by_steps(budget, **options):
    """(examples, steps, size) of a run through its budget."""
    seen, sizes = zip(*follow(num_examples=budget, **options)[0], strict=True)
    steps = np.cumsum([0, *np.diff(seen) / sizes[:-1]])
    return list(zip(seen, steps, sizes, strict=True))


def held_at(path, budget, hold, **options):
    """The size of Eqs. 10 and 16 when growth may begin."""
    seen, t, _ = next(at for at in path if at[0] >= hold * budget)
    return size_by_hand(t=t, left=budget - seen, **options)


@pytest.mark.parametrize("options", [{}, {"hold": 0.8, "growth": 8.0}, {"share": 0.8}])
def test_equation_12_holds_then_grows_as_the_rest_of_the_budget_shrinks(options):
    budget, hold = 300_000, options.get("hold", 0.6)
    path = follow_by_steps(budget, **options)
    expected = held_at(path, budget, hold, share=options.get("share", 0.3))
    held = [size for seen, _, size in path if 0.3 * budget < seen < hold * budget]
    # This loss falls as log t, and Eq. 16 expects t^-1/4 of it, t^-.15 of the noise.
    assert max(held) <= 1.35 * min(held)
    options = {key: value for key, value in options.items() if key != "hold"}
    for seen, t, size in path[-1], *path[:: len(path) // 50]:
        if seen < (hold + 0.01) * budget:
            continue
        grown = size_after_growth(budget - seen, t, expected, in_force=expected, **options)
        assert size == pytest.approx(max(expected, grown), rel=0.1)
    assert path[-1][2] > 4 * held[-1]


def test_equation_12_a_size_at_the_lower_end_grows_later_and_less():
    """Where the size in force is larger than what is wanted, there is less noise to remove."""
    budget, hold, low = 1_500_000, 0.3, round(10 * size_by_hand())
    path = follow_by_steps(budget, min_batch_size=low, max_batch_size=10_000, hold=hold)
    b = held_at(path, budget, hold)
    begun = next(seen for seen, _, size in path if seen > 0.1 * budget and size > 1.05 * low)
    assert 0.85 * budget < begun  # what is left: 2 share b t, less than .6 / 7 of what was seen
    seen, t, size = path[-1]
    assert size == pytest.approx(size_after_growth(budget - seen, t, b, in_force=low), rel=0.15)
    assert size < 0.5 * 32 * low


def test_the_factor_of_growth_matters_at_the_very_end_only():
    budget = 300_000
    # Of windows of 20 steps the last one may begin anywhere.
    runs = [follow_by_steps(budget, growth=growth, window=1) for growth in (32.0, 128.0)]
    at = lambda path, share: next(size for seen, _, size in path if seen > share * budget)
    assert at(runs[1], 0.8) == pytest.approx(at(runs[0], 0.8), rel=0.1)
    assert runs[1][-1][2] > 1.5 * runs[0][-1][2]


def test_holds_where_there_is_no_budget():
    path, _ = follow(1500, initial_batch_size=32)
    sizes = [size for _, size in path[10:]]
    assert max(sizes) <= 1.25 * min(sizes)


def test_no_larger_batches_where_noise_goes_away_with_the_loss():
    """Interpolation: noise in proportion to a loss that falls to zero, whatever the pace was.

    The size at which noise would be all of the loss, and no smaller one: Eq. 17.
    """
    rule, update = floor_rule(initial_batch_size=64)
    state = rule.init(None)
    for t in range(1, 300):
        loss = jnp.exp(-0.03 * t)
        signals = {"value": loss, "batch_size": jnp.asarray(64)}
        state = update(state, signals | noise_signals(CURVE * loss / 64))
        if t in (60, 299):
            assert float(state.statistics.held_batch_size) == pytest.approx(CURVE / 4, rel=1e-3)


def test_larger_batches_where_more_steps_gain_nothing():
    """A loss at its floor, and noise that is not: the largest size."""
    rule, update = floor_rule(initial_batch_size=64)
    state = rule.init(None)
    for t in range(1, 200):
        signals = signals_at(t, 64) | {"value": jnp.float32(0.5), "batch_size": jnp.asarray(64)}
        state = update(state, signals)
    assert int(state.batch_size) == 256  # as far as one change goes
    assert float(state.statistics.held_batch_size) > 4096


@pytest.mark.parametrize("cost", [10.0, 1000.0])
def test_equation_11_a_step_that_costs_is_made_with_more_examples(cost):
    path, _ = follow(300, initial_batch_size=32, step_cost=cost)
    b = size_by_hand()
    expected = (b + math.sqrt(b * b + 4 * b * cost)) / 2
    assert path[-1][1] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("make", ["noise_floor", "expected_gain"])
def test_the_cost_of_a_step_is_measured(make):
    options = {"step_cost": "measured", "initial_batch_size": 32, "min_batch_size": 8}
    extra = (quadratic_loss,) if make == "expected_gain" else ()
    rule = getattr(schedulers, make)(*extra, **options)
    assert "step_seconds" in aj.base.requests(rule.init(None)).signals
    update = jax.jit(lambda state, signals: rule.update(jnp.ones(2), state, jnp.ones(2), **signals))
    state, seconds = rule.init(jnp.ones(2)), jnp.float32(jnp.nan)
    for size in (32, 64, 128, 64):
        for _ in range(2):
            signals = {"step_seconds": seconds, "batch_size": jnp.asarray(size)}
            signals |= {"value": jnp.float32(1.0), "meta_batch": jnp.zeros((4, 2))}
            signals |= noise_signals(0.2) | {"gradient_noise": jnp.ones(2)}
            signals |= {"update_noise": -0.1 * jnp.ones(2)}
            state = update(state, signals)[1]
        seconds = jnp.float32(1e-3 * (200 + size))  # 200 examples' worth a step
    assert float(step_cost(state.step_cost.times)) == pytest.approx(200, rel=0.02)


# Memory


def told_loss(params, batch):
    """A loss function that finds the losses in the batch."""
    del params
    return batch


def size_with_validation(share, every=4, num_steps=400, **options):
    """The held size after a run whose validation loss falls `share` times as fast as the other."""
    rule = schedulers.noise_floor(told_loss, every=every, initial_batch_size=32, **LIMITS)
    update = jax.jit(lambda state, signals: rule.update(jnp.ones(()), state, **signals)[1])
    state = rule.init(None)
    for t in range(1, num_steps):
        other = jnp.full(4, 3 - share * PACE * math.log(t), jnp.float32)
        signals = signals_at(t, 32) | {"meta_batch": other, "batch_size": jnp.asarray(32)}
        state = update(state, signals)
    return float(state.statistics.held_batch_size), state.statistics


@pytest.mark.parametrize(("share", "factor"), [(1.0, 1), (0.6, 1), (0.25, 2), (0.1, 5)])
def test_equation_14_half_of_the_progress_may_be_memory(share, factor):
    size, state = size_with_validation(share)
    assert size == pytest.approx(factor * size_by_hand(), rel=0.05)
    measured = 4 * (state.validation.older_loss - state.validation.recent_loss)
    assert float(measured) == pytest.approx(share * PACE, rel=0.05)


@pytest.mark.parametrize("every", [1, 4, 10])
def test_a_validation_loss_that_rises_buys_no_steps(every):
    size, _ = size_with_validation(-0.1, every=every, num_steps=100)
    assert size > 4096


def test_a_sample_stands_for_the_steps_since_the_last_one():
    mean = statistics.power_average(jnp.float32(0), jnp.float32(3.0), jnp.int32(0), jnp.int32(2), 1)
    mean = statistics.power_average(mean, jnp.float32(5.0), jnp.int32(2), jnp.int32(4), 1)
    # Weights t^1, integrated from 0 to 2 and from 2 to 4: 2 and 6.
    assert float(mean) == pytest.approx((2 * 3 + 6 * 5) / 8)


def test_an_average_still_moves_after_very_many_steps():
    now = jnp.int32(30_000_000)  # 1 - (now - 1) / now is 0 in float32
    mean = statistics.power_average(jnp.float32(0), jnp.float32(1), now - 1, now, 3)
    assert float(mean) == pytest.approx(4 / 3e7, rel=1e-3)


# The horizon


@functools.cache
def ends_on_the_noisy_quadratic():
    """Excess loss at the end of 2,000 examples: each constant size, and held then grown by 16."""
    h = 1 / np.arange(1, 101)
    problem = aj.noisy_quadratic.NoisyQuadratic(*map(jnp.asarray, (h, 1 / h, 10 * np.ones(100))))
    rate, total, segments = 0.5, 2000, 40
    sizes = np.geomspace(1, 20, 25)
    growth = 2.0 ** np.clip(np.arange(segments) // 4 - 5, 0, 4)  # from .6 of the examples on
    schedules = np.concatenate([np.outer(sizes, np.ones(segments)), np.outer(sizes, growth)])
    schedules = jnp.asarray(np.clip(schedules, 1, total / segments))
    end = lambda b: aj.noisy_quadratic.rollout_batch_sizes(problem, b, total, rate).excess_loss[-1]
    constant, grown = np.split(np.asarray(jax.jit(jax.vmap(end))(schedules)), 2)
    best = int(np.argmin(constant))
    steps = total / sizes[best] * np.exp([-0.1, 0.1])
    bias = [np.sum(h * 5 * (1 - rate * h) ** (2 * t)) for t in steps]
    floor = rate * np.sum(h) / (4 * sizes[best])
    return constant, grown, floor, (bias[0] - bias[1]) / 0.2


def test_equation_9_the_best_constant_size_has_its_floor_at_the_pace():
    _, _, floor, pace = ends_on_the_noisy_quadratic()
    assert 1 / 1.5 < floor / pace < 1.5


def test_a_size_held_and_grown_at_the_end_beats_every_constant_size():
    constant, grown, _, _ = ends_on_the_noisy_quadratic()
    assert grown.min() < 0.6 * constant.min()
    assert np.argmin(grown) < np.argmin(constant)  # more noise in the meantime


# The persistence of noise


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (optax.sgd(0.1), 1),
        (optax.sgd(0.1, momentum=0.9), 10),
        (optax.sgd(0.1, momentum=0.99), 100),
        (optax.chain(optax.clip_by_global_norm(1e3), optax.sgd(0.1, momentum=0.5)), 2),
        (optax.adam(1e-3), 10),
        (optax.adam(1e-3, b1=0.0), 1),
    ],
)
def test_persistence_is_the_sum_of_the_impulse_response(tx, expected):
    assert statistics.impulse_response(tx, num_steps=2000) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (optax.sgd(0.1), 1),
        (optax.sgd(0.1, momentum=0.9), (1 - 0.9**2) ** -0.5),
        (optax.adam(1e-3), (1 - 0.9**2) ** -0.5),
    ],
)
def test_the_noise_that_an_update_holds_is_the_energy_of_the_impulse_response(tx, expected):
    assert statistics.impulse_response(tx, power=2) == pytest.approx(expected, rel=0.1)


def test_an_optimizer_in_the_place_of_the_persistence_is_measured():
    sgd = optax.sgd(0.1, momentum=0.9)
    path, _ = follow(60, initial_batch_size=32, persistence=sgd)
    same, _ = follow(60, initial_batch_size=32, persistence=10.0)
    assert [size for _, size in path] == pytest.approx([size for _, size in same], rel=0.02)


# Expected gain

CURVATURE = jnp.array([1.0, 0.2])


def quadratic_loss(w, batch):
    return 0.5 * jnp.sum(CURVATURE[None] * (w[None] - batch) ** 2, axis=1)


@functools.cache
def drawn_statistics(batch_size, num_draws=20_000, rate=0.3):
    """A0 and q of many batches of one point of a quadratic, and their truth in closed form."""
    w, spread = jnp.array([0.5, -0.4]), jnp.array([1.0, 2.0])

    def draw(key):
        train_key, validation_key = jax.random.split(key)
        examples = spread[None] * jax.random.normal(train_key, (batch_size, 2))
        validation = spread[None] * jax.random.normal(validation_key, (8, 2))
        gradient = jax.grad(lambda w, x: jnp.mean(quadratic_loss(w, x)))
        g1, g2 = gradient(w, examples[::2]), gradient(w, examples[1::2])
        signals = {"update_noise": -rate * (g1 - g2) / 2, "meta_batch": validation}
        size = jnp.asarray(batch_size)
        updates = -rate * (g1 + g2) / 2
        return _expected_gain.gain_and_noise_cost(quadratic_loss, w, updates, size, signals)

    progress, cost = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.PRNGKey(0), num_draws))
    mean_gradient = CURVATURE * w
    bend = 0.5 * rate**2 * jnp.sum(CURVATURE * mean_gradient**2)
    true_progress = rate * jnp.sum(mean_gradient**2) - bend
    true_cost = 0.5 * rate**2 * jnp.sum(CURVATURE**3 * spread**2)
    return (progress, true_progress), (cost, true_cost)


@pytest.mark.parametrize("batch_size", [2, 16, 64])
@pytest.mark.parametrize("which", [0, 1])
def test_both_statistics_are_unbiased_on_a_quadratic(batch_size, which):
    sample, truth = drawn_statistics(batch_size)[which]
    error = np.std(sample) / math.sqrt(sample.size)
    assert abs(np.mean(sample) - truth) < 4 * error
    assert error < 0.05 * abs(truth)  # or the bound would say nothing


def test_the_noise_cost_is_that_of_all_the_noise_in_an_update():
    """With momentum, du is the response to the newest gradient only; k restores the rest."""
    tx, size = optax.sgd(0.1, momentum=0.9), 16
    noise = jax.random.normal(jax.random.PRNGKey(0), (201, 200, 2)) / math.sqrt(size)
    state, updates = tx.init(noise[0]), None
    for grads in noise[:200]:
        updates, state = tx.update(grads, state)
    hessian = lambda u: 0.5 * jnp.mean(u**2 @ CURVATURE)
    k = statistics.impulse_response(tx, power=2)
    newest = -0.1 * noise[200]
    assert float(hessian(updates)) == pytest.approx(k**2 * float(hessian(newest)), rel=0.25)


def test_a_look_weighs_its_examples_times_those_so_far():
    objective = _expected_gain.gain_objective(quadratic_loss)
    state, looks = objective.init(), [(8, 1.0, 2.0), (64, 3.0, -1.0), (16, 0.5, 4.0)]
    for size, *sample in looks:
        state = objective.update(state, sample, jnp.array(True), jnp.asarray(size), {})
    ends = np.cumsum([0, *(size for size, *_ in looks)])
    weights = np.diff(ends**2) / ends[-1] ** 2
    progress, cost = weights @ np.array(looks)[:, 1:]
    assert (float(state.progress), float(state.noise_cost)) == pytest.approx((progress, cost))


def test_equation_6_maximises_the_gain_for_the_cost():
    for cost in (0.0, 5.0, 300.0):
        objective = _expected_gain.gain_objective(quadratic_loss, step_cost=cost)
        state = objective.init()._replace(progress=jnp.array(0.02), noise_cost=jnp.array(1.5))
        best = float(objective.best(state))
        sizes = np.linspace(76, 4000, 200_001)  # a step of fewer than 75 gains nothing
        gain = (0.02 - 1.5 / sizes) / (cost + sizes)
        assert best == pytest.approx(sizes[np.argmax(gain)], rel=1e-3)


@pytest.mark.parametrize("start", [8, 64, 512, 2048])
def test_expected_gain_finds_the_scale_from_any_start(start):
    """On a quadratic with the true noise, within ten windows; b* = 2 q / A0."""
    rule = schedulers.expected_gain(quadratic_loss, every=1, initial_batch_size=start, **LIMITS)
    w, rate = jnp.array([0.05, -0.04]), 0.3
    spread = jnp.array([1.0, 2.0])

    @jax.jit
    def step(state, key):
        size = aj.get_batch_size(state)
        noise = (CURVATURE * spread)[None] * jax.random.normal(key, (2, 2)) / jnp.sqrt(size)
        updates = -rate * (CURVATURE * w + noise[0])
        signals = {"update_noise": -rate * noise[1], "meta_batch": jnp.zeros((4, 2))}
        return rule.update(updates, state, w, **signals)[1]

    state = rule.init(w)
    for key in jax.random.split(jax.random.PRNGKey(start), 100):
        state = step(state, key)
    bend = 0.5 * rate**2 * jnp.sum(CURVATURE**3 * w**2)
    best = (
        rate**2 * jnp.sum(CURVATURE**3 * spread**2) / (rate * jnp.sum((CURVATURE * w) ** 2) - bend)
    )
    assert best / 2.5 < int(state.batch_size) < 2.5 * best


def test_the_statistics_are_computed_at_every_tenth_step():
    rule = schedulers.expected_gain(quadratic_loss, every=10, initial_batch_size=32)
    update = jax.jit(
        lambda state, signals: rule.update(-jnp.ones(2), state, jnp.ones(2), **signals)
    )
    state, weights = rule.init(None), []
    for t in range(60):
        changes = {"update_noise": 0.1 * jnp.ones(2), "meta_batch": jnp.full((4, 2), t * 0.01)}
        state = update(state, changes)[1]
        weights.append(float(state.statistics.num_examples))
    computed = [t for t in range(1, 60) if weights[t] != weights[t - 1]]
    assert computed == [*range(1, 20), 20, 30, 40, 50]


def test_a_loss_without_a_forward_derivative_gives_the_same_statistics():
    """A custom_vjp can only be differentiated backwards first."""
    square = jax.custom_vjp(lambda x: x * x)
    square.defvjp(lambda x: (x * x, x), lambda x, g: (2 * x * g,))

    def custom(w, batch):
        return 0.5 * jnp.sum(CURVATURE[None] * square(w[None] - batch), axis=1)

    signals = {"update_noise": jnp.array([0.1, -0.2]), "meta_batch": jnp.ones((4, 2))}
    at = (jnp.array([0.5, -0.4]), jnp.array([-0.1, 0.3]), jnp.asarray(8), signals)
    expected = _expected_gain.gain_and_noise_cost(quadratic_loss, *at)
    np.testing.assert_allclose(_expected_gain.gain_and_noise_cost(custom, *at), expected, rtol=1e-5)


def test_an_overestimated_noise_cost_reads_itself():
    """The trap: with k too large, A0 is almost all q / B, and the rule doubles whatever it does."""
    for size in (32, 128):
        objective = _expected_gain.gain_objective(quadratic_loss, persistence=300.0)
        signals = {"update_noise": 0.1 * jnp.ones(2), "meta_batch": jnp.zeros((4, 2))}
        signals["update_noise"] = signals["update_noise"] / math.sqrt(size)
        now = jnp.asarray(size)
        state, _ = statistics.update_objective(
            objective, objective.init(), -0.1 * jnp.ones(2), jnp.ones(2), now, signals
        )
        assert float(objective.best(state)) == pytest.approx(2 * size, rel=0.15)


# Objectives


@pytest.mark.parametrize("kind", ["noise_floor", "expected_gain"])
def test_the_objective_is_least_at_its_closed_form(kind):
    if kind == "noise_floor":
        objective = _noise_floor.floor_objective()
        state = objective.init()._replace(held_batch_size=jnp.array(77.0))
    else:
        objective = _expected_gain.gain_objective(quadratic_loss, step_cost=20.0)
        state = objective.init()._replace(progress=jnp.array(0.02), noise_cost=jnp.array(1.5))
    sizes = jnp.linspace(2, 1000, 100_000)
    values = jax.vmap(lambda b: objective.objective(state, b))(sizes)
    assert bool(jnp.all(jnp.isfinite(values)))
    assert float(sizes[jnp.argmin(values)]) == pytest.approx(float(objective.best(state)), rel=5e-3)
    slopes = jax.vmap(jax.grad(lambda b: objective.objective(state, b)))(sizes)
    assert np.all(np.sign(slopes[::100]) == np.sign(sizes[::100] - objective.best(state)))


@pytest.mark.parametrize(
    ("best", "size", "expected"),
    [
        (100.0, 10.0, -1.0),  # 1 - 100 / 10, cut
        (100.0, 80.0, 1 - 100 / 80),
        (100.0, 100.0, 0.0),
        (100.0, 199.0, 1 - 100 / 199),
        (1e4, 199.0, -1.0),
        (1e4, 199.9, 0.0),  # outward, in the last half example
    ],
)
def test_an_agent_descends_a_bounded_slope_in_the_logarithm_of_the_size(best, size, expected):
    objective = _noise_floor.floor_objective()
    state = objective.init()._replace(held_batch_size=jnp.array(best))

    def loss(logit):
        size = 8 + (200 - 8) * jax.nn.sigmoid(logit)
        return statistics.limited_loss(objective, state, size, 8, 200)

    logit = jnp.log((size - 8) / (200 - size))
    assert float(jax.grad(loss)(logit)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        ("noise_floor", {"share": 0}, "share must be"),
        ("noise_floor", {"optimal_loss": math.inf}, r"optimal_loss must be in \[-inf, inf\)"),
        ("noise_floor", {"hold": 1.5}, "hold must be"),
        ("noise_floor", {"growth": 0.5}, "growth must be >= 1, got 0.5"),
        ("noise_floor", {"persistence": 0.5}, "persistence must be >= 1"),
        ("noise_floor", {"num_examples": 0}, "num_examples must be"),
        ("noise_floor", {"num_examples": 2**31}, "num_examples must be .* <= 2147483647"),
        ("noise_floor", {"step_cost": "free"}, "step_cost must be one of 'measured'"),
        ("noise_floor", {"max_change": 1.0}, "max_change must be > 1"),
        ("expected_gain", {"every": 0}, "every must be"),
        ("expected_gain", {"max_change": 1.0}, "max_change must be > 1"),
        ("expected_gain", {"step_cost": -1.0}, "step_cost must be"),
    ],
)
def test_bad_arguments_are_named(make, options, message):
    extra = (quadratic_loss,) if make == "expected_gain" else ()
    with pytest.raises(ValueError, match=message):
        getattr(schedulers, make)(*extra, **options)


# In the engine


def test_statistics_that_are_not_due_are_not_computed_and_not_missed():
    """Every tenth step in the engine: the same training, and no step is skipped."""
    inputs = jax.random.normal(jax.random.PRNGKey(0), (64, 2))
    results = []
    for every in (1, 10):
        rule = schedulers.expected_gain(
            quadratic_loss, every=every, min_batch_size=8, max_batch_size=8
        )
        tx = optax.chain(optax.sgd(0.1), rule)
        data = aj.Data(inputs, inputs)
        results.append(
            aj.fit(quadratic_loss, jnp.ones(2), tx, data, num_examples=320, window=40).state
        )
    chex.assert_trees_all_close(results[0].params, results[1].params, rtol=1e-5)
    for state, looks in zip(results, (40, 20 + 2), strict=True):
        assert int(state.opt_state[1].statistics.num_examples) == 8 * looks
        assert int(state.opt_state[1].num_skipped) == 0


def test_of_two_rules_either_may_be_due():
    """One choice for the whole step: both find their signals at the steps of either."""
    inputs = jax.random.normal(jax.random.PRNGKey(0), (64, 2))
    limits = {"min_batch_size": 8, "max_batch_size": 8}
    gain = functools.partial(schedulers.expected_gain, quadratic_loss, **limits)
    states = []
    for every in (3, 5):
        watching = schedulers.shadow(gain(every=every), name="other")
        tx = optax.chain(optax.sgd(0.1), watching, gain(every=3))
        result = aj.fit(
            quadratic_loss, jnp.ones(2), tx, aj.Data(inputs, inputs), num_examples=320, window=40
        )
        states.append(result.state)
    for state in states:
        assert int(state.opt_state[2].num_skipped) == 0
        looks = 20 + 7  # 21, 24, ... 39
        assert int(state.opt_state[2].statistics.num_examples) == 8 * looks
    chex.assert_trees_all_close(states[0].params, states[1].params, rtol=1e-5)


def test_the_noise_floor_looks_at_validation_examples_in_the_engine():
    inputs = jax.random.normal(jax.random.PRNGKey(0), (64, 2))
    rule = schedulers.noise_floor(quadratic_loss, num_examples=3200, max_batch_size=64)
    tx = optax.chain(optax.sgd(0.1), rule)
    state = tx.init(jnp.ones(2))
    assert "meta_batch" in aj.base.requests(state).signals
    data = aj.Data(inputs, inputs + 1)
    result = aj.fit(quadratic_loss, jnp.ones(2), tx, data, num_examples=3200, window=20)
    seen = result.state.opt_state[1].statistics.validation
    assert int(result.state.opt_state[1].num_skipped) == 0
    assert int(seen.last_step) > 0
    assert bool(jnp.isfinite(seen.recent_loss))
    with pytest.raises(ValueError, match=r"data\.validation must be given"):
        aj.fit(quadratic_loss, jnp.ones(2), tx, aj.Data(inputs), num_examples=64)


@pytest.mark.parametrize("make", [schedulers.noise_floor, schedulers.expected_gain])
def test_a_smallest_size_of_one_is_taken_for_two(make):
    """One example tells nothing of noise: a rule would stay there, and skip every step."""
    limits = {"min_batch_size": 1, "max_batch_size": 64, "initial_batch_size": 1}
    inputs = jax.random.normal(jax.random.PRNGKey(0), (64, 2))
    tx, data = optax.chain(optax.sgd(0.1), make(quadratic_loss, **limits)), aj.Data(inputs, inputs)
    result = aj.fit(quadratic_loss, jnp.ones(2), tx, data, num_examples=2000, window=20)
    assert int(result.state.opt_state[1].num_skipped) == 0
    assert min(record.batch_size for record in result.history) == 2
    assert max(record.batch_size for record in result.history) > 2
    only = make(quadratic_loss, max_batch_size=1, min_batch_size=1).init(jnp.ones(2))
    assert int(aj.get_batch_size(only)) == 1


def test_adam_and_gradients_that_are_always_zero_in_the_engine():
    """No derivative of a square root at zero: the response to no noise is none."""
    tx = optax.chain(optax.adam(1e-2), schedulers.noise_floor(num_examples=2000, persistence=10.0))
    inputs = jax.random.normal(jax.random.PRNGKey(0), (200, 3)) * jnp.array([[1.0, 1.0, 0.0]])
    labels = inputs @ jnp.ones(3) + jax.random.normal(jax.random.PRNGKey(1), (200,))
    loss_fn = lambda w, batch: (batch[0] @ w - batch[1]) ** 2
    result = aj.fit(
        loss_fn, jnp.zeros(3), tx, aj.Data((inputs, labels)), num_examples=2000, window=20
    )
    state = result.state.opt_state[1]
    assert int(state.num_skipped) == 0
    assert float(state.statistics.noise) > 0
    chex.assert_tree_all_finite(state)
    assert [record.num_steps for record in result.history[:4]] == [5, 5, 5, 5]
