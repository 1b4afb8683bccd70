"""One program on several devices: the run of one device, each device's share, what moves."""

import functools
import math
import re
import types

import chex
import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import arbiter_jax as aj
from arbiter_jax import datasets
from arbiter_jax.batching._sampling import sample_own_batch
from arbiter_jax.gradients import value_grad_and_stats
from tests.rules import usual_in_ci

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


@pytest.mark.slow
@pytest.mark.parametrize("rule", usual_in_ci(RULES, usual=("arbiter", "gradient_noise_scale")))
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


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["constant", pytest.param("arbiter", marks=pytest.mark.slow)])
def test_every_device_computes_its_share(rule):
    options = {"bucket_size": 1024}  # so that what all devices do, the update, is a small part
    ours, theirs = compiled(rule, **options)[0], compiled(rule, 8, **options)[0]
    flops = [program.cost_analysis()["flops"] for program in (ours, theirs)]
    assert flops[1] <= 1.1 / 8 * flops[0]


@pytest.mark.slow
def test_per_example_statistics_on_a_mesh():
    function = jax.jit(value_grad_and_stats(loss_fn, method="per_example", micro_batch_size=32))
    found = []
    for n in (1, 8):
        mesh = make_mesh(n)
        with jax.set_mesh(mesh):
            sampler = put(aj.init_sampler(0), mesh)
            draw = jax.jit(aj.sample_batch, static_argnums=3)
            _, batch, mask = draw(sampler, put(data().train, mesh), 101, 128)
            program = function.lower(params(), batch, mask).compile()
            found.append((program(params(), batch, mask), program.cost_analysis()["flops"]))
    chex.assert_trees_all_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-4)
    assert found[1][1] <= 1.4 / 8 * found[0][1]  # sums over groups are on every device


@pytest.mark.slow
def test_split_rows_move_as_a_batch():
    ours, sizes = trained("gradient_noise_scale")
    found, found_sizes = trained("gradient_noise_scale", 8, spec=ROWS)
    assert found_sizes == sizes
    chex.assert_trees_all_close(found, ours, atol=1e-5)
    program = compiled("gradient_noise_scale", 8, spec=ROWS)[0]
    # Far less than the data set: a batch, or the numbers of its rows.
    assert max(size for _, size in collectives(program)) <= BUCKET * NUM_INPUTS


@pytest.mark.slow
def test_local_sampling_moves_no_example():
    program = compiled("constant", 8, spec=ROWS, sampling="local")[0]
    found = list(collectives(program))
    assert {name for name, _ in found} == {"all-reduce"}
    assert max(size for _, size in found) <= LARGEST_GRADIENT
    # Another axis changes nothing, and neither does a second run.
    ours, _ = trained("constant", 2, spec=ROWS, sampling="local")
    found, _ = trained("constant", 2, 2, spec=ROWS, sampling="local")
    chex.assert_trees_all_close(found, ours, atol=1e-5)


