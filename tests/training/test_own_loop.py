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
from tests.rules import ARBITERS, NUM_FEATURES, RULES

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


def test_as_in_fit():
    # All rules at once: what each would have chosen, from signals that they share.
    names = [name for name in CASES if name not in ("constant", "shadow")]
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
@pytest.mark.parametrize("name", [name for name in CASES if name != "shadow"])
def test_every_rule_decides_as_in_fit(name):
    tx = optax.chain(optax.adam(0.02), CASES[name].make(**LIMITS))
    result = through_fit(tx)
    params, _, sizes, _ = by_hand(tx, aj.value_grad_and_signals(loss_fn, tx))
    assert sizes == result.per_step("batch_size").tolist()
    chex.assert_trees_all_close(params, result.state.params, rtol=1e-4)
