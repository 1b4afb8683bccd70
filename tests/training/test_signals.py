"""What rules are told: statistics of what the chain moves, the agent's inputs, auxiliary output."""

import functools
import itertools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import _jaxpr, base, gradients
from arbiter_jax.base import with_extra_args
from arbiter_jax.training._signals import moved_leaves
from tests.rules import RULES

S = aj.schedulers
LABELS = {"train": "train", "frozen": "frozen"}
FROZEN = {"train": False, "frozen": True}
TRAINED = {"train": True, "frozen": False}


def params_like():
    return {"train": jnp.full(3, 0.3), "frozen": jnp.full(2, 0.7)}


def partition(train, frozen=None):
    frozen = optax.set_to_zero() if frozen is None else frozen
    return optax.multi_transform({"train": train, "frozen": frozen}, LABELS)


def every_second(tx, **options):
    steps = optax.MultiSteps(tx, 2, **options)
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


DECAY = optax.chain(optax.set_to_zero(), optax.add_decayed_weights(0.1), optax.scale(-0.1))
SKIP_LARGE = functools.partial(optax.skip_large_updates, max_squared_norm=1.0)

FREEZING = {
    "multi_transform": partition(optax.adamw(0.1)),
    "clipped before": optax.chain(optax.clip_by_global_norm(1.0), partition(optax.adam(0.1))),
    "masked before": optax.chain(optax.masked(optax.set_to_zero(), FROZEN), optax.adam(0.1)),
    "masked after": optax.chain(optax.adam(0.1), optax.masked(optax.set_to_zero(), FROZEN)),
    "only decays": optax.chain(optax.masked(optax.set_to_zero(), FROZEN), optax.adamw(0.1)),
    "rate of zero": partition(optax.sgd(0.1), optax.sgd(0.0)),
    "MultiSteps": every_second(partition(optax.adam(0.1))),
    "skipping": every_second(
        partition(optax.adam(0.1)), should_skip_update_fn=optax.skip_not_finite
    ),
    "skipping the large": every_second(
        partition(optax.adam(0.1)), should_skip_update_fn=SKIP_LARGE
    ),
    "apply_if_finite": optax.apply_if_finite(every_second(partition(optax.adam(0.1))), 3),
    "decays if finite": optax.apply_if_finite(partition(optax.adam(0.1), DECAY), 3),
    "a rule inside": partition(optax.chain(optax.sgd(0.1), S.gradient_noise_scale())),
    "inject_hyperparams": optax.inject_hyperparams(
        lambda learning_rate: partition(optax.sgd(learning_rate))
    )(learning_rate=0.1),
    "hypergradients": partition(aj.sgd_hd(0.1, 0.01)),
    "adamp": partition(aj.adamp(0.1)),
    "adascale": optax.chain(partition(optax.sgd(0.1)), aj.adascale(8)),
}


@pytest.mark.parametrize("name", FREEZING)
def test_frozen_leaves_are_found(name):
    tx = with_extra_args(FREEZING[name])
    params = params_like()
    assert moved_leaves(tx, tx.init(params), params) == TRAINED


def delayed():
    """Applies the gradient of the step before."""

    def update(updates, state, params=None):
        return state, updates

    return optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), update)


def by_hand(updates, params=None):
    """The sign of the gradient, made from a comparison."""
    return jax.tree.map(lambda u: jnp.where(u > 0, -0.1, 0.1), updates)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(0.1),
        optax.chain(optax.sgd(0.1, momentum=0.9), S.norm_test(), aj.adascale(8)),
        optax.sgd(0.0),  # nobody moves: a rule may watch such a chain
        optax.set_to_zero(),
        delayed(),
        optax.stateless(by_hand),
        optax.apply_if_finite(every_second(optax.adam(0.1)), 3),
        optax.GradientTransformation(lambda p: (), lambda u, s, p: 1 / 0),  # cannot be traced
    ],
    ids=lambda tx: None,
)
def test_otherwise_all_leaves_count(tx):
    params = params_like()
    assert moved_leaves(with_extra_args(tx), tx.init(params), params) is None


def noisy_loss(params, batch):
    """The gradient with respect to what is frozen is a hundred times as noisy."""
    inputs, labels = batch
    frozen = 100 * jnp.sum(params["frozen"]) * inputs[:, 0]
    return (inputs @ params["train"] - labels) ** 2 / 2 + frozen - jax.lax.stop_gradient(frozen)


