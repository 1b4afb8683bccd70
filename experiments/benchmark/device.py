"""``--config device``: what training costs on this device, in less than five minutes.

Step times of windows against a hand-written jitted step, examples a second from small batches to
large ones, the host's work in a window, seconds to the first step, and what the cost model of
`cost_model.py` makes of them. Without an accelerator the same rows are run at their smallest shapes.

Every program compiles for seconds, so their number is what the time goes into: a hand-written one
and four windows for each of three networks, and for two of them one a size and one for all sizes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import arbiter_jax as aj
from arbiter_jax import models
from experiments import _runner
from experiments.benchmark import cost_model
from experiments.benchmark.networks import Timed, timed_steps, timed_windows

SECONDS = 270  # no row begins later
HELD = {"min_batch_size": 1, "max_batch_size": 2**20}  # limits that no rule here reaches
HOST_WINDOWS = 20


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


class Task:
    """A network, random data of its kind, and the chains that train it."""

    def __init__(self, name: str, model: models.Model, data: Any, loss: Callable, window: int):
        self.name, self.model, self.window = name, model, window
        self.data = aj.Data(data, data)
        self.losses = models.make_losses(model, loss)
        self.params, self.model_state = jax.jit(model.init)(jax.random.key(0))
        self.optimizer = optax.sgd(0.01, momentum=0.9)
        # An agent that flattens and reads what is small: its cost should not be that of its inputs.
        self.agent = aj.mlp_agent(data[0].shape[1:], hidden_sizes=(32,))
        self.options = {
            "loss_fn": self.losses.loss_fn,
            "inputs_of": lambda batch: batch[0].astype(jnp.float32),
        }
        self.plain = optax.chain(self.optimizer, aj.schedulers.constant(1, **HELD))

    def chains(self, batch_size: int) -> dict[str, Any]:
        """The windows that are compared with the hand-written step, each at one size throughout."""
        held = {"min_batch_size": batch_size, "max_batch_size": batch_size}
        arbiter = aj.arbiter(
            self.agent,
            self.losses.response_loss,
            num_features=self.model.num_features,
            initial_batch_size=batch_size,
            window=10**9,
        )
        rules = {
            "noise scale": aj.schedulers.gradient_noise_scale(**held),
            "noise floor": aj.schedulers.noise_floor(**held),
            "Arbiter": arbiter,
        }
        chains = {name: optax.chain(self.optimizer, rule) for name, rule in rules.items()}
        return {"plain": self.plain, **chains}

    def timed(self, tx: Any, batch_size: int, **options: Any) -> Timed:
        """Milliseconds of a step in windows of `run_window`, all of them at this size."""
        state = aj.init_state(self.params, tx, 1, self.model_state)
        # One chain, and so at most one program, for all sizes of a rule that holds its size.
        size = jnp.asarray(batch_size, jnp.int32)
        start = state._replace(opt_state=optax.tree.set(state.opt_state, batch_size=size))
        options = {"start": start} | self.options | options
        return timed_windows(self.params, self.data, tx, batch_size, self.window, **options)

    def by_hand(self, batch_size: int) -> Timed:
        """Milliseconds of a jitted step in a Python loop, with optax and `jax.grad` alone."""
        inputs, labels = self.data.train
        mask = jnp.ones(batch_size, bool)

        def step(carry, _):
            params, model_state, opt_state, key = carry
            key, batch_key = jax.random.split(key)
            rows = jax.random.randint(batch_key, (batch_size,), 0, len(inputs))
            batch = (inputs[rows], labels[rows])

            def mean_loss(params):
                if model_state is None:
                    losses, new_state = self.losses.loss_fn(params, batch), None
                else:
                    losses, new_state = self.losses.loss_fn(params, batch, model_state, mask, key)
                return jnp.mean(getattr(losses, "losses", losses)), new_state

            (value, new_state), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
            updates, opt_state = self.optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), new_state, opt_state, key), value

        start = (self.params, self.model_state, self.optimizer.init(self.params), jax.random.key(2))
        carry = jax.tree.map(lambda x: jnp.array(x, copy=True), start)
        return timed_steps(step, carry, self.window, scan=False)


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


def first_step(task: Task, batch_size: int) -> dict[str, Any]:
    """Seconds before the first step of the plain window can run."""
    state = aj.init_state(task.params, task.plain, 0, task.model_state)
    options = task.options | {"tx": task.plain, "bucket_size": aj.next_bucket(batch_size)}
    start = time.perf_counter()
    with aj.training.count_compilations() as compilations:
        traced = aj.run_window.trace(state, task.data, task.window, window=task.window, **options)
        times = [time.perf_counter()]
        lowered = traced.lower()
        times.append(time.perf_counter())
        lowered.compile()
        times.append(time.perf_counter())
    trace, lower, compilation = np.diff([start, *times])
    cached = ", of the persistent cache" if compilations.num_cache_hits else ""
    text = f"trace {trace:.2f} s, lower {lower:.2f} s, compile {compilation:.2f} s{cached}"
    return {"milliseconds": 1e3 * (times[-1] - start), "note": text}


def step_rows(task: Task, batch_size: int, pairs: int) -> Iterator[dict[str, Any]]:
    """Seconds to the first step, then every window against the hand-written step."""
    yield {"method": f"{task.name}, first step", **first_step(task, batch_size)}
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
    loss_fn, window = task.losses.loss_fn, task.window
    tx = optax.chain(task.optimizer, aj.schedulers.constant(batch_size))
    program = task.timed(tx, batch_size)
    num_examples = batch_size * window * (HOST_WINDOWS + 1)

    def windows_of_fit() -> float:
        ends: list[float] = []
        note = lambda record, state: ends.append(time.perf_counter())
        options = {"num_examples": num_examples, "window": window, "callbacks": note}
        aj.fit(loss_fn, task.params, tx, task.data, **options)
        return 1e3 * float(np.median(np.diff(ends))) / window

    programs = lambda: float(np.median([program() for _ in range(HOST_WINDOWS)]))
    row = compare(windows_of_fit, programs, pairs)
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
    with _no_program_cache():
        for row in build(tasks, shapes, config.pairs):
            results.rows.append(row)
            seconds = time.perf_counter() - begin
            results.windows.append({"method": row["method"], "seconds": seconds})
            if seconds > SECONDS:
                results.rows.append({"method": "stopped here", "note": f"{SECONDS} s were over"})
                break
    return results


@contextlib.contextmanager
def _no_program_cache() -> Iterator[None]:
    """Seconds to the first step are those of a first run."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


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
