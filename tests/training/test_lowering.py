"""Every rule's window program lowers for TPU and CUDA, on a machine that has neither."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.extend import core

import arbiter_jax as aj
from arbiter_jax import models
from tests import rules

PLATFORMS = ("tpu", "cuda")
LIMITS = {"min_batch_size": 4, "max_batch_size": 64, "initial_batch_size": 8}
RULES = rules.RULES | rules.ARBITERS
CHAINS = {
    name: lambda case=case: optax.chain(optax.adam(0.01), case.make(**LIMITS))
    for name, case in RULES.items()
} | {
    "MultiSteps": lambda: optax.MultiSteps(CHAINS["noise_floor"](), 2),
    "apply_if_finite": lambda: optax.apply_if_finite(CHAINS["noise_floor"](), 3),
    "adascale": lambda: optax.chain(
        optax.sgd(1.0), aj.adascale(8, 0.1), CHAINS["gradient_noise_scale"]()
    ),
    "without a rule": lambda: optax.adam(0.01),
}
# One that asks for nothing, and one for each kind of costly signal.
FEW = {"constant", "gradient_noise_scale", "noise_floor", "arbiter"}
WRAPPED = [pytest.param(name, marks=pytest.mark.slow) for name in CHAINS if name not in RULES]


def lowered(tx, data, init, **options):
    """The StableHLO of one window program, for both platforms; nothing is computed."""
    state = jax.eval_shape(lambda: aj.init_state(init()[0], tx, 0, *init()[1:]))
    options = {"tx": tx, "bucket_size": 8, "window": 3} | options
    traced = aj.run_window.trace(state, aj.Data(data, data), 2, 0.1, 400, **options)
    return traced.lower(lowering_platforms=PLATFORMS).as_text()


def check_program(text):
    assert "_platform_index" in text  # one program for both
    assert "callback" not in text
    assert not re.search(r"stablehlo\.(infeed|outfeed|send|recv)", text)
    text = re.sub(r"= dense<.*?> : tensor<[^>]*>", "", text)  # shapes of operations are attributes
    types = set(re.findall(r"tensor<([^>]*)>", text))
    assert not [name for name in types if "?" in name]
    # JAX's own keys are split with uint64 constants; nothing else is wider than 32 bits.
    dtypes = {name.split("x")[-1] for name in types}
    assert dtypes <= {"i1", "i32", "f32", "bf16", "ui8", "ui32", "ui64"}


def arrays(*shapes, dtype=jnp.float32):
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)


@pytest.mark.parametrize("name", [*rules.usual_in_ci(RULES, usual=FEW), *WRAPPED])
def test_a_rule_lowers_for_tpu_and_cuda(name):
    init = lambda: ({"w": jnp.zeros(rules.NUM_FEATURES)},)
    data = arrays((50, rules.NUM_FEATURES), (50,))
    check_program(lowered(CHAINS[name](), data, init, loss_fn=rules.loss_fn))


def images(model):
    losses = models.make_losses(model, optax.softmax_cross_entropy_with_integer_labels)
    return losses.loss_fn, (*arrays((50, 32, 32, 3)), *arrays((50,), dtype=jnp.int32))


def wide_resnet():
    model = models.wide_resnet((32, 32, 3), dtype=jnp.bfloat16)
    return (model, *images(model))


def lenet():
    model = models.lenet((32, 32, 3))
    return (model, *images(model))


def transformer():
    model = models.transformer(96, 16, width=32, dropout_rate=0.1, dtype=jnp.bfloat16)
    loss_fn = models.make_losses(model, models.token_cross_entropy).loss_fn
    return model, loss_fn, arrays((50, 16), (50, 16), dtype=jnp.int32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [pytest.param(wide_resnet, marks=pytest.mark.exhaustive), lenet, transformer]
)
def test_a_network_lowers_for_tpu_and_cuda(make):
    """Convolutions, running averages, dropout, attention, bfloat16; and per-example statistics."""
    model, loss_fn, data = make()
    init = lambda: tuple(x for x in model.init(jax.random.key(0)) if x is not None)
    check_program(lowered(CHAINS["noise_floor"](), data, init, loss_fn=loss_fn))


@pytest.mark.slow
def test_subset_selection_lowers_for_tpu_and_cuda():
    model = models.mlp((32, 32, 3), (16,))
    loss_fn, data = images(model)
    gradient_fn = aj.subset_gradients(loss_fn)
    init = lambda: model.init(jax.random.key(0))[:1]
    check_program(lowered(CHAINS["constant"](), data, init, gradient_fn=gradient_fn))


# Nearly all of the time to the first step is XLA's, and grows with the number of operations.
MOST_EQUATIONS = {"constant": 430, "gradient_noise_scale": 860, "noise_floor": 1850}


def num_equations(program):
    inner = [x for eqn in program.eqns for x in core.jaxprs_in_params(eqn.params)]
    return len(program.eqns) + sum(num_equations(getattr(x, "jaxpr", x)) for x in inner)


@pytest.mark.parametrize("name", MOST_EQUATIONS)
def test_a_window_has_few_equations(name):
    """An upper bound: what makes a program larger makes every user wait longer."""
    state = jax.eval_shape(
        lambda: aj.init_state({"w": jnp.zeros(rules.NUM_FEATURES)}, CHAINS[name](), 0)
    )
    data = aj.Data(*2 * [arrays((50, rules.NUM_FEATURES), (50,))])
    options = {"loss_fn": rules.loss_fn, "bucket_size": 8, "window": 3}
    traced = aj.run_window.trace(state, data, 2, 0.1, 400, tx=CHAINS[name](), **options)
    assert num_equations(traced.jaxpr.jaxpr) <= MOST_EQUATIONS[name]