def clean_loss(params, batch):
    return noisy_loss(params | {"frozen": jax.lax.stop_gradient(params["frozen"])}, batch)


def all_measured_rules():
    limits = {"min_batch_size": 2, "max_batch_size": 64}
    measured = {}
    for name, case in RULES.items():
        if set(case.signals) & base.MEASURED_SIGNALS and name != "shadow":
            measured[name] = case.make(**limits)
    gain = aj.objectives.expected_gain(clean_loss)  # of the parameters of this problem
    measured["expected_gain"] = S.expected_gain(clean_loss, **limits)
    measured["from_objective"] = S.from_objective(gain, **limits)
    return {name: S.shadow(rule, name=name) for name, rule in measured.items()}


def run(tx, loss_fn, params, **options):
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(64, 3)), jnp.float32)
    data = aj.Data(*[(inputs, jnp.asarray(rng.normal(size=64), jnp.float32))] * 2)
    state = aj.init_state(params, tx, jax.random.PRNGKey(0))
    return aj.run_window(
        state, data, budget=400, loss_fn=loss_fn, tx=tx, bucket_size=8, window=10, **options
    )


@pytest.mark.slow
def test_frozen_leaves_decide_nothing():
    """Every measured rule finds what it finds where they have no gradient at all."""
    rules = all_measured_rules()
    assert len(rules) >= 10
    tx = optax.chain(partition(optax.sgd(0.01)), S.constant(8), *rules.values())
    found, _ = run(tx, noisy_loss, params_like())
    expected, _ = run(tx, clean_loss, params_like())
    chex.assert_trees_all_close(found.params, expected.params, rtol=1e-5)
    for pair in zip(found.opt_state[2:], expected.opt_state[2:], strict=True):
        chex.assert_trees_all_close(*pair, rtol=2e-4)


def test_no_operation_where_all_leaves_move(monkeypatch):

    def program():
        tx = optax.chain(optax.adam(0.01), S.gradient_noise_scale())
        return _jaxpr.text(jax.make_jaxpr(lambda: run(tx, noisy_loss, params_like()))())

    looked = program()
    monkeypatch.setattr("arbiter_jax.training._window.moved_leaves", lambda *_: None)
    assert program() == looked


# Auxiliary output


def aux_loss(params, batch):
    """The numbers of rows, and of something that only a whole batch has."""
    inputs, labels = batch
    errors = inputs @ params["train"] - labels
    count, sign = jnp.int32(inputs.shape[0]), errors[0] > 0
    return errors**2 / 2, {"error": jnp.mean(errors), "vector": jnp.zeros(3), "n": (count, sign)}


@pytest.mark.slow
def test_aux_reaches_the_step_info():
    """Steps not taken hold zeros; every second step is measured on two pieces."""
    rule = S.noise_floor(measure_every=2, persistence=1.0, min_batch_size=8, max_batch_size=8)
    plain = lambda params, batch: aux_loss(params, batch)[0]
    for tx, rows in ((optax.sgd(0.1), 8), (optax.chain(optax.sgd(0.1), rule), 4)):
        expected, _ = run(tx, plain, params_like(), num_steps=7)
        state, info = run(tx, aux_loss, params_like(), num_steps=7, has_aux=True)
        chex.assert_trees_all_equal(state.params, expected.params)
        assert info.aux["n"][0].tolist() == [rows] * 7 + [0] * 3
        assert info.aux["vector"].shape == (10, 3)
        assert np.all(info.aux["error"][:7] != 0)


@pytest.mark.parametrize(
    ("method", "num_examples"), [("pieces", 8), ("pieces", 5), ("pieces", 1), ("per_example", 8)]
)
def test_aux_is_a_mean_over_the_real_rows(method, num_examples):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=8), jnp.float32)
    mask = jnp.arange(8) < num_examples

    def loss(w, batch):
        x, real = batch
        mean = jnp.sum(jnp.where(real, x, 0)) / jnp.sum(real)  # nan in an empty piece
        return (w - x) ** 2, (mean, jnp.sum(real))

    fn = gradients.value_grad_and_stats(loss, method=method, has_aux=True, sampled=True)
    got = fn(0.0, (x, mask), mask)
    np.testing.assert_allclose(got.aux[0], np.mean(x[:num_examples]), rtol=1e-5)
    last = {8: 4, 5: 1, 1: 1} if method == "pieces" else {8: 8}
    assert int(got.aux[1]) == last[num_examples]