@pytest.mark.slow
def test_local_samples_are_each_devices_own():
    n, size, bucket_size = 4, 48, 16
    rows, sampler = np.arange(size), aj.init_sampler(3)
    with jax.set_mesh(make_mesh(n)):
        draw = jax.jit(sample_own_batch, static_argnums=3)
        seen = []
        for batch_size in [16, 1, 3, 5, 16, 7, 0] * 2:
            sampler, batch, mask = draw(sampler, rows, batch_size, bucket_size)
            batch, mask = np.asarray(batch), np.asarray(mask)
            assert mask.sum() == batch_size
            assert abs(mask[::2].sum() - mask[1::2].sum()) <= 1  # the halves that are compared
            own = np.repeat(np.arange(n), bucket_size // n)
            np.testing.assert_array_equal(batch // (size // n), own)  # padding as well
            per_device = mask.reshape(n, -1).sum(1)
            assert per_device.max() - per_device.min() <= 1
            seen.extend(batch[mask])
    assert int(sampler.epoch) == 2
    assert int(sampler.cursor) == 0
    for epoch in (seen[:size], seen[size:]):
        np.testing.assert_array_equal(np.sort(epoch), rows)
    assert seen[:size] != seen[size:]


@pytest.mark.slow
def test_halves_are_those_of_one_device():
    rows, sampler = np.arange(40), aj.init_sampler(0)
    _, batch, mask = aj.sample_batch(sampler, rows, 11, 16)
    with jax.set_mesh(make_mesh(8)):
        _, found, real = jax.jit(aj.sample_batch, static_argnums=3)(sampler, rows, 11, 16)
    assert found.sharding.spec == ROWS
    for half in (0, 1):
        ours = slice(8 * half, 8 * half + 8)
        np.testing.assert_array_equal(found[half::2], batch[ours])
        np.testing.assert_array_equal(real[half::2], mask[ours])
    np.testing.assert_array_equal(found.sharding.shard_shape(found.shape), [2])


# fit


def run_fit(data, params, mesh=None, batch_size=5, **options):
    tx = optax.chain(optax.adam(0.01), aj.schedulers.constant(batch_size))
    fit = functools.partial(aj.fit, num_examples=60, window=4, mesh=mesh, **options)
    return fit(loss_fn, params, tx, data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_fit_keeps_what_is_placed(kind):
    mesh = make_mesh(2, 2, kind=kind)
    specs = {"w1": PartitionSpec(None, "model"), "w2": PartitionSpec("model")}
    placed = {name: put(w, mesh, specs[name]) for name, w in params().items()}
    train, validation = data()
    result = run_fit(aj.Data(put(train, mesh, ROWS), validation), placed)  # finds the mesh
    chex.assert_trees_all_close(
        result.state.params, run_fit(data(), params()).state.params, atol=1e-5
    )
    assert result.num_compilations + result.num_cache_hits == 1
    assert [record.bucket_size for record in result.history] == [8, 8, 8]
    adam = result.state.opt_state[0][0]
    for tree in (result.state.params, adam.mu):
        assert {name: w.sharding for name, w in tree.items()} == {
            name: NamedSharding(mesh, spec) for name, spec in specs.items()
        }
    assert adam.count.sharding == NamedSharding(mesh, REPLICATED)
    # And a state that is given back goes on where it lies.
    further = run_fit(data(), None, state=result.state, stop_at=60)
    assert further.state.params["w1"].sharding == NamedSharding(mesh, specs["w1"])


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [None, PartitionSpec(None, "data")])
def test_fit_from_blocks_on_a_mesh(sharding):
    mesh = make_mesh(8, kind=AxisType.Explicit)
    tx = make("gradient_noise_scale")

    def run(mesh, sharding):
        chunks = datasets.epochs(data().train, chunk_size=100)
        with datasets.host_blocks(chunks, window=WINDOW, sharding=sharding) as blocks:
            given = aj.Data(blocks)
            return aj.fit(loss_fn, params(), tx, given, num_examples=800, window=WINDOW, mesh=mesh)

    ours = run(None, None)
    found = run(mesh, None if sharding is None else NamedSharding(mesh, sharding))
    sizes = [[record.batch_size for record in run.history] for run in (ours, found)]
    assert sizes[0] == sizes[1]
    assert len(set(sizes[0])) > 1
    chex.assert_trees_all_close(found.state.params, ours.state.params, atol=1e-5)


@pytest.mark.slow
def test_a_small_bucket_has_a_row_for_each_device():
    result = run_fit(data(), params(), mesh=make_mesh(8), batch_size=3, stop_at=12)
    assert [(record.batch_size, record.bucket_size) for record in result.history] == [(3, 8)]


@pytest.mark.slow
def test_the_mesh_of_any_kind_of_data_is_found():
    placed = put(data(), make_mesh(8))
    other = types.SimpleNamespace(train=placed.train, validation=placed.validation)
    result = run_fit(other, params(), batch_size=3, stop_at=12)
    assert [record.bucket_size for record in result.history] == [8]


# Errors


def test_meshes_that_rows_cannot_be_split_over():
    with pytest.raises(ValueError, match=r"mesh must have a power of two of devices .* got 3"):
        run_fit(data(), params(), mesh=make_mesh(3))
    mesh = jax.make_mesh((4,), ("x",))
    with pytest.raises(ValueError, match=r"mesh must have an axis 'data'.*\('x',\)"):
        run_fit(data(), params(), mesh=mesh)
    with pytest.raises(ValueError, match=r"mesh must be a jax.sharding.Mesh.*got 8"):
        run_fit(data(), params(), mesh=8)


def test_buckets_and_data_that_devices_cannot_share():
    state = aj.init_state(params(), make("constant"), 0)
    run = functools.partial(aj.run_window, state, loss_fn=loss_fn, tx=make("constant"), window=1)
    with jax.set_mesh(make_mesh(8)):
        with pytest.raises(ValueError, match=r"bucket_size must be at least 8.*got 4"):
            run(data(), bucket_size=4)
        odd = data()._replace(train=jax.tree.map(lambda x: x[:60], data().train))
        with pytest.raises(
            ValueError, match=r"multiple of 8 examples.*'local', got 60: leave 4 out"
        ):
            run(odd, bucket_size=8, sampling="local")
    with pytest.raises(ValueError, match=r"sampling must be .*got 'own'"):
        run(data(), bucket_size=8, sampling="own")


@pytest.mark.slow
def test_own_loop_on_explicit_axes():
    mesh, tx = make_mesh(8, kind=AxisType.Explicit), make("gradient_noise_scale")
    batch, mask = jax.tree.map(lambda x: x[:32], data().train), np.arange(32) % 8 > 0
    grad_fn, accumulator = aj.value_grad_and_signals(loss_fn, tx), aj.accumulate(loss_fn, tx)

    def run(params, opt_state, batch, mask):
        at_once = grad_fn(params, opt_state, batch, mask=mask)
        added = accumulator.init(params, opt_state)
        added = accumulator.add(added, params, opt_state, batch, mask=mask)
        return at_once, accumulator.finish(added, params, opt_state)

    expected = run(params(), tx.init(params()), batch, mask)
    with jax.set_mesh(mesh):
        state = put((params(), tx.init(params())), mesh, REPLICATED)
        found = run(*state, *put((batch, mask), mesh, ROWS))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
