"""Models that were not written for this library: like the examples of Flax, and harder ones."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from arbiter_jax import models
from arbiter_jax.batching._batch_norm import row_mask

xent = optax.softmax_cross_entropy_with_integer_labels
IMAGES = (8, 8, 1)


class ExampleCNN(nnx.Module):
    """Built like the MNIST network in the examples of Flax; it is called with rngs."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 4, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(4, rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.25)
        self.conv2 = nnx.Conv(4, 8, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm2 = nnx.BatchNorm(8, rngs=rngs)
        self.avg_pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(32, 16, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate=0.25)
        self.linear2 = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x, rngs: nnx.Rngs | None = None):
        x = self.batch_norm1(self.dropout1(self.conv1(x), rngs=rngs))
        x = self.avg_pool(nnx.relu(x))
        x = self.avg_pool(nnx.relu(self.batch_norm2(self.conv2(x))))
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(self.dropout2(self.linear1(x), rngs=rngs))
        return self.linear2(x)


class ExampleLinenCNN(nn.Module):
    """Built like the Linen MNIST network in the examples of Flax: compact, with automatic names."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(features=4, kernel_size=(3, 3))(x)
        x = nn.relu(x)
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nn.Conv(features=8, kernel_size=(3, 3))(x)
        x = nn.relu(x)
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.Dense(features=16)(x)
        x = nn.relu(x)
        return nn.Dense(features=10)(x)


class Tail(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 10, rngs=rngs)])

    def __call__(self, x):
        return nnx.log_softmax(self.layers[1](nnx.relu(self.layers[0](self.norm(x)))))


class Deep(nnx.Module):
    """A head of two layers, followed by more; the tail runs inside nnx.remat."""

    def __init__(self, rngs):
        self.body = nnx.Sequential(nnx.Linear(64, 16, rngs=rngs), nnx.relu)
        self.tail = nnx.data({"classifier": Tail(rngs)})

    def __call__(self, x):
        x = self.body(x.reshape(x.shape[0], -1))
        return nnx.remat(lambda tail, x: tail(x))(self.tail["classifier"], x)


class LinenTail(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16)(x))
        return nn.log_softmax(nn.Dense(10, name="logits")(x))


class LinenDeep(nn.Module):
    """The same in Linen, with BatchNorm and dropout; the tail runs inside nn.remat."""

    @nn.compact
    def __call__(self, x, training: bool):
        x = nn.Dense(16)(x.reshape(x.shape[0], -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not training, momentum=0.9)(x))
        x = nn.Dropout(0.5, deterministic=not training)(x)
        return nn.remat(LinenTail)(name="tail")(x)


def plain_init(key):
    keys = jax.random.split(key, 2)
    return {
        "body": jax.random.normal(keys[0], (64, 16)) / 8,
        "head": {"w": jax.random.normal(keys[1], (16, 10)) / 4, "b": jnp.zeros((10,))},
    }


def plain_apply(params, x):
    """Written for one example, then mapped; the head is inside a jit and a checkpoint."""

    @jax.checkpoint
    @jax.jit
    def head(h):
        return jax.nn.log_softmax(h @ params["head"]["w"] + params["head"]["b"])

    return jax.vmap(lambda x: head(jax.nn.relu(x.reshape(-1) @ params["body"])))(x)


def batch(num=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((num, *IMAGES)).astype(np.float32), np.arange(num) % 10


SAMPLE = jax.ShapeDtypeStruct((1, *IMAGES), jnp.float32)
CASES = {
    "nnx_example": (lambda: ExampleCNN, "linear2", 16, {}),
    "nnx_nested_path": (lambda: Deep, "tail.classifier.layers.1", 16, {}),
    "nnx_head_of_two_layers": (lambda: Deep, "tail.classifier", 16, {}),
    "linen_example": (ExampleLinenCNN, "Dense_1", 16, {}),
    "linen_nested_path": (LinenDeep, "tail.logits", 16, {}),
    "plain": (lambda: plain_apply, "head", 16, {"init": plain_init}),
}
STATEFUL = ("nnx_example", "linen_nested_path")
KEY = jax.random.PRNGKey(1)


@functools.cache
def attached(name):
    make, head, num_features, kwargs = CASES[name]
    model = models.attach(make(), head, SAMPLE, **kwargs)
    assert model.num_features == num_features
    return model, jax.jit(model.init)(KEY)


def run_original(name, params, model_state, x):
    """The network itself, in inference mode, without any of this library."""
    if name.startswith("linen"):
        module = CASES[name][0]()
        kwargs = {"training": False} if name == "linen_nested_path" else {}
        return module.apply({"params": params, **(model_state or {})}, x, **kwargs)
    if name == "plain":
        return plain_apply(params, x)
    module = CASES[name][0]()(rngs=nnx.Rngs(jax.random.wrap_key_data(KEY)))
    module.eval()
    return module(x)


@functools.cache
def results(name):
    """All that is compared, from one program per case."""
    model, variables = attached(name)
    losses = models.make_losses(model, xent)
    x, y = batch()
    response = np.linspace(-0.5, 0.5, model.num_features, dtype=np.float32)

    @jax.jit
    def run(params, model_state, response):
        state = () if model_state is None else (model_state,)

        def response_loss(params, response):
            values = losses.response_loss(params, response, (x, y), *state)
            return jnp.sum(values * jnp.arange(1.0, 7.0)), values

        grads, with_response = jax.grad(response_loss, (0, 1), has_aux=True)(params, response)
        features, new_state = model.features(params, model_state, x)
        outputs = model.head(params, model_state, features)
        scaled = model.head(params, model_state, features * (1 + response)[None])
        result = {
            "features": features,
            "model_state": new_state,
            "outputs": outputs,
            "original": run_original(name, params, model_state, x),
            "response_loss": with_response,
            "loss_of_scaled_features": xent(scaled, y),
            "loss_without_response": losses.response_loss(params, response * 0, (x, y), *state),
            "loss": xent(losses.predict(params, x, *state), y),
            "gradients": grads,
        }
        if model_state is None:
            result["training_features"] = model.features(params, None, x, train=True)[0]
        return result

    return run(*variables, response)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_features_and_head_equal_the_model(name):
    got, (_, model_state) = results(name), attached(name)[1]
    assert got["features"].shape == (6, 16)
    chex.assert_trees_all_close(got["outputs"], got["original"], atol=1e-5)
    chex.assert_trees_all_equal(got["model_state"], model_state)
    assert (model_state is not None) == (name in STATEFUL)


@pytest.mark.parametrize("name", CASES)
def test_a_response_multiplies_the_heads_input(name):
    got = results(name)
    chex.assert_trees_all_close(got["response_loss"], got["loss_of_scaled_features"], atol=1e-5)
    chex.assert_trees_all_close(got["loss_without_response"], got["loss"], atol=1e-5)
    assert not np.allclose(got["response_loss"], got["loss"], atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_response_loss_has_no_other_gradient(name):
    of_params, of_response = results(name)["gradients"]
    assert of_response.shape == (16,)
    assert np.abs(of_response).max() > 1e-3
    for leaf in jax.tree.leaves(of_params):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("name", CASES)
def test_the_head_computes_no_part_of_the_body(name):
    model, variables = attached(name)
    features = jax.ShapeDtypeStruct((6, model.num_features), jnp.float32)
    text = str(jax.make_jaxpr(model.head)(*variables, features))
    assert text.count("dot_general[") == (2 if name == "nnx_head_of_two_layers" else 1)
    assert "conv_general_dilated" not in text


@pytest.mark.parametrize("name", [name for name in CASES if name not in STATEFUL])
def test_training_without_state_changes_nothing(name):
    got = results(name)
    chex.assert_trees_all_close(got["training_features"], got["features"], atol=1e-6)


@pytest.mark.parametrize("name", STATEFUL)
def test_mask_and_key_reach_their_layers(name):
    """The mask reaches BatchNorm, the key reaches dropout, and the state changes."""
    model, (params, model_state) = attached(name)
    real, _ = batch(5)
    mask = np.arange(10) < 5

    def padded_with(padding):
        return np.concatenate([real, np.broadcast_to(padding, real.shape)]).astype(np.float32)

    @jax.jit
    def run(x, mask, seed):
        key = jax.random.PRNGKey(seed)
        return model.features(params, model_state, x, train=True, mask=mask, key=key)

    features, new_state = run(padded_with(2.0), mask, 0)
    again, _ = run(padded_with(2.0), mask, 0)
    other_key, _ = run(padded_with(2.0), mask, 1)
    _, poisoned_state = run(padded_with(1e3), mask, 0)
    _, unmasked_state = run(padded_with(2.0), np.ones(10, bool), 0)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, model_state)
    chex.assert_trees_all_equal(features, again)
    assert not np.allclose(features, other_key)
    chex.assert_trees_all_close(new_state, poisoned_state, atol=1e-6)
    if name == "linen_nested_path":
        # Each example twice: the statistics of the unpadded batch. (Dropout before a BatchNorm, as
        # in the other network, draws for each of the ten.)
        _, unpadded_state = run(padded_with(real), np.ones(10, bool), 0)
        chex.assert_trees_all_close(new_state, unpadded_state, atol=1e-6)
    leaves = [jax.tree.leaves(s) for s in (model_state, new_state, unmasked_state)]
    assert not any(np.allclose(a, b, atol=1e-6) for a, b in zip(leaves[0], leaves[1], strict=True))
    assert not any(np.allclose(a, b, atol=1e-6) for a, b in zip(leaves[1], leaves[2], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", STATEFUL)
def test_state_flows_through_a_scan(name):
    model, (params, model_state) = attached(name)
    losses = models.make_losses(model, xent)
    x, y = batch(8)
    mask = np.arange(8) < 6
    tx = optax.sgd(0.05, momentum=0.9)

    def step(carry, key):
        params, opt_state, model_state = carry

        def loss(params):
            values, new_state = losses.loss_fn(params, (x, y), model_state, mask, key)
            return jnp.mean(values, where=mask), new_state

        (value, new_state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, new_state), value

    @jax.jit
    def train(params, model_state):
        keys = jax.random.split(jax.random.PRNGKey(0), 40)
        return jax.lax.scan(step, (params, tx.init(params), model_state), keys)

    (params, _, new_state), values = train(params, model_state)
    assert np.mean(values[-10:]) < 0.8 * np.mean(values[:4])
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, model_state)


def test_vmaps_and_takes_forward_derivatives():
    model, _ = attached("plain")
    loss_fn = models.make_losses(model, xent).loss_fn

    @jax.jit
    def run(keys):
        params, _ = jax.vmap(model.init)(keys)
        tangents = jax.tree.map(jnp.ones_like, params)

        def value(params):
            return jnp.sum(jax.vmap(loss_fn, (0, None))(params, batch()))

        return jax.jvp(jax.grad(value), (params,), (tangents,))[1]

    result = run(jax.random.split(jax.random.PRNGKey(0), 2))
    assert all(np.isfinite(x).all() and np.abs(x).max() > 0 for x in jax.tree.leaves(result))


def test_the_head_is_traced_once_per_shape():
    """Not at each call; the trace is that of the whole network."""
    num_traces = 0

    class Counting(Deep):
        def __call__(self, x):
            nonlocal num_traces
            num_traces += 1
            return super().__call__(x)

    model = models.attach(Counting, "tail.classifier", SAMPLE)
    params, _ = jax.eval_shape(model.init, KEY)

    def traces_of_head(num_rows):
        before = num_traces
        features = jax.ShapeDtypeStruct((num_rows, 16), jnp.float32)
        jax.make_jaxpr(lambda params, features: model.head(params, None, features))(
            params, features
        )
        return num_traces - before

    assert [traces_of_head(num_rows) for num_rows in (6, 6, 7, 6)] == [1, 0, 1, 0]


def test_an_instance_keeps_its_own_parameters():
    module = Deep(nnx.Rngs(3))
    model = models.attach(module, "tail.classifier.layers.1", SAMPLE)
    params, _ = model.init(jax.random.PRNGKey(99))
    chex.assert_trees_all_equal(
        params["body"]["layers"]["0"]["kernel"], module.body.layers[0].kernel[...]
    )
    x, _ = batch()
    predict = jax.jit(models.make_losses(model, xent).predict)
    expected = nnx.jit(lambda module, x: module(x))(module, x)
    chex.assert_trees_all_close(predict(params, x), expected, atol=1e-6)
    assert type(module.tail["classifier"].layers[1]) is nnx.Linear  # left as it was


class Tied(nnx.Module):
    """A language model whose head is a method of its embedding."""

    def __init__(self, rngs):
        self.embedding = nnx.Embed(11, 8, rngs=rngs)
        self.middle = nnx.Linear(8, 8, rngs=rngs)

    @nnx.jit
    def __call__(self, tokens, deterministic=True):
        return self.embedding.attend(nnx.gelu(self.middle(self.embedding(tokens))))


class LinenTied(nn.Module):
    def setup(self):
        self.embedding = nn.Embed(11, 8)
        self.middle = nn.Dense(8)

    def __call__(self, tokens):
        return self.embedding.attend(nn.gelu(self.middle(self.embedding(tokens))))


@pytest.mark.parametrize("make", [lambda: Tied, LinenTied], ids=["nnx", "linen"])
def test_the_head_may_be_a_method(key, make):
    tokens = np.arange(15).reshape(3, 5) % 11
    model = models.attach(make(), "embedding.attend", jax.ShapeDtypeStruct((1, 5), jnp.int32))
    params, model_state = jax.jit(model.init)(key)
    assert model_state is None

    @jax.jit
    def run(params):
        features, _ = model.features(params, None, tokens)
        return features, model.head(params, None, features)

    features, outputs = run(params)
    assert features.shape == (3, 5, 8)
    table = params["embedding"]["embedding"]
    chex.assert_trees_all_close(outputs, np.asarray(features) @ np.asarray(table).T, atol=1e-5)


class Attention(nnx.Module):
    """A head of several inputs, whose signature does not begin with the one that is called first."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, values, *, scale=1.0):
        return scale * self.linear(inputs=values)


