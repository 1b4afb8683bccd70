"""What is made of numbers: one table of everything in `aj.learning_rate`, and the signals of a step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import arbiter_jax as aj
from tests.rules import signals_at

L = aj.learning_rate


class Case(NamedTuple):
    """One factory, with a number for everything that can be one."""

    factory: Callable[..., Any]
    arguments: dict[str, Any]
    # Of them, those that have to be listed: numbers that fix a structure, and functions.
    static: tuple[str, ...] = ()


LENGTHS = (
    "steps_per_epoch",
    "num_epochs",
    "max_warmup_fraction",
    "cooldown_fraction",
    "num_tests",
)
RATES = {
    "adam_hd": Case(L.adam_hd, {"learning_rate": 0.1, "hypergradient_learning_rate": 0.01}),
    "adamw_in_examples": Case(
        L.adamw_in_examples, {"learning_rate": 0.1, "batch_size": 16, "weight_decay": 0.1}
    ),
    "add_decayed_weights_in_examples": Case(
        L.add_decayed_weights_in_examples, {"weight_decay": 0.1, "batch_size": 16}
    ),
    "ema_in_examples": Case(L.ema_in_examples, {"batch_size": 16, "decay": 0.9}),
    "lamb_in_examples": Case(
        L.lamb_in_examples, {"learning_rate": 0.1, "batch_size": 16, "weight_decay": 0.1}
    ),
    "scale_by_adam_in_examples": Case(L.scale_by_adam_in_examples, {"batch_size": 16}),
    "trace_in_examples": Case(L.trace_in_examples, {"batch_size": 16, "decay": 0.9}),
    "adamp": Case(L.adamp, {"learning_rate": 0.1, "weight_decay": 0.1}),
    "adascale": Case(L.adascale, {"reference": 16, "decay": 0.5}),
    "autowu": Case(L.autowu, {"steps_per_epoch": 10, "num_epochs": 4}, LENGTHS),
    "scale_by_batch_size": Case(L.scale_by_batch_size, {"reference": 16, "exponent": 0.5}),
    "scale_by_schedule": Case(
        L.scale_by_schedule, {"schedule": lambda n: 1 / (n + 1.0)}, ("schedule",)
    ),
    "sgd_hd": Case(
        L.sgd_hd,
        {
            "learning_rate": 0.1,
            "hypergradient_learning_rate": 0.01,
            "momentum": 0.9,
            "max_learning_rate": 0.2,
        },
    ),
}


def signals(step):
    steps = {"num_steps": step, "num_examples": 32 * step, "progress": 1.0 * step}
    return signals_at(step) | jax.tree.map(jnp.asarray, steps)
