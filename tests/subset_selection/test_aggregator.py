"""Dynamic Batch Adaptation as an optax aggregator."""

import ast
import functools
import pathlib
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.experimental import aggregating

import arbiter_jax
from arbiter_jax import subset_selection as ss
from tests.subset_selection.problems import select_all

NUM_ROWS = 12


def tree_of_grads(seed=0):
    shapes = {"hidden": {"bias": (3,), "kernel": (4, 3)}, "head": {"bias": (2,), "kernel": (3, 2)}}
    rng = np.random.default_rng(seed)
    grads = jax.tree.map(
        lambda s: np.asarray(0.3 + rng.normal(size=(NUM_ROWS, *s)), np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return grads, jax.tree.map(lambda g: jnp.zeros(g.shape[1:]), grads)


@functools.cache
def jitted_update(*args, **kwargs):
    return jax.jit(ss.dynamic_batch_adaptation(*args, **kwargs).update)


def update(grads, mask=None, state=None, **settings):
    """Updates and state of one call; one program per setting."""
    if state is None:
        params = jax.tree.map(lambda g: g[0], grads)
        state = ss.dynamic_batch_adaptation(**settings).init(params)
    mask = np.ones(NUM_ROWS, bool) if mask is None else mask
    return jitted_update(**settings)(grads, state, mask=mask)


@pytest.mark.parametrize(
    ("groups", "metric"), [("leaf", "norm"), ("module", "signal_to_noise"), ("model", "variance")]
)
def test_each_group_takes_the_mean_over_its_subset(groups, metric):
    grads, params = tree_of_grads()
    updates, state = update(grads, metric=metric, min_size=2, groups=groups)
    names = ss.group_names(params, groups)
    assert len(names) == {"leaf": 4, "module": 2, "model": 1}[groups]

    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
    }
    got = jax.tree_util.tree_leaves(updates)
    for i, name in enumerate(names):
        members = [path for path in flat if groups == "model" or path.startswith(name)]
        rows = np.concatenate([flat[m].reshape(NUM_ROWS, -1) for m in members], axis=1)
        rows = np.pad(rows, ((0, 0), (0, 23 - rows.shape[1])))  # one shape, one program
        selected, num_selected = select_all(rows, min_size=2)[metric]
        assert int(state.num_selected[i]) == int(num_selected)
        assert float(state.selected_fraction[i]) == pytest.approx(int(num_selected) / NUM_ROWS)
        for member in members:
            expected = flat[member][np.flatnonzero(selected)].mean(axis=0)
            np.testing.assert_allclose(
                got[list(flat).index(member)], expected, rtol=1e-5, atol=1e-6
            )


def test_min_size_n_is_the_plain_mean():
    """Guarantee: with min_size at least n, the update is the plain mean."""
    grads, _ = tree_of_grads()
    updates, _ = update(grads, min_size=NUM_ROWS)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda g: g.mean(axis=0), grads), rtol=1e-5)


def test_non_finite_rows_are_left_out_and_counted():
    """In every group, if they are not finite in one."""
    grads, _ = tree_of_grads()
    grads["head"]["bias"][3], grads["head"]["bias"][0] = np.nan, np.inf
    mask = np.arange(NUM_ROWS) > 0
    state = None
    for calls in (1, 2):
        updates, state = update(grads, mask, state, min_size=NUM_ROWS)
        assert int(state.num_skipped) == calls  # row 0 is masked
    keep = np.array([i for i in range(NUM_ROWS) if i not in (0, 3)])
    expected = jax.tree.map(lambda g: g[keep].mean(axis=0), grads)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    np.testing.assert_allclose(state.selected_fraction, 10 / 11)


def test_no_row_left_gives_a_zero_update():
    """Guarantee: with no row left, the update is zero."""
    grads, params = tree_of_grads()
    bad = jax.tree.map(lambda g: g * np.nan, grads)
    for rows, mask in [(grads, np.zeros(NUM_ROWS, bool)), (bad, None)]:
        updates, state = update(rows, mask, min_size=NUM_ROWS)
        chex.assert_trees_all_equal(updates, params)
        assert not state.selected_fraction.any()


@pytest.mark.slow
def test_goes_through_process():
    """Behind a transformation of the rows, in front of an optimizer; the mask reaches it."""
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1))
    clip_rows = optax.stateless(lambda g, _: jax.tree.map(lambda x: jnp.clip(x, -2, 2), g))
    tx = aggregating.process(
        optax.with_extra_args_support(clip_rows), ss.dynamic_batch_adaptation("variance"), optimizer
    )
    mask = np.arange(NUM_ROWS) < 9

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, mask=mask)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def plain_step(params, state, mean):
        updates, state = optimizer.update(mean, state, params)
        return optax.apply_updates(params, updates), state

    _, params = tree_of_grads()
    state = tx.init(params)
    types = jax.tree.map(jax.typeof, state)
    plain, plain_state = params, optimizer.init(params)
    for seed in range(3):
        grads, _ = tree_of_grads(seed=seed)
        params, state = step(params, state, grads)
        assert jax.tree.map(jax.typeof, state) == types
        clipped = jax.tree.map(lambda x: np.clip(x, -2, 2), grads)
        mean, _ = update(clipped, mask, metric="variance")
        plain, plain_state = plain_step(plain, plain_state, mean)
    assert step._cache_size() == 1
    chex.assert_trees_all_close(params, plain, rtol=1e-4)


# The experimental part of optax


def imports_when_loaded(tree):
    """Every import that does not wait for a call of a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not isinstance(node, ast.FunctionDef):
            yield from imports_when_loaded(node)


def test_only_the_factory_imports_experimental_optax():
    root = pathlib.Path(arbiter_jax.__file__).parent
    users = []
    for path in root.rglob("*.py"):
        source = path.read_text()
        assert not any("optax.exp" in name for name in imports_when_loaded(ast.parse(source))), path
        if "from optax.experimental" in source.replace(">>> from", ""):
            users.append(path.name)
    assert users == ["_aggregator.py"]


def test_an_optax_without_aggregators_is_one_sentence(monkeypatch):
    monkeypatch.delattr(optax, "experimental")
    monkeypatch.setitem(sys.modules, "optax.experimental", None)
    with pytest.raises(ImportError, match=r"^dynamic_batch_adaptation needs optax\.experimental"):
        ss.dynamic_batch_adaptation()
