"""AutoWU against recorded runs of the published implementation, and with bad losses."""

import functools
import pathlib

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arbiter_jax.learning_rate import AutoWUState, adamp, autowu

RECORDED = np.load(pathlib.Path(__file__).parent.parent / "fixtures" / "autowu.npz")
CASES = ("u_low", "monotone", "diverge", "sparse_nan")
STEPS_PER_EPOCH, NUM_EPOCHS = 50, 40
NUM_STEPS = STEPS_PER_EPOCH * NUM_EPOCHS
UPDATES = {"w": jnp.ones(3)}


def run(tx, losses, state=None):
    """Rates and phases after every step, and the last state."""

    def step(state, loss):
        _, state = tx.update(UPDATES, state, value=loss)
        return state, (state.learning_rate, state.phase)

    state, (rates, phases) = jax.lax.scan(
        step, tx.init(UPDATES) if state is None else state, losses
    )
    return rates, phases, state


# --- The published implementation


@pytest.mark.slow
def test_switches_where_the_published_one_does():
    """On random subsets of its own, two seeds."""
    tx = autowu(STEPS_PER_EPOCH, NUM_EPOCHS)
    seeds = jnp.stack([jax.random.PRNGKey(seed) for seed in (0, 1)])

    @jax.jit
    @jax.vmap
    def run_all(losses):
        start = jax.vmap(lambda key: tx.init(UPDATES)._replace(key=key))(seeds)
        return jax.vmap(lambda state: run(tx, losses, state))(start)

    rates, phases, states = run_all(jnp.stack([RECORDED[f"{case}/loss"] for case in CASES]))
    for index, case in enumerate(CASES):
        name = f"{case}/imm1"
        for seed in range(len(seeds)):
            rate, phase = np.asarray(rates[index, seed]), np.asarray(phases[index, seed])
            warm = (phase == 0) & (RECORDED[f"{name}/phase"] == 0)
            np.testing.assert_allclose(rate[warm], RECORDED[f"{name}/lr"][warm], rtol=1e-5)
            end = np.argmax(phase > 0) + 1
            if case == "monotone":  # never switched: the longest warm-up
                assert end == NUM_STEPS // 2
                np.testing.assert_allclose(rate[:-1], RECORDED[f"{name}/lr"][:-1], rtol=1e-5)
                np.testing.assert_array_equal(phase, RECORDED[f"{name}/phase"])
            else:
                assert abs(end / STEPS_PER_EPOCH - RECORDED[f"{name}/switch_epoch"]) <= 1
                peak = states.peak_learning_rate[index, seed]
                np.testing.assert_allclose(peak, RECORDED[f"{name}/lr_after_switch"], rtol=0.1)


@pytest.mark.parametrize("immediate", [0, 1])
@pytest.mark.parametrize("case", ["u_low", "diverge", "sparse_nan"])
def test_equals_the_published_rates_after_a_switch(case, immediate):
    name = f"{case}/imm{immediate}"
    tx = autowu(NUM_STEPS, 1, immediate_cooldown=bool(immediate))
    # The state one step after the recorded switch, from the recorded rate.
    start = int(RECORDED[f"{name}/switch_epoch"]) * STEPS_PER_EPOCH
    state = tx.init(UPDATES)._replace(
        num_steps=jnp.asarray(start, jnp.int32),
        phase=jnp.asarray(2 if immediate else 1, jnp.int32),
        learning_rate=jnp.asarray(RECORDED[f"{name}/lr"][start - 1]),
        peak_learning_rate=jnp.asarray(RECORDED[f"{name}/lr_after_switch"], jnp.float32),
        cooldown_start=jnp.asarray(start if immediate else NUM_STEPS, jnp.int32),
    )
    rates, phases, _ = run(tx, RECORDED[f"{case}/loss"][start:], state)
    # No step uses the last rate. The published cosine rises there; ours is 0.
    np.testing.assert_allclose(rates[:-1], RECORDED[f"{name}/lr"][start:-1], rtol=1e-5)
    np.testing.assert_array_equal(phases, RECORDED[f"{name}/phase"][start:])
    assert rates[-1] == 0


