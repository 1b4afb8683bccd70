"""What a user may get wrong, one line a kind: the sentence that it gets, or the value it must give."""

# ruff: noqa: E501 (a table: one line a case)

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import arbiter_jax as aj
from arbiter_jax import base
from tests.script_runs import run_main

S, L, D, M = aj.schedulers, aj.learning_rate, aj.datasets, aj.models
NQ, SMD, PLOT = aj.noisy_quadratic, aj.stochastic_meta_descent, aj.plotting
RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 3)).astype(np.float32)
Y = X @ np.arange(3, dtype=np.float32)
W = jnp.zeros(3)
TX = optax.chain(optax.sgd(0.05), S.constant(10))
NOISE = optax.chain(optax.sgd(0.05), S.gradient_noise_scale(min_batch_size=8, max_batch_size=32))
AGENT = aj.mlp_agent((3,), hidden_sizes=(4,))
PROBLEM = NQ.NoisyQuadratic(jnp.ones(3), jnp.ones(3), jnp.ones(3))
KEY = jax.random.PRNGKey(0)
NAN, INF = float("nan"), float("inf")


def loss_fn(params, batch):
    inputs, labels = batch
    return (inputs @ params - labels) ** 2


def response_loss(params, response, batch):
    inputs, labels = batch
    return (inputs * (1 + response) @ params - labels) ** 2


def fit(**options):
    defaults = {"loss_fn": loss_fn, "params": W, "tx": TX, "data": aj.Data((X, Y))}
    return aj.fit(**(defaults | {"num_examples": 40, "window": 4} | options))


@functools.cache
def trained():
    """The parameters of a plain run, which the same run in other words has to reach."""
    return np.asarray(fit().state.params)


def params_of(**options):
    return fit(**options).state.params


def steps(**options):
    return int(fit(**options).state.num_steps)


def sizes(tx, updates=None, **signals):
    """The decision after one update."""
    _, state = tx.update(W if updates is None else updates, tx.init(W), W, **signals)
    return int(aj.get_batch_size(state))


def stats(**options):
    return aj.gradient_stats(**({"loss_fn": loss_fn, "params": W, "batch": (X, Y)} | options))


def sample(**options):
    arguments = {"state": aj.init_sampler(KEY), "data": X, "batch_size": 4, "bucket_size": 8}
    return aj.sample_batch(**(arguments | options))


def evaluate(**options):
    arguments = {"predict": lambda p, x: x @ p, "per_example_loss": lambda o, y: (o - y) ** 2}
    return aj.metrics.evaluate(**(arguments | {"params": W, "data": (X, Y)} | options))


def arbiter(**options):
    return aj.arbiter(
        **({"agent": AGENT, "response_loss": response_loss, "num_features": 3} | options)
    )


def with_arbiter(**options):
    validation = aj.Data((X, Y), (X, Y))
    return fit(tx=optax.chain(optax.sgd(0.1), arbiter(**options)), data=validation, num_examples=64)


def inject(factory, *static, **arguments):
    tx = optax.inject_hyperparams(factory, static_args=static)(**arguments)
    return jax.jit(lambda state: tx.update(W, state, W)[1])(tx.init(W))


def accumulated(signals):
    """A change that is due at 400 examples, in a loop of one's own with four batches of 50 an update."""
    rule = S.from_schedule(lambda n: jnp.where(n >= 400, 32, 8), count="num_examples")
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.01), rule), 4)
    state, seen = tx.init(W), 0
    for call in range(40):
        given = {"num_examples": seen} if signals else {}
        _, state = tx.update(W, state, W, batch_size=50, **given)
        seen += 50
        if int(aj.get_batch_size(state)) == 32:
            return 50 * (call + 1)
    return None


def offline(**options):
    few = {"horizon": 2, "num_meta_steps": 1, "num_pretraining_steps": 1, "batch_size": 4}
    return SMD.offline(
        **({"loss_fn": loss_fn, "params": W, "data": (X, Y), "key": KEY} | few | options)
    )


def dicts(tree):
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return {name: dicts(getattr(tree, name)) for name in tree._fields}
    return [dicts(part) for part in tree] if isinstance(tree, tuple) else tree


def sets_entry(record, state):
    state.params["w"] = jnp.full(3, 1e6)


def poisoned_batch_norm():
    """Model state after a bad row: that of the steps that were not skipped."""
    inputs = np.where(np.arange(50)[:, None] == 7, NAN, X).astype(np.float32)

    def loss(params, batch, model_state, mask, key):
        return loss_fn(params, batch), jnp.mean(batch[0])

    tx = optax.apply_if_finite(TX, 100)
    result = fit(loss_fn=loss, tx=tx, data=aj.Data((inputs, Y)), model_state=jnp.float32(0))
    return bool(jnp.isfinite(result.state.model_state))


