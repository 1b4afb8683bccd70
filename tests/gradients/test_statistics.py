"""Masked gradients and what their spread within a batch says about gradient noise."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arbiter_jax as aj
from arbiter_jax.batching import batch_mask
from arbiter_jax.gradients import masked_value_and_grad, per_example_grads, value_grad_and_stats
from arbiter_jax.gradients._estimators import stats_from_pieces

gradient_stats = jax.jit(
    aj.gradient_stats, static_argnames=("loss_fn", "method", "num_pieces", "micro_batch_size")
)

GRADIENT_FNS = {
    "plain": masked_value_and_grad,
    "2 pieces": value_grad_and_stats,
    "4 pieces": lambda loss_fn: value_grad_and_stats(loss_fn, num_pieces=4),
    "per_example": lambda loss_fn: value_grad_and_stats(
        loss_fn, method="per_example", micro_batch_size=2
    ),
}


@functools.cache
def gradient_fn_of(name, loss_fn):
    return jax.jit(GRADIENT_FNS[name](loss_fn))


def loss_fn(params, batch):
    inputs, labels = batch
    hidden = jnp.sqrt(jnp.abs(inputs @ params["w"]))  # an infinite slope at 0, and NaN spreads
    return (hidden @ params["v"] - labels) ** 2


def problem(num_rows=8, seed=0):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(3, 4)), "v": rng.normal(size=4)}
    batch = (rng.normal(size=(num_rows, 3)), rng.normal(size=num_rows))
    return jax.tree.map(lambda x: x.astype(np.float32), (params, batch))


def fill_padding(batch, batch_size, garbage):
    def fill(x):
        x = x.copy()
        x[batch_size:] = garbage
        return x

    return jax.tree.map(fill, batch)


def gaussian_loss(params, x):
    """The gradient of example i is params - x_i: mean -mu and covariance that of x."""
    return jnp.sum((params[None, :] - x) ** 2, axis=1) / 2


def sample_statistics(grads):
    """GradStats by the textbook, from per-example gradients [B, d] in float64."""
    grads = np.asarray(grads, np.float64)
    mean, n = grads.mean(axis=0), len(grads)
    trace = np.sum((grads - mean) ** 2) / (n - 1)
    inner = grads @ mean
    first, second = grads[: n // 2].sum(axis=0), grads[n // 2 :].sum(axis=0)
    c4 = math.sqrt(2 / (n - 1)) * math.gamma(n / 2) / math.gamma((n - 1) / 2)
    return aj.GradStats(
        mean_sq_norm=mean @ mean - trace / n,
        variance_trace=trace,
        batch_size=float(n),
        batch_sq_norm=mean @ mean,
        half_cosine=first @ second / np.linalg.norm(first) / np.linalg.norm(second),
        inner_product_variance=np.sum((inner - inner.mean()) ** 2) / (n - 1),
        abs_deviation=np.sum(grads.std(axis=0, ddof=1)) / c4,
        abs_signal=np.sum(first / (n // 2) * np.sign(second)),
    )


# The gradient itself


@pytest.mark.parametrize("name", GRADIENT_FNS)
@pytest.mark.parametrize("batch_size", [1, 5, 8])
def test_value_and_gradient_of_the_real_examples(name, batch_size):
    params, batch = problem()
    out = gradient_fn_of(name, loss_fn)(params, batch, batch_mask(batch_size, 8))
    real = jax.tree.map(lambda x: x[:batch_size], batch)
    value_and_grad = jax.jit(jax.value_and_grad(lambda p, rows: jnp.mean(loss_fn(p, rows))))
    chex.assert_trees_all_close(
        (out.value, out.grads), value_and_grad(params, real), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", GRADIENT_FNS)
def test_guarantee_1_padding_contributes_exactly_zero(name):
    # Size 1 leaves pieces empty, 5 makes them unequal.
    params, batch = problem()
    gradient_fn = jax.jit(GRADIENT_FNS[name](loss_fn))
    for batch_size in (1, 3, 5):
        mask = batch_mask(batch_size, 8)
        expected = gradient_fn(params, batch, mask)
        assert np.isfinite(expected.value)
        chex.assert_tree_all_finite(expected.grads)
        for garbage in (np.nan, np.inf, -np.inf, 0.0, 1e30):
            out = gradient_fn(params, fill_padding(batch, batch_size, garbage), mask)
            chex.assert_trees_all_equal(out, expected)  # NaN equals NaN


def batch_norm_loss(params, batch, model_state, mask, key):
    """A loss with running statistics, as a BatchNorm layer keeps them: 0 / 0 for no example."""
    del key
    mean = jnp.sum(jnp.where(mask, batch, 0)) / jnp.sum(mask)
    losses = (params * (batch - mean) - 1) ** 2
    return losses, {"mean": 0.9 * model_state["mean"] + 0.1 * mean}


@pytest.mark.parametrize("name", ["plain", "2 pieces", "4 pieces"])
def test_guarantee_1_holds_for_model_state(name):
    batch = np.arange(8, dtype=np.float32)
    gradient_fn = jax.jit(GRADIENT_FNS[name](batch_norm_loss))
    state = {"mean": np.float32(5.0)}
    for batch_size in (1, 3):
        mask = batch_mask(batch_size, 8)
        expected = gradient_fn(np.float32(2.0), batch, mask, state)
        chex.assert_tree_all_finite((expected.value, expected.grads, expected.model_state))
        assert float(expected.model_state["mean"]) != 5.0
        for garbage in (np.nan, np.inf, 1e30):
            out = gradient_fn(
                np.float32(2.0), fill_padding(batch, batch_size, garbage), mask, state
            )
            chex.assert_trees_all_equal(out, expected)


def test_model_state_goes_through_every_piece():
    state = {"mean": np.float32(0.0)}
    batch = np.array([10.0, 20.0, 10.0, 20.0], np.float32)
    out = gradient_fn_of("2 pieces", batch_norm_loss)(np.float32(1), batch, np.ones(4, bool), state)
    # Rows are dealt out in turn: a piece of tens, then one of twenties.
    np.testing.assert_allclose(out.model_state["mean"], 0.9 * 1.0 + 0.1 * 20.0, rtol=1e-6)


def test_every_piece_gets_a_key_of_its_own():
    def noisy_loss(params, batch, model_state, mask, key):
        return params * jax.random.normal(key, batch.shape), model_state

    gradient_fn = jax.jit(value_grad_and_stats(noisy_loss))
    key = jax.random.PRNGKey(0)
    out = gradient_fn(1.0, np.ones(4, np.float32), np.ones(4, bool), np.zeros(1), key)
    assert float(out.gradient_noise) != 0.0


def test_counting_is_exact_for_a_loss_in_bfloat16():
    # 301 is no bfloat16: a mean that divides by 300 or 302 is off by a third of a percent.
    losses = lambda params, x: params.astype(jnp.bfloat16) * x
    x, mask = np.ones(512, jnp.bfloat16), batch_mask(301, 512)
    out = jax.jit(value_grad_and_stats(losses))(np.float32(1), x, mask)
    assert out.value.dtype == jnp.float32
    assert float(out.value) == 1.0
    assert float(out.grad_stats.batch_size) == 301.0


@pytest.mark.parametrize("name", GRADIENT_FNS)
def test_gradients_have_the_type_of_the_parameters(name):
    params, batch = jax.tree.map(lambda x: x.astype(jnp.bfloat16), problem())
    out = gradient_fn_of(name, loss_fn)(params, batch, batch_mask(5, 8))
    chex.assert_trees_all_equal_dtypes(out.grads, params)
    chex.assert_trees_all_equal_shapes(out.grads, params)
    if out.grad_stats is not None:
        assert {x.dtype for x in out.grad_stats} == {jnp.dtype("float32")}


def test_a_mean_instead_of_losses_is_refused():
    with pytest.raises(ValueError, match=r"must return one loss per example, shape \(4,\)"):
        masked_value_and_grad(lambda w, x: jnp.mean(w * x))(1.0, np.ones(4), np.ones(4, bool))


# The statistics in closed form


@pytest.mark.parametrize("num_examples", [2, 5, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 4, 32])
def test_per_example_statistics_are_the_samples(num_examples, micro_batch_size):
    x = np.random.default_rng(1).normal(1.0, 2.0, size=(8, 3)).astype(np.float32)
    fn = value_grad_and_stats(
        gaussian_loss, method="per_example", micro_batch_size=micro_batch_size
    )
    stats = jax.jit(fn)(np.zeros(3, np.float32), x, batch_mask(num_examples, 8)).grad_stats
    chex.assert_trees_all_close(stats, sample_statistics(-x[:num_examples]), rtol=1e-4, atol=1e-5)


def test_pieces_of_one_example_are_the_sample():
    x = np.random.default_rng(2).normal(1.0, 2.0, size=(8, 3)).astype(np.float32)
    fn = jax.jit(value_grad_and_stats(gaussian_loss, num_pieces=8))
    for num_examples in (2, 5, 8):
        stats = fn(np.zeros(3, np.float32), x, batch_mask(num_examples, 8)).grad_stats
        expected = sample_statistics(-x[:num_examples])
        if num_examples < 8:  # halves of the bucket and not of the examples
            halves = {"half_cosine": stats.half_cosine, "abs_signal": stats.abs_signal}
            expected = expected._replace(**halves)
        chex.assert_trees_all_close(stats, expected, rtol=1e-4, atol=1e-5)


def test_two_pieces_give_mccandlishs_formulas():
    # Eq. A.2 of arXiv:1812.06162, with B_big the whole batch and B_small one half.
    x = np.random.default_rng(3).normal(1.0, 2.0, size=(8, 3))
    with jax.enable_x64(True):
        stats = gradient_stats(gaussian_loss, jnp.zeros(3), jnp.asarray(x))
    big = np.sum(x.mean(axis=0) ** 2)
    small = (np.sum(x[::2].mean(axis=0) ** 2) + np.sum(x[1::2].mean(axis=0) ** 2)) / 2
    np.testing.assert_allclose(stats.mean_sq_norm, (8 * big - 4 * small) / (8 - 4), rtol=1e-12)
    np.testing.assert_allclose(stats.variance_trace, (small - big) / (1 / 4 - 1 / 8), rtol=1e-12)
    np.testing.assert_allclose(stats.batch_sq_norm, big, rtol=1e-12)


def test_stats_from_pieces_by_hand():
    # Pieces of 3 and 1 examples with gradients (1, 0) and (0, 2): gbar = (3/4, 1/2).
    pieces = [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}]
    stats = stats_from_pieces(pieces, jnp.array([3.0, 1.0]))
    square = 9 / 16 + 1 / 4
    trace = 3 * 1 + 1 * 4 - 4 * square
    np.testing.assert_allclose(stats.batch_sq_norm, square, rtol=1e-6)
    np.testing.assert_allclose(stats.variance_trace, trace, rtol=1e-6)
    np.testing.assert_allclose(stats.mean_sq_norm, square - trace / 4, rtol=1e-6)
    # Inner products with gbar: 3/4 and 1.
    spread = 3 * (3 / 4) ** 2 + 1 - 4 * square**2
    np.testing.assert_allclose(stats.inner_product_variance, spread, rtol=1e-5)
    assert float(stats.half_cosine) == 0.0
    assert float(stats.batch_size) == 4.0


def test_a_preconditioner_multiplies_every_gradient():
    x = np.random.default_rng(4).normal(1.0, 2.0, size=(8, 3)).astype(np.float32)
    scale = np.array([0.5, 2.0, 3.0], np.float32)
    expected = sample_statistics(-x * scale)
    for options in ({"method": "per_example", "micro_batch_size": 4}, {"num_pieces": 8}):
        stats = gradient_stats(gaussian_loss, np.zeros(3), x, preconditioner=scale, **options)
        chex.assert_trees_all_close(stats, expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["2 pieces", "4 pieces", "per_example"])
def test_statistics_of_one_example_are_nan(name):
    assert "NaN for a batch of one example" in aj.gradient_stats.__doc__
    params, batch = problem()
    for num_rows in (1, 8):  # a bucket of one, and one real row of eight
        rows = jax.tree.map(lambda x, n=num_rows: x[:n], batch)
        out = gradient_fn_of(name, loss_fn)(params, rows, batch_mask(1, num_rows))
        chex.assert_tree_all_finite((out.value, out.grads))
        stats = out.grad_stats
        assert np.isnan(stats.mean_sq_norm)
        assert np.isnan(stats.variance_trace)
        assert np.isnan(stats.half_cosine)
        assert np.isnan(stats.inner_product_variance)
        assert float(stats.batch_size) == 1.0
        assert float(stats.batch_sq_norm) > 0
        if name == "2 pieces":
            assert all(np.isnan(x).all() for x in jax.tree.leaves(out.gradient_noise))


def test_identical_examples_have_no_noise():
    x = np.full((8, 3), 0.1, np.float32)
    for options in ({"method": "per_example"}, {"num_pieces": 4}):
        stats = gradient_stats(gaussian_loss, np.zeros(3, np.float32), x, **options)
        assert 0 <= float(stats.variance_trace) < 1e-6
        assert 0 <= float(stats.inner_product_variance) < 1e-6
        np.testing.assert_allclose(stats.half_cosine, 1.0, rtol=1e-5)


def test_per_example_grads_are_single_gradients():
    params, batch = problem()
    grads = jax.jit(per_example_grads(loss_fn))(params, batch)
    single = jax.jit(jax.grad(lambda p, row: loss_fn(p, row)[0]))
    for i in (0, 7):
        expected = single(params, jax.tree.map(lambda x, i=i: x[i : i + 1], batch))
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], grads), expected, rtol=1e-5, atol=1e-6
        )


# A weighted loss


def token_loss(params, batch):
    """Losses per token; the padding tokens of a row have weight 0."""
    tokens, weights = batch
    return aj.WeightedLoss((params[0] * tokens + params[1] - 1) ** 2, weights)


def tokens():
    rng = np.random.default_rng(5)
    weights = (np.arange(6)[None, :] < rng.integers(1, 7, size=8)[:, None]).astype(np.float32)
    return rng.normal(size=(8, 6)).astype(np.float32), weights


@pytest.mark.parametrize("name", GRADIENT_FNS)
@pytest.mark.parametrize("batch_size", [1, 5, 8])
def test_weighted_loss_averages_over_real_tokens(name, batch_size):
    params, (x, weights) = np.array([0.5, 0.1], np.float32), tokens()

    def mean_loss(params):
        losses = token_loss(params, (x, weights)).losses
        real = weights * (np.arange(8) < batch_size)[:, None]
        return jnp.sum(losses * real) / np.sum(real)

    garbage = np.where(weights > 0, x, np.inf)  # in the padding tokens
    garbage[batch_size:] = np.nan  # in the padding rows
    mask = batch_mask(batch_size, 8)
    gradient_fn = jax.jit(GRADIENT_FNS[name](token_loss))
    expected = jax.jit(jax.value_and_grad(mean_loss))(params)
    out = gradient_fn(params, (x, weights), mask)
    chex.assert_trees_all_close((out.value, out.grads), expected, rtol=1e-5)
    assert float(gradient_fn(params, (garbage, weights), mask).value) == float(out.value)


@pytest.mark.slow
def test_weighted_examples_are_pieces_of_their_weight():
    # One definition of the statistics, whichever way they are computed.
    params, batch = np.array([0.5, 0.1], np.float32), tokens()
    pieces_fn = jax.jit(value_grad_and_stats(token_loss, num_pieces=8))
    for batch_size in (2, 5, 8):
        mask = batch_mask(batch_size, 8)
        exact = gradient_fn_of("per_example", token_loss)(params, batch, mask).grad_stats
        pieces = pieces_fn(params, batch, mask).grad_stats
        if batch_size < 8:
            halves = {"half_cosine": exact.half_cosine, "abs_signal": exact.abs_signal}
            pieces = pieces._replace(**halves)
        chex.assert_trees_all_close(exact, pieces, rtol=1e-4)
        np.testing.assert_allclose(exact.batch_size, batch_size, rtol=1e-6)


# Unbiased on a Gaussian problem, whose |G|^2 and tr S are known


MU = np.array([0.5, -1.0, 0.25, 0.0])
SIGMA = np.array([1.0, 0.5, 2.0, 0.1])
NUM_REPEATS = 4000


@functools.cache
def repeated(name):
    """The statistics of many batches of up to 16 examples of the Gaussian problem."""
    fn = GRADIENT_FNS[name](gaussian_loss)
    x = np.random.default_rng(6).normal(MU, SIGMA, size=(NUM_REPEATS, 16, 4)).astype(np.float32)
    one = lambda batch, mask: fn(np.zeros(4, np.float32), batch, mask)
    vmapped = jax.jit(jax.vmap(one, in_axes=(0, None)))
    return lambda batch_size: vmapped(x, batch_mask(batch_size, 16))


@pytest.mark.parametrize("batch_size", [16, 11, 3])
@pytest.mark.parametrize("name", ["2 pieces", "4 pieces", "per_example"])
def test_the_estimators_are_unbiased(name, batch_size):
    stats = repeated(name)(batch_size).grad_stats
    truth = {"mean_sq_norm": np.sum(MU**2), "variance_trace": np.sum(SIGMA**2)}
    for field, expected in truth.items():
        values = np.asarray(getattr(stats, field), np.float64)
        error = values.std() / math.sqrt(NUM_REPEATS)
        assert abs(values.mean() - expected) < 4 * error, (field, values.mean(), expected)
        # A bound that a wrong estimator does not pass: the biased |gbar|^2 is far outside.
        assert 4 * error < 0.2 * expected
    biased = np.mean(stats.batch_sq_norm) - truth["mean_sq_norm"]
    assert biased > 0.5 * truth["variance_trace"] / batch_size


@pytest.mark.parametrize("batch_size", [16, 11, 3])
def test_gradient_noise_has_the_gradients_covariance(batch_size):
    # Cov = S / B, also for unequal halves.
    noise = repeated("2 pieces")(batch_size).gradient_noise
    # The relative error of a sample variance is sqrt(2 / n) = 2.2%.
    np.testing.assert_allclose(np.var(noise, axis=0), SIGMA**2 / batch_size, rtol=0.1)
    np.testing.assert_allclose(np.mean(noise, axis=0), np.zeros(4), atol=0.1)


# Bad arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "half"},
            r"method must be one of .*'normalization', got 'half'",
        ),
        ({"num_pieces": 1}, r"num_pieces must be a power of two >= 2, got 1"),
        ({"num_pieces": 3}, r"num_pieces must be a power of two >= 1, got 3"),
        ({"num_pieces": 2.0}, r"num_pieces must be a power of two >= 1, got 2.0"),
        ({"micro_batch_size": 0}, r"micro_batch_size must be a power of two >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        value_grad_and_stats(loss_fn, **options)
    with pytest.raises(ValueError, match=message):
        aj.gradient_stats(gaussian_loss, jnp.zeros(3), jnp.zeros((4, 3)), **options)


def test_per_example_refuses_a_model_with_state():
    fn = value_grad_and_stats(batch_norm_loss, method="per_example")
    with pytest.raises(ValueError, match=r"method must be 'pieces' for a model with state"):
        fn(1.0, np.ones(4), np.ones(4, bool), {"mean": 0.0})


@pytest.mark.slow
def test_per_example_refuses_rows_that_fill_no_group():
    stats = functools.partial(aj.gradient_stats, gaussian_loss, jnp.zeros(3), method="per_example")
    x = np.random.default_rng(0).normal(size=(43, 3)).astype(np.float32)
    message = (
        r"^micro_batch_size must divide the 43 rows of batch or be at least 43 where method is "
        r"'per_example', got 32: pad the batch to 64 rows and mark the real ones in mask\.$"
    )
    with pytest.raises(ValueError, match=message):
        stats(x)
    padded = stats(np.pad(x, ((0, 21), (0, 0))), np.arange(64) < 43)  # as it says
    chex.assert_trees_all_close(padded, stats(x, micro_batch_size=64), rtol=1e-5)


# One piece a device


@pytest.mark.parametrize("num_examples", [16, 13, 3, 1])
def test_a_piece_a_device_is_what_as_many_pieces_are(num_examples):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    x[num_examples:] = np.nan  # of the last devices, all rows may be padding
    params, mask = np.zeros(3, np.float32), batch_mask(num_examples, 16)
    loss_fn = lambda w, x: jnp.sum((w[None] - x) ** 4, axis=1)
    scale = np.array([1.0, 2.0, 0.5], np.float32)

    fn = value_grad_and_stats(loss_fn, method="per_device", axis_name="data")
    rows, all_of_it = jax.P("data"), jax.P()
    on_devices = jax.jit(
        jax.shard_map(
            lambda w, x, mask: fn(w, x, mask, preconditioner=scale),
            mesh=mesh,
            in_specs=(all_of_it, rows, rows),
            out_specs=all_of_it,
        )
    )
    got = on_devices(params, x, mask)

    grads = masked_value_and_grad(loss_fn)(params, x, mask)
    chex.assert_trees_all_close((got.value, got.grads), (grads.value, grads.grads), rtol=1e-5)
    shares = [(x[i : i + 4], mask[i : i + 4]) for i in range(0, 16, 4)]
    pieces = [masked_value_and_grad(loss_fn)(params, *share).grads for share in shares]
    sizes = jnp.array([share[1].sum() for share in shares])
    pieces = [jnp.where(size > 0, piece, 0) for piece, size in zip(pieces, sizes, strict=True)]
    expected = stats_from_pieces(pieces, sizes.astype(float), scale)
    chex.assert_trees_all_close(got.grad_stats, expected, rtol=1e-4)


def test_the_name_of_an_axis_goes_with_the_devices():
    for options in ({"method": "per_device"}, {"axis_name": "data"}):
        with pytest.raises(ValueError, match="axis_name must be given where method is"):
            value_grad_and_stats(lambda w, x: x, **options)


@pytest.mark.slow
@pytest.mark.parametrize("num_pieces", [2, 8])
def test_noise_and_signal_in_the_l1_norm(num_pieces):
    """Of gradients of mean m and standard deviation s, in every coordinate."""
    dim, rows, mean, deviation = 50, 32, 0.3, 0.7
    loss_fn = lambda w, x: x @ w

    def stats(key):
        batch = mean + deviation * jax.random.normal(key, (rows, dim))
        return aj.gradient_stats(loss_fn, jnp.zeros(dim), batch, num_pieces=num_pieces)

    found = jax.jit(jax.vmap(stats))(jax.random.split(jax.random.key(0), 2_000))
    np.testing.assert_allclose(np.mean(found.abs_deviation), dim * deviation, rtol=0.01)
    # Less than |G|_1 by how often noise turns the sign of a half.
    share = math.erf(mean / (deviation / math.sqrt(rows / 2)) / math.sqrt(2))
    np.testing.assert_allclose(np.mean(found.abs_signal), dim * mean * share, rtol=0.02)


@pytest.mark.slow
def test_pure_noise_has_no_signal_in_the_l1_norm():
    """The noise scale in the l1 norm does not follow the size of the batch that measures it."""
    loss_fn = lambda w, x: x @ w
    for rows in (8, 128):
        stats = jax.vmap(
            lambda key, rows=rows: aj.gradient_stats(
                loss_fn, jnp.zeros(50), jax.random.normal(key, (rows, 50))
            )
        )(jax.random.split(jax.random.key(1), 500))
        scale = np.mean(stats.abs_deviation**2) / np.mean(np.maximum(stats.abs_signal, 0) ** 2)
        assert scale > 20 * rows
