"""Expected gain as an objective: its two statistics, and the size at which it is largest."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import objectives
from arbiter_jax.objectives._expected_gain import GainSample, gain_and_noise_cost
from arbiter_jax.objectives._objective import update_objective

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
        updates = -rate * (g1 + g2) / 2
        return gain_and_noise_cost(quadratic_loss, w, updates, jnp.asarray(batch_size), signals)

    gain, cost = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.PRNGKey(0), num_draws))
    mean_gradient = CURVATURE * w
    bend = 0.5 * rate**2 * jnp.sum(CURVATURE * mean_gradient**2)
    true_gain = rate * jnp.sum(mean_gradient**2) - bend
    true_cost = 0.5 * rate**2 * jnp.sum(CURVATURE**3 * spread**2)
    return (gain, true_gain), (cost, true_cost)


@pytest.mark.parametrize("batch_size", [2, 16, 64])
@pytest.mark.parametrize("which", [0, 1])
def test_both_statistics_are_unbiased_on_a_quadratic(batch_size, which):
    sample, truth = drawn_statistics(batch_size)[which]
    error = np.std(sample) / math.sqrt(sample.size)
    assert abs(np.mean(sample) - truth) < 4 * error
    assert error < 0.05 * abs(truth)  # or the bound would show nothing


def test_the_noise_cost_counts_all_noise_in_an_update():
    """With momentum, du is the response to the newest gradient only; k restores the rest."""
    tx, size = optax.sgd(0.1, momentum=0.9), 16
    noise = jax.random.normal(jax.random.PRNGKey(0), (201, 200, 2)) / math.sqrt(size)
    _, updates = jax.lax.scan(
        lambda state, grads: tx.update(grads, state)[::-1], tx.init(noise[0]), noise[:200]
    )
    hessian = lambda u: 0.5 * jnp.mean(u**2 @ CURVATURE)
    k = objectives.impulse_response(tx, power=2)
    newest = -0.1 * noise[200]
    assert float(hessian(updates[-1])) == pytest.approx(k**2 * float(hessian(newest)), rel=0.25)


def test_a_measurement_weighs_its_examples():
    """Times those so far."""
    objective = objectives.expected_gain(quadratic_loss, persistence=1.0)
    state, measured = objective.init(), [(8, 1.0, 2.0), (64, 3.0, -1.0), (16, 0.5, 4.0)]
    for size, *sample in measured:
        state = objective.update(state, GainSample(*sample), True, jnp.asarray(size), {})
    ends = np.cumsum([0, *(size for size, *_ in measured)])
    weights = np.diff(ends**2) / ends[-1] ** 2
    gain, cost = weights @ np.array(measured)[:, 1:]
    assert (float(state.noiseless_gain), float(state.noise_cost)) == pytest.approx((gain, cost))


def test_equation_6_maximizes_the_gain_for_the_cost():
    for cost in (0.0, 5.0, 300.0):
        objective = objectives.expected_gain(quadratic_loss, step_cost=cost)
        state = objective.init()._replace(noiseless_gain=jnp.array(0.02), noise_cost=jnp.array(1.5))
        best = float(objective.best(state))
        sizes = np.linspace(76, 4000, 200_001)  # a step of fewer than 75 gains nothing
        gain = (0.02 - 1.5 / sizes) / (cost + sizes)
        assert best == pytest.approx(sizes[np.argmax(gain)], rel=1e-3)


def test_a_loss_without_a_forward_derivative():
    """A custom_vjp can only be differentiated backwards first: the same statistics."""
    square = jax.custom_vjp(lambda x: x * x)
    square.defvjp(lambda x: (x * x, x), lambda x, g: (2 * x * g,))

    def custom(w, batch):
        return 0.5 * jnp.sum(CURVATURE[None] * square(w[None] - batch), axis=1)

    signals = {"update_noise": jnp.array([0.1, -0.2]), "meta_batch": jnp.ones((4, 2))}
    at = (jnp.array([0.5, -0.4]), jnp.array([-0.1, 0.3]), jnp.asarray(8), signals)
    expected = gain_and_noise_cost(quadratic_loss, *at)
    np.testing.assert_allclose(gain_and_noise_cost(custom, *at), expected, rtol=1e-5)


@pytest.mark.parametrize("size", [32, 128])
def test_an_overestimated_noise_cost_reads_itself(size):
    """The trap: with k too large, A0 is almost all q / B, and the rule doubles whatever it does."""
    objective = objectives.expected_gain(quadratic_loss, persistence=300.0)
    noise = 0.1 * jnp.ones(2) / math.sqrt(size)
    signals = {"update_noise": noise, "meta_batch": jnp.zeros((4, 2))}
    state, _ = update_objective(
        objective, objective.init(), -0.1 * jnp.ones(2), jnp.ones(2), jnp.asarray(size), signals
    )
    assert float(objective.best(state)) == pytest.approx(2 * size, rel=0.15)


def test_the_persistence_is_asked_for_if_not_given():
    make = functools.partial(objectives.expected_gain, quadratic_loss)
    asks = lambda objective: aj.base.requests(objective.init()).signals
    assert asks(make()) - asks(make(persistence=1.0)) == {"persistence"}
    momentum = make(persistence=optax.sgd(0.1, momentum=0.9))  # measured at once
    signals = {"update_noise": jnp.array([0.1, -0.2]), "meta_batch": jnp.ones((4, 2))}
    measured = {"persistence": objectives.Persistence(np.float32(10), np.float32(0.19**-0.5))}
    at = -jnp.ones(2), jnp.ones(2), jnp.asarray(8)
    given = momentum.measure(*at, signals)
    np.testing.assert_allclose(make().measure(*at, signals | measured), given, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_fn": 100_000}, r"loss_fn must be a function .*, got 100000\."),
        ({"loss_fn": None}, "loss_fn must be a function"),
        ({"step_cost": -1.0}, "step_cost must be"),
        ({"persistence": 0.0}, "persistence must be"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        objectives.expected_gain(**{"loss_fn": quadratic_loss} | options)
