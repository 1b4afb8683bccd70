"""The flags of an experiment: the fields of its `Config`, with the help text of each."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import shlex
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """A wrong flag, data set or configuration: one line on standard error, exit status 2."""


# Help for flags that mean the same in every experiment; a field made by `flag` has its own. The
# default and the choices are added to it.
COMMON_HELP = {
    "dataset": (
        "name of a data set: digits, synthetic, mnist10k, mnist, fashion_mnist, another one of tfds, "
        "or the path of an .npz file"
    ),
    "model": "network to train",
    "seeds": "seeds of the parameters and the order of the examples; one run per seed",
    "epochs": "training examples of a run, in epochs",
    "window": "training steps between two decisions",
    "learning_rate": "learning rate of the optimizer",
    "learning_rates": "learning rates of the optimizer; one run per rate",
    "momentum": "momentum of SGD",
    "min_batch_size": "smallest batch size, in examples",
    "max_batch_size": "largest batch size, in examples",
    "initial_batch_size": "batch size to start from, in examples",
    "batch_size": "batch size, in examples",
    "hidden_size": "units of a hidden layer",
    "num_steps": "training steps of a run",
    "num_examples": "training examples that are used",
}


COMMON_CHOICES = {"model": ("mlp", "lenet", "vgg11", "wrn_16_4")}


def flag(default: Any, help: str, choices: Sequence[str] = ()) -> Any:
    """A field of a `Config`: its default, the help text of its flag, and all values that it takes."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


class Parser(argparse.ArgumentParser):
    """Raises a UsageError where argparse would print its usage and exit."""

    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(message)


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any) -> None:
    name = "--" + field.name.replace("_", "-")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    choices = field.metadata.get("choices") or COMMON_CHOICES.get(field.name)
    if hint is bool:
        kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    else:
        kind = {
            "type": _TYPES[arguments[0] if origin is tuple else hint],
            "nargs": "+" if origin is tuple else None,
            "choices": choices,
            "metavar": field.name.upper(),
        }
    text = field.metadata.get("help") or COMMON_HELP[field.name]
    if choices:
        text += f". Choices: {', '.join(choices)}"
    text = f"{text[0].upper()}{text[1:]}. Default: {_as_given(field.default)}."
    parser.add_argument(name, default=None, help=text.replace("%", "%%"), **kind)


def _as_given(value: Any) -> str:
    """A value as one would give it on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return shlex.join(map(str, value if isinstance(value, tuple) else (value,))) or "none"


def _text(value: str) -> str:
    return value


def _integer(value: str) -> int:
    if not value.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer >= 0, got {value!r}")
    return int(value)


def _number(value: str) -> float:
    with contextlib.suppress(ValueError):
        number = float(value)
        if math.isfinite(number) and number >= 0:
            return number
    raise argparse.ArgumentTypeError(f"must be a finite number >= 0, got {value!r}")


# Every number of every experiment is a size, a count, a rate or a seed.
_TYPES = {str: _text, int: _integer, float: _number}


def parse(name: str, configs: Mapping[str, Any], description: str, argv: Sequence[str]) -> Any:
    """Returns (config, output): the configuration and the output folder that the flags ask for."""
    parser = Parser(prog=f"python -m experiments.{name}", description=description)
    parser.add_argument(
        "--config",
        default="default",
        choices=sorted(configs),
        help="The values of all flags that are not given; the defaults below are those of `default`.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results") / name,
        metavar="DIR",
        help=(
            "Folder for summary.json, metrics.csv and the figures; it may hold those of an earlier run "
            f"of this experiment, which are replaced. Default: {Path('results') / name}."
        ),
    )
    config_class = type(configs["default"])
    hints = typing.get_type_hints(config_class)
    fields = [field for field in dataclasses.fields(config_class) if field.init]
    for field in fields:
        _add_flag(parser, field, hints[field.name])
    flags = vars(parser.parse_args(argv))
    changes = {f.name: flags[f.name] for f in fields if flags[f.name] is not None}
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    return dataclasses.replace(configs[flags["config"]], **changes), flags["output"]
