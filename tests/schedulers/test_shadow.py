"""Shadows: they watch and never decide."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import base, schedulers
from tests.problems import proposing


def test_wrappers_pass_the_needs_of_the_rule_on():
    for wrap in (schedulers.hysteresis, schedulers.shadow):
        state = wrap(schedulers.cabs(0.1)).init(None)
        assert base.requests(state).signals == {"value", "grad_stats"}


@pytest.mark.parametrize("acting", [lambda: schedulers.constant(64), lambda: optax.identity()])
def test_never_acts(acting):
    tx = optax.chain(acting(), schedulers.shadow(proposing(10, 1000)))
    state = tx.init(None)
    for _ in range(3):
        assert len(base.requests(state).rules) == len(base.requests(acting().init(None)).rules)
        _, state = tx.update(None, state)
    assert int(schedulers.shadow_batch_sizes(state)["schedule"]) == 1000


def test_many_shadows_in_one_chain():
    given = aj.GradStats(*jnp.array([0.5, 40.0, 32.0, 1.75, 0.2, 3.0]))
    tx = optax.chain(
        schedulers.constant(64),
        schedulers.shadow(schedulers.gradient_noise_scale()),
        schedulers.shadow(schedulers.norm_test(eta=0.5), name="strict"),
        schedulers.shadow(schedulers.norm_test(eta=1.0), name="loose"),
        schedulers.shadow(schedulers.adadamp(initial_batch_size=32)),
    )
    state = tx.init(None)
    _, state = tx.update(None, state, value=1.0, grad_stats=given, batch_size=20)
    sizes = {name: int(size) for name, size in schedulers.shadow_batch_sizes(state).items()}
    assert sizes == {"gradient_noise_scale": 80, "strict": 92, "loose": 23, "adadamp": 32}
    assert list(sizes) == ["gradient_noise_scale", "strict", "loose", "adadamp"]
    assert int(aj.get_batch_size(state)) == 64


def test_a_shadow_sees_the_applied_size_not_its_own():
    """Its decisions are never applied: a rule that multiplies must not compound them."""
    given = aj.GradStats(*jnp.array([0.5, 40.0, 32.0, 1.75, 0.2, 3.0]))
    rule = schedulers.shadow(schedulers.simigrad(decide_every=1, initial_batch_size=8))
    for given_size in (
        {"batch_size": 32},
        {},
    ):  # without it, the 32 examples of the statistics count
        state = rule.init(None)
        for _ in range(5):
            _, state = rule.update(None, state, grad_stats=given, **given_size)
        assert int(schedulers.shadow_batch_sizes(state)["simigrad"]) == 48


def test_shadow_values_for_the_log():
    """One entry a shadow, whatever the rule inside would log by itself."""
    state = schedulers.shadow(schedulers.gradient_noise_scale(), name="noise").init(None)
    assert list(state.metrics) == ["shadow/noise"]
    assert int(state.metrics["shadow/noise"]) == 8


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (schedulers.constant(8), "constant"),
        (schedulers.cabs(0.1), "cabs"),
        (schedulers.adadamp(), "adadamp"),
        (schedulers.dive_batch(10), "dive_batch"),
        (schedulers.goodput(), "goodput"),
        (schedulers.gradient_noise_scale(), "gradient_noise_scale"),
        (schedulers.inner_product_test(), "inner_product_test"),
        (schedulers.norm_test(), "norm_test"),
        (schedulers.simigrad(), "simigrad"),
        (schedulers.hysteresis(schedulers.cabs(0.1)), "hysteresis"),
    ],
)
def test_default_names(rule, name):
    state = schedulers.shadow(rule).init(jnp.zeros(()))
    assert list(schedulers.shadow_batch_sizes(state)) == [name]


def test_two_shadows_of_one_name_are_refused():
    watched = schedulers.shadow(schedulers.constant(8))
    with pytest.raises(ValueError, match="two shadows are called 'constant'"):
        schedulers.shadow_batch_sizes(optax.chain(watched, watched).init(None))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedulers.shadow("cabs"), "rules must be a batch-size rule .*, got 'cabs'"),
        (lambda: schedulers.shadow([None]), "rule must be an optax gradient transformation"),
        (lambda: schedulers.shadow({}), "rules must hold at least one rule, got none"),
        (lambda: schedulers.shadow(name="a"), "name must be None unless there is a single rule"),
        (lambda: schedulers.shadow({"": schedulers.constant(8)}), "name must be a string"),
        (
            lambda: schedulers.shadow([schedulers.constant(8), schedulers.constant(9)]).init(None),
            "two shadows are called 'constant'",
        ),
        (lambda: schedulers.shadow(schedulers.constant(8), name=""), "name must be a string"),
        (lambda: schedulers.shadow(optax.sgd(0.1)).init(None), "found none"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


READY = ["gradient_noise_scale", "inner_product_test", "noise_floor", "norm_test"]
WINDOW = 24


def losses(params, batch):
    return (batch @ params["w"] - 1) ** 2 / 2


def first_state(tx, key=0):
    return aj.init_state({"w": jnp.zeros(3)}, tx, key)


DATA = aj.Data(0.3 + jax.random.normal(jax.random.key(1), (64, 3)))


def one_window(tx, bucket_size=16):
    """The shadows at each step, and the state after them."""
    state, info = aj.run_window(
        first_state(tx), DATA, loss_fn=losses, tx=tx, bucket_size=bucket_size, window=WINDOW
    )
    return {name.removeprefix("shadow/"): x for name, x in info.metrics.items()}, state


@pytest.fixture(scope="module")
def watched():
    """A run whose chain has no rule that decides: its batches are of the user's own size."""
    return one_window(optax.chain(optax.sgd(0.03), schedulers.shadow()))