def test_equals_the_published_rates_without_a_switch():
    tx = autowu(NUM_STEPS, 1, immediate_cooldown=False)
    rates, phases, _ = run(tx, RECORDED["monotone/loss"])
    np.testing.assert_allclose(rates[:-1], RECORDED["monotone/imm0/lr"][:-1], rtol=1e-5)
    np.testing.assert_array_equal(phases, RECORDED["monotone/imm0/phase"])


# --- The equations


def test_warm_up_and_cosine_by_hand():
    tx = autowu(20, 1, min_learning_rate=1e-4, max_learning_rate=1e-2)
    rates, phases, _ = run(tx, jnp.linspace(2.0, 1.0, 20))
    warm = 1e-4 * 100 ** (np.arange(1, 10) / 10)
    peak = warm[-1]  # the decay starts from the rate of the last step of the warm-up
    cosine = 0.5 * peak * (1 + np.cos(np.pi * np.minimum(np.arange(1, 12), 10) / 10))
    np.testing.assert_allclose(rates, [*warm, *cosine], rtol=1e-5, atol=1e-12)
    np.testing.assert_array_equal(phases, [0] * 9 + [2] * 11)


def test_constant_phase_by_hand():
    tx = autowu(20, 1, immediate_cooldown=False, cooldown_fraction=0.25)
    rates, phases, _ = run(tx, jnp.linspace(2.0, 1.0, 20))
    peak = 1e-5 * 1e5**0.9
    cosine = 0.5 * peak * (1 + np.cos(np.pi * np.minimum(np.arange(1, 7), 5) / 5))
    np.testing.assert_allclose(rates[9:], [peak] * 5 + [*cosine], rtol=1e-5, atol=1e-12)
    np.testing.assert_array_equal(phases, [0] * 9 + [1] * 5 + [2] * 6)


def test_the_cool_down_ends_a_warm_up():
    tx = autowu(20, 1, immediate_cooldown=False, cooldown_fraction=0.5, max_warmup_fraction=0.9)
    rates, phases, _ = run(tx, jnp.linspace(2.0, 1.0, 20))
    np.testing.assert_array_equal(phases, [0] * 9 + [2] * 11)
    peak = 1e-5 * 1e5 ** (9 / 18)
    np.testing.assert_allclose(rates[9], 0.5 * peak * (1 + np.cos(np.pi / 10)), rtol=1e-5)


def test_updates_are_multiplied_by_the_rate():
    tx = autowu(20, 1)
    updates = {"w": jnp.arange(3.0), "b": jnp.ones(2, jnp.bfloat16)}
    state, update = tx.init(updates), jax.jit(tx.update)
    for loss in (2.0, 1.9, 1.8):
        scaled, next_state = update(updates, state, value=loss)
        np.testing.assert_allclose(scaled["w"], state.learning_rate * updates["w"])
        assert scaled["b"].dtype == jnp.bfloat16
        assert next_state.learning_rate > state.learning_rate
        state = next_state


@pytest.mark.parametrize("optimizer", [optax.lamb(1.0), adamp(1.0)])
def test_chains_with_the_optimizers_of_the_paper(optimizer):
    tx = optax.chain(optimizer, autowu(40, 1, max_learning_rate=0.1))
    params = {"w": jnp.full((4, 3), 2.0), "b": jnp.ones(3)}

    def loss_fn(params):
        return jnp.sum(params["w"] ** 2) + jnp.sum((params["b"] - 3) ** 2)

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=loss, batch_size=8)
        return (optax.apply_updates(params, updates), state), loss

    _, losses = jax.jit(lambda c: jax.lax.scan(step, c, length=40))((params, tx.init(params)))
    assert losses[-1] < losses[0]


# --- Bad losses