def test_aux_of_unclear_rows_is_refused_in_pieces():
    loss = lambda w, x: ((w - x) ** 2, jnp.concatenate([x, x]))
    fn = gradients.value_grad_and_stats(loss, has_aux=True)
    with pytest.raises(ValueError, match=r"aux, which .*\(16,\) for the whole batch and \(8,\)"):
        fn(0.0, jnp.ones(8), jnp.ones(8, bool))


# The agent's inputs


def seeing(batch):
    """What an agent that is given 2 of 8 validation examples sees."""

    class State(NamedTuple):
        batch_size: jax.Array
        seen: jax.Array
        requires = ("agent_inputs",)

    def update(updates, state, params=None, *, agent_inputs, **signals):
        return updates, state._replace(seen=agent_inputs)

    rule = optax.GradientTransformationExtraArgs(
        lambda params: State(jnp.int32(4), jnp.zeros((2, 3))), update
    )
    loss = lambda w, batch: jnp.sum(w[None] - jax.tree.leaves(batch)[0], axis=1)

    def run(**options):
        state = aj.init_state(jnp.zeros(3), rule, jax.random.PRNGKey(0))
        state, _ = aj.run_window(
            state,
            aj.Data(batch, batch),
            loss_fn=loss,
            tx=rule,
            bucket_size=4,
            window=1,
            num_agent_inputs=2,
            **options,
        )
        return state.opt_state.seen

    return run


class Batch(NamedTuple):
    x: jax.Array
    y: jax.Array


@pytest.mark.slow
def test_the_agent_sees_the_inputs_of_any_batch():
    x, y = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32), jnp.ones(8)
    expected = seeing((x, y))()
    assert np.all(expected != 1)
    for batch in ([x, y], Batch(x, y), x):
        np.testing.assert_array_equal(seeing(batch)(), expected)
    by_name = seeing({"label": y, "image": x})
    np.testing.assert_array_equal(by_name(inputs_of=lambda b: b["image"]), expected)
    with pytest.raises(ValueError, match="inputs_of must be given where a batch is a dict with"):
        by_name()


TRAINABLE = (TRAINED, lambda params: {name: name == "train" for name in params})


@pytest.mark.parametrize(
    ("method", "trainable"), [*itertools.product(("pieces", "per_example"), TRAINABLE)]
)
def test_trainable_leaves_the_others_out(method, trainable):
    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.normal(size=(16, 3)), jnp.float32), jnp.ones(16)
    params = params_like() | {"train": {"a": jnp.ones(3)}}
    loss = lambda params, batch: noisy_loss(params | {"train": params["train"]["a"]}, batch)
    alone = lambda train, batch: loss({"train": train, "frozen": params["frozen"]}, batch)
    scale = jax.tree.map(lambda x: 2 + x, params)
    fn = gradients.value_grad_and_stats(loss, method=method, trainable=trainable)
    got = fn(params, batch, jnp.ones(16, bool), preconditioner=scale)
    expected = aj.gradient_stats(
        alone, params["train"], batch, method=method, preconditioner=scale["train"]
    )
    chex.assert_trees_all_close(got.grad_stats, expected, rtol=1e-5)
    assert np.any(got.grads["frozen"] != 0)
    if method == "pieces":
        assert not np.any(got.gradient_noise["frozen"])
        assert np.all(got.gradient_noise["train"]["a"] != 0)


@pytest.mark.slow
def test_trainable_of_subset_gradients():
    batch, params = (draw_rows(), jnp.ones(16)), params_like()
    got = jax.jit(aj.subset_gradients(noisy_loss, trainable=TRAINED))(params, batch)
    stats = lambda *args: aj.gradient_stats(noisy_loss, *args, num_pieces=16, trainable=TRAINED)
    expected = jax.jit(stats)(params, batch)
    # The halves of a batch are other ones.
    others = dict.fromkeys(("half_cosine", "abs_deviation", "abs_signal"), 0)
    same = lambda stats: stats._replace(**others)
    chex.assert_trees_all_close(same(got.grad_stats), same(expected), rtol=1e-4)


def draw_rows():
    return jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)


@pytest.mark.parametrize("trainable", [{"train": True}, {"train": 1, "frozen": 0}, False, [True]])
def test_trainable_must_be_bools(trainable):
    with pytest.raises(ValueError, match="trainable must be a pytree of bools like params"):
        aj.gradient_stats(
            noisy_loss, params_like(), (jnp.ones((4, 3)), jnp.ones(4)), trainable=trainable
        )
