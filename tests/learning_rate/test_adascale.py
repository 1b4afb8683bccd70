"""The gain of AdaScale by hand, its averages, and what JAX expects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arbiter_jax as aj
from arbiter_jax.learning_rate import AdaScaleState, adascale
from tests.problems import grad_stats

UPDATES = {"w": jnp.array([1.0, -2.0]), "b": jnp.ones(1, jnp.bfloat16)}


def make_stats(mean_sq_norm, variance_trace, batch_size=256.0):
    return grad_stats(batch_size, mean_sq_norm=mean_sq_norm, variance_trace=variance_trace)


def run(tx, all_stats, batch_sizes):
    """Factors and states after every step."""
    state, factors, states = tx.init(UPDATES), [], []
    for stats, batch_size in zip(all_stats, batch_sizes, strict=True):
        updates, state = tx.update(UPDATES, state, grad_stats=stats, batch_size=batch_size)
        factors.append(updates["w"][0])
        states.append(state)
    return np.array(factors), states


def test_the_gain_by_hand():
    # m^2 = 2, s^2 = 192 / 64 = 3, S = 4: (3 + 2) / (3 / 4 + 2).
    factors, (state,) = run(adascale(64), [make_stats(2.0, 192.0)], [256])
    np.testing.assert_allclose(factors[0], 5 / 2.75, rtol=1e-6)
    np.testing.assert_allclose(state.gain, 5 / 2.75, rtol=1e-6)
    np.testing.assert_allclose(state.progress, 5 / 2.75, rtol=1e-6)


def test_the_reference_is_neutral():
    """Guarantee: The reference is neutral."""
    factors, _ = run(adascale(64), [make_stats(1.0, 50.0)] * 2, [64, 64])
    np.testing.assert_allclose(factors, 1.0, rtol=1e-6)


def test_averages_numerator_and_denominator_separately():
    """Their averages refer to the reference size, so they survive a change of the batch size."""
    decay = 0.75
    samples = [(2.0, 192.0, 256), (-1.0, 64.0, 128), (0.5, 640.0, 1024)]
    factors, states = run(
        adascale(64, decay=decay),
        [make_stats(*sample) for sample in samples],
        [batch_size for *_, batch_size in samples],
    )
    variance = mean_sq_norm = progress = 0.0
    for factor, state, (m2, trace, batch_size) in zip(factors, states, samples, strict=True):
        variance = decay * variance + (1 - decay) * trace / 64
        mean_sq_norm = decay * mean_sq_norm + (1 - decay) * m2
        gain = (variance + mean_sq_norm) / (variance / (batch_size / 64) + mean_sq_norm)
        progress += gain
        np.testing.assert_allclose(factor, gain, rtol=1e-5)
        np.testing.assert_allclose(state.progress, progress, rtol=1e-5)


def test_the_published_decay():
    samples = [make_stats(2.0, 192.0), make_stats(1.0, 640.0)]
    _, by_default = run(adascale(64), samples, [256, 256])
    _, explicit = run(adascale(64, decay=1 - 4 / 1000), samples, [256, 256])
    np.testing.assert_allclose(by_default[-1].gain, explicit[-1].gain, rtol=1e-5)
    # Beyond a thousand times the reference only the newest statistics count.
    _, newest = run(adascale(1), samples, [2000, 2000])
    np.testing.assert_allclose(newest[-1].gain, (640 + 1) / (640 / 2000 + 1), rtol=1e-5)


@pytest.mark.parametrize(
    ("mean_sq_norm", "variance", "batch_size", "gain"),
    [
        (-1.0, 192.0, 256, 4.0),  # noise only: the linear rule
        (5.0, 0.0, 256, 1.0),  # no noise: a larger batch does not help
        (0.0, 0.0, 256, 1.0),  # no information
        (0.0, 192.0, 16, 0.25),
        (1.0, 192.0, 0, 4 / 193),  # an empty batch counts as one example
    ],
)
def test_the_gain_is_between_1_and_s(mean_sq_norm, variance, batch_size, gain):
    """Guarantee: Between 1 and S."""
    _, (state,) = run(adascale(64), [make_stats(mean_sq_norm, variance)], [batch_size])
    np.testing.assert_allclose(state.gain, gain, rtol=1e-5)


def test_a_sum_that_overflows_leaves_the_gain_at_one():
    _, (state,) = run(adascale(1, decay=0.0), [make_stats(3e38, 3e38)], [4])
    assert state.gain == 1


def test_the_schedule_is_a_function_of_the_progress():
    tx = adascale(64, learning_rate=lambda step: 1.0 / (1 + step))
    factors, states = run(tx, [make_stats(0.0, 192.0)] * 3, [160, 160, 160])  # gain 2.5
    np.testing.assert_allclose(factors, [2.5, 2.5 / 3, 2.5 / 6], rtol=1e-5)  # floor of 0, 2.5, 5
    np.testing.assert_allclose([s.learning_rate for s in states], factors, rtol=1e-6)


def test_the_loop_reads_the_gain_as_progress_per_step():
    _, (state,) = run(adascale(64), [make_stats(2.0, 192.0)], [256])
    assert state.progress_per_step is state.gain
    assert aj.base.requests((state,)).progress_per_step is state.gain


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_statistics_that_are_not_finite_are_skipped(bad):
    """Guarantee: Skips and counts."""
    good = make_stats(2.0, 192.0)
    bads = [make_stats(bad, 192.0), make_stats(2.0, bad)]
    _, states = run(adascale(64), [bads[0], good, *bads], [256, 256, 256, 256])
    np.testing.assert_allclose([s.gain for s in states], [1.0] + [5 / 2.75] * 3, rtol=1e-5)
    assert states[-1].num_skipped == 3
    assert np.isfinite(states[-1].progress)


@pytest.mark.slow
def test_stable_types_one_program_scan_equals_loop():
    tx = adascale(64)
    sizes, stats = jnp.array([64, 128, 32, 512], jnp.int32), make_stats(2.0, 192.0)

    def update(state, batch_size):
        return tx.update(UPDATES, state, grad_stats=stats, batch_size=batch_size, value=1.0)

    step = jax.jit(update)
    state = tx.init(UPDATES)
    types = jax.tree.map(jax.typeof, state)
    rows = []
    for batch_size in sizes:
        updates, state = step(state, batch_size)
        assert jax.tree.map(jax.typeof, state) == types
        rows.append(updates["w"])
    _, scanned = jax.lax.scan(lambda s, b: update(s, b)[::-1], tx.init(UPDATES), sizes)
    np.testing.assert_allclose(scanned["w"], rows, rtol=1e-6)
    together = jax.vmap(lambda b: update(tx.init(UPDATES), b)[1].learning_rate)(sizes)
    assert together.shape == (4,)
    assert step._cache_size() == 1
    assert state.learning_rate.dtype == jnp.float32


def test_signals():
    assert AdaScaleState.requires == ("grad_stats",)
    tx = adascale(64)
    with pytest.raises(TypeError, match="adascale needs the signal `grad_stats`"):
        tx.update(UPDATES, tx.init(UPDATES), batch_size=4)
    with pytest.raises(TypeError, match="adascale needs the signal `batch_size`"):
        tx.update(UPDATES, tx.init(UPDATES), grad_stats=make_stats(1.0, 1.0))


def test_a_probe_passes_through():
    tx = adascale(64)
    state = tx.init(UPDATES)
    updates, after = tx.update(UPDATES, state, probe=True)
    assert updates is UPDATES
    assert after is state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adascale(0.5), "reference must be an integer >= 1, got 0.5"),
        (lambda: adascale(64, -1.0), "learning_rate must be a finite number >= 0, got -1.0"),
        (lambda: adascale(64, decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rate_that_is_not_finite_is_not_taken():
    tx = adascale(8, lambda n: jnp.where(n == 1, jnp.nan, 2.0 + n))
    state, factors = tx.init(None), []
    for _ in range(3):
        updates, state = tx.update(
            jnp.ones(()), state, grad_stats=make_stats(1.0, 1.0), batch_size=8
        )
        factors.append(float(updates))
    assert factors == [2.0, 2.0, 4.0]
    assert int(state.num_skipped) == 1
    rate = lambda n: 0.1 / jnp.sqrt(n)
    with pytest.raises(
        ValueError, match=r"learning_rate must be finite at the count 0, .* got inf"
    ):
        adascale(8, rate).init(None)
    state = jax.jit(adascale(8, rate).init)({})
    updates, _ = adascale(8, rate).update(
        jnp.ones(()), state, grad_stats=make_stats(1.0, 1.0), batch_size=8
    )
    assert float(updates) == 0
