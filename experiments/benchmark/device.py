"""``--config device``: what training costs on this device, in less than five minutes.

Step times of windows against a hand-written jitted step, examples a second from small batches to
large ones, the host's work in a window, seconds to the first step, and what the cost model of
`cost_model.py` makes of them. Without an accelerator the same rows are run at their smallest shapes.

Every program compiles for seconds, so their number is what the time goes into: a hand-written one
and four windows for each of three networks, and for two of them one a size and one for all sizes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import arbiter_jax as aj
from arbiter_jax import models
from experiments import _runner
from experiments.benchmark import cost_model, first_step, programs
from experiments.benchmark.networks import Task, Timed

SECONDS = 270  # no row begins later


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What is measured: on an accelerator, or where there is none."""

    mlp: dict[str, Any]
    wide_resnet: dict[str, Any]
    transformer: dict[str, Any]
    batch_size: int  # of the step times
    batch_sizes: tuple[int, ...]  # of the examples a second
    micro_batch_size: int
    windows: dict[str, int]  # steps of a window
    num_examples: int


ACCELERATOR = Shapes(
    mlp={"input_shape": (28, 28, 1), "hidden_sizes": (256,)},
    wide_resnet={"input_shape": (32, 32, 3), "dtype": jnp.bfloat16},
    transformer={
        **{"vocab_size": 256, "max_length": 64, "num_layers": 6, "num_heads": 8, "width": 512},
        "dtype": jnp.bfloat16,
    },
    batch_size=64,
    batch_sizes=(64, 512, 2048, 8192),
    micro_batch_size=512,
    windows={"MLP": 100, "WRN": 20, "Transformer": 10},
    num_examples=16_384,
)
SMALLEST = Shapes(
    mlp={"input_shape": (28, 28, 1), "hidden_sizes": (256,)},
    wide_resnet={"input_shape": (8, 8, 3), "depth": 10, "widen_factor": 1},
    transformer={"vocab_size": 32, "max_length": 8, "num_layers": 1, "num_heads": 2, "width": 32},
    batch_size=64,
    batch_sizes=(64, 128, 256, 512),
    micro_batch_size=64,
    windows={"MLP": 50, "WRN": 5, "Transformer": 20},
    num_examples=1024,
)


def make_tasks(shapes: Shapes) -> list[Task]:
    """The three networks."""
    key, n = jax.random.key(0), shapes.num_examples

    def images(shape: tuple[int, ...]) -> Any:
        return jax.random.normal(key, (n, *shape)), jax.random.randint(key, (n,), 0, 10)

    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    text = shapes.transformer
    tokens = jax.random.randint(key, (n, text["max_length"] + 1), 0, text["vocab_size"])
    pixels, pictures = shapes.mlp["input_shape"], shapes.wide_resnet["input_shape"]
    windows = shapes.windows
    mlp, wide = models.mlp(**shapes.mlp), models.wide_resnet(**shapes.wide_resnet)
    transformer = models.transformer(**text)
    per_token = models.token_cross_entropy
    texts = (tokens[:, :-1], tokens[:, 1:])
    return [
        Task("MLP", mlp, images(pixels), cross_entropy, windows["MLP"]),
        Task("Transformer", transformer, texts, per_token, windows["Transformer"]),
        Task("WRN", wide, images(pictures), cross_entropy, windows["WRN"]),
    ]


def compare(measured: Timed, reference: Timed, pairs: int) -> dict[str, Any]:
    """A row: the median ratio of interleaved pairs."""
    measured(), reference()  # compile
    times = np.array([(measured(), reference()) for _ in range(pairs)])
    low, median, high = np.quantile(times[:, 0] / times[:, 1], [0.25, 0.5, 0.75])
    return {
        "milliseconds": np.median(times[:, 0]),
        "reference_milliseconds": np.median(times[:, 1]),
        "ratio": median,
        "quartiles": (low, high),
    }


def step_rows(task: Task, batch_size: int, pairs: int) -> Iterator[dict[str, Any]]:
    """Seconds to the first step, then every window against the hand-written step."""
    seconds = first_step.window_seconds(task, task.plain, batch_size)
    first = {"milliseconds": 1e3 * seconds.wall, "note": first_step.describe(seconds)}
    yield {"method": f"{task.name}, first step", **first}
    by_hand = task.by_hand(batch_size)
    for name, tx in task.chains(batch_size).items():
        row = compare(task.timed(tx, batch_size), by_hand, pairs)
        yield {"method": f"{task.name}, {name} / hand-written step, B = {batch_size}", **row}


