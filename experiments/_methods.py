"""Every way to choose a batch size that the experiments compare, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optax

import arbiter_jax as aj
from arbiter_jax import schedulers
from arbiter_jax.objectives import noise_response
from experiments._runner import UsageError
from experiments._training import Task

GRID = tuple(f"constant_{2**k}" for k in range(3, 10))


class Method(NamedTuple):
    """A transformation, and a function that makes others with the same `update`.

    Seed, learning rate and a constant size only affect the state that `init` makes. So a run takes
    its initial state from `start(...)` and its program from `tx`, and all runs share that program.
    """

    tx: optax.GradientTransformation
    start: Callable[..., optax.GradientTransformation]  # start(seed=..., learning_rate=...)


def optimizer(
    learning_rate: float, momentum: float, decay: str, num_examples: int
) -> optax.GradientTransformation:
    """SGD with momentum at a constant rate, or with cosine decay over the examples of the run."""
    # Injected: the rate lies in the state, so that every rate uses the same program.
    sgd = optax.inject_hyperparams(optax.sgd, static_args="momentum")(
        learning_rate=learning_rate, momentum=momentum or None
    )
    if decay == "constant":
        return sgd
    if decay == "cosine":
        share = optax.cosine_decay_schedule(1.0, num_examples)
        return optax.chain(sgd, aj.learning_rate.scale_by_schedule(share))
    raise UsageError(f"--decays must be among 'constant', 'cosine', got {decay!r}.")


def agent_for(task: Task) -> aj.Agent:
    """The default agent for the inputs: convolutional for images of 16 x 16 pixels or more."""
    shape = task.dataset.input_shape
    if len(shape) == 3 and shape[0] >= 16:
        return aj.conv_agent(shape)
    return aj.mlp_agent(shape)


def arbiter(task: Task, config: Any, limits: dict[str, int], **options: Any):
    """Arbiter with its published objective: (seed, learning_rate) -> rule."""
    agent = agent_for(task)
    return lambda seed, learning_rate: aj.arbiter(
        agent,
        task.losses.response_loss,
        num_features=task.model.num_features,
        window=config.window,
        seed=seed,
        **limits,
        **options,
    )


def _random_pick(task: Task, config: Any, limits: dict[str, int]):
    """Arbiter with both learning rates zero: only the random draw of alpha remains."""
    zero = optax.set_to_zero()
    return arbiter(task, config, limits, agent_optimizer=zero, mixture_optimizer=zero)


def _rule(factory: Callable[..., Any], **options: Any):
    return lambda task, config, limits: lambda seed, learning_rate: factory(**options, **limits)


def _of_dataset(factory: Callable[..., Any], **options: Any):
    return lambda task, config, limits: (
        lambda seed, learning_rate: factory(dataset_size=task.num_train, **options, **limits)
    )


def _smith(task: Task, config: Any, limits: dict[str, int]):
    boundaries = [int(share * config.epochs * task.num_train) for share in (0.5, 0.75)]
    return lambda seed, learning_rate: schedulers.smith(
        boundaries, task.num_train, factor=2.0, **limits
    )


def _budget_and_persistence(task: Task, config: Any) -> dict[str, Any]:
    """Arguments of the noise floor: the budget, and how long momentum keeps noise."""
    epochs = getattr(config, "epochs", 0)
    return {
        "num_examples": int(epochs * task.num_train) or None,
        "persistence": 1 / (1 - getattr(config, "momentum", 0.0)),
    }


def _noise_floor(task: Task, config: Any, limits: dict[str, int]):
    known = _budget_and_persistence(task, config)
    return lambda seed, learning_rate: schedulers.noise_floor(
        task.losses.loss_fn, **known, **limits
    )


def _expected_gain(task: Task, config: Any, limits: dict[str, int]):
    momentum = getattr(config, "momentum", 0.0)
    return lambda seed, learning_rate: schedulers.expected_gain(
        task.losses.loss_fn, persistence=(1 - momentum**2) ** -0.5, **limits
    )


def _arbiter_noise_response(task: Task, config: Any, limits: dict[str, int]):
    agent, known = agent_for(task), _budget_and_persistence(task, config)
    return lambda seed, learning_rate: aj.arbiter(
        agent,
        objective=noise_response("noise_floor", loss_fn=task.losses.loss_fn, **known),
        window=config.window,
        seed=seed,
        **limits,
    )


RULES: dict[str, Callable[..., Callable[..., Any]]] = {
    "arbiter": arbiter,
    "random_pick": _random_pick,
    "arbiter_noise_response": _arbiter_noise_response,
    "noise_floor": _noise_floor,
    "expected_gain": _expected_gain,
    "gradient_noise_scale": _rule(schedulers.gradient_noise_scale),
    "cabs": lambda task, config, limits: (
        lambda seed, learning_rate: schedulers.cabs(learning_rate, **limits)
    ),
    "norm_test": _rule(schedulers.norm_test, eta=0.5, decay=0.95),
    "inner_product_test": _rule(schedulers.inner_product_test, decay=0.95),
    "simigrad": _rule(schedulers.simigrad),
    "dive_batch": _of_dataset(schedulers.dive_batch),
    "adadamp": _rule(schedulers.adadamp),
    "goodput": _rule(schedulers.goodput),
    "adabatch": lambda task, config, limits: (
        lambda seed, learning_rate: schedulers.adabatch(
            task.num_train, epochs=config.epochs / 4, **limits
        )
    ),
    "smith": _smith,
}
STATISTICS_BASED = ("gradient_noise_scale", "cabs", "norm_test", "inner_product_test", "simigrad")
STATISTICS_BASED += ("dive_batch", "adadamp", "goodput")


def limits(config: Any) -> dict[str, int]:
    """The range of batch sizes of a config, as keyword arguments of a rule."""
    return {
        "min_batch_size": config.min_batch_size,
        "max_batch_size": config.max_batch_size,
        "initial_batch_size": config.initial_batch_size,
    }


def build(
    name: str, task: Task, config: Any, make_optimizer: Callable[[float], Any], learning_rate: float
) -> Method:
    """Builds a method from its name.

    Args:
      name: A key of :data:`RULES`, or "constant_N" for any size N.
      task: What it trains on.
      config: Has `window`, `min_batch_size`, `max_batch_size`, `initial_batch_size`, `epochs`.
      make_optimizer: learning rate -> optimizer.
      learning_rate: The rate that the shared program is built with.

    Raises:
      UsageError: If the name is unknown.
    """
    check_names([name])
    if name.startswith("constant_"):
        size = int(name[9:])
        # All constant sizes share one update function; the size lies in the state.
        start = lambda seed=0, learning_rate=learning_rate: optax.chain(
            make_optimizer(learning_rate), schedulers.constant(size)
        )
        return Method(_shared_constant(make_optimizer, learning_rate), start)
    rule = RULES[name](task, config, limits(config))
    start = lambda seed=0, learning_rate=learning_rate: optax.chain(
        make_optimizer(learning_rate), rule(seed, learning_rate)
    )
    return Method(start(), start)


def check_names(names: Sequence[str]) -> None:
    """Raises a UsageError for the first name that :func:`build` does not know."""
    for name in names:
        if name not in RULES and not (name.startswith("constant_") and name[9:].isdecimal()):
            raise UsageError(f"--methods must be among {NAMES}; got {name!r}.")


NAMES = f"{', '.join(RULES)}, or constant_N for any size N"


def seesaw_from(batch_size: int, config: Any, num_examples: int, learning_rate: float) -> Method:
    """SGD with momentum and cosine decay over the run, of which `seesaw` makes batch size, up to 8 B0.

    Args:
      batch_size: B0, for which the rate was chosen.
      config: Has `momentum` and `max_batch_size`.
      num_examples: The budget.
      learning_rate: The peak.
    """
    tx = aj.seesaw(
        optax.sgd(1.0, momentum=config.momentum),
        optax.cosine_decay_schedule(learning_rate, num_examples),
        num_examples=num_examples,
        batch_size=batch_size,
        max_batch_size=max(batch_size, min(8 * batch_size, config.max_batch_size)),
    )
    return Method(tx, lambda **_: tx)


@functools.cache
def _shared_constant(make_optimizer: Callable[[float], Any], learning_rate: float):
    return optax.chain(make_optimizer(learning_rate), schedulers.constant(1))


def shadows(task: Task, config: Any, learning_rate: float) -> list[optax.GradientTransformation]:
    """Every statistics-based rule as a shadow, which logs its decision without applying it."""
    return [
        schedulers.shadow(RULES[name](task, config, limits(config))(0, learning_rate), name=name)
        for name in STATISTICS_BASED
    ]
