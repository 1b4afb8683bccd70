"""Flax's train state, with an optimizer that reads signals."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

import arbiter_jax as aj
from arbiter_jax import models

PARAMS = {"w": jnp.array([1.0, 2.0])}
GRADS = {"w": jnp.array([0.5, -1.0])}


class WithStatistics(models.TrainState):
    batch_stats: Any
    model_state: Any = None


def create(tx, cls: Any = models.TrainState, params=PARAMS, **fields):
    return cls.create(apply_fn=None, params=params, tx=tx, **fields)


def noting(seen):
    """Notes the extra arguments of every update."""

    def update(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.MultiSteps(optax.adam(0.1), 2)])
def test_equals_the_train_state_of_flax(tx):
    mine, theirs = create(tx), create(tx, train_state.TrainState)
    for _ in range(2):
        mine = mine.apply_gradients(grads=GRADS, value=jnp.ones(()))  # which nothing reads
        theirs = theirs.apply_gradients(grads=GRADS)
    chex.assert_trees_all_equal((mine.params, mine.opt_state), (theirs.params, theirs.opt_state))
    assert mine.step == theirs.step == 2
    assert isinstance(mine, models.TrainState)


def test_fields_are_replaced_and_signals_passed_on():
    seen: list[dict[str, Any]] = []
    state = create(noting(seen), WithStatistics, batch_stats=jnp.zeros(3))
    state = state.apply_gradients(
        grads=GRADS, batch_stats=jnp.ones(3), value=2.0, model_state={"mean": 5.0}
    )
    assert seen == [{"value": 2.0, "model_state": {"mean": 5.0}}]
    assert state.batch_stats.tolist() == [1.0] * 3
    assert state.model_state == {"mean": 5.0}
    # Without a field of that name it is a signal alone.
    create(noting(seen)).apply_gradients(grads=GRADS, model_state=7.0, my_signal=1)
    assert seen[1:] == [{"model_state": 7.0, "my_signal": 1}]


def test_a_rule_decides_inside_jit_and_scan():
    rule = aj.schedulers.adadamp(decay=0, initial_batch_size=32)
    state = create(optax.chain(optax.sgd(0.1), rule)).replace(step=jnp.int32(0))
    step = lambda state, loss: (state.apply_gradients(grads=GRADS, value=loss), None)
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, jnp.array([2.0, 1.0])))(state)
    assert int(aj.get_batch_size(state.opt_state)) == 64
    assert int(state.step) == 2


def test_overwritten_with_the_gradient_as_in_flax():
    scale = {"amax": jnp.array([1.0])}
    params = {"params": PARAMS, OVERWRITE_WITH_GRADIENT: scale}
    grads = {"params": GRADS, OVERWRITE_WITH_GRADIENT: {"amax": jnp.array([9.0])}}
    tx = optax.sgd(0.1, momentum=0.9)
    mine = create(tx, params=params).apply_gradients(grads=grads, value=1.0)
    theirs = create(tx, train_state.TrainState, params=params).apply_gradients(grads=grads)
    chex.assert_trees_all_equal((mine.params, mine.opt_state), (theirs.params, theirs.opt_state))
    assert float(mine.params[OVERWRITE_WITH_GRADIENT]["amax"][0]) == 9.0


@pytest.mark.parametrize("field", ["params", "step", "opt_state"])
def test_what_it_computes_cannot_be_given(field):
    with pytest.raises(TypeError, match=rf"takes no '{field}'.*state.replace\({field}="):
        create(optax.sgd(0.1)).apply_gradients(grads=GRADS, **{field: PARAMS})
