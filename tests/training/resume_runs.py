"""Runs that are stopped and gone on with; as a program, one run that may be killed.

    python -m tests.training.resume_runs CHAIN KIND DIRECTORY RESULT

trains, or goes on from what lies in the directory, prints a line a window and writes the result.
"""

import functools
import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import arbiter_jax as aj
from arbiter_jax import datasets
from arbiter_jax.batching import masked_mean
from tests.rules import ARBITERS, NUM_FEATURES, RULES

WINDOW, NUM_EXAMPLES = 4, 1000
BUDGETS = dict.fromkeys(["arbiter_noise_response", "noise_floor", "seesaw"], 400)  # built for it
LIMITS = {"min_batch_size": 4, "max_batch_size": 32, "initial_batch_size": 10}
CHAINS = {**RULES, **ARBITERS}
NAMES = [*sorted(CHAINS), "multi_steps"]
KINDS = ["resident", "streamed", "batch_norm"]


@functools.cache
def chain(name, kind):
    if name == "multi_steps":
        return optax.MultiSteps(chain("gradient_noise_scale", kind), 3).gradient_transformation()
    if name == "arbiter":  # its response loss is given the state of a model that has one
        agent = aj.mlp_agent((NUM_FEATURES,), hidden_sizes=(4,))
        respond = lambda params, response, batch, *model_state: loss_fn(
            params | {"w": params["w"] * (1 + response)}, batch
        )
        rule = aj.arbiter(agent, respond, num_features=NUM_FEATURES, window=2, **LIMITS)
    elif name in ("expected_gain", "from_objective"):  # so is their loss
        loss = loss_with_norm if kind == "batch_norm" else loss_fn
        options = {"measure_every": 2, "step_cost": "measured"} if name == "expected_gain" else {}
        rule = aj.schedulers.expected_gain(loss, **options, **LIMITS)
    else:
        rule = CHAINS[name].make(**LIMITS)
    return optax.chain(optax.adam(0.02), rule)


def loss_fn(params, batch):
    inputs, labels = batch
    return (inputs @ params["w"] + params["b"] - labels) ** 2


def loss_with_norm(params, batch, model_state, mask, key):
    """Batch normalization of the outputs, in a few lines."""
    inputs, labels = batch
    outputs = inputs @ params["w"]
    mean = masked_mean(outputs, mask)
    variance = masked_mean((outputs - mean) ** 2, mask)
    normed = (outputs - mean) * jax.lax.rsqrt(variance + 1e-3)
    dropped = jax.random.bernoulli(key, 0.9, labels.shape) * normed
    state = jax.tree.map(
        lambda old, new: 0.9 * old + 0.1 * new, model_state, {"mean": mean, "variance": variance}
    )
    return (dropped + params["b"] - labels) ** 2, state


def draw(seed, num_examples):
    inputs = np.random.default_rng(seed).normal(size=(num_examples, NUM_FEATURES))
    inputs = inputs.astype(np.float32)
    noise = np.random.default_rng(seed + 1).normal(size=num_examples).astype(np.float32)
    return inputs, inputs @ np.arange(NUM_FEATURES, dtype=np.float32) + noise


def fit(name, kind, **options):
    """A run of 1000 examples under a clock of its own, one second a reading."""
    with_norm = kind == "batch_norm"
    start = {"w": jnp.zeros(NUM_FEATURES), "b": jnp.zeros(())}
    model_state = {"mean": jnp.zeros(()), "variance": jnp.ones(())} if with_norm else None
    options = {"clock": itertools.count().__next__, "model_state": model_state} | options
    train = draw(0, 150)
    run = functools.partial(
        aj.fit,
        loss_with_norm if with_norm else loss_fn,
        start,
        chain(name, kind),
        num_examples=BUDGETS.get(name, NUM_EXAMPLES),
        window=WINDOW,
        key=3,
        **options,
    )
    if kind != "streamed":
        return run(aj.Data(train, draw(5, 40)))
    source = datasets.epochs(train, chunk_size=23, seed=1)
    with datasets.host_blocks(source, window=WINDOW) as blocks:
        return run(aj.Data(blocks, draw(5, 40)))


def arrays(result):
    """Everything that a run has come to, by name."""
    found = {
        "state" + jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(result.state)
    }
    for name in ("window_index", "batch_size", "bucket_size", "num_steps", "num_examples", "loss"):
        found[name] = np.array([getattr(record, name) for record in result.history])
    infos = [record.info for record in result.history]
    steps = jax.tree.map(lambda *x: np.concatenate(x), *infos)
    found |= {"info" + jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(steps)}
    return {name: np.asarray(x) for name, x in found.items()}


def assert_same_run(found, expected):
    """Bit for bit, with the names of all that differs."""
    assert sorted(found) == sorted(expected)
    different = [
        name
        for name, x in expected.items()
        if (found[name].dtype, found[name].shape, found[name].tobytes())
        != (x.dtype, x.shape, x.tobytes())
    ]
    assert not different


def program(*arguments):
    """Starts this file as a program, with the settings of the tests."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.resume_runs", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"},
    )


def main(name, kind, directory, result):
    cache = os.path.join(os.path.dirname(directory), "programs")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    say = lambda record, state: print(record.window_index, flush=True)
    found = fit(name, kind, checkpoints=aj.checkpoints(directory), resume=True, callbacks=say)
    np.savez(result, **arrays(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
