"""One program on several devices: the run of one device, each device's share, what moves."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import arbiter_jax as aj
from arbiter_jax import datasets
from arbiter_jax.batching import interleaved, sample_own_batch

NUM_EXAMPLES, NUM_INPUTS, NUM_HIDDEN, NUM_CLASSES = 512, 16, 32, 4
BUCKET, WINDOW = 64, 4
# What a window took on a clock, in seconds a step: two sizes cost differently.
STEP_SECONDS = [np.nan, 0.010, 0.012, 0.012, 0.015, 0.015]
ROWS, REPLICATED = PartitionSpec("data"), PartitionSpec()


def loss_fn(params, batch):
    inputs, labels = batch
    outputs = jax.nn.relu(inputs @ params["w1"]) @ params["w2"]
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


def response_loss(params, response, meta_batch):
    inputs, labels = meta_batch
    outputs = (jax.nn.relu(inputs @ params["w1"]) * (1 + response[None])) @ params["w2"]
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


def make_arbiter(**limits):
    agent = aj.mlp_agent((NUM_INPUTS,), hidden_sizes=(4,))
    return aj.arbiter(agent, response_loss, num_features=NUM_HIDDEN, window=WINDOW, **limits)


S = aj.schedulers
RULES = {
    "constant": lambda **k: S.constant(24, **k),
    "gradient_noise_scale": functools.partial(S.gradient_noise_scale, decay=0.5),
    "noise_floor": functools.partial(S.noise_floor, num_examples=2000),
    "expected_gain": functools.partial(S.expected_gain, loss_fn, measure_every=2),
    "goodput": functools.partial(S.goodput, decay=0.5),
    "arbiter": make_arbiter,
}
ALL_RULES = [
    pytest.param(name, marks=[] if name == "gradient_noise_scale" else pytest.mark.slow)
    for name in RULES
]


@functools.cache
def make(rule):
    start = {} if rule == "constant" else {"initial_batch_size": 24}
    limits = {"min_batch_size": 8, "max_batch_size": BUCKET}
    return optax.chain(optax.sgd(0.1), RULES[rule](**limits, **start))


def data():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(NUM_EXAMPLES, NUM_INPUTS)).astype(np.float32)
    labels = (inputs[:, 0] > 0).astype(np.int32) + (inputs[:, 1] > rng.normal(size=NUM_EXAMPLES))
    train = inputs, labels.astype(np.int32)
    return aj.Data(train, jax.tree.map(lambda x: x[::4], train))


def params():
    rng = np.random.default_rng(1)
    shapes = {"w1": (NUM_INPUTS, NUM_HIDDEN), "w2": (NUM_HIDDEN, NUM_CLASSES)}
    return {name: 0.3 * rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def make_mesh(*shape, kind=AxisType.Auto):
    names = ("data", "model")[: len(shape)]
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(devices, names, axis_types=(kind,) * len(shape))


def put(tree, mesh, spec=REPLICATED):
    return jax.device_put(tree, NamedSharding(mesh, spec))


@functools.cache
def compiled(rule, *shape, spec=REPLICATED, bucket_size=BUCKET, sampling="exact"):
    """(A window's program, its first state, its data), on one device or on a mesh of some shape."""
    mesh = make_mesh(*shape) if shape else make_mesh(1)
    state, drawn = aj.init_state(params(), make(rule), 0), data()
    state, validation = put(state, mesh), put(drawn.validation, mesh)
    drawn = aj.Data(put(drawn.train, mesh, spec), validation)
    with jax.set_mesh(mesh):
        lowered = aj.run_window.lower(
            state,
            drawn,
            None,
            np.float32(0),
            loss_fn=loss_fn,
            tx=make(rule),
            bucket_size=bucket_size,
            window=WINDOW,
            num_agent_inputs=8,
            sampling=sampling,
        )
        return lowered.compile(), state, drawn


@functools.cache
def trained(rule, *shape, **options):
    """(Parameters, batch sizes) after some windows; every program runs once."""
    program, state, drawn = compiled(rule, *shape, **options)
    sizes = []
    for seconds in STEP_SECONDS:
        sizes.append(int(aj.get_batch_size(state.opt_state)))
        state, _ = program(state, drawn, None, np.float32(seconds))
    return jax.device_get(state.params), sizes


def collectives(program):
    """(Operation, elements of the largest array that it moves) for each that a program holds."""
    pattern = r"= (.*?) (all-[a-z]+|collective-[a-z]+|reduce-scatter)(?:-start)?\("
    for arrays, name in re.findall(pattern, program.as_text()):
        shapes = re.findall(r"\w+\[([\d,]*)\]", arrays)
        yield name, max(math.prod(int(n) for n in s.split(",") if n) for s in shapes)


LARGEST_GRADIENT = NUM_INPUTS * NUM_HIDDEN


@pytest.mark.parametrize("rule", ALL_RULES)
def test_eight_devices_run_as_one(rule):
    ours, sizes = trained(rule)
    if rule != "constant":
        assert len(set(sizes)) > 1
    for shape in [(8,), (2, 2)] if rule != "gradient_noise_scale" else [(8,)]:
        found, found_sizes = trained(rule, *shape)
        assert found_sizes == sizes
        chex.assert_trees_all_close(found, ours, atol=1e-5)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_only_gradients_and_numbers_move(rule):
    found = list(collectives(compiled(rule, 8)[0]))
    assert {name for name, _ in found} == {"all-reduce"}
    assert max(size for _, size in found) <= LARGEST_GRADIENT
