"""Part B of :mod:`experiments.fewer_steps`: tasks, optimizers, and rules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import optax

import arbiter_jax as aj
from arbiter_jax import datasets, models
from experiments import _training
from experiments._problems import next_character, task_of

LENGTH = 32  # characters of a sequence of the transformer


class Case(NamedTuple):
    """One problem, on which all rules and controls are compared at equal examples."""

    task: str  # a key of TASKS
    optimizer: str  # a key of OPTIMIZERS
    decay: str  # a key of decays.DECAYS


class Rule(NamedTuple):
    """Arguments of `seesaw`."""

    exponent: float | str
    trade: float = 0.8
    limit: str | None = None
    doubling: bool = False

    @property
    def label(self) -> str:
        """How a table calls it."""
        more = (", limit" if self.limit else "") + (", doubling" if self.doubling else "")
        return f"seesaw, p = {self.exponent}, trade {self.trade:g}{more}"


@dataclasses.dataclass(frozen=True)
class Definition:
    """A task with its budget, its size, and where the search for a rate begins."""

    task: _training.Task
    num_examples: int
    batch_size: int  # B0
    rates: dict[str, float]


# The exponents that are tried, the library's default first: it is the one at eight times the
# critical size, with shuffled sizes, and with a limit.
EXPONENTS: dict[str, tuple[float | str, ...]] = {
    "sgd": (1.0,),
    "momentum": (1.0,),
    "adam": (1.0, 0.75, 0.5, "measured"),
    "adamw": (1.0, 0.75, 0.5, "measured"),
}
OPTIMIZERS = tuple(EXPONENTS)
# The noise scale that fits the optimizer.
LIMITS = {
    name: "noise_scale_l1" if name.startswith("adam") else "noise_scale" for name in OPTIMIZERS
}


def rules(optimizer: str) -> list[Rule]:
    """What runs of `seesaw`, besides those at eight times the critical size."""
    exponents = EXPONENTS[optimizer]
    default = [Rule(p) for p in exponents]
    whole = [
        Rule(p, trade=1.0)
        for p in dict.fromkeys((exponents[0], exponents[-2] if len(exponents) > 1 else 1.0))
    ]
    doubling = Rule(exponents[0], doubling=True)
    return [*default, *whole, doubling, Rule(exponents[0], limit=LIMITS[optimizer])]


def _images(dataset: str, model: str, epochs: float, batch_size: int, rates: dict[str, float]):
    task = _training.make_task(dataset, model, hidden_sizes=(256,))
    return Definition(task, int(epochs * task.num_train), batch_size, rates)


def _text(epochs: float) -> Definition:
    """Predicts a character from the eight before it, as in :mod:`experiments.noise_rules`."""
    task = next_character()
    rates = {"sgd": 0.3, "momentum": 0.03, "adam": 0.0015, "adamw": 0.0015}
    return Definition(task, int(epochs * task.num_train), 8, rates)


def _transformer(epochs: float) -> Definition:
    dataset = datasets.text(LENGTH, form="sequence")
    model = models.transformer(dataset.num_classes, LENGTH, num_layers=2, num_heads=4, width=64)
    task = task_of(dataset, model, models.token_cross_entropy)
    rates = {"sgd": 0.3, "momentum": 0.05, "adam": 0.004, "adamw": 0.004}
    return Definition(task, int(epochs * task.num_train), 4, rates)


_IMAGE_RATES = {"sgd": 0.1, "momentum": 0.02, "adam": 0.001, "adamw": 0.001}
TASKS: dict[str, Callable[[], Definition]] = {
    "fashion_mnist": lambda: _images("fashion_mnist", "mlp", 4, 32, _IMAGE_RATES),
    "fashion_lenet": lambda: _images("fashion_mnist", "lenet", 4, 32, _IMAGE_RATES),
    "text": lambda: _text(1),
    "text_transformer": lambda: _transformer(1),
    "digits": lambda: _images("digits", "mlp", 30, 16, _IMAGE_RATES),
}


@functools.cache
def definition(name: str, share: float = 1.0) -> Definition:
    """A task by name, with a share of its budget."""
    made = TASKS[name]()
    return dataclasses.replace(made, num_examples=int(share * made.num_examples))


def make_optimizer(kind: str, batch_size: int, exponent: float = 0.5):
    """An optimizer of rate 1; AdamW's averages and weight decay are those of examples."""
    if kind == "adamw":
        return aj.adamw_in_examples(1.0, batch_size, weight_decay=0.01, exponent=exponent)
    if kind == "adam":
        return optax.adam(1.0)
    return optax.sgd(1.0, momentum=0.9 if kind == "momentum" else None)
