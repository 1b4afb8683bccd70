"""Official examples in a loop of one's own: few changed lines, and the losses that `fit` has."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import arbiter_jax as aj
from arbiter_jax.batching._batch_norm import mask_batch_norms
from tests.script_runs import (
    BUDGET,
    NUM_VALIDATION,
    RULES,
    SCRIPTS,
    changed_lines,
    load,
    run_fit,
)

NUM_STEPS = 6
IMAGE = (8, 8, 1)


@functools.cache
def digits():
    return aj.datasets.digits()


def examples(form, split="train"):
    """A split of the digits in the form that a script takes."""
    images, labels = getattr(digits(), split)
    if split != "train":
        images, labels = images[:NUM_VALIDATION], labels[:NUM_VALIDATION]
    if form == "dict":
        return {"image": images, "label": labels}
    return (images.reshape(len(images), -1), labels) if form == "flat" else (images, labels)


def pieces(form, chunk_size=50):
    return aj.datasets.epochs(examples(form), chunk_size=chunk_size)


def chain(rule=None, shape=IMAGE):
    # Not Adam: it makes steps of full length from the rounding errors of a bias before BatchNorm,
    # whose gradient is zero.
    optimizer = optax.sgd(0.05, momentum=0.9)
    return optax.chain(optimizer, *([] if rule is None else [RULES[rule](shape)]))


class Loader:
    """Stands in for a DataLoader of torch: lists of arrays, shuffled."""

    def __init__(self, dataset, batch_size):
        self.dataset, self.batch_size = dataset, batch_size

    def __len__(self):
        return len(self.dataset[1]) // self.batch_size

    def __iter__(self):
        order = np.random.default_rng(0).permutation(len(self.dataset[1]))
        for i in range(len(self)):
            rows = order[i * self.batch_size :][: self.batch_size]
            yield [x[rows] for x in self.dataset]


@pytest.mark.parametrize("name", SCRIPTS)
def test_at_most_eight_lines(name):
    """Besides the rule in the chain, which is given to each script."""
    lines = changed_lines(name)
    assert 3 <= len(lines) <= 8, "\n".join(lines)


def numbered(source):
    """Examples with the number of each."""
    start = 0
    for chunk in source:
        end = start + len(chunk["label"])
        yield chunk | {"number": np.arange(start, end, dtype=np.int32)}
        start = end


def fit_nnx(tx):
    """The script's model as pure functions: everything but the parameters is its state."""
    script = load("nnx_mnist_adaptive")
    model = script.CNN(rngs=nnx.Rngs(0))
    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params, batch, rest, mask, key):
        # `fit` deals rows out; dropout, which draws by row, is to see them as the loop does.
        order = jnp.argsort(jnp.where(mask, batch["number"], BUDGET))
        batch = jax.tree.map(lambda x: x[order], batch)
        model = nnx.merge(graph, params, rest, copy=True)
        mask_batch_norms(model, mask[order])
        losses, _ = script.loss_fn(model, batch)
        kept = nnx.state(model, nnx.Any(nnx.BatchStat, nnx.RngState))
        return losses[jnp.argsort(order)], kept

    return run_fit(
        loss_fn,
        params,
        tx,
        numbered(pieces("dict")),
        examples("dict", "validation"),
        NUM_STEPS,
        model_state=rest,
        inputs_of=lambda batch: batch["image"],
    )


def fit_linen(tx):
    script = load("linen_batch_norm_adaptive")
    held_out = examples("image", "validation")
    mlp = script.MLP()
    model_state, params = flax.core.pop(mlp.init(jax.random.key(0), held_out[0], False), "params")
    model = aj.models.attach(mlp, "Dense_1", held_out[0])
    loss_fn = aj.models.make_losses(model, script.softmax_loss).loss_fn
    source = pieces("image")
    return run_fit(loss_fn, params, tx, source, held_out, NUM_STEPS, model_state=model_state)


def fit_loader(tx, loader):
    script = load("torch_loader_adaptive")
    params = script.init_network_params([64, 32, 10], jax.random.key(0))
    return run_fit(script.loss, params, tx, loader, examples("flat", "validation"), NUM_STEPS)


def run_nnx(rule):
    tx = chain(rule)
    held_out = examples("dict", "validation")
    model, history = load("nnx_mnist_adaptive").train(tx, pieces("dict"), held_out, NUM_STEPS)
    losses = [float(metrics["loss"]) for metrics in history]
    result, *expected = fit_nnx(tx)
    trained = nnx.state(model, nnx.Param), result.state.params
    return trained, losses, expected


def run_linen(rule):
    tx = chain(rule)
    held_out = examples("image", "validation")
    state, losses = load("linen_batch_norm_adaptive").train(
        tx, pieces("image"), held_out, NUM_STEPS
    )
    result, *expected = fit_linen(tx)
    trained = (state.params, state.model_state), (result.state.params, result.state.model_state)
    return trained, losses, expected


def run_loader(rule, make=lambda: Loader(examples("flat"), 24)):
    tx = chain(rule, shape=(64,))
    script = load("torch_loader_adaptive")
    params, losses = script.train(tx, make(), examples("flat", "validation"), NUM_STEPS)
    result, *expected = fit_loader(tx, make())
    return (params, result.state.params), losses, expected


RUNS = {"nnx_mnist": run_nnx, "linen_batch_norm": run_linen, "torch_loader": run_loader}
IN_CI = {  # a rule a loop
    ("nnx_mnist", "gradient_noise_scale"),
    ("linen_batch_norm", "noise_floor"),
    ("torch_loader", "arbiter"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        pytest.param(name, rule, marks=() if (name, rule) in IN_CI else pytest.mark.exhaustive)
        for name in RUNS
        for rule in RULES
    ],
)
def test_losses_are_those_of_fit(name, rule):
    (own, theirs), losses, (expected, sizes) = RUNS[name](rule)
    assert len(set(sizes)) > 1
    np.testing.assert_allclose(losses[:-1], expected, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        jax.tree.leaves(own),
        jax.tree.leaves(theirs),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_plain_version_learns(name):
    form = {"nnx_mnist": "dict", "linen_batch_norm": "image", "torch_loader": "flat"}[name]
    _, losses = load(name).train(chain(), pieces(form, 32), examples(form, "validation"), 40)
    losses = [float(x["loss"] if isinstance(x, dict) else x) for x in losses]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.slow
def test_a_loader_of_torch():
    torch = pytest.importorskip("torch")
    images, labels = examples("flat")
    dataset = list(zip(images, labels, strict=True))
    collate = load("torch_loader").numpy_collate

    def make():
        order = torch.Generator().manual_seed(0)
        options = {"shuffle": True, "generator": order, "collate_fn": collate}
        return torch.utils.data.DataLoader(dataset, batch_size=24, **options)

    (own, theirs), losses, (expected, _) = run_loader("noise_floor", make)
    np.testing.assert_allclose(losses[:-1], expected, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), own, theirs)