BAD_LOSSES = {
    "nan": lambda n: np.full(n, np.nan),
    "inf": lambda n: np.full(n, np.inf),
    "minus_inf": lambda n: np.full(n, -np.inf),
    "zero": lambda n: np.zeros(n),
    "constant": lambda n: np.full(n, 2.3),
    "huge": lambda n: np.full(n, 3e38),
    "large": lambda n: np.geomspace(1e-12, 9e11, n),
    "nan_first": lambda n: np.where(np.arange(n) < n / 8, np.nan, 1.0),
    "alternating": lambda n: np.where(np.arange(n) % 2 == 0, np.nan, np.linspace(2, 1, n)),
    "explodes": lambda n: np.geomspace(1.0, 3e38, n),
    "single": lambda n: np.where(np.arange(n) == 0, 1.0, np.inf),
}


EPOCHS = (5, 12)
# Epochs 1 to 3 are finite. Then none is; or one loss of the fourth; or none at all.
SEEN = np.where(np.arange(60) < 15, np.linspace(2.0, 1.0, 60), np.nan)
COLLAPSES = [SEEN, np.where(np.arange(60) == 17, 1.0, SEEN), np.full(60, np.nan)]


@functools.cache
def bad_runs(epochs, immediate):
    """Losses, rates, phases and states of a run per bad loss, in one program; -3: the collapses."""
    num_steps = epochs[0] * epochs[1]
    losses = [make(num_steps) for make in BAD_LOSSES.values()]
    losses = np.stack(losses + (COLLAPSES if epochs == EPOCHS else []))
    # Steps after the end of training must be harmless.
    losses = jnp.asarray(np.concatenate([losses, losses[:, -3:]], axis=1), jnp.float32)
    tx = autowu(*epochs, immediate_cooldown=immediate)
    return losses, *jax.jit(jax.vmap(lambda x: run(tx, x)))(losses)


@pytest.mark.parametrize(
    ("epochs", "immediate"),
    [(EPOCHS, False), ((1, 16), True), ((24, 1), True), ((24, 1), False), ((1, 1), True)],
)
def test_finite(epochs, immediate):
    """Guarantees: Finite; Skips and counts."""
    losses, rates, _, states = bad_runs(epochs, immediate)
    for leaf in jax.tree.leaves((rates, states._replace(losses=()))):
        assert np.all(np.isfinite(leaf))
    assert np.all((np.asarray(rates) >= 0) & (np.asarray(rates) <= 1))
    assert np.all(np.asarray(rates)[:, epochs[0] * epochs[1] - 1 :] == 0)
    with np.errstate(invalid="ignore"):
        bad = np.sum(~(np.abs(np.asarray(losses)) <= 1e12), axis=1)
    np.testing.assert_array_equal(states.num_skipped, bad)


def test_an_epoch_of_bad_losses_ends_the_warm_up():
    _, rates, phases, states = jax.tree.map(lambda x: x[-3:], bad_runs(EPOCHS, False))
    switches = np.argmax(np.asarray(phases) > 0, axis=1) + 1
    np.testing.assert_array_equal(switches, [20, 25, 5])
    # The best rate is that of a step with a finite loss, here the last of them: step 14.
    assert 0.5 * rates[0, 13] < states.peak_learning_rate[0] <= rates[0, 14]
    np.testing.assert_allclose(states.peak_learning_rate[2], 1e-5)


# --- What optax and JAX expect


@pytest.mark.slow
def test_stable_types_one_program_scan_equals_loop():
    tx = autowu(*EPOCHS, immediate_cooldown=False)
    losses, rates, phases, states = bad_runs(EPOCHS, False)
    step = jax.jit(lambda s, v: tx.update(UPDATES, s, value=v)[1])
    types = jax.tree.map(jax.typeof, tx.init(UPDATES))
    for row in (list(BAD_LOSSES).index("alternating"), -2):
        state = tx.init(UPDATES)
        for index, loss in enumerate(losses[row]):
            state = step(state, loss)
            assert jax.tree.map(jax.typeof, state) == types
            np.testing.assert_allclose(state.learning_rate, rates[row, index], rtol=1e-4)
            assert state.phase == phases[row, index]
        np.testing.assert_array_equal(state.key, states.key[row])
    assert step._cache_size() == 1
    assert state.learning_rate.dtype == jnp.float32
    assert state.phase.dtype == jnp.int32
    assert AutoWUState.requires == ("value",)


