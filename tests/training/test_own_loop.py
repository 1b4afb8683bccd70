"""A loop of one's own: the same decisions and parameters as through `fit`, for every rule."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import datasets
from tests.rules import ARBITERS, NUM_FEATURES, RULES, usual_in_ci

BUCKET = 8
NUM_EXAMPLES = 96


def loss_fn(params, batch):
    inputs, labels = batch
    return (inputs @ params["w"] - labels) ** 2


def draw(num_rows, seed=0):
    inputs = np.random.default_rng(seed).normal(size=(num_rows, NUM_FEATURES)).astype(np.float32)
    return inputs, (inputs @ np.arange(1.0, 4.0) + inputs[:, 0] ** 2).astype(np.float32)


@functools.cache
def validation():
    """One example many times: then it does not matter which ones are drawn."""
    return tuple(np.repeat(x, 40, axis=0) for x in draw(1, seed=1))


def start():
    return {"w": jnp.full(NUM_FEATURES, 0.1)}


def chunks():
    return datasets.epochs(draw(64), chunk_size=BUCKET)


def through_fit(tx, **options):
    with datasets.host_blocks(chunks(), window=1) as blocks:
        return aj.fit(
            loss_fn,
            start(),
            tx,
            aj.Data(blocks, validation()),
            num_examples=400,  # what the rules in the table are built for
            stop_at=NUM_EXAMPLES,
            window=1,
            clock=itertools.count().__next__,
            **options,
        )


def padded(examples, size):
    """The first examples in a bucket whose padding is NaN, the mask, and the rest."""
    rows = jax.tree.map(lambda x: x[:size], examples)
    pad = lambda x: np.concatenate([x, np.full((BUCKET - size, *x.shape[1:]), np.nan, x.dtype)])
    rest = jax.tree.map(lambda x: x[size:], examples)
    return jax.tree.map(pad, rows), np.arange(BUCKET) < size, rest


def by_hand(tx, grad_fn, count=True):
    """A loop as a user writes it; (parameters, state, batch sizes, sizes of shadows)."""

    @jax.jit
    def step(params, opt_state, batch, mask, num_examples, seconds):
        value, grads, signals = grad_fn(
            params,
            opt_state,
            batch,
            mask=mask,
            validation=validation(),
            num_examples=num_examples if count else None,
            step_seconds=seconds,
        )
        updates, opt_state = tx.update(grads, opt_state, params, **signals)
        return optax.apply_updates(params, updates), opt_state, value

    source = chunks()
    examples = jax.tree.map(lambda *x: np.concatenate(x), *[next(source) for _ in range(20)])
    params, opt_state, seen, seconds, sizes, shadows = start(), tx.init(start()), 0, np.nan, [], []
    while seen + int(aj.get_batch_size(opt_state)) <= NUM_EXAMPLES:
        size = int(aj.get_batch_size(opt_state))
        batch, mask, examples = padded(examples, size)
        params, opt_state, _ = step(params, opt_state, batch, mask, seen, seconds)
        seen, seconds = seen + size, 1.0
        sizes.append(size)
        shadows.append(aj.schedulers.shadow_batch_sizes(opt_state))
    return params, opt_state, sizes, shadows


LIMITS = {"min_batch_size": 4, "max_batch_size": BUCKET, "initial_batch_size": 6}
CASES = {**RULES, **ARBITERS}


@pytest.mark.slow
def test_as_in_fit():
    # Several rules at once: what each would have chosen, from signals that they share.
    names = ["gradient_noise_scale", "noise_floor", "goodput", "from_schedule"]
    watched = [aj.schedulers.shadow(CASES[name].make(**LIMITS), name=name) for name in names]
    tx = optax.chain(optax.sgd(0.02, momentum=0.9), *watched, aj.schedulers.constant(6))
    result = through_fit(tx)
    params, opt_state, sizes, shadows = by_hand(tx, aj.value_grad_and_signals(loss_fn, tx))
    assert sizes == result.per_step("batch_size").tolist() == [6] * 16
    for name in names:
        found = [int(step[name]) for step in shadows]
        assert found == result.per_step(f"shadow/{name}").tolist(), name
    chex.assert_trees_all_close(params, result.state.params, rtol=1e-5)
    chex.assert_trees_all_close(opt_state, result.state.opt_state, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", usual_in_ci(name for name in CASES if name != "shadow"))
def test_every_rule_decides_as_in_fit(name):
    tx = optax.chain(optax.adam(0.02), CASES[name].make(**LIMITS))
    result = through_fit(tx)
    params, _, sizes, _ = by_hand(tx, aj.value_grad_and_signals(loss_fn, tx))
    assert sizes == result.per_step("batch_size").tolist()
    chex.assert_trees_all_close(params, result.state.params, rtol=1e-4)


def noise_chain(*rules, optimizer=None):
    optimizer = optimizer or optax.sgd(0.02, momentum=0.9)
    return optax.chain(optimizer, *rules)


@functools.cache
def floor():
    return aj.schedulers.noise_floor(num_examples=400, measure_every=2, **LIMITS)


@functools.cache
def floor_chain():
    tx = noise_chain(floor())
    return tx, aj.value_grad_and_signals(loss_fn, tx)


def batch_of(num_rows, seed=2):
    return draw(num_rows, seed)


def test_padding_changes_no_bit():
    tx, grad_fn = floor_chain()
    state = tx.init(start())
    batch = batch_of(6)
    rows = np.array([1, 3, 4, 5, 6, 7])  # the first row is padding, too
    spread = lambda x, fill: np.insert(np.full((8 - 6, *x.shape[1:]), fill, x.dtype), [0] * 6, x, 0)
    padded_with = lambda fill: jax.tree.map(
        lambda x: spread(x, fill)[np.argsort([*rows, 0, 2])], batch
    )
    mask = np.isin(np.arange(8), rows)
    found = [grad_fn(start(), state, padded_with(x), mask=mask) for x in (0.0, np.nan, np.inf)]
    chex.assert_trees_all_equal(*found)
    value, grads, signals = grad_fn(start(), state, batch)
    chex.assert_trees_all_close(found[0][:2], (value, grads), rtol=1e-5)
    assert int(found[0][2]["batch_size"]) == int(signals["batch_size"]) == 6


@pytest.mark.slow
def test_halves_are_alternate_rows():
    tx, grad_fn = floor_chain()
    for num_rows in (7, 8):
        inputs, labels = batch = batch_of(num_rows)
        _, grads, signals = grad_fn(start(), tx.init(start()), batch)
        gradient = lambda rows: mean_gradient((inputs[rows], labels[rows]))  # noqa: B023
        even, odd = (gradient(slice(j, None, 2)) for j in range(2))
        n = num_rows // 2
        factor = np.sqrt(n * (num_rows - n)) / num_rows  # 1/2 for equal halves
        np.testing.assert_allclose(signals["gradient_noise"]["w"], factor * (even - odd), rtol=1e-4)
        np.testing.assert_allclose(grads["w"], gradient(slice(None)), rtol=1e-5)
        np.testing.assert_allclose(
            signals["update_noise"]["w"], -0.02 * signals["gradient_noise"]["w"], rtol=1e-5
        )


def test_measures_only_when_due():
    tx, grad_fn = floor_chain()
    state = tx.init(start())
    not_due = (state[0], state[1]._replace(signals_due=jnp.array(False)))
    batch = batch_of(8)
    value, grads, signals = grad_fn(start(), state, batch)
    plain_value, plain_grads, zeros = grad_fn(start(), not_due, batch)
    chex.assert_trees_all_close((value, grads), (plain_value, plain_grads), rtol=1e-5)
    measured = ("gradient_noise", "update_noise", "grad_stats")
    assert all(not np.any(x) for name in measured for x in jax.tree.leaves(zeros[name]))
    assert all(np.any(x) for name in measured for x in jax.tree.leaves(signals[name]))


def test_nothing_that_no_rule_asks_for():
    for optimizer, names in (
        (optax.scale(-0.1), []),  # takes no extra argument
        (
            noise_chain(aj.schedulers.constant(8)),
            ["batch_size", "grad", "num_accumulated", "value"],
        ),
    ):
        grad_fn = aj.value_grad_and_signals(loss_fn, optimizer)
        state = optimizer.init(start())
        value, grads, signals = grad_fn(start(), state, batch_of(8))
        assert sorted(signals) == names
        mean = lambda params: jnp.mean(loss_fn(params, batch_of(8)))
        chex.assert_trees_all_close((value, grads), jax.value_and_grad(mean)(start()), rtol=1e-6)
        optimizer.update(grads, state, start(), **signals)
        jaxpr = jax.make_jaxpr(
            lambda p, grad_fn=grad_fn, state=state: grad_fn(p, state, batch_of(8))[:2]
        )
        assert str(jaxpr(start())).count("dot_general") <= 2


def test_counts_by_itself():
    tx = noise_chain(CASES["from_schedule"].make(**LIMITS))
    grad_fn = aj.value_grad_and_signals(loss_fn, tx)
    with_count, without = (by_hand(tx, grad_fn, count=count) for count in (True, False))
    assert with_count[2] == without[2]
    assert len(set(without[2])) > 1


@pytest.mark.slow
def test_multi_steps_without_a_count():
    watched = aj.schedulers.shadow(CASES["gradient_noise_scale"].make(**LIMITS))
    inner = noise_chain(watched, aj.schedulers.constant(6))
    tx = optax.MultiSteps(inner, 2)
    result = through_fit(tx)
    params, _, sizes, shadows = by_hand(tx, aj.value_grad_and_signals(loss_fn, tx), count=False)
    assert sizes == [6] * 16
    found = [int(step["gradient_noise_scale"]) for step in shadows]
    assert found == result.per_step("shadow/gradient_noise_scale").tolist()
    chex.assert_trees_all_close(params, result.state.params, rtol=1e-5)


def with_state(params, batch, model_state, mask, key):
    """Batch normalization of the labels, and noise from the key."""
    inputs, labels = batch
    mean = jnp.sum(labels * mask) / jnp.sum(mask)
    noise = 0.0 if key is None else jax.random.normal(key, ())
    losses = (inputs @ params["w"] - labels + mean) ** 2 + noise
    if not model_state:
        return losses, model_state
    return losses, {"mean": 0.5 * model_state["mean"] + 0.5 * mean, "n": model_state["n"] + 1}


@pytest.mark.slow
def test_model_state_and_key():
    tx = noise_chain(floor())
    grad_fn = aj.value_grad_and_signals(with_state, tx)
    opt_state = tx.init(start())
    batch = inputs, labels = batch_of(8)
    model_state = {"mean": jnp.float32(0), "n": jnp.int32(0)}
    _, grads, signals = grad_fn(start(), opt_state, batch, model_state=model_state)
    mean = labels[1::2].mean() / 2 + labels[::2].mean() / 4  # the halves, one after the other
    np.testing.assert_allclose(signals["model_state"]["mean"], mean, rtol=1e-6)
    assert int(signals["model_state"]["n"]) == 2
    tx.update(grads, opt_state, start(), **signals)
    bad = inputs, labels * np.nan
    _, _, signals = grad_fn(start(), opt_state, bad, model_state=model_state)
    chex.assert_trees_all_equal(signals["model_state"], model_state)
    values = [grad_fn(start(), opt_state, batch, key=jax.random.key(s))[0] for s in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def with_aux(params, batch):
    losses = loss_fn(params, batch)
    return losses, {"each": batch[1], "mean": losses.mean(), "rows": len(losses) * 0 + 3}


@pytest.mark.parametrize("num_rows", [6, 7])
def test_aux_rows_in_the_order_of_the_batch(num_rows):
    tx = noise_chain(floor())
    grad_fn = aj.value_grad_and_signals(with_aux, tx, has_aux=True)
    batch = batch_of(num_rows)
    value, _, _, aux = grad_fn(start(), tx.init(start()), batch)
    np.testing.assert_array_equal(aux["each"], batch[1])
    np.testing.assert_allclose(aux["mean"], value, rtol=1e-6)
    assert int(aux["rows"]) == 3


@pytest.mark.slow
def test_micro_batches_of_a_batch():
    tx, grad_fn = floor_chain()
    state = tx.init(start())
    in_groups = aj.value_grad_and_signals(loss_fn, tx, micro_batch_size=4)
    for num_rows in (8, 7):  # groups of four in halves: four pieces
        batch = batch_of(num_rows)
        whole, found = grad_fn(start(), state, batch), in_groups(start(), state, batch)
        chex.assert_trees_all_close(found[:2], whole[:2], rtol=1e-5)
        assert int(found[2]["batch_size"]) == num_rows
        pieces = [jax.tree.map(lambda x, j=j: x[j::4], batch) for j in range(4)]
        sizes = np.array([len(x[0]) for x in pieces])
        gradients = np.stack([mean_gradient(piece) for piece in pieces])
        spread = sizes @ (gradients - sizes @ gradients / num_rows) ** 2
        stats = found[2]["grad_stats"]
        np.testing.assert_allclose(stats.variance_trace, spread.sum() / 3, rtol=1e-4)


def mean_gradient(batch):
    inputs, labels = batch
    return 2 * (inputs @ start()["w"] - labels) @ inputs / len(labels)


def accumulated(accumulator, micro_batches, opt_state, **options):
    state = accumulator.init(start(), opt_state)
    for micro_batch in micro_batches:
        state = accumulator.add(state, start(), opt_state, micro_batch, **options)
    return accumulator.finish(state, start(), opt_state)


@pytest.mark.parametrize("rule", ["constant", "gradient_noise_scale"])
def test_groups_of_padding_alone_are_skipped(rule):
    """Five rows in a bucket of sixteen are two groups of four, not four."""
    computed = []

    def counted(params, batch):
        jax.debug.callback(lambda x: computed.append(len(x)), batch[1])
        return loss_fn(params, batch)

    tx = optax.chain(
        optax.sgd(0.1), RULES[rule].make(min_batch_size=4, max_batch_size=16, initial_batch_size=8)
    )
    params = start()
    grad_fn = aj.value_grad_and_signals(counted, tx, micro_batch_size=4)
    batch = datasets.MaskedBatch(draw(16), np.arange(16) < 5)
    _, grads, _ = jax.jit(grad_fn)(params, tx.init(params), batch)
    jax.block_until_ready(grads)
    jax.effects_barrier()
    assert sum(computed) == 8


def test_groups_of_a_whole_batch_are_differentiated():
    """As in meta-learning: a batch without a mask has a known number of groups."""
    tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(8))
    batch, params = draw(8), start()

    def sq_norm(params, **options):
        grad_fn = aj.value_grad_and_signals(loss_fn, tx, **options)
        return optax.tree.norm(grad_fn(params, tx.init(params), batch)[1], squared=True)

    found = jax.grad(functools.partial(sq_norm, micro_batch_size=4))(params)
    chex.assert_trees_all_close(found, jax.grad(sq_norm)(params), rtol=1e-4)


@pytest.mark.slow
def test_accumulate():
    tx, grad_fn = floor_chain()
    accumulator = aj.accumulate(loss_fn, tx)
    opt_state = tx.init(start())
    for n in (1, 3, 4):
        micro_batches = [batch_of(4, seed=j) for j in range(n)]
        value, grads, signals = accumulated(accumulator, micro_batches, opt_state)
        # Rows 0 and 2 of each micro-batch are the first half.
        order = [j * 4 + i for half in ((0, 2), (1, 3)) for j in range(n) for i in half]
        rows = np.array(order).reshape(2, -1).T.ravel()
        batch = jax.tree.map(lambda *x: np.concatenate(x)[rows], *micro_batches)  # noqa: B023
        expected = grad_fn(start(), opt_state, batch)
        chex.assert_trees_all_close((value, grads), expected[:2], rtol=1e-5)
        for name in ("gradient_noise", "update_noise", "batch_size"):
            chex.assert_trees_all_close(signals[name], expected[2][name], rtol=1e-4, atol=1e-6)
        halves = [jax.tree.map(lambda x, j=j: x[j::2], m) for m in micro_batches for j in range(2)]
        gradients = [mean_gradient(half) for half in halves]
        variance = 2 * np.var(gradients, axis=0, ddof=1).sum()
        np.testing.assert_allclose(signals["grad_stats"].variance_trace, variance, rtol=1e-4)


@pytest.mark.slow
def test_accumulate_not_due_and_masked():
    tx, grad_fn = floor_chain()
    accumulator = aj.accumulate(loss_fn, tx)
    state = tx.init(start())
    state = (state[0], state[1]._replace(signals_due=jnp.array(False)))
    first, second = batch_of(4), batch_of(4, seed=3)
    batch = accumulator.init(start(), state)
    batch = accumulator.add(batch, start(), state, first)
    nan = jax.tree.map(
        lambda x: np.where(np.arange(4).reshape(-1, *[1] * (x.ndim - 1)) < 1, x, np.nan), second
    )
    batch = accumulator.add(batch, start(), state, nan, mask=np.arange(4) < 1)
    value, grads, signals = accumulator.finish(batch, start(), state)
    five = jax.tree.map(lambda x, y: np.concatenate([x, y[:1]]), first, second)
    expected = grad_fn(start(), state, five)
    chex.assert_trees_all_close((value, grads), expected[:2], rtol=1e-5)
    as_arrays = lambda tree: jax.tree.map(jnp.asarray, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(as_arrays(signals), as_arrays(expected[2]))
    assert int(signals["batch_size"]) == 5
    assert not np.any(signals["gradient_noise"]["w"])


@pytest.mark.slow
def test_accumulate_aux_and_model_state():
    tx = noise_chain(floor())
    accumulator = aj.accumulate(with_aux, tx, has_aux=True)
    opt_state = tx.init(start())
    batch = batch_of(6)
    _, aux = accumulator.add(accumulator.init(start(), opt_state), start(), opt_state, batch)
    np.testing.assert_array_equal(aux["each"], batch[1])
    accumulator = aj.accumulate(with_state, tx)
    model_state = {"mean": jnp.float32(0), "n": jnp.int32(0)}
    state = accumulator.init(start(), opt_state, model_state)
    state = accumulator.add(state, start(), opt_state, batch)
    state = accumulator.add(state, start(), opt_state, (batch[0], batch[1] * np.nan))
    _, _, signals = accumulator.finish(state, start(), opt_state)
    chex.assert_trees_all_equal(signals["model_state"], model_state)  # the batch was not finite


@pytest.mark.slow
def test_under_scan_and_vmap():
    tx, grad_fn = floor_chain()

    def step(carry, batch):
        params, opt_state = carry
        value, grads, signals = grad_fn(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **signals)
        return (optax.apply_updates(params, updates), opt_state), value

    batches = jax.tree.map(lambda *x: jnp.stack(x), *[batch_of(8, seed=j) for j in range(4)])
    run = lambda scale: jax.lax.scan(
        step, (jax.tree.map(lambda x: scale * x, start()), tx.init(start())), batches
    )
    alone = [run(scale) for scale in (1.0, 2.0)]
    together = jax.vmap(run)(jnp.array([1.0, 2.0]))
    expected = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    chex.assert_trees_all_close(together, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, s: f(start(), s, batch_of(4), mask=np.ones(3, bool)), r"mask must be bool\[4\]"),
        (lambda f, s: f(start(), s, batch_of(4), mask=np.ones(4)), r"mask must be bool\[4\]"),
        (lambda f, s: f(start(), s, ()), "batch must be a pytree of arrays"),
        (
            lambda f, s: f(start(), optax.adam(0.1).init(start()), batch_of(4)),
            "opt_state must be that",
        ),
        (lambda f, s: f(start(), None, batch_of(4)), "opt_state must be that of tx, whose rules"),
        (lambda f, s: f(start(), s, (np.ones((3, 2)), np.ones(4))), "one leading axis of equal"),
        (
            lambda f, s: f(start(), s, next(datasets.batches(chunks(), 5)), mask=np.ones(8, bool)),
            r"mask must be None if batch is a pair from datasets.batches, which holds one, got .*\[8\]",
        ),
    ],
)
def test_errors(call, message):
    tx, grad_fn = floor_chain()
    with pytest.raises(ValueError, match=message):
        call(grad_fn, tx.init(start()))


def test_a_tensor_is_no_array():
    class Tensor:  # as torch's: it has a shape and a type
        shape, dtype = (4, NUM_FEATURES), np.dtype(np.float32)

    tx, grad_fn = floor_chain()
    with pytest.raises(ValueError, match=r"batch must be a pytree of arrays .* got a Tensor"):
        grad_fn(start(), tx.init(start()), (Tensor(), np.ones(4)))


def test_a_seed_is_a_key():
    def noisy(params, batch, model_state, mask, key):
        return loss_fn(params, batch) + jax.random.uniform(key), model_state

    tx = optax.sgd(0.1)
    grad_fn = aj.value_grad_and_signals(noisy, tx)
    values = [
        float(grad_fn(start(), tx.init(start()), batch_of(4), key=key)[0])
        for key in (3, jax.random.key(3), 4)
    ]
    assert values[0] == values[1] != values[2]


def test_errors_of_arguments():
    tx = noise_chain(CASES["arbiter"].make(**LIMITS))
    grad_fn = aj.value_grad_and_signals(loss_fn, tx)
    with pytest.raises(ValueError, match="validation must be given, got None"):
        grad_fn(start(), tx.init(start()), batch_of(4))
    as_dict = dict(zip("xy", validation(), strict=True))
    with pytest.raises(ValueError, match="inputs_of must be given if a batch is a dict"):
        grad_fn(start(), tx.init(start()), batch_of(4), validation=as_dict)
    for make in (aj.value_grad_and_signals, aj.accumulate):
        with pytest.raises(ValueError, match="loss_fn must be a function"):
            make(3, tx)
        with pytest.raises(ValueError, match="tx must be an optax"):
            make(loss_fn, optax.sgd)
        with pytest.raises(ValueError, match="has_aux must be"):
            make(loss_fn, tx, has_aux="yes")
    with pytest.raises(TypeError, match=r"needs the signal .* tx\.update\(\.\.\., \*\*signals\)"):
        tx.update(start(), tx.init(start()), start())
    with pytest.raises(ValueError, match="micro_batch_size must be an integer >= 1"):
        aj.value_grad_and_signals(loss_fn, tx, micro_batch_size=0)
    with pytest.raises(ValueError, match="return the losses, not their mean"):
        aj.value_grad_and_signals(lambda p, b: loss_fn(p, b).mean(), optax.sgd(0.1))(
            start(), optax.sgd(0.1).init(start()), batch_of(4)
        )
