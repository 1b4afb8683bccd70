"""DiveBatch, on numbers worked out by hand and against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbiter_jax import schedulers
from tests.problems import grad_stats

LIMITS = {"min_batch_size": 2, "max_batch_size": 1000, "initial_batch_size": 10}


SUMS = ("gradient_sum", "sq_norm_sum", "num_examples")


def test_dive_batch_equation():
    """Two steps of 10 examples are an epoch of N = 20.

    The gradient is (1, 0), then (0, 2). Sums of squared norms: 9 * 5 + 10 * 1 and 9 * 3 + 10 * 4;
    squared norm of the sum: (10 * 1)^2 + (10 * 2)^2 = 500. delta N D = 3 * 20 * 122 / 500 = 14.64.
    """
    rule = schedulers.dive_batch(20, delta=3.0, **LIMITS)
    params = jnp.zeros(2)
    state = rule.init(params)
    first = grad_stats(variance_trace=5.0, batch_sq_norm=1.0)
    _, state = rule.update(jnp.array([1.0, 0.0]), state, grad_stats=first)
    assert int(state.batch_size) == 10
    assert float(state.sq_norm_sum) == pytest.approx(55.0)
    second = grad_stats(variance_trace=3.0, batch_sq_norm=4.0)
    _, after = rule.update(jnp.array([0.0, 2.0]), state, grad_stats=second)
    assert int(after.batch_size) == 14
    assert [float(jnp.sum(getattr(after, name))) for name in SUMS] == [0.0, 0.0, 0.0]  # a new epoch
    # Behind an optimizer the updates are no gradients: `grad` says what they were.
    _, after = rule.update(jnp.full(2, -0.1), state, grad_stats=second, grad=jnp.array([0.0, 2.0]))
    assert int(after.batch_size) == 14


def test_is_exact_for_per_example_statistics():
    """Against the definition, from the gradients themselves."""
    gradients = np.random.default_rng(0).normal(0.5, 1.0, (3, 8, 5))  # 3 batches of 8 examples
    diversity = np.sum(gradients**2) / np.sum(np.sum(gradients, axis=(0, 1)) ** 2)
    rule = schedulers.dive_batch(24, delta=10.0, min_batch_size=1, max_batch_size=10_000)
    state = rule.init(jnp.zeros(5))
    for batch in gradients:
        mean = np.mean(batch, axis=0)
        trace = np.sum(np.var(batch, axis=0, ddof=1))
        given = grad_stats(8.0, variance_trace=trace, batch_sq_norm=np.sum(mean**2))
        _, state = rule.update(jnp.asarray(mean, jnp.float32), state, grad_stats=given)
    assert int(state.batch_size) == int(10.0 * 24 * diversity)


def test_cancelling_gradients_take_the_largest_size():
    given = {"grad_stats": grad_stats(variance_trace=1.0, batch_sq_norm=1.0)}
    rule = schedulers.dive_batch(20, **LIMITS)
    state = rule.init(jnp.zeros(()))
    for gradient in (1.0, -1.0):
        _, state = rule.update(jnp.float32(gradient), state, **given)
    assert int(state.batch_size) == 1000


def test_sums_low_precision_gradients_in_float32():
    rule = schedulers.dive_batch(10_000, **LIMITS)
    params = jnp.zeros(3, jnp.bfloat16)
    given = grad_stats(variance_trace=1.0, batch_sq_norm=3.0)
    step = lambda _, state: rule.update(jnp.ones_like(params), state, grad_stats=given)[1]
    state = jax.lax.fori_loop(0, 300, step, rule.init(params))  # a bfloat16 sum stops at 2560
    assert state.gradient_sum.tolist() == [3000.0] * 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedulers.dive_batch(0), "dataset_size must be an integer >= 1 and <= .*, got 0"),
        (lambda: schedulers.dive_batch(10, delta=0), "delta must be a finite number > 0"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_grows_only():
    """Gradients that all agree have a diversity of 1 / N: the decision is the applied size."""
    rule = schedulers.dive_batch(20, delta=1.0, **LIMITS)
    agreeing = grad_stats(variance_trace=0.0, batch_sq_norm=4.0)
    state = rule.init(jnp.zeros(1))
    for applied in (10, 300):
        for _ in range(2):
            _, state = rule.update(jnp.array([2.0]), state, grad_stats=agreeing, batch_size=applied)
        assert int(state.batch_size) == applied