class Keywords(nnx.Module):
    """Every layer is called by keyword; `jit` and `remat` of Flax stand around norm and head."""

    def __init__(self, rngs):
        self.body = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.9, rngs=rngs)
        self.head = Attention(rngs)
        self.table = nnx.Embed(5, 3, rngs=rngs)

    def __call__(self, x, tied=False):
        norm = nnx.jit(lambda norm, x: norm(use_running_average=None, x=x, mask=None))
        x = norm(self.norm, self.body(inputs=x))
        if tied:
            return self.table.attend(query=x)
        return nnx.remat(lambda head, x: head(scale=jnp.float32(2.0), values=x))(self.head, x)


class KeywordHead(nn.Module):
    @nn.compact
    def __call__(self, *, scale=1.0, values):
        return scale * nn.Dense(2)(inputs=values)


class LinenKeywords(nn.Module):
    tied: bool = False

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(3)(inputs=x)
        x = nn.BatchNorm(momentum=0.9, name="norm")(use_running_average=not train, x=x, mask=None)
        if self.tied:
            return nn.Embed(5, 3, name="table").attend(query=x)
        return nn.remat(KeywordHead)(name="head")(values=x)


class TiedKeywords(Keywords):
    def __call__(self, x):
        return super().__call__(x, tied=True)


