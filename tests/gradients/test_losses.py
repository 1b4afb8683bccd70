"""Loss functions of a wrong form: one sentence at the first trace, wherever they are called."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax.gradients import masked_value_and_grad, per_example_grads, value_grad_and_stats
from arbiter_jax.gradients._masked import call_loss

BATCH = jnp.ones((4, 3)), jnp.ones(4)
PARAMS = {"w": jnp.ones(3)}
MASK = jnp.ones(4, bool)


def good(params, batch):
    inputs, labels = batch
    return (inputs @ params["w"] - labels) ** 2


def broadcast(params, batch):
    inputs, labels = batch
    return ((inputs @ params["w"])[:, None] - labels[None, :]) ** 2


def returns(change):
    return lambda params, batch: change(good(params, batch))


SHAPE = r"loss_fn must return one loss per example, shape \(\d,\) and a float type, got "
WRONG = {
    "a matrix": (broadcast, SHAPE + r"shape \(\d, \d\): squeeze the outputs, .*WeightedLoss"),
    "a column": (returns(lambda x: x[:, None]), SHAPE + r"shape \(\d, 1\): squeeze the outputs"),
    "a mean": (returns(jnp.mean), SHAPE + r"shape \(\): return the losses, not their mean"),
    "too few": (returns(lambda x: x[1:]), SHAPE + r"shape \(\d,\): return the losses"),
    "integers": (returns(lambda x: x.astype(int)), SHAPE + "int32: integers and booleans have no"),
    "booleans": (returns(lambda x: x > 0), SHAPE + "bool: integers and booleans have no gradient"),
    "complex": (returns(lambda x: x + 0j), SHAPE + "complex64: return a real number"),
    "None": (returns(lambda x: None), SHAPE + "None"),
    "a string": (returns(lambda x: "loss"), SHAPE + "'loss'"),
    "a number": (returns(lambda x: 1.0), SHAPE + "1.0"),
    "a list": (returns(lambda x: [x]), SHAPE + "a list of 1"),
    "a weight a row": (
        returns(lambda x: aj.WeightedLoss(jnp.stack([x, x], axis=1), jnp.ones(x.shape))),
        r"WeightedLoss whose weights have the shape of its losses, \(\d, 2\), got",
    ),
    "a weight": (
        returns(lambda x: aj.WeightedLoss(x, 1.0)),
        r"weights have the shape of its losses, \(\d,\), got 1.0",
    ),
    "weighted integers": (
        returns(lambda x: aj.WeightedLoss(x.astype(int), x)),
        r"shape \(\d, ...\) and a float type, got int32",
    ),
}
CALLERS = {
    "gradient": lambda f: masked_value_and_grad(f)(PARAMS, BATCH, MASK),
    "pieces": lambda f: value_grad_and_stats(f)(PARAMS, BATCH, MASK),
    "per_example": lambda f: value_grad_and_stats(f, method="per_example")(PARAMS, BATCH, MASK),
    "per_example_grads": lambda f: per_example_grads(f)(PARAMS, BATCH),
    "subset": lambda f: aj.subset_gradients(f)(PARAMS, BATCH),
    "expected_gain": lambda f: measure(aj.objectives.expected_gain(f, persistence=1.0)),
    "noise_floor": lambda f: measure(aj.objectives.noise_floor(f, persistence=1.0)),
}


def measure(objective):
    ones = PARAMS
    signals = {
        "value": 1.0,
        "gradient_noise": ones,
        "update_noise": ones,
        "grad_stats": aj.GradStats(*[jnp.ones(())] * 6),
        "meta_batch": BATCH,
    }
    return objective.measure(ones, ones, jnp.int32(4), signals)


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_loss_is_named(case, caller):
    loss_fn, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: CALLERS[caller](loss_fn))


@pytest.mark.parametrize("caller", CALLERS)
def test_the_right_forms_pass(caller):
    tokens = lambda x: aj.WeightedLoss(jnp.stack([x, x], axis=1), jnp.ones((*x.shape, 1), bool))
    for loss_fn in (good, returns(tokens), returns(lambda x: x.astype(jnp.bfloat16))):
        jax.eval_shape(lambda f=loss_fn: CALLERS[caller](f))


def test_a_response_loss_is_named_as_such():
    agent = aj.mlp_agent((3,))
    wrong = lambda params, response, batch: broadcast({"w": params["w"] * (1 + response)}, batch)
    tx = aj.arbiter(agent, wrong, num_features=3)
    signals = {"agent_inputs": BATCH[0], "meta_batch": BATCH}
    with pytest.raises(ValueError, match=r"response_loss must return one loss .*\(4, 4\): squeeze"):
        jax.eval_shape(lambda: tx.update(PARAMS, tx.init(PARAMS), PARAMS, **signals))


# What a loss function takes


def with_state(params, batch, model_state, mask, key):
    return good(params, batch), model_state


def call(loss_fn, model_state=None, **options):
    gradient_fn = masked_value_and_grad(loss_fn, **options)
    return lambda: gradient_fn(PARAMS, BATCH, MASK, model_state, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            call(with_state),
            r"loss_fn must take \(params, batch\) without a model_state, got one that takes "
            r"\(params, batch, model_state, mask, key\): give its state",
        ),
        (
            call(good, 1.0),
            r"must take \(params, batch, model_state, mask, key\) if a model_state is given, got "
            r"one that takes \(params, batch\)",
        ),
        (call(lambda *args: with_state(*args)[0], 1.0), r"return \(losses, model_state\), got "),
        (call(lambda p, b: (good(p, b), 1)), SHAPE + r"a tuple of 2: pass has_aux=True if it"),
        (call(good, has_aux=True), r"loss_fn must return \(losses, aux\), got "),
        (
            call(lambda *args: (*with_state(*args), {}), 1.0),
            r"\(losses, model_state\), got a tuple of 3: pass has_aux=True",
        ),
        (call(lambda p, b: (good(p, b), "x"), has_aux=True), "aux, which loss_fn returns, must be"),
    ],
)
def test_the_form_of_a_loss_is_checked(make, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(make)


def test_aux_comes_with_and_without_a_state():
    out = call(lambda p, b: (good(p, b), {"n": 4}), has_aux=True)()
    assert (out.model_state, int(out.aux["n"])) == (None, 4)
    out = call(lambda *args: (*with_state(*args), {"n": 4}), 2.0, has_aux=True)()
    assert (float(out.model_state), int(out.aux["n"])) == (2.0, 4)


def test_callables_of_any_kind_pass():
    class Loss:
        def __call__(self, *args):
            return good(*args)

    for loss_fn in (Loss(), jax.jit(good), lambda params, batch, scale=1.0: good(params, batch)):
        jax.eval_shape(call(loss_fn))
    losses, _, aux = call_loss(lambda p, b: (good(p, b), 1), PARAMS, BATCH, MASK, has_aux=None)
    assert aux is None or losses.shape == (4,)


# What parameters hold


@pytest.mark.parametrize("leaf", [jnp.int32(3), True, "name", jax.random.key(0)])
@pytest.mark.parametrize("caller", ["gradient", "pieces", "per_example_grads", "subset"])
def test_a_leaf_without_a_gradient_is_named(leaf, caller, monkeypatch):
    monkeypatch.setitem(PARAMS, "count", [leaf])
    with pytest.raises(
        ValueError, match=r"params must hold floating-point.*params\['count'\]\[0\]"
    ):
        CALLERS[caller](good)


def test_a_window_says_so_too():
    tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(4))
    params = PARAMS | {"steps": jnp.int32(0)}
    state = aj.init_state(params, tx, jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match=r"got int32 at params\['steps'\]: keep"):
        aj.run_window(state, aj.Data(BATCH), loss_fn=good, tx=tx, bucket_size=4, window=1)


def test_a_list_or_dict_is_a_batch():
    by_name = lambda params, batch: good(params, (batch["x"], batch["y"]))
    for loss_fn, batch in ((good, [*BATCH]), (by_name, dict(zip("xy", BATCH, strict=True)))):
        got = value_grad_and_stats(loss_fn)(PARAMS, batch, MASK)
        expected = value_grad_and_stats(good)(PARAMS, BATCH, MASK)
        np.testing.assert_array_equal(got.grads["w"], expected.grads["w"])