def frozen_decides(frozen):
    """The size where half of the parameters, which are all noise, are frozen or left out."""

    def loss(params, batch):
        noise = jax.lax.stop_gradient(params["b"]) if frozen == "stop" else params["b"]
        return loss_fn(params["w"], batch) + 30 * batch[0] @ noise

    groups = {"train": optax.sgd(0.01), "freeze": optax.set_to_zero()}
    optimizer = optax.sgd(0.01)
    if frozen == "group":
        optimizer = optax.multi_transform(groups, {"w": "train", "b": "freeze"})
    tx = optax.chain(optimizer, S.gradient_noise_scale(min_batch_size=8, max_batch_size=512))
    result = fit(loss_fn=loss, params={"w": W, "b": W}, tx=tx, num_examples=80)
    return int(result.history[-1].batch_size)


def hypergradient(dtype):
    tx = L.sgd_hd(0.1, 1.0)
    params, grads = jnp.ones(4, dtype), jnp.full(4, 1e-4, dtype)
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(grads, state, params)
    return float(state.hypergradient)


def head_by_keyword():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="body")(x)
            return nn.Dense(1, name="head")(inputs=x)

    model = M.attach(Net(), "head", X[:2])
    params, model_state = model.init(KEY)
    features = model.features(params, model_state, X[:5])
    features = features[0] if isinstance(features, tuple) else features
    return features.shape


@dataclasses.dataclass(frozen=True)
class Case:
    """One input: what it is called, what the user does, and what has to come of it."""

    name: str
    call: Callable[[], Any]
    expected: Any = None  # a value
    error: str | None = None  # how the sentence begins: it names the argument
    warns: str | None = None


def E(name, call, error):  # noqa: N802
    return Case(name, call, error=error)


def V(name, call, expected):  # noqa: N802
    return Case(name, call, expected)


def U(name, call, warns):  # noqa: N802
    return Case(name, call, warns=warns)


def like_trained(call):
    return lambda: np.allclose(call(), trained(), rtol=0.02)