@pytest.mark.parametrize(
    ("module", "head"),
    [
        (Keywords, "head"),
        (Keywords, "head.linear"),
        (TiedKeywords, "table.attend"),
        (LinenKeywords(), "head"),
        (LinenKeywords(), "head.Dense_0"),
        (LinenKeywords(tied=True), "table.attend"),
    ],
)
def test_layers_may_be_called_by_keyword(key, module, head):
    """The head's input is the normalized body; the statistics are those of the unpadded batch."""
    model = models.attach(module, head, jax.ShapeDtypeStruct((1, 4), jnp.float32))
    params, model_state = jax.jit(model.init)(key)
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    mask = np.arange(6) < 4

    @jax.jit
    def run(params, model_state, x):
        features, _ = model.features(params, model_state, x)
        new_state = model.features(params, model_state, x, train=True, mask=mask, key=key)[1]
        return features, model.head(params, model_state, features), new_state

    features, outputs, new_state = run(params, model_state, x)
    body = params["Dense_0" if isinstance(module, nn.Module) else "body"]
    h = x @ np.asarray(body["kernel"]) + np.asarray(body["bias"])
    np.testing.assert_allclose(features, h / np.sqrt(1 + 1e-5), rtol=1e-5, atol=1e-6)
    if head == "table.attend":
        expected = np.asarray(features) @ np.asarray(params["table"]["embedding"]).T
    else:
        linear = params["head"]["Dense_0" if isinstance(module, nn.Module) else "linear"]
        scale = 1 if isinstance(module, nn.Module) else 2
        expected = scale * (np.asarray(features) @ np.asarray(linear["kernel"]))
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    statistics = new_state.get("batch_stats", new_state)["norm"]
    np.testing.assert_allclose(statistics["mean"], 0.1 * h[:4].mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(statistics["var"], 0.9 + 0.1 * h[:4].var(0), rtol=1e-4)


def test_a_mask_of_the_network_itself_is_kept(key):
    """One of tokens, say: a row counts if both masks say so."""

    class OwnMask(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")
            return nn.Dense(2)(norm(x, mask=x[..., :1] < 10))

    model = models.attach(OwnMask(), "Dense_0", jax.ShapeDtypeStruct((1, 1), jnp.float32))
    params, model_state = jax.jit(model.init)(key)
    x = jnp.array([[1.0], [3.0], [100.0], [7.0]])
    mask = jnp.arange(4) < 3
    _, state = jax.jit(lambda s: model.features(params, s, x, train=True, mask=mask))(model_state)
    np.testing.assert_allclose(state["batch_stats"]["norm"]["mean"], [0.2], rtol=1e-6)


class Branching(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(4, 4, rngs=rngs)
        self.b = nnx.Linear(4, 4, rngs=rngs)
        self.unused = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.b(self.b(self.a(x))) + x


class LateDropout(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(4, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.b = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.b(self.dropout(self.a(x)))


class LinenLateNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(nn.Dense(3)(x)))


class Tricky(nnx.Module):
    """Its head is followed by functions that every call rebuilds, the same in training."""

    def __init__(self, rngs):
        self.a = nnx.Linear(4, 4, rngs=rngs)
        self.b = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        double = jax.custom_vjp(lambda x: 2 * x)
        double.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))
        x = jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), self.a(x))
        return jax.lax.scan(lambda x, _: (nnx.silu(x), None), double(self.b(x)), None, length=2)[0]