@pytest.mark.slow
def test_ready_set_watches_a_chain_without_a_rule(watched):
    sizes, state = watched
    assert sorted(sizes) == READY
    assert not base.requests(state.opt_state).rules
    found = schedulers.shadow_batch_sizes(state.opt_state)
    assert {name: int(x) for name, x in found.items()} == {n: int(x[-1]) for n, x in sizes.items()}
    assert 2 < sizes["gradient_noise_scale"][-1] < sizes["norm_test"][-1] < 64
    assert (sizes["inner_product_test"] == 16).all()  # passed: it would stay
    plain, after = one_window(optax.sgd(0.03))
    assert plain == {}
    chex.assert_trees_all_close(state.params, after.params, rtol=1e-6)


@pytest.mark.slow
def test_each_watched_rule_measures_when_it_is_due(watched):
    """The noise floor measures at each of the first 20 steps, the others then only at the 10th."""
    changes = {name: set(np.flatnonzero(np.diff(x)) + 1) for name, x in watched[0].items()}
    assert changes["gradient_noise_scale"] == changes["norm_test"] == {10, 20}
    assert changes["noise_floor"] == {1, 2, 3}


def test_together_the_rules_choose_as_alone(watched):
    scale = schedulers.gradient_noise_scale(
        decay=0.9, measure_every=10, min_batch_size=2, max_batch_size=2**15
    )
    alone, _ = one_window(optax.chain(optax.sgd(0.03), schedulers.shadow(scale)))
    np.testing.assert_array_equal(alone["gradient_noise_scale"], watched[0]["gradient_noise_scale"])


@pytest.mark.slow
def test_shadows_inside_other_transformations(watched):
    """A learning rate that can be set, and seeds side by side, change no decision."""
    make = lambda learning_rate: optax.chain(optax.sgd(learning_rate), schedulers.shadow())
    tx = optax.inject_hyperparams(make)(learning_rate=0.03)
    states = jax.vmap(lambda key: first_state(tx, key))(jnp.arange(2))
    window = lambda state: aj.run_window(
        state, DATA, loss_fn=losses, tx=tx, bucket_size=16, window=WINDOW
    )
    _, info = jax.jit(jax.vmap(window))(states)
    for name in READY:
        found = info.metrics[f"shadow/{name}"]
        np.testing.assert_allclose(found[0], watched[0][name], rtol=1e-2, atol=1)
    scale = info.metrics["shadow/gradient_noise_scale"]
    assert (scale[0] != scale[1]).all()


@pytest.mark.slow
def test_shadows_inside_multi_steps():
    """What they report is the size of a call, of which the update averages two."""
    given = aj.GradStats(*jnp.array([0.5, 400.0, 32.0, 1.75, 0.2, 3.0]))
    rules = {"scale": schedulers.gradient_noise_scale(), "test": schedulers.norm_test(eta=1.0)}
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.1), schedulers.shadow(rules)), 2)
    params = {"w": jnp.ones(())}
    state = tx.init(params)
    for step in range(4):
        _, state = tx.update(
            params, state, params, grad_stats=given, batch_size=32, num_examples=32 * step
        )
    found = {name: int(size) for name, size in schedulers.shadow_batch_sizes(state).items()}
    assert found == {"scale": 400, "test": 115}  # 800 / 2, and 400 / 1.75 / 2


def own_loop(tx, num_steps=12):
    """The sizes after each step of a loop of one's own, whose batches are of one size."""
    grad_fn = aj.value_grad_and_signals(losses, tx)
    batches = DATA.train[: 8 * 8].reshape(8, 8, 3)

    def step(carry, t):
        params, opt_state = carry
        _, grads, signals = grad_fn(params, opt_state, batches[t % 8])
        updates, opt_state = tx.update(grads, opt_state, params, **signals)
        found = schedulers.shadow_batch_sizes(opt_state) or aj.get_batch_size(opt_state)
        return (optax.apply_updates(params, updates), opt_state), found

    params = {"w": jnp.zeros(3)}
    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(num_steps))[1]


@pytest.mark.slow
def test_in_a_loop_of_ones_own():
    """One line more in the chain shows what the same rule decides where it acts."""
    shared = {"measure_every": 10, "min_batch_size": 2, "max_batch_size": 2**15}
    watched = own_loop(optax.chain(optax.sgd(0.03), schedulers.shadow()))
    assert sorted(watched) == READY
    acting = schedulers.gradient_noise_scale(decay=0.9, **shared)
    decided = own_loop(optax.chain(optax.sgd(0.03), acting))
    np.testing.assert_array_equal(watched["gradient_noise_scale"], decided)
    assert set(np.flatnonzero(np.diff(decided)) + 1) == {10}
