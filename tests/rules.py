"""One table of all batch-size rules: how to make each, and what it reads; and signals for any of them.

`test_conformance` checks that no member of `aj.schedulers` is missing.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax.objectives import Persistence

S = aj.schedulers
NUM_FEATURES = 3
NOISE = ("gradient_noise", "update_noise", "grad_stats")
GAIN = ("update_noise", "meta_batch")
LIMITS = {"min_batch_size": 16, "max_batch_size": 128, "initial_batch_size": 32}

# Public functions of the module that are not rules, each with what it is.
NOT_RULES = {
    "adabatch_learning_rate": "a schedule",
    "optimal_schedule": "a schedule",
    "parse_schedule": "reads a schedule",
    "published_ramp": "a schedule",
    "seesaw_schedule": "a schedule",
    "smith_learning_rate": "a schedule",
    "shadow_batch_sizes": "reads a state",
}


# Rules of every kind. A slow test of all rules runs with these in CI, with the others before a release.
# `expected_gain` and `from_objective` are made by the function that makes `noise_floor`.
USUAL = (
    "arbiter",
    "constant",
    "goodput",
    "gradient_noise_scale",
    "noise_floor",
    "seesaw",
)


def usual_in_ci(names: Iterable[str], usual: Iterable[str] = USUAL) -> list[Any]:
    """The names as cases of a test that is slow, at least with the rules of which CI has the kind."""
    unusual = lambda name: pytest.param(name, marks=(pytest.mark.slow, pytest.mark.exhaustive))
    return [name if name in usual else unusual(name) for name in names]


class Case(NamedTuple):
    """One rule."""

    make: Callable[..., optax.GradientTransformationExtraArgs]  # takes the three batch sizes
    signals: tuple[str, ...] = ()  # that its state asks for
    reads: tuple[str, ...] = ()  # fields of signals: a step with a non-finite one is skipped
    takes_limits: bool = True  # errors about its limits are its own


def loss_fn(params, batch):
    """Of any parameters: half the squared distance of their sum from the last leaf of a batch."""
    total = sum(jnp.sum(x) for x in jax.tree.leaves(params))
    return (total - jax.tree.leaves(batch)[-1]) ** 2 / 2


def response_loss(params, response, meta_batch):
    inputs, labels = meta_batch
    return (inputs * (1 + response[None, :]) @ params["w"] - labels) ** 2


def make_arbiter(**limits):
    agent = aj.mlp_agent((NUM_FEATURES,), hidden_sizes=(4,))
    return aj.arbiter(agent, response_loss, num_features=NUM_FEATURES, window=2, **limits)


def make_arbiter_with_noise(**limits):
    agent = aj.mlp_agent((NUM_FEATURES,), hidden_sizes=(4,))
    objective = aj.noise_response("noise_floor", num_examples=400, persistence=1.0)
    return aj.arbiter(agent, objective=objective, window=2, **limits)


def make_from_objective(**limits):
    return S.from_objective(aj.objectives.expected_gain(loss_fn, persistence=1.0), **limits)


def make_from_schedule(**limits):
    """A schedule without a value for the first 25 examples."""
    return S.from_schedule(lambda n: jnp.log(n - 25.0) * 20, count="num_examples", **limits)


def make_hysteresis(**limits):
    return S.hysteresis(S.gradient_noise_scale(decay=0.5, **limits), dwell=2)


def make_seesaw(min_batch_size, max_batch_size, initial_batch_size=None):
    """A linear decay to 0 after 100 examples, from a size that is not the smallest."""
    del min_batch_size
    rate = optax.linear_schedule(1.0, 0.0, 100)
    return S.seesaw(
        rate, num_examples=400, batch_size=initial_batch_size, max_batch_size=max_batch_size
    )


def make_shadow(**limits):
    # A shadow decides nothing, so it needs a rule beside it.
    return optax.chain(S.constant(**limits), S.shadow(S.norm_test(**limits)))


RULES = {
    "adabatch": Case(lambda **k: S.adabatch(64, epochs=1, **k)),
    "adadamp": Case(lambda **k: S.adadamp(decay=0.5, **k), ("value",), ("value",)),
    "cabs": Case(
        lambda **k: S.cabs(0.1, decay=0.5, **k),
        ("value", "grad_stats"),
        ("value", "variance_trace", "batch_size"),
    ),
    "constant": Case(S.constant),
    "dive_batch": Case(
        lambda **k: S.dive_batch(64, delta=1.0, **k),
        ("grad_stats",),
        ("grad", "variance_trace", "batch_size", "batch_sq_norm"),
    ),
    "expected_gain": Case(
        lambda **k: S.expected_gain(loss_fn, measure_every=2, step_cost="measured", **k),
        (*GAIN, "step_seconds", "persistence"),
        ("grad", "update_noise", "meta"),
    ),
    "from_objective": Case(make_from_objective, GAIN, ("grad", "update_noise", "meta")),
    "from_schedule": Case(make_from_schedule),
    "goodput": Case(
        lambda **k: S.goodput(decay=0.5, **k),
        ("grad_stats", "step_seconds"),
        ("variance_trace", "mean_sq_norm"),
    ),
    "gradient_noise_scale": Case(
        lambda **k: S.gradient_noise_scale(decay=0.5, **k),
        ("grad_stats",),
        ("variance_trace", "mean_sq_norm"),
    ),
    "hysteresis": Case(make_hysteresis, ("grad_stats",), takes_limits=False),
    "inner_product_test": Case(
        lambda **k: S.inner_product_test(decay=0.5, **k),
        ("grad_stats",),
        ("inner_product_variance", "batch_sq_norm"),
    ),
    "noise_floor": Case(
        lambda **k: S.noise_floor(num_examples=400, **k),
        ("value", *NOISE, "persistence"),
        ("value", "gradient_noise", "update_noise", "variance_trace", "mean_sq_norm"),
    ),
    "norm_test": Case(
        lambda **k: S.norm_test(decay=0.5, **k),
        ("grad_stats",),
        ("variance_trace", "batch_sq_norm"),
    ),
    "seesaw": Case(make_seesaw, takes_limits=False),
    "shadow": Case(make_shadow, ("grad_stats",), takes_limits=False),
    "simigrad": Case(
        lambda **k: S.simigrad(decide_every=2, **k), ("grad_stats",), ("half_cosine",)
    ),
    "smith": Case(lambda **k: S.smith((64, 128), 10_000, factor=2, **k)),
}
ARBITERS = {
    "arbiter": Case(make_arbiter, ("agent_inputs", "meta_batch")),
    "arbiter_noise_response": Case(make_arbiter_with_noise, ("agent_inputs", "value", *NOISE)),
}


def params_like():
    return {"w": jnp.full((NUM_FEATURES,), 0.5), "b": jnp.zeros(())}


def signals_at(seed: int) -> dict[str, Any]:
    """Every signal there is, plausible and different at each step."""
    rng = np.random.default_rng(seed)
    stats = aj.GradStats(
        mean_sq_norm=rng.normal(0.5, 0.2),
        variance_trace=rng.gamma(4.0, 10.0),
        batch_size=float(LIMITS["initial_batch_size"]),
        batch_sq_norm=rng.gamma(4.0, 0.5),
        half_cosine=rng.uniform(-0.5, 1.0),
        inner_product_variance=rng.gamma(4.0, 10.0),
    )
    inputs = rng.normal(size=(LIMITS["max_batch_size"], NUM_FEATURES))
    signals = {
        "value": 2.0 * 0.8**seed + rng.uniform(0, 0.1),
        "grad_stats": stats,
        "gradient_noise": jax.tree.map(lambda x: rng.normal(size=x.shape), params_like()),
        "update_noise": jax.tree.map(lambda x: rng.normal(size=x.shape), params_like()),
        "agent_inputs": inputs[:8],
        "meta_batch": (inputs, inputs.sum(axis=1)),
        "step_seconds": 0.01 + 0.001 * (seed // 2),
        "persistence": Persistence(1.0, 1.0),
    }
    signals = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), signals)
    return signals | {"batch_size": jnp.int32(LIMITS["initial_batch_size"] + 8 * (seed // 2))}


def grads_at(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(1000 + seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params_like())