# fmt: off
LOSSES = [
    E("outputs [M, 1] minus labels [M]", lambda: fit(loss_fn=lambda p, b: (b[0] @ p)[:, None] - b[1]), "loss_fn must return one loss per example"),
    E("the mean loss", lambda: fit(loss_fn=lambda p, b: loss_fn(p, b).mean()), r"loss_fn must return .* shape \(\): return the losses"),
    E("integer losses", lambda: fit(loss_fn=lambda p, b: loss_fn(p, b).astype(int)), "loss_fn must return .* int32: integers and booleans"),
    E("boolean losses", lambda: fit(loss_fn=lambda p, b: loss_fn(p, b) > 1), "loss_fn must return .* bool: integers and booleans"),
    E("complex losses", lambda: fit(loss_fn=lambda p, b: loss_fn(p, b) + 0j), "loss_fn must return .* return a real number"),
    E("no losses", lambda: fit(loss_fn=lambda p, b: None), "loss_fn must return .* got None"),
    E("a dict of losses", lambda: fit(loss_fn=lambda p, b: {"loss": loss_fn(p, b)}), "loss_fn must return .* got a dict of 1"),
    E("losses and aux without has_aux", lambda: fit(loss_fn=lambda p, b: (loss_fn(p, b), 1.0)), "loss_fn must return .* pass has_aux=True"),
    E("has_aux without aux", lambda: fit(has_aux=True), r"loss_fn must return \(losses, aux\), got a traced"),
    E("has_aux that is text", lambda: fit(has_aux="no"), "has_aux must be True or False, got 'no'"),
    E("aux that is text", lambda: fit(loss_fn=lambda p, b: (loss_fn(p, b), "hi"), has_aux=True), "aux, which loss_fn returns"),
    E("one loss too few", lambda: fit(loss_fn=lambda p, b: loss_fn(p, b)[1:]), r"loss_fn must return .* shape \(15,\)"),
    E("weights of another shape", lambda: fit(loss_fn=lambda p, b: aj.WeightedLoss(loss_fn(p, b), jnp.ones(3))), "loss_fn must return"),
    E("five arguments without model_state", lambda: fit(loss_fn=lambda p, b, s, m, k: (loss_fn(p, b), s)), "loss_fn must be a function .* needs model_state"),
    E("no loss function", lambda: fit(loss_fn=None), "loss_fn must be given, or gradient_fn"),
    E("a loss that is text", lambda: fit(loss_fn="mse"), "loss_fn must be a function .* got 'mse'"),
    V("losses and aux", lambda: fit(loss_fn=lambda p, b: (loss_fn(p, b), {"labels": b[1]}), has_aux=True).history[0].info.aux["labels"].shape, (4, 16)),
    V("losses in float16", like_trained(lambda: params_of(loss_fn=lambda p, b: loss_fn(p, b).astype(jnp.float16))), True),
    V("a loss without any parameter", lambda: params_of(loss_fn=lambda p, b: b[1]), W),
    U("losses that are nan", lambda: fit(loss_fn=lambda p, b: loss_fn(p, b) * NAN), "4 of 4 steps had a loss that was not finite"),
]
DATA = [
    E("a tuple as data", lambda: fit(data=(X, Y)), r"data must be aj\.Data\(train, validation\)"),
    E("a generator as data", lambda: fit(data=iter([(X, Y)])), r"data must be aj\.Data.*host_blocks"),
    E("text labels", lambda: fit(data=aj.Data((X, Y.astype(str)))), r"data\.train\[1\] must be an array of numbers, got dtype <U"),
    E("labels beyond int32", lambda: fit(data=aj.Data((X, np.full(50, 2**40)))), r"data\.train\[1\] must fit into int32"),
    E("arrays of two lengths", lambda: fit(data=aj.Data((X, Y[:7]))), r"data\.train must be .* one leading axis of equal length"),
    E("no examples", lambda: fit(data=aj.Data((X[:0], Y[:0]))), r"data\.train must hold at least 1 example"),
    E("a set", lambda: fit(data=aj.Data({1, 2})), r"data\.train must be an array of numbers, got a set"),
    V("a dict as a batch", like_trained(lambda: params_of(data=aj.Data({"x": X, "y": Y}), loss_fn=lambda p, b: loss_fn(p, (b["x"], b["y"])))), True),
    V("a list as a batch", like_trained(lambda: params_of(data=aj.Data([X, Y]))), True),
    V("float64 arrays", like_trained(lambda: params_of(data=aj.Data((X.astype(float), Y.astype(float))))), True),
    V("one example", lambda: steps(data=aj.Data((X[:1], Y[:1]))), 4),
    V("fewer examples than a batch", lambda: steps(data=aj.Data((X[:4], Y[:4]))), 4),
    V("nan labels under apply_if_finite", lambda: jnp.isfinite(_quietly(lambda: params_of(data=aj.Data((X, Y * NAN)), tx=optax.apply_if_finite(TX, 9)))), jnp.ones(3, bool)),
    U("nan inputs", lambda: fit(data=aj.Data((X * NAN, Y))), "4 of 4 steps had a loss that was not finite"),
    U("a source of one epoch", lambda: _ends_early(), r"data\.train ended after 50 of 400 examples"),
]
NUMBERS = [
    E("num_examples as a float", lambda: fit(num_examples=40.0), r"num_examples must be an integer >= 1, got 40\.0"),
    E("a window of nothing", lambda: fit(window=0), "window must be an integer >= 1, got 0"),
    E("stop_at beyond the budget", lambda: fit(stop_at=50), "stop_at must be an integer >= 1 and <= 40, got 50"),
    E("a budget that is traced", lambda: jax.jit(lambda n: fit(num_examples=n).state.params)(40), "num_examples must be known"),
    V("a window of one step", like_trained(lambda: params_of(window=1)), True),
    V("a bucket of no power of two", lambda: int(sample(batch_size=12, bucket_size=12)[2].sum()), 12),
    U("a budget of less than a batch", lambda: fit(num_examples=9), "fit has trained nothing"),
    U("a leg of less than a batch", lambda: fit(num_examples=99, stop_at=9), "raise stop_at or let"),
    E("next_bucket of a float", lambda: aj.next_bucket(2.5), r"n must be an integer >= 1, got 2\.5"),
    E("all_buckets backwards", lambda: aj.all_buckets(8, 4), "maximum must be >= minimum"),
    E("a batch size that is text", lambda: sample(batch_size="4"), "batch_size must be an integer >= 0, got '4'"),
    E("half an example", lambda: sample(batch_size=2.5), r"batch_size must be an integer >= 0, got 2\.5"),
    E("a bucket of no rows", lambda: sample(bucket_size=0), "bucket_size must be an integer >= 1, got 0"),
    E("a key in place of a sampler", lambda: sample(state=KEY), "state must be a SamplerState"),
    E("text to sample from", lambda: sample(data=np.array(["a", "b"])), "data must be an array of numbers, got dtype <U1"),
    E("to_logit of an empty range", lambda: aj.to_logit(8, 8, 8), "max_batch_size must be > min_batch_size"),
    E("to_logit of text", lambda: aj.to_logit("8", 8, 512), "batch_size must be a number .* got '8'"),
    E("to_batch_size of nothing", lambda: aj.to_batch_size(None, 8, 512), "logit must be a number .* got None"),
    V("to_batch_size of nan", lambda: int(aj.to_batch_size(NAN, 8, 512)), 8),
]
STATES = [
    E("a state that Orbax restored as dicts", lambda: fit(state=dicts(aj.init_state(W, TX, 0))), r"state must be an aj\.TrainState, got a dict .* Orbax"),
    E("a FitResult as state", lambda: fit(state=fit()), r"state must be an aj\.TrainState, got a FitResult: pass result\.state"),
    E("a state of another chain", lambda: fit(state=aj.init_state(W, optax.chain(optax.adam(0.1), S.constant(10)), 0)), "state must be one of the given tx"),
    E("a state of several seeds", lambda: fit(state=jax.vmap(lambda k: aj.init_state(W, TX, k))(jax.random.split(KEY))), "state must be one of the given tx"),
    E("integer parameters", lambda: fit(params=jnp.zeros(3, int)), "params must hold floating-point arrays, got int32"),
    E("an integer among parameters", lambda: fit(params={"w": W, "n": 3}, loss_fn=lambda p, b: loss_fn(p["w"], b)), r"params must hold .* at params\['n'\]"),
    E("a key among parameters", lambda: fit(params={"w": W, "k": jax.random.key(0)}, loss_fn=lambda p, b: loss_fn(p["w"], b)), r"params must hold .* params\['k'\]"),
    E("no parameters", lambda: fit(params=None), "params must be a pytree of arrays, got None"),
    E("model state that is text", lambda: fit(model_state="x"), "model_state must be an array of numbers, got 'x'"),
    E("the state of no rule", lambda: aj.get_batch_size(optax.sgd(0.1).init(W)), r"opt_state must hold exactly one batch-size rule .* found none.* whole chain, tx\.init\(params\)"),
    E("next_window of traced numbers", lambda: jax.jit(aj.next_window)(TX.init(W)), "opt_state must hold numbers, got traced"),
    E("re_anchor of no arbiter", lambda: aj.re_anchor(TX.init(W), 16), r"opt_state must hold the state of an aj\.arbiter"),
    E("re_anchor out of range", lambda: aj.re_anchor(arbiter().init(W), 10**6), "batch_size must be an integer >= 8 and <= 512, got 1000000"),
    E("re_anchor to half an example", lambda: aj.re_anchor(arbiter().init(W), 16.5), "batch_size must be an integer .* got 16.5"),
    V("the shapes of a state", lambda: aj.get_batch_size(jax.eval_shape(S.noise_floor(num_examples=9).init, W)).dtype, np.int32),
    V("a complex parameter", like_trained(lambda: params_of(params=W + 0j, loss_fn=lambda p, b: jnp.abs(b[0] @ p - b[1]) ** 2).real), True),
    V("float16 parameters", like_trained(lambda: params_of(params=W.astype(jnp.float16))), True),
    V("bfloat16 parameters", lambda: params_of(params=W.astype(jnp.bfloat16)).dtype, jnp.bfloat16),
    V("a parameter of no entries", like_trained(lambda: params_of(params={"w": W, "e": jnp.zeros((0, 3))}, loss_fn=lambda p, b: loss_fn(p["w"], b))["w"]), True),
    V("a state of a larger range", lambda: _resumed_range(), [8]),
    V("a state with all examples seen", lambda: steps(state=fit().state), 4),
]
KEYS = [
    *[E(f"a key {key!r}", functools.partial(fit, key=key), "key must be one PRNG key") for key in (None, -1, 2**32, 0.5, True, "seed")],
    E("several keys", lambda: fit(key=jax.random.split(KEY)), "params must have a leading axis of 2"),
    E("a key of another implementation", lambda: fit(key=jax.random.key(0, impl="rbg")), "key must be of the implementation 'threefry2x32'"),
    E("a sampler without a key", lambda: aj.init_sampler(None), r"key must be an integer >= 0 .* got None"),
    E("a sampler of a negative seed", lambda: aj.init_sampler(-1), r"key must be an integer >= 0 .* got -1"),
    E("offline without a key", lambda: offline(key=None), "key must be one PRNG key"),
    E("an arbiter with a seed that is text", lambda: arbiter(seed="x"), "seed must be an integer or one PRNG key"),
    V("a typed key", lambda: aj.init_state(W, TX, jax.random.key(7)).key, aj.init_state(W, TX, 7).key),
]
FUNCTIONS = [
    E("an optimizer that was not called", lambda: fit(tx=optax.sgd), "tx must be an optax .* call it first"),
    E("a list of transformations", lambda: fit(tx=[TX]), r"tx must be an optax .* optax\.chain\(\*tx\)"),
    E("a chain without a rule", lambda: fit(tx=optax.sgd(0.1)), r"tx must hold exactly one batch-size rule .* found none\. aj\.schedulers\.constant"),
    E("two rules", lambda: fit(tx=optax.chain(TX, S.constant(3))), r"tx must hold exactly one .* ConstantState, ConstantState\. Wrap .*shadow"),
    E("a gradient function that is text", lambda: fit(loss_fn=None, gradient_fn="sgd"), "gradient_fn must be a function"),
    E("a gradient function of nothing", lambda: fit(loss_fn=None, gradient_fn=lambda p, b, m, s, k: None), "gradient_fn must return"),
    E("transform_batch of one argument", lambda: fit(transform_batch=lambda b: b), "transform_batch must be a function"),
    E("transform_batch that drops rows", lambda: fit(transform_batch=lambda k, b: jax.tree.map(lambda x: x[:3], b)), "transform_batch must return a batch of the 16 rows"),
    E("inputs_of that is no function", lambda: fit(inputs_of="x"), "inputs_of must be a function inputs_of"),
    E("callbacks that are text", lambda: fit(callbacks=["log"]), "callbacks must be functions .* got 'log'"),
    E("a callback of one argument", lambda: fit(callbacks=lambda record: None), r"callbacks must be functions .* that takes \(record\)"),
    E("a callback that returns parameters", lambda: fit(callbacks=lambda record, state: state.params), r"callbacks must return True .* shape \(3,\)"),
    E("fit inside jit", lambda: jax.jit(lambda p: fit(params=p).state.params)(W), "params must hold arrays with values, got traced ones"),
    E("fit inside vmap", lambda: jax.vmap(lambda p: fit(params=p).state.params)(W[None]), "params must hold arrays with values"),
    E("fit inside grad", lambda: jax.grad(lambda p: fit(params=p).state.params.sum())(W), "params must hold arrays with values"),
    V("one callback without a list", like_trained(lambda: params_of(callbacks=lambda record, state: None)), True),
    V("a callback that sets the parameters", like_trained(lambda: params_of(params={"w": W}, callbacks=sets_entry, window=2, loss_fn=lambda p, b: loss_fn(p["w"], b))["w"]), True),
    E("statistics of no loss", lambda: stats(loss_fn=None), "loss_fn must be a function"),
    E("statistics of no parameters", lambda: stats(params=None), "params must hold floating-point arrays, got None"),
    E("a mask of another length", lambda: stats(mask=jnp.ones(3, bool)), r"mask must be bool\[50\]"),
    E("weights as a mask", lambda: stats(mask=jnp.full(50, 0.5)), r"mask must be bool\[50\].*WeightedLoss"),
    E("a preconditioner of another shape", lambda: stats(preconditioner=jnp.ones(4)), "preconditioner must be a pytree like params"),
    E("three pieces", lambda: stats(num_pieces=3), "num_pieces must be a power of two"),
    E("statistics of text", lambda: stats(batch=(X, Y.astype(str))), r"batch\[1\] must be an array of numbers"),
    E("statistics of an unknown axis", lambda: stats(method="per_device", axis_name="i"), "axis_name must be an axis of"),
    E("no trainable parameter", lambda: stats(trainable=False), "trainable must be a pytree of bools"),
    V("statistics of one example", lambda: np.isnan(stats(batch=(X[:1], Y[:1])).variance_trace), True),
    V("statistics of a dict", lambda: float(stats(batch={"x": X, "y": Y}, loss_fn=lambda p, b: loss_fn(p, (b["x"], b["y"]))).batch_size), 50.0),
    E("a subset of no gradients", lambda: aj.select_subset(jnp.zeros((0, 2))), "per_example_grads must be float"),
    E("a subset mask of another length", lambda: aj.select_subset(jnp.ones((3, 2)), mask=jnp.ones(2)), r"mask must be bool\[3\]"),
    E("a subset by an unknown metric", lambda: aj.select_subset(jnp.ones((3, 2)), "best"), "metric must be one of"),
    E("subsets of no loss", lambda: aj.subset_gradients(None), "loss_fn must be a function"),
    E("the persistence of no optimizer", lambda: aj.impulse_response(optax.sgd), "tx must be an optax gradient transformation.* call it first"),
]
RULES = [
    *[E(f"{name} from {low} to {high}", functools.partial(getattr(S, name), min_batch_size=low, max_batch_size=high), f"{argument} must be")
      for name in ("adadamp", "norm_test", "simigrad", "goodput", "gradient_noise_scale")
      for low, high, argument in ((0, 8, "min_batch_size"), (16, 8, "max_batch_size"), (2.5, 8, "min_batch_size"))],
    E("a size of nothing", lambda: S.constant(0), "batch_size must be an integer"),
    E("a rate that is text", lambda: S.cabs("0.1"), "learning_rate must be"),
    E("a rate that is nan", lambda: S.cabs(NAN), "learning_rate must be a finite number"),
    E("a schedule that is a number", lambda: S.from_schedule(32), "schedule must be a function"),
    E("a schedule of something else", lambda: S.from_schedule(lambda n: 8, count="epochs"), "count must be one of"),
    E("boundaries that are one number", lambda: S.smith(100, 1000), "boundaries must be a tuple of counts, got 100"),
    E("boundaries that fall", lambda: S.smith((200, 100), 1000), "boundaries must increase"),
    E("candidates that are one number", lambda: S.goodput(candidates=8), "candidates must be a tuple of batch sizes, got 8"),
    E("an objective that is text", lambda: S.from_objective("noise_floor"), "objective must be"),
    E("an unknown noise response", lambda: aj.noise_response("x"), "kind must be one of"),
    E("two budgets", lambda: fit(tx=optax.chain(optax.sgd(0.1), S.noise_floor(num_examples=80))), "num_examples must be 80, the budget"),
    V("a schedule that is nan", lambda: sizes(S.from_schedule(lambda n: NAN, initial_batch_size=16)), 16),
    V("a schedule beyond the range", lambda: sizes(S.from_schedule(lambda n: INF, max_batch_size=64)), 64),
    V("a loss that is nan", lambda: sizes(S.adadamp(initial_batch_size=16), value=NAN), 16),
    V("a range of one size", lambda: [r.batch_size for r in fit(tx=optax.chain(optax.sgd(0.05), S.gradient_noise_scale(min_batch_size=8, max_batch_size=8))).history], [8, 8]),
    V("a batch of one", lambda: int(aj.get_batch_size(S.norm_test(min_batch_size=1).init(W))), 2),
    V("a budget beyond 2^31", lambda: sizes(S.from_schedule(lambda n: jnp.where(n > 2.9e9, 32, 8), count="num_examples"), num_examples=base.as_count(3 * 10**9), batch_size=8), 32),
]
WRAPPERS = [
    E("hysteresis of no rule", lambda: S.hysteresis(None), "rule must be an optax gradient transformation, got None"),
    E("hysteresis of an optimizer", lambda: S.hysteresis(optax.sgd(0.1)).init(W), "rule must hold exactly one batch-size rule"),
    E("shadow of a shadow", lambda: S.shadow(S.shadow(S.norm_test())).init(W), "rule must hold exactly one batch-size rule"),
    E("a shadow alone", lambda: fit(tx=optax.chain(optax.sgd(0.1), S.shadow(S.norm_test()))), "tx must hold exactly one batch-size rule"),
    E("a shadow without a name", lambda: S.shadow(S.norm_test(), name=""), "name must be a string that is not empty"),
    E("a rule behind a mask", lambda: optax.masked(S.dive_batch(64), {"w": True, "b": False}).init({"w": W, "b": W}), "dive_batch must see all parameters"),
    E("an arbiter behind a mask", lambda: optax.masked(arbiter(), {"w": True, "b": False}).init({"w": W, "b": W}), "arbiter must see all parameters"),
    E("an injected structure", lambda: inject(L.autowu, steps_per_epoch=5, num_epochs=5), r"steps_per_epoch.* must be known while tracing.* static_args="),
    E("an injected function", lambda: inject(S.from_schedule, schedule=lambda n: jnp.asarray(16.0)), r"schedule must be a function .* static_args=\(\"schedule\",\)"),
    V("an injected number", lambda: int(aj.get_batch_size(inject(S.constant, batch_size=32))), 32),
    V("hysteresis of hysteresis", lambda: sizes(S.hysteresis(S.hysteresis(S.constant(10)))), 10),
    V("MultiSteps itself", lambda: steps(tx=optax.MultiSteps(TX, 2)), 4),
    V("apply_if_finite twice", like_trained(lambda: params_of(tx=optax.apply_if_finite(optax.apply_if_finite(TX, 2), 2))), True),
    V("accumulation with a ledger", lambda: accumulated(True), 400),
    V("progress of accumulation", lambda: float(fit(tx=optax.MultiSteps(TX, 4)).state.progress), 1.0),
    V("frozen noise in a group", lambda: frozen_decides("group") == frozen_decides("stop"), True),
    V("a bad row and BatchNorm", lambda: _quietly(poisoned_batch_norm), True),
]
LEARNING_RATES = [
    E("a negative rate", lambda: L.sgd_hd(-0.1, 0.1), r"learning_rate must be a finite number >= 0, got -0\.1"),
    E("a rate beyond its range", lambda: L.sgd_hd(2.0, 0.1, max_learning_rate=1.0), r"learning_rate must be in \[0\.0, 1\.0\]"),
    E("momentum of one", lambda: L.sgd_hd(0.1, 0.1, momentum=1.0), "momentum must be in"),
    E("multiplicative as text", lambda: L.adam_hd(0.1, 0.1, multiplicative="no"), "multiplicative must be True or False, got 'no'"),
    E("nesterov as text", lambda: L.adamp(0.1, nesterov="no"), "nesterov must be True or False, got 'no'"),
    E("a channel axis that is not there", lambda: L.adamp(0.1, channel_axis=7), "channel_axis must be one of"),
    E("a reference of nothing", lambda: L.adascale(0), "reference must be an integer"),
    E("an exponent that is nan", lambda: L.scale_by_batch_size(8, NAN), "exponent must be"),
    E("a confidence of one", lambda: L.autowu(5, 10, confidence=1.0), "confidence must be in"),
    E("a schedule of learning rates by number", lambda: L.scale_by_schedule(0.1), "schedule must be a function"),
    V("a hypergradient of small gradients", lambda: hypergradient(jnp.float16) != 0, True),
]
ARBITERS = [
    E("no response and no objective", lambda: aj.arbiter(AGENT), "arbiter takes exactly one of .* got neither"),
    E("a response and an objective", lambda: arbiter(objective=aj.noise_response()), "arbiter takes exactly one of .* got both"),
    E("a function as agent", lambda: arbiter(agent=lambda x: x), r"agent must be an aj\.Agent"),
    E("no num_features", lambda: arbiter(num_features=None), "num_features must be an integer >= 1, got None"),
    E("an optimizer that was not called, again", lambda: arbiter(agent_optimizer=optax.adam), "agent_optimizer must be an optax .* call it first"),
    E("learn_response as text", lambda: arbiter(learn_response="no"), "learn_response must be True or False, got 'no'"),
    E("a window shorter than a hyper-step", lambda: arbiter(window=2, hyper_every=3), "hyper_every must be an integer >= 1 and <= 2"),
    E("no validation", lambda: fit(tx=optax.chain(optax.sgd(0.1), arbiter()), num_examples=64), r"data\.validation must be given, got None"),
    E("an agent of other inputs", lambda: with_arbiter(agent=aj.mlp_agent((5,))), "input_shape of the agent must be"),
    E("a response loss that is a mean", lambda: with_arbiter(response_loss=lambda p, r, b: response_loss(p, r, b).mean()), "response_loss must return one loss per example"),
    E("a response loss [M, M]", lambda: with_arbiter(response_loss=lambda p, r, b: (b[0] @ p)[:, None] - b[1]), "response_loss must return one loss per example"),
    E("an agent without inputs", lambda: aj.mlp_agent(None), "input_shape must be a tuple of integers >= 1, got None"),
    E("hidden sizes that are a number", lambda: aj.mlp_agent((3,), hidden_sizes=64), "hidden_sizes must be a tuple of integers >= 1, got 64"),
    E("a convolution of vectors", lambda: aj.conv_agent((8,)), r"input_shape must be \(height, width, channels\)"),
]
FILES = [
    E("no name", lambda: D.load(None), "name must be"),
    E("bytes as a name", lambda: D.load(b"digits"), "name must be"),
    E("no path", lambda: D.from_npz(None), "path must be"),
    E("ragged lists", lambda: D.from_arrays(([[1, 2], [3]], [0, 1])), "train"),
    E("a fraction of one", lambda: D.from_arrays((X, Y), validation_fraction=1.0), "validation_fraction must be in"),
    E("normalize as text", lambda: D.from_arrays((X, Y), normalize="no"), "normalize must be True or False"),
    E("a source that is no iterable", lambda: D.host_blocks(3, window=4), "source must be"),
    E("a token beyond the vocabulary", lambda: D.decode_text([10**6]), "tokens must be"),
    E("a seed of digits that is text", lambda: D.digits("x"), "seed must be an integer"),
    E("images that are not there", lambda: D.pad_crop_flip(KEY, None), "images must have the shape"),
    E("a shape that is a number", lambda: D.synthetic(100, input_shape=16), "input_shape must be"),
]
METRICS = [
    E("evaluation of nothing", lambda: evaluate(data=None), "data must be"),
    E("evaluation of a dict", lambda: evaluate(data={"x": X, "y": Y}), "data must be"),
    E("no prediction", lambda: evaluate(predict=None), "predict must be"),
    E("outputs [M, 1] minus labels [M], evaluated", lambda: evaluate(predict=lambda p, x: (x @ p)[:, None]), "per_example_loss must return one loss per example"),
    E("a chunk of nothing", lambda: evaluate(chunk_size=0), "chunk_size must be an integer >= 1"),
    E("an interval of text", lambda: aj.metrics.mean_and_interval(["a"]), "values must be"),
    E("a confidence of two", lambda: aj.metrics.mean_and_interval([1.0, 2.0], 2), "confidence must be"),
    V("padding in an accuracy", lambda: _accuracy_with_padding(), 1.0),
    V("outputs and labels that are trees", lambda: evaluate(data=(X, {"y": Y}), predict=lambda p, x: {"y": x @ p}, per_example_loss=lambda o, y: (o["y"] - y["y"]) ** 2).loss, evaluate().loss),
]
MODELS = [
    E("a network without inputs", lambda: M.mlp(None), "input_shape must be"),
    E("an integer network", lambda: M.mlp((4,), dtype=int), "dtype must be"),
    E("losses of no model", lambda: M.make_losses(None, loss_fn), "model must be"),
    E("attach without a head", lambda: M.attach(nn.Dense(3), None, X[:2]), "head must be"),
    E("attach to an unknown head", lambda: M.attach(nn.Dense(3), "nope", X[:2]), "head"),
    E("attach to a list", lambda: M.attach(nn.Dense(3), "head", [[1.0, 2.0]]), "sample_input"),
    V("a head called by keyword", head_by_keyword, (5, 4)),
]
REST = [
    E("pictures of no runs", lambda: PLOT.losses({}), "fits must hold at least one run"),
    E("pictures of a list", lambda: PLOT.batch_sizes([1], (8, 64)), r"fits must be a dict"),
    E("one limit alone", lambda: PLOT.batch_sizes({("a", 0): fit()}, (16,)), "limits must be"),
    E("proposals of no run", lambda: PLOT.proposals(3, (8, 64)), "fit must be a FitResult, got int"),
    E("proposals of a run without them", lambda: PLOT.proposals(fit(), (8, 64)), "fit must be a run with"),
    E("no problem", lambda: NQ.rollout(None, jnp.ones(2)), "problem must be"),
    E("rates that are nan", lambda: NQ.rollout(PROBLEM, [NAN]), "learning_rates"),
    E("momentum that is text", lambda: NQ.greedy_schedule(PROBLEM, 2, momentum="no"), "momentum must be one of"),
    E("a schedule beyond int32", lambda: NQ.greedy_schedule(PROBLEM, 10**30), "num_steps must be an integer"),
    E("batch sizes of nothing", lambda: NQ.rollout_batch_sizes(PROBLEM, [0.0], 100, 0.1), "batch_sizes"),
    E("meta-descent without a loss", lambda: offline(loss_fn=None), "loss_fn must be"),
    E("meta-descent without data", lambda: offline(data=None), "data must"),
    E("meta-descent on integers", lambda: offline(params=jnp.zeros(3, int)), "params must"),
    E("nothing to learn", lambda: offline(learned=()), "learned must name"),
    E("an unknown hyperparameter", lambda: offline(learned=("rate",)), "learned must be one of"),
    E("a factory as meta optimizer", lambda: offline(meta_optimizer=optax.adam), "meta_optimizer must be"),
    E("reset_meta_state as text", lambda: offline(reset_meta_state="no"), "reset_meta_state must be True or False"),
]
# fmt: on


