"""Loops in plain JAX with a rule in the chain end where `fit`, or a loop without rules, ends."""

import pathlib
from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import datasets
from tests.script_runs import RANGE, RULES, run_fit
from tests.scripts import (
    language_model,
    language_model_adaptive,
    plain_functions,
    plain_functions_adaptive,
    reinforcement_learning,
    reinforcement_learning_adaptive,
)

NUM_STEPS = 8
MICRO = language_model.MICRO_BATCH_SIZE
MINIBATCH = reinforcement_learning.MINIBATCH_SIZE
IN_CI = [  # of the rules of each loop one; the others before a release
    name if name == "gradient_noise_scale" else pytest.param(name, marks=pytest.mark.exhaustive)
    for name in RULES
]


class Sizes(NamedTuple):
    """State of :func:`recorded`."""

    sizes: jax.Array
    num_steps: jax.Array


def recorded(rule, length=NUM_STEPS):
    """The rule, and a transformation that keeps the batch size of every step."""

    def update(updates, state, params=None, *, batch_size=0, **signals):
        del params, signals
        sizes = state.sizes.at[state.num_steps].set(batch_size)
        return updates, Sizes(sizes, state.num_steps + 1)

    init = lambda params: Sizes(jnp.zeros(length, jnp.int32), jnp.int32(0))
    return optax.chain(rule, optax.GradientTransformationExtraArgs(init, update))


def sizes_in(opt_state):
    """What :func:`recorded` has kept."""
    is_record = lambda node: isinstance(node, Sizes)
    (found,) = filter(is_record, jax.tree.leaves(opt_state, is_leaf=is_record))
    return found.sizes


def adamw(peak=3e-3):
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, 3, 40)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))


@pytest.fixture(autouse=True)
def wide_range(monkeypatch):
    """Room for the batch size to move within a few steps, down as well as up."""
    wide = {"min_batch_size": 4, "max_batch_size": 64, "initial_batch_size": 8}
    for name, size in wide.items():
        monkeypatch.setitem(RANGE, name, size)


@pytest.fixture(scope="module")
def digits():
    data = datasets.digits()
    return data.train, jax.tree.map(lambda x: x[:32], data.validation)


@pytest.fixture(scope="module")
def text():
    """Lines of the license as bytes, between line ends, padded with zeros: training, validation."""
    lines = (pathlib.Path(__file__).parents[1] / "LICENSE").read_text().splitlines()
    lines = [f"\n{line.strip()}\n".encode() for line in lines if line.strip()]
    tokens = np.zeros((len(lines), 1 + max(map(len, lines))), np.int32)
    for row, line in zip(tokens, lines, strict=True):
        row[: len(line)] = list(line)
    return tokens[32:], tokens[:32]


# Plain functions, clipping, AdamW with a warm-up and a cosine.


@pytest.mark.slow
def test_plain_functions_at_a_constant_size(digits):
    train, validation = digits
    chunks = lambda size: datasets.epochs(train, chunk_size=size)
    _, plain = plain_functions.train(adamw(), chunks(24), validation, NUM_STEPS)
    tx = optax.chain(adamw(), aj.schedulers.constant(24))
    _, losses = plain_functions_adaptive.train(tx, chunks(7), validation, NUM_STEPS)
    np.testing.assert_allclose(losses, plain, rtol=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_CI)
def test_plain_functions_as_fit(name, digits, monkeypatch):
    # Away from where the last bit decides: the agent's Adam makes of rounding a size of 4 or of 5.
    monkeypatch.setitem(RANGE, "min_batch_size", 6)
    train, validation = digits
    tx = optax.chain(adamw(), recorded(RULES[name]((8, 8, 1))))
    source = datasets.epochs(train, chunk_size=64)
    (_, opt_state), losses = plain_functions_adaptive.train(tx, source, validation, NUM_STEPS)
    init = plain_functions.init_params(jax.random.key(0), (64, 32, 10))
    source = datasets.epochs(train, chunk_size=50)
    loss_fn = plain_functions.cross_entropy
    result, of_fit, sizes = run_fit(loss_fn, init, tx, source, validation, NUM_STEPS)
    assert len(set(sizes)) > 1
    np.testing.assert_array_equal(sizes_in(opt_state), sizes)
    np.testing.assert_allclose(losses[:-1], of_fit, rtol=1e-4)
    end = plain_functions.loss_fn(result.state.params, validation)
    np.testing.assert_allclose(losses[-1], end, rtol=1e-4)


# A language model: fixed micro-batches, as many as the rule asks for.


@pytest.mark.slow
def test_language_model_at_a_constant_size(text):
    train, validation = text
    chunks = lambda: datasets.epochs(train, chunk_size=MICRO)
    _, plain = language_model.train(adamw(), chunks(), validation, 4, num_micro_batches=3)
    tx = optax.chain(adamw(), aj.schedulers.constant(3 * MICRO))
    _, losses = language_model_adaptive.train(tx, chunks(), validation, 4)
    np.testing.assert_allclose(losses, plain, rtol=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_CI)
