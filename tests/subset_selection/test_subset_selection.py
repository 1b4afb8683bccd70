"""Dynamic Batch Adaptation: the selection, the aggregator, and the gradients without examples."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from optax.experimental import aggregating

from arbiter_jax import base, models, schedulers
from arbiter_jax import subset_selection as ss
from arbiter_jax.gradients import masked_value_and_grad, value_grad_and_stats
from arbiter_jax.models import conv_general_dilated
from arbiter_jax.subset_selection import _sites
from arbiter_jax.training import _window as inner_loop

# These programs are compiled once and run once: the compiler's effort is what a test takes.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

METRICS = ("signal_to_noise", "variance", "norm")
ORDERS = ("distance", "norm", "alignment")
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@functools.partial(jit, static_argnames="min_size")
def select_all(grads, mask=None, min_size=1):
    """By metric; one program for all of them."""
    return {metric: ss.select_subset(grads, metric, min_size, mask) for metric in METRICS}


@jit
def all_scores(gram):
    valid = jnp.ones(len(gram), bool)
    return {(m, o): ss.prefix_scores(gram, valid, m, o) for m in METRICS for o in ORDERS}


def direct_score(grads, metric):
    """The metric of one subset, from its definition."""
    k = len(grads)
    mean = grads.mean(axis=0)
    if metric == "norm":
        return mean @ mean
    if k == 1:
        return -np.inf
    variance = np.trace(np.atleast_2d(np.cov(grads, rowvar=False)))
    return -variance / k if metric == "variance" else mean @ mean / (variance / k)


def direct_order(grads, order):
    mean = grads.mean(axis=0)
    key = {
        "distance": ((grads - mean) ** 2).sum(axis=1),
        "norm": (grads**2).sum(axis=1),
        "alignment": -grads @ mean,
    }[order]
    return np.argsort(key, kind="stable")


def gaussian_rows(n, d, seed=0, signal=0.5):
    return signal + np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


# --- the prefix rule


@pytest.mark.parametrize("d", [4, 30])
def test_every_prefix_has_the_metric_of_its_definition(d):
    n = 8
    grads = gaussian_rows(n, d)
    for (metric, order), scores in all_scores(jnp.array(grads @ grads.T)).items():
        ranking = direct_order(grads, order)
        np.testing.assert_array_equal(np.argsort(scores.size), ranking)
        expected = [direct_score(grads[ranking[:k]], metric) for k in range(1, n + 1)]
        np.testing.assert_allclose(scores.score[ranking], expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("min_size", [1, 4])
def test_brute_force_over_all_subsets(min_size):
    """Guarantee: the subset has the best score of all prefixes that have min_size examples."""
    n = 8
    for seed in range(3):
        grads = gaussian_rows(n, 5, seed)
        ranking = direct_order(grads, "distance")
        prefixes = [tuple(np.sort(ranking[:k])) for k in range(min_size, n + 1)]
        subsets = [np.flatnonzero([code >> i & 1 for i in range(n)]) for code in range(1, 2**n)]
        for metric, (selected, num_selected) in select_all(grads, min_size=min_size).items():
            scores = {tuple(rows): direct_score(grads[rows], metric) for rows in subsets}
            chosen = tuple(np.flatnonzero(selected))
            assert len(chosen) == int(num_selected) >= min_size
            assert chosen in prefixes
            assert scores[chosen] == max(scores[prefix] for prefix in prefixes)
            assert scores[chosen] <= max(scores.values())


def test_scale_does_not_matter():
    grads = gaussian_rows(8, 5)
    for scale in (1e-15, 1e15):
        chex.assert_trees_all_equal(select_all(grads * scale), select_all(grads))


def test_outliers_are_left_out():
    grads = 1 + 1e-3 * gaussian_rows(8, 5)
    grads[[2, 5]] = -30.0
    chosen = select_all(grads)
    for metric in ("signal_to_noise", "variance"):
        selected, num_selected = chosen[metric]
        assert int(num_selected) >= 2
        assert not selected[jnp.array([2, 5])].any()


@pytest.mark.parametrize(
    ("grads", "mask", "min_size"),
    [
        (gaussian_rows(8, 5), np.arange(8) < 3, 4),
        (gaussian_rows(8, 5), np.arange(8) == 6, 1),
        (np.tile(gaussian_rows(1, 5), (8, 1)), np.ones(8, bool), 1),
        (np.zeros((8, 5), np.float32), np.ones(8, bool), 1),
        (gaussian_rows(8, 5), np.zeros(8, bool), 1),
    ],
    ids=["fewer than min_size", "one example", "identical", "zero", "no example"],
)
def test_all_examples_are_chosen_where_there_is_no_choice(grads, mask, min_size):
    for selected, num_selected in select_all(grads, mask, min_size=min_size).values():
        np.testing.assert_array_equal(selected, mask)
        assert int(num_selected) == mask.sum()


def test_one_row():
    selected, num_selected = ss.select_subset(jnp.ones((1, 3)))
    assert selected.tolist() == [True]
    assert int(num_selected) == 1


def test_masked_and_non_finite_rows_change_nothing():
    """Guarantee: masked rows, and rows that are not finite, are never chosen."""
    grads = gaussian_rows(12, 5)
    mask = np.array([1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1], bool)
    usable = mask & ~np.isin(np.arange(12), [4, 8])
    expected = select_all(grads[usable], np.ones(8, bool))
    for garbage in (0.0, 1e30, np.nan, np.inf):
        spoiled = grads.copy()
        spoiled[~mask] = garbage
        spoiled[4] = np.nan
        spoiled[8, 1] = -np.inf
        for metric, (selected, num_selected) in select_all(spoiled, mask).items():
            np.testing.assert_array_equal(selected[usable], expected[metric][0])
            assert not selected[~usable].any()
            assert int(num_selected) == int(expected[metric][1])


def test_selection_vmaps():
    grads = jnp.stack([gaussian_rows(8, 5, seed) for seed in range(3)])
    many = jax.vmap(select_all)(grads)
    for i in range(3):
        chex.assert_trees_all_equal(jax.tree.map(lambda x, i=i: x[i], many), select_all(grads[i]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "snr"}, "metric must be one of"),
        ({"min_size": 0}, "min_size must be an integer >= 1, got 0"),
        ({"min_size": 1.5}, "min_size must be an integer >= 1, got 1.5"),
        ({"order": "random"}, "order must be one of"),
        ({"groups": "layer"}, "groups must be one of"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ss.dynamic_batch_adaptation(**arguments)
    with pytest.raises(ValueError, match=message):
        ss.subset_gradients(lambda p, b: b, **arguments)
    if "groups" not in arguments:
        with pytest.raises(ValueError, match=message):
            ss.select_subset(jnp.ones((3, 2)), **arguments)


def test_bad_max_bytes():
    with pytest.raises(ValueError, match="max_bytes must be an integer >= 1, got 0"):
        ss.subset_gradients(lambda p, b: b, max_bytes=0)


# --- the aggregator


def tree_of_grads(n=12, seed=0):
    shapes = {"hidden": {"bias": (3,), "kernel": (4, 3)}, "head": {"bias": (2,), "kernel": (3, 2)}}
    rng = np.random.default_rng(seed)
    grads = jax.tree.map(
        lambda s: jnp.array(0.3 + rng.normal(size=(n, *s)), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return grads, jax.tree.map(lambda g: jnp.zeros(g.shape[1:]), grads)


@pytest.mark.parametrize(
    ("groups", "metric"), [("leaf", "norm"), ("module", "signal_to_noise"), ("model", "variance")]
)
def test_each_group_takes_the_mean_over_its_own_subset(groups, metric):
    grads, params = tree_of_grads()
    aggregator = ss.dynamic_batch_adaptation(metric, min_size=2, groups=groups)
    updates, state = jit(aggregator.update)(grads, aggregator.init(params))
    names = ss.group_names(params, groups)
    assert len(names) == {"leaf": 4, "module": 2, "model": 1}[groups]

    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
    }
    got = jax.tree_util.tree_leaves(updates)
    for i, name in enumerate(names):
        members = [path for path in flat if groups == "model" or path.startswith(name)]
        rows = jnp.concatenate([flat[m].reshape(12, -1) for m in members], axis=1)
        rows = jnp.pad(rows, ((0, 0), (0, 23 - rows.shape[1])))  # one shape, one program
        selected, num_selected = select_all(rows, min_size=2)[metric]
        assert int(state.num_selected[i]) == int(num_selected)
        assert float(state.selected_fraction[i]) == pytest.approx(int(num_selected) / 12)
        for member in members:
            expected = flat[member][np.flatnonzero(selected)].mean(axis=0)
            np.testing.assert_allclose(
                got[list(flat).index(member)], expected, rtol=1e-5, atol=1e-6
            )


def test_min_size_n_is_the_plain_mean():
    """Guarantee: with min_size at least n, the update is the plain mean."""
    grads, params = tree_of_grads()
    aggregator = ss.dynamic_batch_adaptation(min_size=12)
    updates, _ = jit(aggregator.update)(grads, aggregator.init(params))
    chex.assert_trees_all_close(updates, jax.tree.map(lambda g: g.mean(axis=0), grads), rtol=1e-5)


def test_non_finite_rows_are_counted_and_left_out_of_every_group():
    grads, params = tree_of_grads()
    grads["head"]["bias"] = grads["head"]["bias"].at[3].set(jnp.nan).at[0].set(jnp.inf)
    mask = jnp.arange(12) > 0
    aggregator = ss.dynamic_batch_adaptation(min_size=12)
    state = aggregator.init(params)
    for calls in (1, 2):
        updates, state = jit(aggregator.update)(grads, state, mask=mask)
        assert int(state.num_skipped) == calls  # row 0 is masked
    keep = np.array([i for i in range(12) if i not in (0, 3)])
    expected = jax.tree.map(lambda g: g[keep].mean(axis=0), grads)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    np.testing.assert_allclose(state.selected_fraction, 10 / 11)


def test_no_row_left_gives_a_zero_update():
    """Guarantee: with no row left, the update is zero."""
    grads, params = tree_of_grads()
    aggregator = ss.dynamic_batch_adaptation()
    bad = jax.tree.map(lambda g: g * jnp.nan, grads)
    for rows, mask in [(grads, jnp.zeros(12, bool)), (bad, None)]:
        updates, state = jit(aggregator.update)(rows, aggregator.init(params), mask=mask)
        chex.assert_trees_all_equal(updates, params)
        assert not state.selected_fraction.any()


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.adam(0.1),
        optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
    ],
    ids=["sgd", "adam", "clip"],
)
def test_goes_through_process(optimizer):
    clip_rows = optax.stateless(lambda g, _: jax.tree.map(lambda x: jnp.clip(x, -2, 2), g))
    tx = aggregating.process(
        optax.with_extra_args_support(clip_rows), ss.dynamic_batch_adaptation("variance"), optimizer
    )
    grads, params = tree_of_grads()
    mask = jnp.arange(12) < 9

    @jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, mask=mask)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    types = jax.tree.map(jax.typeof, state)
    aggregator = ss.dynamic_batch_adaptation("variance")
    plain, plain_state = params, optimizer.init(params)
    for seed in range(3):
        grads, _ = tree_of_grads(seed=seed)
        params, state = step(params, state, grads)
        assert jax.tree.map(jax.typeof, state) == types
        clipped = jax.tree.map(lambda x: jnp.clip(x, -2, 2)[:9], grads)
        mean, _ = jit(aggregator.update)(clipped, aggregator.init(plain))
        updates, plain_state = optimizer.update(mean, plain_state, plain)
        plain = optax.apply_updates(plain, updates)
    assert step._cache_size() == 1
    chex.assert_trees_all_close(params, plain, rtol=1e-4)


# --- gradients without per-example gradients


class Network(nnx.Module):
    """Convolutions, a LayerNorm and a dense layer: every kind of site."""

    def __init__(self, rngs, **settings):
        self.first = nnx.Conv(1, 4, (3, 3), rngs=rngs, **settings)
        self.second = nnx.Conv(
            4, 6, (2, 3), strides=2, padding="VALID", kernel_dilation=(1, 1), rngs=rngs, **settings
        )
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.head = nnx.Linear(36, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(x))
        x = nnx.relu(self.norm(self.second(x)))
        return self.head(x.reshape(x.shape[0], -1))


def filled(shapes, scale=0.3):
    """Arrays of these shapes; unlike the initialisers of a model it compiles nothing."""
    rng = np.random.default_rng(0)
    fill = lambda s: jnp.array(scale * rng.normal(size=s.shape), jnp.float32)
    return jax.tree.map(fill, shapes)


def nnx_problem(**settings):
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Network(nnx.Rngs(0), **settings)))
    loss_fn = lambda p, b: cross_entropy(nnx.merge(graph, p)(b[0]), b[1])
    return loss_fn, filled(shapes), inputs(16, 6, 6, 1)


def inputs(*shape):
    return jnp.array(np.random.default_rng(1).normal(size=shape), jnp.float32)


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.attend = nnx.MultiHeadAttention(2, 12, decode=False, keep_rngs=False, rngs=rngs)
        self.head = nnx.Linear(12, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(self.attend(x)).mean(axis=1)


def attention_problem():
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Attention(nnx.Rngs(0))))
    loss_fn = lambda p, b: cross_entropy(nnx.merge(graph, p)(b[0]), b[1])
    return loss_fn, filled(shapes), inputs(16, 7, 12)


def linen_problem(wrap=lambda f: f):
    model = linen.Sequential([linen.Dense(12), linen.relu, linen.Dense(10)])
    x = inputs(16, 20)
    shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0), x)
    return wrap(lambda p, b: cross_entropy(model.apply(p, b[0]), b[1])), filled(shapes), x


def plain_problem():
    sizes = {
        "transposed": (12, 20),
        "positive": (12, 10),
        "table": (10, 10),
        "shared": (10, 10),
        "bias": (10,),
        "unused": (3,),
    }
    params = filled({name: jax.ShapeDtypeStruct(size, float) for name, size in sizes.items()})

    def loss_fn(p, batch):
        hidden = jnp.tanh(p["transposed"] @ batch[0].T).T @ jax.nn.softplus(p["positive"])
        hidden += p["table"][batch[1]] + p["bias"][None]
        return cross_entropy(jnp.tanh(hidden @ p["shared"]) @ p["shared"], batch[1])

    return loss_fn, params, inputs(16, 20)


def penalized_problem():
    loss_fn, params, x = linen_problem()
    return lambda p, b: loss_fn(p, b) + 0.01 * optax.tree.norm(p, squared=True), params, x


def weighted_problem():
    loss_fn, params, x = linen_problem()

    def weighted(p, batch):
        tokens = loss_fn(p, batch)[:, None] * jnp.arange(1.0, 4.0)[None]
        return base.WeightedLoss(tokens, (jnp.abs(batch[0][:, :3]) > 0.3).astype(float))

    return weighted, params, x


PROBLEMS = {
    "nnx": nnx_problem,
    "patches": lambda: nnx_problem(conv_general_dilated=conv_general_dilated),
    "attention": attention_problem,
    "linen": lambda: linen_problem(lambda f: jax.checkpoint(jax.jit(f))),
    "plain": plain_problem,
    "penalized": penalized_problem,
    "weighted": weighted_problem,
}


def problem(name):
    loss_fn, params, x = PROBLEMS[name]()
    return loss_fn, params, (x, jnp.array(np.random.default_rng(2).integers(0, 10, 16)))


@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_the_aggregator(name):
    """Guarantee: equals dynamic_batch_adaptation on per-example gradients, to rounding."""
    loss_fn, params, batch = problem(name)
    mask = jnp.arange(16) != 5

    def one(p, example, mean_weight):
        total, _ = _total(loss_fn(p, jax.tree.map(lambda x: x[None], example)))
        return total / mean_weight

    @jit
    def both(params, batch):
        totals, weights = (jnp.where(mask, x, 0) for x in _total_rows(loss_fn(params, batch)))
        mean_weight = jnp.sum(weights) / jnp.sum(mask)
        grads = jax.vmap(jax.grad(one), (None, 0, None))(params, batch, mean_weight)
        aggregator = ss.dynamic_batch_adaptation()
        expected = aggregator.update(grads, aggregator.init(params), mask=mask)
        value = jnp.sum(totals) / jnp.sum(weights)
        got = ss.subset_gradients(loss_fn)(params, batch, mask)
        return got._replace(grad_stats=None), expected, value

    got, (expected, state), value = both(params, batch)
    chex.assert_trees_all_close(got.grads, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(got.num_selected, state.num_selected)
    assert 1 <= int(got.num_selected.min()) < 15  # a selection, not the whole batch
    assert not got.selected[:, 5].any()
    np.testing.assert_allclose(got.value, value, rtol=1e-5)


def _total_rows(losses):
    if isinstance(losses, base.WeightedLoss):
        return jnp.sum(losses.losses * losses.weights, axis=1), jnp.sum(losses.weights, axis=1)
    return losses, jnp.ones_like(losses)


def _total(losses):
    return jax.tree.map(lambda x: x[0], _total_rows(losses))


@pytest.mark.parametrize("settings", [{"factorize": False}, {"max_bytes": 1}])
def test_blocks_change_nothing(settings):
    loss_fn, params, batch = problem("plain")
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    settings = {"max_bytes": 5 * size, **settings}

    @jit
    def both(params, batch):
        blocks = ss.subset_gradients(loss_fn, **settings)(params, batch)
        return blocks, ss.subset_gradients(loss_fn, factorize=False)(params, batch)

    chex.assert_trees_all_close(*both(params, batch), rtol=1e-4, atol=1e-5)


def test_agrees_in_float64():
    with jax.enable_x64(True):
        loss_fn, params, batch = problem("plain")
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        batch = batch[0].astype(jnp.float64), batch[1]

        @jit
        def both(params, batch):
            layers = ss.subset_gradients(loss_fn)(params, batch)
            return layers, ss.subset_gradients(loss_fn, factorize=False)(params, batch)

        layers, examples = both(params, batch)
        assert layers.grads["bias"].dtype == jnp.float64
        chex.assert_trees_all_close(layers, examples, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["plain", "weighted"])
def test_min_size_n_is_the_gradient_of_the_mean_loss(name):
    """Guarantee: with min_size at least n, the gradient is that of the mean loss."""
    loss_fn, params, batch = problem(name)
    mask = jnp.arange(16) < 11
    got = jit(ss.subset_gradients(loss_fn, min_size=16))(params, batch, mask)
    expected = jit(masked_value_and_grad(loss_fn))(params, batch, mask)
    chex.assert_trees_all_close(got.grads, expected.grads, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.value, expected.value, rtol=1e-6)
    assert got.selected_fraction.tolist() == [1.0] * len(got.selected)


@pytest.mark.parametrize(("name", "factorize"), [("nnx", True), ("linen", False)])
def test_masked_and_non_finite_examples_change_nothing(name, factorize):
    """Guarantee: masked examples, and examples that are not finite, change nothing."""
    loss_fn, params, (x, labels) = problem(name)
    gradient_fn = jit(ss.subset_gradients(loss_fn, factorize=factorize))
    mask = jnp.arange(16) < 13
    expected = gradient_fn(params, (x, labels), mask & (jnp.arange(16) != 2))
    spoiled = x.at[2, 0].set(jnp.nan).at[13:].set(jnp.inf)
    got = gradient_fn(params, (spoiled, labels), mask)
    chex.assert_trees_all_close(got.grads, expected.grads, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(got.selected, expected.selected)
    np.testing.assert_allclose(got.value, expected.value, rtol=1e-6)
    assert int(got.num_skipped) == 1
    lost = gradient_fn(params, (x * jnp.nan, labels), mask)
    assert int(lost.num_skipped) == 13
    assert jnp.isnan(lost.value)
    chex.assert_trees_all_equal(lost.grads, jax.tree.map(jnp.zeros_like, params))


def test_statistics_are_those_of_the_batch():
    loss_fn, params, batch = problem("linen")
    mask = jnp.arange(16) < 13
    got = jit(ss.subset_gradients(loss_fn))(params, batch, mask).grad_stats
    expected = jit(value_grad_and_stats(loss_fn, method="per_example"))(
        params, batch, mask
    ).grad_stats
    chex.assert_trees_all_close(
        got._replace(half_cosine=0.0), expected._replace(half_cosine=0.0), rtol=1e-4
    )
    halves = [
        jit(masked_value_and_grad(loss_fn))(params, batch, mask & (jnp.arange(16) % 2 == i)).grads
        for i in range(2)
    ]
    halves = [jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(half)]) for half in halves]
    cosine = halves[0] @ halves[1] / jnp.linalg.norm(halves[0]) / jnp.linalg.norm(halves[1])
    np.testing.assert_allclose(got.half_cosine, cosine, rtol=1e-3)


def mlp_problem(n=64):
    def loss_fn(p, batch):
        hidden = jax.nn.relu(batch[0] @ p["in"])
        return cross_entropy(hidden @ p["out"], batch[1])

    sizes = {"in": (400, 128), "out": (128, 10)}
    params = {name: jax.ShapeDtypeStruct(size, float) for name, size in sizes.items()}
    return loss_fn, filled(params, 0.05), (inputs(n, 400), jnp.arange(n) % 10)


def test_layers_form_no_per_example_gradient():
    loss_fn, params, batch = mlp_problem()
    mask = jnp.ones(64, bool)

    def compiled(gradient_fn):
        return jax.jit(gradient_fn).lower(params, batch, mask).compile()

    layers = compiled(ss.subset_gradients(loss_fn))
    plain = compiled(masked_value_and_grad(loss_fn))
    examples = compiled(ss.subset_gradients(loss_fn, factorize=False))
    temp = lambda c: c.memory_analysis().temp_size_in_bytes
    flops = lambda c: c.cost_analysis()["flops"]
    rows = 4 * 64 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert temp(layers) < rows / 5
    assert temp(examples) >= rows
    assert flops(layers) < 1.6 * flops(plain)
    assert 5 * flops(layers) < flops(examples)


def test_memory_bound_of_the_blocks():
    loss_fn, params, batch = mlp_problem()
    rows = 4 * 64 * sum(leaf.size for leaf in jax.tree.leaves(params))
    max_bytes = rows // 8
    gradient_fn = ss.subset_gradients(loss_fn, factorize=False, max_bytes=max_bytes)
    compiled = jax.jit(gradient_fn).lower(params, batch, jnp.ones(64, bool)).compile()
    # Activations and the n x n matrices come on top.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * max_bytes + 2**19


# --- what cannot have per-example gradients


def test_batch_norm_is_refused():
    with pytest.raises(ValueError, match="BatchNorm"):
        ss.subset_gradients(lambda params, batch, model_state, mask, key: None)
    with pytest.raises(ValueError, match=r"model_state must be None.*BatchNorm"):
        ss.subset_gradients(lambda p, b: b)(0.0, jnp.ones(3), None, model_state={"mean": 0.0})
    with pytest.raises(ValueError, match=r"batch_stats/mean.*BatchNorm"):
        ss.dynamic_batch_adaptation().init({"params": jnp.ones(3), "batch_stats": {"mean": 0.0}})
    state = nnx.state(nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match=r"mean.*BatchNorm"):
        ss.dynamic_batch_adaptation().init(state)


def test_batch_norm_of_linen_is_refused_unless_frozen():
    class Model(linen.Module):
        frozen: bool

        @linen.compact
        def __call__(self, x):
            x = linen.Dense(5)(x)
            return linen.Dense(10)(linen.BatchNorm(use_running_average=self.frozen)(x))

    x, labels = jnp.ones((4, 3)), jnp.arange(4)
    variables = Model(True).init(jax.random.PRNGKey(0), x)

    def loss_fn(frozen, params, batch):
        variables_ = {"params": params, "batch_stats": variables["batch_stats"]}
        out, _ = Model(frozen).apply(variables_, batch[0], mutable=["batch_stats"])
        return cross_entropy(out, batch[1])

    def trace(frozen):
        gradient_fn = ss.subset_gradients(functools.partial(loss_fn, frozen))
        return jax.eval_shape(gradient_fn, variables["params"], (x, labels))

    chex.assert_trees_all_equal_shapes(trace(True).grads, variables["params"])
    with pytest.raises(ValueError, match="BatchNorm"):
        trace(False)


def test_a_mean_loss_is_refused():
    with pytest.raises(ValueError, match="one loss per example"):
        ss.subset_gradients(lambda p, b: jnp.mean(b * p))(1.0, jnp.ones(3))


# --- in the engine


def test_trains_in_a_window_with_a_batch_size_rule():
    loss_fn, params, batch = mlp_problem()
    tx = optax.chain(optax.adam(0.01), schedulers.constant(12))
    gradient_fn = ss.subset_gradients(loss_fn, "variance", min_size=4)
    state = inner_loop.init_state(params, tx, jax.random.PRNGKey(0))
    run = functools.partial(
        inner_loop.run_window, tx=tx, bucket_size=16, window=20, gradient_fn=gradient_fn
    )
    state, info = run(state, inner_loop.Data(batch))
    assert info.batch_size.tolist() == [12] * 20
    assert float(info.loss[-5:].mean()) < 0.7 * float(info.loss[:5].mean())


def test_runs_vmap_over_seeds():
    loss_fn, params, batch = mlp_problem(16)
    gradient_fn = ss.subset_gradients(loss_fn)
    seeds = jnp.arange(1.0, 4.0)
    run = lambda seed: gradient_fn(jax.tree.map(lambda p: seed * p, params), batch)
    many = jit(jax.vmap(run))(seeds)
    for i, seed in enumerate(seeds):
        one = jit(run)(seed)
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], many.grads), one.grads, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("build", [models.mlp, models.lenet], ids=["mlp", "lenet"])
def test_the_models_of_the_library_are_made_of_layers(build):
    """No parameter falls back to per-example gradients, although the head runs twice."""
    model = build((16, 16, 1))
    loss_fn = models.make_losses(model, cross_entropy).loss_fn
    params, _ = jax.eval_shape(model.init, jax.random.PRNGKey(0))
    batch = jax.ShapeDtypeStruct((1, 16, 16, 1), float), jax.ShapeDtypeStruct((1,), int)
    leaves, treedef = jax.tree.flatten(params)
    closed = jax.make_jaxpr(lambda leaves, *b: loss_fn(jax.tree.unflatten(treedef, leaves), b))(
        leaves, *batch
    )
    sites = _sites.inline(closed, len(leaves)).sites
    assert len(sites) == len(leaves)
    for leaf, site in sites.items():
        assert (_sites.as_matrix(site) is not None) == (leaves[leaf].ndim > 1)