def test_functions_after_the_head_may_be_rebuilt():
    """They are not a difference between training and inference."""
    assert models.attach(Tricky, "a", jax.ShapeDtypeStruct((2, 4), jnp.float32)).num_features == 4


@pytest.mark.parametrize(
    ("model", "head", "kwargs", "message"),
    [
        (LateDropout, "a", {}, "head='a' must be followed by nothing that differs"),
        (LinenLateNorm(), "Dense_1", {}, "head='Dense_1' must be followed by nothing that differs"),
        (Branching, None, {}, "head must be a path, such as .*, got None"),
        (nn.Dense(4), 3, {}, "head must be a path, such as .*, got 3"),
        (lambda p, x: x @ p["w"], "w", {"init": 3}, "init must be a function of a key .* got 3"),
        (Branching, "c", {}, "head must be one of a, b, unused, got 'c'"),
        (Branching, "a.kernel", {}, "head must be one of"),
        (Branching, "a", {}, "head='a' must be the only way"),
        (Branching, "b", {}, "head='b' must be called exactly once .* 2 times"),
        (Branching, "unused", {}, "head='unused' must be called exactly once .* 0 times"),
        (nn.Dense(4), "kernel", {}, "head must be one of"),
        (nn.Sequential([nn.Dense(4), nn.Dense(3)]), "layers_2", {}, "layers_0, layers_1, got"),
        (lambda p, x: x @ p["w"], "v", {"init": lambda key: {"w": jnp.ones((4, 2))}}, "a path in"),
        (lambda p, x: x @ p["w"], "w", {}, "model must be an nnx.Module"),
        (lambda rngs: 3, "w", {}, "model must be an nnx.Module"),
        (3, "w", {}, "model must be an nnx.Module"),
        (
            lambda p, x: jax.lax.scan(lambda c, _: (c @ p["w"], None), x, None, length=2)[0],
            "w",
            {"init": lambda key: {"w": jnp.ones((4, 4))}},
            "meets it inside `scan`",
        ),
    ],
)
def test_errors_say_what_is_wrong(model, head, kwargs, message):
    with pytest.raises(ValueError, match=message):
        models.attach(model, head, jax.ShapeDtypeStruct((2, 4), jnp.float32), **kwargs)