def test_language_model_as_fit(name, text):
    """The same examples through `fit`, whose statistics come from half micro-batches: the sizes
    are therefore those of the loop, as a schedule, and the loss is the same at each step."""
    train, validation = text
    chunks = datasets.epochs(train, chunk_size=MICRO)
    tx = optax.chain(adamw(), recorded(RULES[name]((validation.shape[1],))))
    state, losses = language_model_adaptive.train(tx, chunks, validation, NUM_STEPS)
    sizes = sizes_in(state.opt_state)
    assert len(np.unique(sizes)) > 1
    assert not np.any(sizes % MICRO)

    schedule = aj.schedulers.from_schedule(lambda t: jnp.append(sizes, MICRO)[t])
    params = jax.jit(language_model.model.init)(jax.random.key(0), validation[:1, :-1])
    loss_fn = lambda *args: aj.WeightedLoss(*language_model.token_losses(*args))
    tx, source = optax.chain(adamw(), schedule), datasets.epochs(train, chunk_size=50)
    result, of_fit, _ = run_fit(
        loss_fn, params, tx, source, validation, NUM_STEPS, micro_batch_size=MICRO
    )
    np.testing.assert_allclose(losses[:-1], of_fit, rtol=1e-4)
    total, weight = language_model.loss_fn(result.state.params, validation)
    np.testing.assert_allclose(losses[-1], total / weight, rtol=1e-4)


@pytest.mark.slow
def test_noise_scale_of_groups_by_hand(text):
    """The decisions too: the statistics are those of the micro-batches, written out here."""
    train, validation = text
    rule = aj.schedulers.gradient_noise_scale(
        decay=0.5, min_batch_size=MICRO, max_batch_size=64, initial_batch_size=4 * MICRO
    )
    tx, chunks = optax.chain(adamw(), recorded(rule)), datasets.epochs(train, chunk_size=MICRO)
    state, losses = language_model_adaptive.train(tx, chunks, validation, NUM_STEPS)

    tx, chunks = adamw(), datasets.epochs(train, chunk_size=MICRO)
    grad_fn = jax.jit(jax.value_and_grad(language_model.loss_fn, has_aux=True))
    update = jax.jit(tx.update)
    params = jax.jit(language_model.model.init)(jax.random.key(0), validation[:1, :-1])
    opt_state, size = tx.init(params), 4 * MICRO
    variance = signal = 0.0
    for step in range(NUM_STEPS):
        num_groups = -(-size // MICRO)
        assert num_groups * MICRO == sizes_in(state.opt_state)[step]
        groups = [next(chunks) for _ in range(num_groups)]
        found = [grad_fn(params, rows[i::2]) for rows in groups for i in range(2)]
        values, weights = (np.array([x[0][i] for x in found]) for i in range(2))
        vectors = np.stack([jax.flatten_util.ravel_pytree(x[1])[0] for x in found])
        mean = vectors.sum(0) / weights.sum()
        # A half of a micro-batch counts by its share of the tokens.
        examples = weights / weights.sum() * num_groups * MICRO
        deviation = np.sum((vectors / weights[:, None] - mean) ** 2, axis=1)
        trace = np.sum(examples * deviation) / (len(found) - 1)
        variance = (variance + trace) / 2
        signal = (signal + mean @ mean - trace / (num_groups * MICRO)) / 2
        size = int(np.clip(np.round(variance / signal) if signal > 0 else 64, MICRO, 64))
        np.testing.assert_allclose(losses[step], values.sum() / weights.sum(), rtol=1e-4)
        grads = jax.flatten_util.ravel_pytree(params)[1](jnp.asarray(mean, jnp.float32))
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert len(np.unique(sizes_in(state.opt_state))) > 1


# Reinforcement learning in one program: only the mask moves, within one static minibatch.


def replay(monkeypatch, key, sizes, num_updates):
    """The loop without the library, on the first rows of each minibatch: really so many, no mask.

    Without jit, scans are Python loops, and each of their steps may have a shape of its own.
    """
    left = iter(sizes.tolist())

    def compiled(function):
        compiled_function = jax.jit(function)

        def call(*args):
            with jax.disable_jit(False):
                return compiled_function(*args)

        return call

    def of_first_rows(params, minibatch):
        size = next(left)
        return grad_fn(params, jax.tree.map(lambda x: x[:size], minibatch))

    grad_fn = compiled(jax.value_and_grad(reinforcement_learning.loss_fn))
    with monkeypatch.context() as patch, jax.disable_jit():
        patch.setattr(jax, "value_and_grad", lambda loss_fn: of_first_rows)
        patch.setattr(reinforcement_learning, "rollout", compiled(reinforcement_learning.rollout))
        _, losses = reinforcement_learning.make_train(adamw(), num_updates)(key)
    assert next(left, None) is None
    return losses


@pytest.mark.slow
def test_reinforcement_learning_full_minibatch(key):
    tx = optax.chain(adamw(), aj.schedulers.constant(MINIBATCH))
    _, losses = jax.jit(reinforcement_learning_adaptive.make_train(tx, 2))(key)
    _, plain = jax.jit(reinforcement_learning.make_train(adamw(), 2))(key)
    np.testing.assert_allclose(losses, plain, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_CI)
def test_reinforcement_learning_by_hand(name, monkeypatch):
    """Two seeds in one program, each with sizes of its own, against the loop without the library."""
    keys = jax.random.split(jax.random.key(0), 2)
    tx = optax.chain(adamw(), recorded(RULES[name]((4,))))
    train = jax.jit(jax.vmap(reinforcement_learning_adaptive.make_train(tx, 2)))
    (_, opt_state, _), losses = train(keys)
    assert losses.shape == (2, NUM_STEPS)
    sizes = jax.vmap(sizes_in)(opt_state)
    assert len(np.unique(sizes)) > 1
    assert sizes.max() <= MINIBATCH
    for key, own_sizes, own_losses in zip(keys, sizes, losses, strict=True):
        np.testing.assert_allclose(own_losses, replay(monkeypatch, key, own_sizes, 2), rtol=1e-3)