def primitives_outside_loops(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        if equation.primitive.name != "while":
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from primitives_outside_loops(inner)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_idle_between_tests(monkeypatch, backend):
    """Guarantee: Idle between tests, under ``vmap`` as well, on every backend."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    tx = autowu(3, 8)
    states = jax.vmap(lambda _: tx.init(UPDATES))(jnp.arange(2))
    jaxpr = jax.make_jaxpr(jax.vmap(lambda s, v: tx.update(UPDATES, s, value=v)))(
        states, jnp.ones(2)
    )
    assert "eigh" in str(jaxpr)
    assert "eigh" not in set(primitives_outside_loops(jaxpr.jaxpr))


@pytest.mark.slow
def test_training_may_be_differentiated():
    def final_loss(start, tx):
        def step(carry, _):
            w, state = carry
            value, grad = jax.value_and_grad(lambda w: jnp.sum(w**2))(w)
            update, state = tx.update(-grad, state, value=value)
            return (w + update, state), value

        return jax.lax.scan(step, (start, tx.init(start)), length=24)[1][-1]

    start = jnp.ones(2)
    one_epoch = autowu(24, 1, max_learning_rate=0.2)
    rates = run(one_epoch, jnp.ones(23))[0][:22]
    shrinkage = (1 - 2 * 1e-5) * jnp.prod(1 - 2 * rates)
    reverse = jax.grad(final_loss)(start, one_epoch)
    np.testing.assert_allclose(reverse, 2 * shrinkage**2 * start, rtol=1e-5)
    # The test is excluded from differentiation, so reverse mode accepts its loop.
    assert (
        "eigh"
        in jax.jit(jax.grad(final_loss), static_argnums=1).lower(start, autowu(3, 8)).as_text()
    )


def test_lowers_for_accelerators():
    tx = autowu(3, 8)
    exported = jax.export.export(
        jax.jit(lambda s, v: tx.update(UPDATES, s, value=v)), platforms=["tpu", "cuda"]
    )(tx.init(UPDATES), jnp.float32(1.0))
    assert exported.platforms == ("tpu", "cuda")


def test_a_probe_passes_through():
    tx = autowu(3, 8)
    state = tx.init(UPDATES)
    updates, after = tx.update(UPDATES, state, probe=True)
    assert updates is UPDATES
    assert after is state


def test_the_loss_is_required():
    tx = autowu(3, 8)
    with pytest.raises(TypeError, match="autowu needs the signal `value`"):
        tx.update(UPDATES, tx.init(UPDATES))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps_per_epoch": 0}, "steps_per_epoch must be an integer >= 1, got 0"),
        ({"num_epochs": 2.5}, "num_epochs must be an integer >= 1, got 2.5"),
        ({"min_learning_rate": 0}, "min_learning_rate must be a finite number > 0, got 0"),
        ({"max_learning_rate": 1e-6}, "max_learning_rate must be >= min_learning_rate"),
        ({"max_warmup_fraction": 0}, r"max_warmup_fraction must be in \(0, 1\], got 0"),
        ({"cooldown_fraction": 1.5}, r"cooldown_fraction must be in \[0, 1\], got 1.5"),
        ({"patience": 0}, "patience must be an integer >= 1, got 0"),
        ({"num_tests": 0}, "num_tests must be an integer >= 1, got 0"),
        ({"confidence": 1.0}, r"confidence must be in \(0, 1\), got 1.0"),
        ({"seed": 0.5}, "seed must be an integer or one PRNG key .*, got 0.5"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        autowu(**{"steps_per_epoch": 3, "num_epochs": 8} | arguments)