def test_a_sample_without_rows_is_an_error():
    with pytest.raises(ValueError, match="sample_input must have the same number of leading rows"):
        models.attach(Branching, "a", (jnp.ones((2, 4)), jnp.ones((3, 4))))


def test_a_sample_of_numbers_is_an_error():
    with pytest.raises(ValueError, match=r"sample_input must be a pytree of arrays .* type float"):
        models.attach(Branching, "a", [[1.0, 2.0]])


def test_a_head_without_a_row_per_example_is_an_error():
    def apply(params, x):
        return x.reshape(-1) @ params["w"]

    init = lambda key: {"w": jnp.ones((8, 2))}
    with pytest.raises(ValueError, match=r"head='w' must be called with float\[M, .*shape \(8,\)"):
        models.attach(apply, "w", jnp.ones((2, 4)), init=init)


class PairHead(nn.Module):
    @nn.compact
    def __call__(self, pair):
        return nn.Dense(2)(pair[0] + pair[1])


class WithPairHead(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3)(x)
        return PairHead(name="head")(pair=(x, x))


def test_a_head_of_a_pytree_is_an_error():
    with pytest.raises(ValueError, match=r"head='head' must be called with one array .* a tuple"):
        models.attach(WithPairHead(), "head", jnp.ones((2, 4)))