def throughput_rows(task: Task, shapes: Shapes, pairs: int) -> Iterator[dict[str, Any]]:
    """Examples a second at several sizes, without and with micro-batches, and the cost model."""
    micro_batch_size = shapes.micro_batch_size
    kinds: dict[str, dict[str, int]] = {
        "": {},
        f", micro-batches of {micro_batch_size}": {"micro_batch_size": micro_batch_size},
    }
    seconds = {}
    for kind, options in kinds.items():
        for size in shapes.batch_sizes:
            if options and size <= micro_batch_size:
                continue  # the same program as without
            row = {"method": f"{task.name}, B = {size}{kind}"}
            bucket = min([aj.next_bucket(size), *options.values()])
            try:
                window = task.timed(task.plain, size, bucket_size=bucket, **options)
                window()  # compile
                milliseconds = np.median([window() for _ in range(pairs)])
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                yield row | {"note": "out of memory"}
                continue
            if not options:
                seconds[size] = 1e-3 * milliseconds
            rate = 1e3 * size / milliseconds
            yield row | {"milliseconds": milliseconds, "note": f"{rate:,.0f} examples/s"}
    if len(seconds) > 1:  # else memory was too small for them
        yield cost_row(task, seconds)


def cost_row(task: Task, seconds: dict[int, float]) -> dict[str, Any]:
    """How well the cost model fits, and what it says of more devices."""
    gradient_bytes = 4 * models.count_params(task.params)
    model = cost_model.fit_cost_model([*seconds], [*seconds.values()], gradient_bytes)
    predicted = {size: cost_model.step_seconds(model, size) for size in seconds}
    worst = max(abs(predicted[size] / seconds[size] - 1) for size in seconds)
    per_device, largest = sorted(seconds)[len(seconds) // 2], max(seconds)
    weak = cost_model.weak_efficiency(model, per_device, 8)
    strong = cost_model.strong_speedup(model, largest, 8)
    text = (
        f"{1e3 * model.fixed:.3f} ms + {1e6 * model.per_example:.2f} us an example, error at most "
        f"{worst:.0%}; 8 devices at {model.bandwidth / 1e9:.0f} GB/s: {weak:.0%} of linear at "
        f"{per_device} a device, {strong:.1f} times at {largest} in all"
    )
    return {"method": f"{task.name}, cost model", "ratio": 1 + worst, "note": text}


def host_row(task: Task, batch_size: int, pairs: int) -> dict[str, Any]:
    """What `fit` adds to the compiled program of a window."""
    window = task.window
    tx = optax.chain(task.optimizer, aj.schedulers.constant(batch_size))
    program = task.timed(tx, batch_size)
    pair = programs.host(
        task.losses.loss_fn, task.params, tx, task.data, batch_size, window, program
    )
    row = compare(*pair, pairs)
    host = window * (row["milliseconds"] - row["reference_milliseconds"])
    note = f"host: {host:.2f} ms a window of {window} steps"
    return {"method": f"{task.name}, window of fit / its program", **row, "note": note}


def build(tasks: dict[str, Task], shapes: Shapes, pairs: int) -> Iterator[dict[str, Any]]:
    """All rows; the network that compiles longest comes last."""
    for name, task in tasks.items():
        yield from step_rows(task, shapes.batch_size, pairs)
        if name == "MLP":
            yield host_row(task, shapes.batch_size, pairs)
        if name != "WRN":
            yield from throughput_rows(task, shapes, pairs)


def run(config: Any) -> _runner.Results:
    """Runs the rows one after the other, until the time is up."""
    results = _runner.Results(extra={"config": config})
    begin = time.perf_counter()
    shapes = SMALLEST if jax.default_backend() == "cpu" else ACCELERATOR
    tasks = {task.name: task for task in make_tasks(shapes) if config.only in task.name}
    if not tasks:
        raise _runner.UsageError(
            f"--only must be part of the name of a network, got {config.only!r}."
        )
    with first_step.no_program_cache():
        for row in build(tasks, shapes, config.pairs):
            results.rows.append(row)
            seconds = time.perf_counter() - begin
            results.windows.append({"method": row["method"], "seconds": seconds})
            if seconds > SECONDS:
                results.rows.append({"method": "stopped here", "note": f"{SECONDS} s were over"})
                break
    return results


def table(results: _runner.Results):
    device = jax.devices()[0]
    where = device.device_kind
    if device.platform == "cpu":
        where += ": no accelerator at hand, smallest shapes"
    shown = lambda row, name, digits: f"{row[name]:.{digits}f}" if name in row else ""
    rows = [
        [
            row["method"],
            shown(row, "milliseconds", 3),
            shown(row, "reference_milliseconds", 3),
            shown(row, "ratio", 3),
            "{:.3f}-{:.3f}".format(*row["quartiles"]) if "quartiles" in row else "",
            row.get("note", ""),
        ]
        for row in results.rows
    ]
    return _runner.make_table(
        f"{where}, jax {jax.__version__}: milliseconds of a step, medians of "
        f"{results.extra['config'].pairs} interleaved pairs",
        ["what", "ms", "ms (reference)", "ratio", "quartiles", ""],
        rows,
    )
