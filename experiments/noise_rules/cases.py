"""The cases of :mod:`experiments.noise_rules`: tasks, optimizers, decays, and what runs on them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import arbiter_jax as aj
from arbiter_jax import objectives, schedulers
from experiments import _methods, _training
from experiments._learning_rates import scale_by_decay
from experiments._problems import DEFINITIONS, next_character, token_agent

NOISE_RULES = (
    "noise_floor",
    "noise_floor_training",
    "expected_gain",
    "arbiter_noise_response",
)
HINDSIGHT = "best_held"  # not a rule: several sizes to hold, the best of which is known afterwards


class Case(NamedTuple):
    """One problem, on which all sizes and rules are compared at equal examples."""

    task: str  # a key of TASKS
    optimizer: str  # a key of OPTIMIZERS
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Definition:
    """A task with its budget and its range of sizes."""

    task: _training.Task
    agent: aj.Agent
    num_examples: int
    max_batch_size: int
    scale: float = 1.0  # factor on all learning rates


# Three rates each, at most a decade from one to the next.
OPTIMIZERS: dict[str, tuple[float, ...]] = {
    "sgd": (0.03, 0.1, 0.3),
    "momentum": (0.01, 0.03, 0.1),
    "adam": (0.0005, 0.0015, 0.005),
}


def _of_name(dataset: str, model: str, epochs: float, max_batch_size: int) -> Definition:
    task = _training.make_task(dataset, model)
    budget = int(epochs * task.num_train)
    return Definition(task, _methods.agent_for(task), budget, max_batch_size)


def _language(epochs: float) -> Definition:
    """Predicts an English character from the eight before it."""
    task = next_character()
    agent = token_agent(task.dataset.input_shape, task.dataset.num_classes)
    return Definition(task, agent, int(epochs * task.num_train), 2048)


def _regression(epochs: float) -> Definition:
    made = DEFINITIONS["regression"](False)
    budget = int(epochs * made.task.num_train)
    return Definition(made.task, made.agent, budget, 256, scale=0.1)


TASKS: dict[str, Callable[[], Definition]] = {
    "fashion_mnist": lambda: _of_name("fashion_mnist", "mlp", 4, 2048),
    "digits": lambda: _of_name("digits", "mlp", 30, 1024),
    "digits_lenet": lambda: _of_name("digits", "lenet", 20, 1024),
    "language": lambda: _language(1),
    "regression": lambda: _regression(100),
}


@functools.cache
def definition(name: str, share: float = 1.0) -> Definition:
    """A task by name, with a share of its budget."""
    made = TASKS[name]()
    return dataclasses.replace(made, num_examples=int(share * made.num_examples))


def optimizer(kind: str, rate: float, decay: str, num_examples: int):
    """An optimizer whose rate, momentum and decay lie in its state, so that they share a program."""
    if kind == "adam":
        base = optax.inject_hyperparams(optax.adam)(learning_rate=rate)
    else:
        momentum = 0.9 if kind == "momentum" else 0.0
        base = optax.inject_hyperparams(optax.sgd)(learning_rate=rate, momentum=momentum)
    return optax.chain(base, scale_by_decay(decay, num_examples))


@functools.cache
def persistence(kind: str, power: int = 1) -> float:
    """k from the impulse response: power 1 for the noise floor, 2 for the expected gain."""
    made = {
        "sgd": optax.sgd(0.1),
        "momentum": optax.sgd(0.1, momentum=0.9),
        "adam": optax.adam(0.1),
    }
    return objectives.impulse_response(made[kind], power=power)


class HeldState(NamedTuple):
    """State of :func:`held_then_grown`."""

    batch_size: jax.Array  # shape=(), dtype=int32
    held: jax.Array  # shape=(), dtype=float, size to hold


def held_then_grown(
    held: float, num_examples: int, max_batch_size: int, min_batch_size: int = 8
) -> optax.GradientTransformationExtraArgs:
    """Holds a given size and grows it as the noise floor does (DERIVATION.md, Eq. 12).

    The size lies in the state, so that all sizes share a program.

    Args:
      held: b, in examples, > 0; below min_batch_size, growth begins later.
      num_examples: The budget.
      max_batch_size: Largest size.
      min_batch_size: Smallest size.
    """
    grows_from = objectives.FloorConfig.hold_until * num_examples

    def size(b, seen):
        applied = jnp.maximum(b, min_batch_size)
        num_steps = jnp.maximum(seen, 1) / applied
        grown = objectives.final_size(b, applied, num_steps, num_examples - seen)
        b = jnp.where(seen < grows_from, b, jnp.maximum(b, grown))
        return jnp.clip(jnp.round(b), min_batch_size, max_batch_size).astype(jnp.int32)

    def init_fn(params):
        del params
        b = jnp.asarray(held, float)
        return HeldState(size(b, 0), b)

    def update_fn(updates, state, params=None, *, num_examples=0, **extra_args):
        del params, extra_args
        return updates, state._replace(batch_size=size(state.held, jnp.asarray(num_examples)))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rule(name: str, made: Definition, kind: str, seed: int, start: int, options: dict[str, Any]):
    if name == HINDSIGHT:
        return held_then_grown(start, made.num_examples, made.max_batch_size)
    limits = {"max_batch_size": made.max_batch_size, "initial_batch_size": start}
    floor = {"num_examples": made.num_examples, "persistence": persistence(kind)} | options
    loss_fn = made.task.losses.loss_fn
    if name == "noise_floor":
        return schedulers.noise_floor(loss_fn, **floor, **limits)
    if name == "noise_floor_training":
        return schedulers.noise_floor(**floor, **limits)
    if name == "expected_gain":
        k = persistence(kind, power=2)
        return schedulers.expected_gain(loss_fn, persistence=k, **options, **limits)
    return aj.arbiter(
        made.agent,
        objective=aj.noise_response("noise_floor", loss_fn=loss_fn, **floor),
        window=20,
        seed=seed,
        **limits,
    )


@functools.cache
def _program(name: str, task: str, share: float, kind: str, options: tuple) -> Any:
    """The transformation whose `update` all rates, decays, sizes and seeds of a method share."""
    made = definition(task, share)
    base = optimizer(kind, 0.1, "constant", made.num_examples)
    if name == "constant":
        return optax.chain(base, schedulers.constant(1))
    return optax.chain(base, _rule(name, made, kind, 0, 64, dict(options)))


def forget_programs() -> None:
    """Drops every compiled program before the next task compiles its own."""
    _program.cache_clear()
    jax.clear_caches()


def run(
    case: Case,
    name: str,
    *,
    seed: int,
    decay: str = "constant",
    share: float = 1.0,
    start: int = 64,
    callbacks: Any = (),
    **options: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]], aj.FitResult]:
    """Runs a method on a case: (row, windows, fit).

    Args:
      case: What to train.
      name: One of :data:`NOISE_RULES`, :data:`HINDSIGHT` or "constant".
      seed: Of the run.
      decay: Of the learning rate, one of :data:`experiments._learning_rates.DECAYS`.
      share: Share of the task's budget.
      start: The constant size, the size to hold, or the initial size of a rule.
      callbacks: Passed to `fit`.
      **options: Further arguments of the rule.
    """
    made = definition(case.task, share)
    # Momentum lies in the state, but a rule's persistence is a constant of its program.
    fixed = name in ("constant", HINDSIGHT)
    kind = "sgd" if fixed and case.optimizer == "momentum" else case.optimizer
    tx = _program(name, case.task, share, kind, tuple(sorted(options.items())))

    def begin(seed, learning_rate):
        base = optimizer(case.optimizer, learning_rate, decay, made.num_examples)
        if name == "constant":
            return optax.chain(base, schedulers.constant(start))
        return optax.chain(base, _rule(name, made, case.optimizer, seed, start, options))

    return _training.train(
        made.task,
        name,
        _methods.Method(tx, begin),
        seed=seed,
        num_examples=made.num_examples,
        window=100 if name == "constant" else 20,
        learning_rate=made.scale * case.learning_rate,
        callbacks=callbacks,
        task_name=case.task,
        optimizer=case.optimizer,
        case_rate=case.learning_rate,
        decay=decay,
        start=start,
    )