def test_a_mask_must_divide_the_rows_of_batch_norm(key):
    """As it does where other axes are folded into the batch."""
    x = jax.ShapeDtypeStruct((6, 3, 2), jnp.float32)
    mask = jnp.array([True, False, True])
    assert row_mask(mask, x)[:, 0, 0].tolist() == [True, True, False, False, True, True]
    with pytest.raises(ValueError, match=r"mask must have a number of rows .* 6, got 4"):
        row_mask(jnp.ones(4, bool), x)


def test_call_arguments_are_passed_on(key):
    class Moody(nn.Module):
        @nn.compact
        def __call__(self, x, mood):
            x = nn.Dropout(0.5, deterministic=mood == "calm")(nn.Dense(64)(x))
            return nn.Dense(2)(x)

    model = models.attach(
        Moody(),
        "Dense_1",
        jax.ShapeDtypeStruct((2, 4), jnp.float32),
        call_arguments=lambda train: {"mood": "wild" if train else "calm"},
    )
    params, model_state = jax.jit(model.init)(key)
    assert model_state == {}
    x = np.ones((2, 4), np.float32)
    features = jax.jit(model.features, static_argnames="train")
    calm, _ = features(params, model_state, x)
    wild, _ = features(params, model_state, x, train=True, key=key)
    assert (np.asarray(calm) != 0).all()
    assert 0.2 < np.mean(np.asarray(wild) == 0) < 0.8