def _quietly(call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def _ends_early():
    source = D.epochs((X, Y), chunk_size=50)
    with D.host_blocks(iter([next(source)]), window=4) as blocks:
        return fit(data=aj.Data(blocks), num_examples=400)


def _resumed_range():
    make = lambda high: optax.chain(optax.sgd(0.1), S.adadamp(max_batch_size=high))
    state = aj.init_state(W, make(64), 0)
    rule = state.opt_state[1]._replace(batch_size=jnp.int32(64))
    state = state._replace(opt_state=(state.opt_state[0], rule))
    return sorted({r.batch_size for r in fit(state=state, tx=make(8)).history})


def _accuracy_with_padding():
    labels = jnp.where(jnp.arange(8) < 5, jnp.arange(8) % 3, -1)[None].repeat(4, 0)
    outputs = jax.nn.one_hot(labels, 3) * 9
    loss = M.token_cross_entropy
    return evaluate(data=(outputs, labels), predict=lambda p, x: x, per_example_loss=loss).accuracy


AREAS = {
    "losses": LOSSES, "data": DATA, "numbers": NUMBERS, "states": STATES, "keys": KEYS,
    "functions": FUNCTIONS, "rules": RULES, "wrappers": WRAPPERS,
    "rates": LEARNING_RATES, "arbiter": ARBITERS, "files": FILES, "metrics": METRICS,
    "models": MODELS, "rest": REST,
}  # fmt: skip
CASES = [pytest.param(c, id=f"{area}-{c.name}") for area, cases in AREAS.items() for c in cases]
INSIDE = re.compile(r"Tracer|Concretization|pjit|jaxpr|[Aa]bstract|in_axes|scan body|\blax\.")


@pytest.fixture(autouse=True)
def _as_users_have_it():
    """The tests forbid that ranks are promoted; nearly no user does."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("case", CASES)
def test_misuse(case):
    if case.error is not None:
        with pytest.raises(ValueError, match=f"^{case.error}") as caught:
            case.call()
        message = str(caught.value)
        assert not INSIDE.search(message), message
        assert len(message) <= 400, message
        assert len(re.findall(r"\. [A-Z]", message)) <= 1, message
    elif case.warns is not None:
        with pytest.warns(UserWarning, match=case.warns):
            case.call()
    else:
        found = case.call()
        if isinstance(case.expected, jax.Array | np.ndarray):
            np.testing.assert_array_equal(found, case.expected)
        else:
            assert found == case.expected


def test_every_kind_is_there():
    assert len(CASES) >= 150
    names = [case.values[0].name for case in CASES]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 50


# The command line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--seeds", "one"], "--seeds"),
        (["--learning-rates", "nan"], "--learning-rates"),
        (["--dataset", "nope"], "nope"),
    ],
)
def test_a_wrong_command_is_one_line(flags, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run_main("standalone_scheduler", ["--output", str(tmp_path), *flags])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
