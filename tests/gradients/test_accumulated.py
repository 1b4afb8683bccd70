"""The gradient in groups: that of the whole batch, whose groups are the pieces of its statistics."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arbiter_jax as aj
from arbiter_jax.gradients import masked_value_and_grad, value_grad_and_stats
from arbiter_jax.gradients._accumulation import (
    Groups,
    accumulated_gradient,
    accumulated_value_and_grad,
)
from arbiter_jax.gradients._estimators import stats_from_pieces

ROWS = 4
X = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
PARAMS = {"w": jnp.array([0.3, -0.2, 0.5]), "b": jnp.array(0.1)}


def loss_fn(params, x):
    return (x @ params["w"] + params["b"] - jnp.sum(x**2, axis=1)) ** 2


def weighted_loss(params, x):
    return aj.WeightedLoss(loss_fn(params, x), jnp.abs(x[:, 0]))


def in_groups(sizes):
    """Groups of given sizes of consecutive examples, padded with NaN-free garbage."""
    sizes = jnp.asarray(sizes, jnp.int32)
    starts = jnp.cumsum(sizes) - sizes

    def take(j, key):
        del key
        rows = jnp.arange(ROWS)
        return jnp.asarray(X)[(starts[j] + rows) % len(X)], rows < sizes[j]

    return Groups(take, sizes.shape[0])


@functools.partial(jax.jit, static_argnames=("make",))
def gradient(make, sizes, num_groups):
    groups = in_groups(sizes)._replace(num_groups=num_groups)
    return make()(PARAMS, groups, jnp.sum(jnp.where(jnp.arange(len(sizes)) < num_groups, sizes, 0)))


def plain():
    return accumulated_value_and_grad(loss_fn)


def weighted():
    return accumulated_value_and_grad(weighted_loss, statistics=True)


def measured():
    return accumulated_value_and_grad(loss_fn, statistics=True)


def pieces_of(loss, sizes):
    """Mean gradient and total weight of each group, by itself."""
    starts, fn = np.cumsum(sizes) - sizes, masked_value_and_grad(loss)
    rows = [X[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    grads = [fn(PARAMS, x, jnp.ones(len(x), bool)).grads for x in rows]
    weights = [float(np.abs(x[:, 0]).sum()) if loss is weighted_loss else len(x) for x in rows]
    return grads, jnp.array(weights)


@pytest.mark.parametrize("num_groups", [1, 2, 6])
def test_any_number_of_groups_in_one_program(num_groups):
    sizes = np.array([4, 4, 3, 3, 3, 3])
    before = gradient._cache_size()
    out = gradient(plain, sizes, num_groups)
    assert gradient._cache_size() - before <= 1
    x = X[: sizes[:num_groups].sum()]
    whole = masked_value_and_grad(loss_fn)(PARAMS, x, jnp.ones(len(x), bool))
    chex.assert_trees_all_close((out.value, out.grads), (whole.value, whole.grads), rtol=1e-5)
    assert out.grad_stats is None
    assert out.gradient_noise is None


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[4, 4], [4, 3, 4, 3, 3], [4, 2, 0, 0]])
@pytest.mark.parametrize(("make", "loss"), [(measured, loss_fn), (weighted, weighted_loss)])
def test_statistics_are_those_of_the_pieces(make, loss, sizes):
    sizes = np.array(sizes)
    out = gradient(make, sizes, len(sizes))
    real = [size for size in sizes if size]
    pieces, weights = pieces_of(loss, real)
    empty = [jax.tree.map(jnp.zeros_like, PARAMS)] * (len(sizes) - len(real))
    weights = jnp.array([*weights, *[0.0] * len(empty)])
    b = weights / weights.sum() * sizes.sum()
    expected = stats_from_pieces([*pieces, *empty], b)
    half = len(sizes) // 2
    assert float(out.grad_stats.batch_size) == pytest.approx(sizes.sum())
    if b[half:].sum() == 0:  # no second half
        assert np.isnan(out.grad_stats.half_cosine)
        assert np.isnan(out.grad_stats.abs_signal)
        assert all(np.isnan(x).all() for x in jax.tree.leaves(out.gradient_noise))
        names = ("mean_sq_norm", "variance_trace", "batch_sq_norm", "abs_deviation")
    else:
        names = set(aj.GradStats._fields) - {"inner_product_variance"}
        mean = lambda part: jax.tree.map(
            lambda *g: sum(w * x for w, x in zip(b[part], g, strict=True)) / b[part].sum(),
            *pieces[part],
        )
        first, second = mean(slice(None, half)), mean(slice(half, None))
        scale = np.sqrt(b[:half].sum() * b[half:].sum()) / b.sum()
        noise = jax.tree.map(lambda x, y: (x - y) * scale, first, second)
        chex.assert_trees_all_close(out.gradient_noise, noise, rtol=1e-4, atol=1e-5)
        # Of the two halves, whatever their number of groups.
        halves = stats_from_pieces([first, second], jnp.array([b[:half].sum(), b[half:].sum()]))
        np.testing.assert_allclose(
            out.grad_stats.inner_product_variance, halves.inner_product_variance, rtol=1e-4
        )
    for name in names:
        np.testing.assert_allclose(
            getattr(out.grad_stats, name), getattr(expected, name), rtol=2e-4, err_msg=name
        )


def test_two_groups_are_two_halves_of_a_batch():
    out = gradient(measured, np.array([4, 4]), 2)
    order = np.arange(8).reshape(2, 4)
    fn = value_grad_and_stats(loss_fn, sampled=True)  # contiguous pieces
    chex.assert_trees_all_close(out, fn(PARAMS, X[order.ravel()], jnp.ones(8, bool)), rtol=1e-4)


def test_equal_groups_have_no_spread():
    def take(j, key):
        del j, key
        return 100 + jnp.asarray(X[:ROWS]), jnp.ones(ROWS, bool)

    fn = jax.jit(lambda n: measured()(PARAMS, Groups(take, n), 4 * n))
    stats = fn(7).grad_stats
    assert float(stats.variance_trace) == 0
    assert float(stats.abs_deviation) == 0
    assert float(stats.inner_product_variance) == 0


def test_one_group_has_no_spread_to_measure():
    out = gradient(measured, np.array([4, 4]), 1)
    assert np.isnan(out.grad_stats.variance_trace)
    assert np.isnan(out.grad_stats.mean_sq_norm)
    assert np.isfinite(out.value)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_sums_are_in_float32(dtype):
    """A sum of 4,096 ones in bfloat16 ends at 256."""
    loss = lambda w, x: w * x
    take = lambda j, key: (jnp.ones(1, dtype) + (j % 2).astype(dtype), jnp.ones(1, bool))
    fn = accumulated_value_and_grad(loss, statistics=True)
    out = jax.jit(lambda n: fn(jnp.ones((), dtype), Groups(take, n), n))(4096)
    assert out.grads.dtype == dtype
    assert float(out.grads) == 1.5
    assert out.gradient_noise.dtype == dtype
    np.testing.assert_allclose(out.grad_stats.variance_trace, 0.25 * 4096 / 4095, rtol=1e-4)


def test_only_moved_leaves_are_measured():
    fn = accumulated_value_and_grad(loss_fn, statistics=True, trainable={"w": True, "b": False})
    out = fn(PARAMS, in_groups([4, 4, 4]), 12)
    pieces, weights = pieces_of(loss_fn, [4, 4, 4])
    expected = stats_from_pieces([piece["w"] for piece in pieces], weights)
    np.testing.assert_allclose(out.grad_stats.variance_trace, expected.variance_trace, rtol=1e-4)
    assert float(out.gradient_noise["b"]) == 0
    assert np.all(np.asarray(out.gradient_noise["w"]) != 0)


@pytest.mark.slow
def test_complex_parameters():
    z = jnp.asarray(X[:, 0] + 1j * X[:, 1])
    loss = lambda w, x: jnp.abs(w - x) ** 2
    take = lambda j, key: (jax.lax.dynamic_slice_in_dim(z, 4 * j, 4), jnp.ones(4, bool))
    out = accumulated_value_and_grad(loss, statistics=True)(jnp.complex64(1j), Groups(take, 6), 24)
    pieces = [jnp.mean(2 * (1j - z[4 * j : 4 * j + 4])) for j in range(6)]
    expected = stats_from_pieces(pieces, jnp.full(6, 4.0))._asdict()
    np.testing.assert_allclose(out.grads, jnp.mean(jnp.stack(pieces)), rtol=1e-5)
    for name in set(expected) - {"inner_product_variance"}:
        np.testing.assert_allclose(getattr(out.grad_stats, name), expected[name], rtol=1e-4)


# Models with state, auxiliary output, other gradient functions


def stateful(params, x, model_state, mask, key):
    """Counts its calls and examples; the statistics of no example are 0 / 0."""
    mean = jnp.sum(jnp.where(mask, x[:, 0], 0)) / jnp.sum(mask)
    noise = jax.random.normal(key)
    new = {"calls": model_state["calls"] + 1, "mean": mean, "draws": model_state["draws"] + noise}
    return loss_fn(params, x) * (1 + 0 * mean), new


@pytest.mark.slow
def test_the_state_of_a_model_goes_through_all_groups(key):
    state = {"calls": jnp.int32(0), "mean": jnp.zeros(()), "draws": jnp.zeros(())}
    fn = accumulated_value_and_grad(stateful, statistics=True)
    out = jax.jit(lambda: fn(PARAMS, in_groups([4, 3, 4, 0]), 11, state, key))()
    assert int(out.model_state["calls"]) == 3  # an empty group changes nothing
    np.testing.assert_allclose(out.model_state["mean"], X[7:11, 0].mean(), rtol=1e-5)
    draws = sum(float(jax.random.normal(jax.random.fold_in(key, j))) for j in range(3))
    np.testing.assert_allclose(out.model_state["draws"], draws, rtol=1e-5)
    whole = masked_value_and_grad(loss_fn)(PARAMS, X[:11], jnp.ones(11, bool))
    chex.assert_trees_all_close(out.grads, whole.grads, rtol=1e-5)
    assert np.isfinite(out.grad_stats.variance_trace)


def test_auxiliary_output_is_averaged():
    def loss(params, x):
        losses = loss_fn(params, x)
        return losses, {"mean": jnp.mean(x), "rows": jnp.int32(x.shape[0]), "last": x[0, 0] > 0}

    fn = accumulated_value_and_grad(loss, has_aux=True)
    aux = fn(PARAMS, in_groups([4, 4, 4]), 12).aux
    np.testing.assert_allclose(aux["mean"], X[:12].mean(), rtol=1e-5)
    assert int(aux["rows"]) == 4
    assert bool(aux["last"]) == (X[8, 0] > 0)
    wrong = accumulated_value_and_grad(lambda p, x: (loss_fn(p, x), x[:, 0]), has_aux=True)
    with pytest.raises(ValueError, match=r"^aux, which loss_fn returns, must have the same shapes"):
        wrong(PARAMS, in_groups([4, 4, 4]), 12)


@pytest.mark.slow
def test_another_gradient_is_averaged_by_examples():
    subset = jax.jit(aj.subset_gradients(loss_fn, min_size=8))  # the whole group
    sizes = jnp.array([4, 3, 3])
    out = jax.jit(lambda sizes: accumulated_gradient(subset)(PARAMS, in_groups(sizes), 10))(sizes)
    whole = masked_value_and_grad(loss_fn)(PARAMS, X[:10], jnp.ones(10, bool))
    chex.assert_trees_all_close((out.value, out.grads), (whole.value, whole.grads), rtol=1e-5)
    np.testing.assert_allclose(out.selected_fraction, 1)
    each = [subset(PARAMS, x).grad_stats for x in (X[:4], X[4:7], X[7:10])]
    trace = np.average([float(s.variance_trace) for s in each], weights=[4, 3, 3])
    stats = out.grad_stats
    np.testing.assert_allclose(stats.variance_trace, trace, rtol=1e-5)
    assert float(stats.batch_size) == 10
    np.testing.assert_allclose(stats.batch_sq_norm - trace / 10, stats.mean_sq_norm, rtol=1e-4)
