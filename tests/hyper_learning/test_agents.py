"""The network that proposes, its mixture, and the published way to start it at a batch size."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax.hyper_learning._agents import mixture_logit, sorted_proposals

AGENTS = {
    "mlp": (aj.mlp_agent, (6, 6, 1), {"hidden_sizes": (8,)}),
    "deep mlp": (aj.mlp_agent, (5,), {"hidden_sizes": (8, 7, 6)}),
    "linear": (aj.mlp_agent, (5,), {"hidden_sizes": ()}),
    "conv": (aj.conv_agent, (7, 6, 2), {"channels": 3, "num_layers": 2}),
}


def inputs_of(shape, num_rows=3, seed=0):
    return np.random.default_rng(seed).normal(size=(num_rows, *shape)).astype(np.float32)


@pytest.mark.parametrize(("name", "num_proposals"), [("mlp", 1), *((name, 4) for name in AGENTS)])
def test_one_row_of_finite_logits_per_input(name, num_proposals, key):
    make, shape, options = AGENTS[name]
    agent = make(shape, num_proposals, **options)
    agent_params = jax.jit(agent.init)(key)
    inputs = inputs_of(shape)
    logits = jax.jit(agent.apply)(agent_params, inputs)
    chex.assert_shape(logits, (3, num_proposals))
    chex.assert_tree_all_finite(logits)
    assert agent.num_proposals == num_proposals
    # Each row is a function of its own input alone, and of nothing else.
    alone = jax.jit(agent.apply)(agent_params, inputs[1:2])
    np.testing.assert_allclose(logits[1:2], alone, rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(logits[0] - logits[1]).max()) > 1e-3


@pytest.mark.parametrize("name", AGENTS)
def test_init_is_a_function_of_the_key(name, key):
    make, shape, options = AGENTS[name]
    init = jax.jit(make(shape, **options).init)
    chex.assert_trees_all_equal(init(key), init(key))
    first, other = jax.tree.leaves(init(key)), jax.tree.leaves(init(jax.random.PRNGKey(1)))
    assert all(np.abs(a - b).max() > 0 for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("name", "linear"), [("mlp", False), ("deep mlp", False), ("conv", False), ("linear", True)]
)
def test_agents_have_nonlinearities_between_layers(name, linear, key):
    make, shape, options = AGENTS[name]
    agent = make(shape, **options)
    agent_params = jax.jit(agent.init)(key)
    x, y = inputs_of(shape, 3), inputs_of(shape, 3, seed=1)
    apply = functools.partial(jax.jit(agent.apply), agent_params)
    bend = apply(x) + apply(y) - apply(x + y) - apply(np.zeros_like(x))
    assert (float(jnp.abs(bend).max()) < 1e-5) == linear


def test_the_published_conv_agent(key):
    agent = aj.conv_agent((28, 28, 1), channels=64)
    shapes = [layer["weight"].shape for layer in jax.eval_shape(agent.init, key)]
    assert shapes == [(9, 64), *[(9 * 64, 64)] * 3, (64, 4)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: aj.mlp_agent(()), r"input_shape must have at least one axis, got \(\)"),
        (lambda: aj.mlp_agent((0,)), r"input_shape must be an integer >= 1, got 0"),
        (lambda: aj.mlp_agent((5,), 0), r"num_proposals must be an integer >= 1, got 0"),
        (lambda: aj.mlp_agent((5,), 2.0), r"num_proposals must be an integer >= 1, got 2.0"),
        (
            lambda: aj.mlp_agent((5,), hidden_sizes=(8, -1)),
            r"hidden_sizes must be an integer >= 1, got -1",
        ),
        (lambda: aj.conv_agent((28, 28)), r"input_shape must be \(height, width, channels\), got"),
        (lambda: aj.conv_agent((28, 28, 1), 0), r"num_proposals must be an integer >= 1, got 0"),
        (lambda: aj.conv_agent((9, 9, 1), channels=0), r"channels must be an integer >= 1, got 0"),
        (
            lambda: aj.conv_agent((9, 9, 1), num_layers=0),
            r"num_layers must be an integer >= 1, got 0",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Proposals and their mixture


def constant_agent(logits):
    """Proposes the same logits whatever it sees; its parameters are the logits."""
    apply = lambda params, inputs: jnp.broadcast_to(params[None, :], (len(inputs), len(logits)))
    return aj.Agent(lambda key: jnp.asarray(logits), apply, len(logits))


def test_proposals_are_averaged_and_then_sorted():
    agent = aj.Agent(lambda key: None, lambda params, inputs: inputs, 2)
    logits = jnp.array([[3.0, 0.0], [1.0, -4.0]])
    assert sorted_proposals(agent, None, logits).tolist() == [-2.0, 2.0]
    # Rows sorted one by one, and averaged then, would give -2.5 and 3.5.
    logits = jnp.array([[3.0, 0.0], [-5.0, 4.0]])
    assert sorted_proposals(agent, None, logits).tolist() == [-1.0, 2.0]


def test_the_mixture_is_the_softmax_average():
    mixture = mixture_logit(jnp.log(jnp.array([1.0, 2.0, 5.0])), jnp.array([8.0, -4.0, 1.6]))
    np.testing.assert_allclose(mixture, (8 - 2 * 4 + 5 * 1.6) / 8, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3), (2,), (3, 4), (2, 4, 1), ()])
def test_an_agent_of_the_wrong_shape_is_named(shape):
    agent = aj.Agent(lambda key: None, lambda params, inputs: jnp.zeros(shape))
    with pytest.raises(ValueError, match=r"\(batch, num_proposals\) = \(2, 4\), got \("):
        sorted_proposals(agent, None, jnp.zeros((2, 5)))


# The warm-up


def warm_up(batch_size, logits=(-1.0, 0.0, 1.0, 2.0), limits=(8, 512), **options):
    agent = constant_agent(logits)
    arguments = {"min_batch_size": limits[0], "max_batch_size": limits[1], "learning_rate": 1e-2}

    @jax.jit
    def run():
        return aj.warm_up(
            agent,
            jnp.array(logits),
            jnp.zeros(len(logits)),
            jnp.zeros((2, 1)),
            batch_size=batch_size,
            **(arguments | options),
        )

    return run()


@pytest.mark.parametrize("batch_size", [8, 9, 64, 260, 500, 512])
def test_warm_up_ends_within_two_of_the_target(batch_size):
    agent_params, num_steps, mixture = warm_up(batch_size, learning_rate=3e-2)
    assert abs(int(aj.to_batch_size(mixture, 8, 512)) - batch_size) < 2
    assert 0 < int(num_steps) < 10_000
    chex.assert_tree_all_finite(agent_params)


@pytest.mark.parametrize("limits", [(1, 2), (32, 65536)])
def test_warm_up_of_other_ranges(limits):
    _, _, mixture = warm_up(limits[0], limits=limits, learning_rate=0.1)
    assert abs(int(aj.to_batch_size(mixture, *limits)) - limits[0]) < 2


def test_warm_up_tests_the_mixture_before_the_step():
    # Already there: one step is taken, as published, and the mixture is the one before it.
    size = int(aj.to_batch_size(0.5, 8, 512))
    agent_params, num_steps, mixture = warm_up(size)
    assert (int(num_steps), float(mixture)) == (1, 0.5)
    assert float(jnp.abs(agent_params - jnp.array([-1.0, 0.0, 1.0, 2.0])).max()) > 0


def test_warm_up_stops_at_max_steps():
    _, num_steps, mixture = warm_up(500, learning_rate=1e-6, max_steps=7)
    assert int(num_steps) == 7
    np.testing.assert_allclose(mixture, 0.5, atol=1e-3)


def test_warm_up_by_hand():
    # Two steps of Adam on the Huber loss, weight decay in the gradient, on agent and mixture.
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.adam(1e-2))
    target = np.log((64 - 8) / (512 - 64))

    def huber(learnable):
        logits, alpha = learnable
        distance = jnp.sum(jax.nn.softmax(alpha) * jnp.sort(logits)) - target
        return jnp.where(jnp.abs(distance) <= 1, distance**2 / 2, jnp.abs(distance) - 0.5)

    @jax.jit
    def two_steps(learnable):
        opt_state = optimizer.init(learnable)
        for _ in range(2):
            updates, opt_state = optimizer.update(jax.grad(huber)(learnable), opt_state, learnable)
            learnable = optax.apply_updates(learnable, updates)
        return learnable

    learnable = two_steps((np.array([-1, 0, 1, 2], np.float32), np.zeros(4, np.float32)))
    agent_params, _, _ = warm_up(64, max_steps=2)
    np.testing.assert_allclose(agent_params, learnable[0], rtol=1e-6)


def test_the_target_of_a_warm_up_may_be_traced():
    agent = constant_agent((-1.0, 0.0, 1.0, 2.0))

    def mixture_at(batch_size):
        _, _, mixture = aj.warm_up(
            agent,
            agent.init(None),
            jnp.zeros(4),
            jnp.zeros((2, 1)),
            batch_size=batch_size,
            min_batch_size=8,
            max_batch_size=512,
            learning_rate=3e-2,
        )
        return mixture

    sizes = jnp.array([40, 400])
    reached = aj.to_batch_size(jax.jit(jax.vmap(mixture_at))(sizes), 8, 512)
    assert np.abs(reached - sizes).max() < 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 7}, r"batch_size must be an integer >= 8 and <= 512, got 7"),
        ({"batch_size": 64.0}, r"batch_size must be an integer >= 8 and <= 512, got 64.0"),
        ({"min_batch_size": 1024}, r"max_batch_size must be >= min_batch_size"),
        ({"min_batch_size": 512}, r"max_batch_size must be > min_batch_size, got 512 for both"),
        ({"learning_rate": 0.0}, r"learning_rate must be a finite number > 0, got 0.0"),
        ({"max_steps": 0}, r"max_steps must be an integer >= 1, got 0"),
    ],
)
def test_bad_arguments_of_a_warm_up_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        warm_up(**({"batch_size": 64} | options))
