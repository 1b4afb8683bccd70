"""The time to the first step: what is spent before the program of a window can run.

Trace, lower and compile, in wall-clock and processor seconds, against a jitted step of optax that a
user writes. Every time is that of a new program in a process that remembers no other one, with JAX's
persistent cache off. What that cache leaves of it is measured in two processes of their own:
`main` prints the seconds of each rule there.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.experimental.compilation_cache import compilation_cache

import arbiter_jax as aj
from arbiter_jax import models
from experiments.benchmark.networks import SHAPE, Task, Timed
from experiments.benchmark.row import Row

WINDOW = 50
# At most so many times the first step of the user's own program.
BARS = {"constant": 2.0, "noise scale": 2.5, "noise floor": 5.0, "Arbiter": 4.0}
NETWORKS = ("MLP", "LeNet", "Transformer")
REPOSITORY = Path(__file__).parents[2]


class Seconds(NamedTuple):
    """Where the time to a first step goes."""

    trace: float
    lower: float
    compile: float
    processor: float  # of all threads together, in all three

    @property
    def wall(self) -> float:
        return self.trace + self.lower + self.compile


def make_task(name: str) -> Task:
    """A small network with random data; of its data, only the shapes matter here."""
    key, cross_entropy = jax.random.key(0), optax.softmax_cross_entropy_with_integer_labels
    if name == "Transformer":
        model = models.transformer(96, 32, num_layers=2, num_heads=4, width=64)
        tokens = jax.random.randint(key, (1024, 33), 0, 96)
        data = (tokens[:, :-1], tokens[:, 1:])
        return Task(name, model, data, models.token_cross_entropy, WINDOW)
    model = models.mlp(SHAPE, (256,), 10) if name == "MLP" else models.lenet(SHAPE, 10)
    data = (jax.random.normal(key, (1024, *SHAPE)), jax.random.randint(key, (1024,), 0, 10))
    return Task(name, model, data, cross_entropy, WINDOW)


def make_rule(task: Task, name: str, batch_size: int) -> Any:
    """A new transformation each time: no program knows it."""
    rules: dict[str, Callable] = {
        "constant": lambda: aj.schedulers.constant(batch_size),
        "noise scale": lambda: aj.schedulers.gradient_noise_scale(initial_batch_size=batch_size),
        "noise floor": lambda: aj.schedulers.noise_floor(initial_batch_size=batch_size),
        "Arbiter": lambda: aj.arbiter(
            task.agent,
            task.losses.response_loss,
            num_features=task.model.num_features,
            initial_batch_size=batch_size,
        ),
    }
    return optax.chain(task.optimizer, rules[name]())


def window_seconds(task: Task, tx: Any, batch_size: int) -> Seconds:
    """Seconds before the first step of a window can run."""
    state = aj.init_state(task.params, tx, 0, task.model_state)
    options = task.options | {"tx": tx, "bucket_size": aj.next_bucket(batch_size)}
    return _seconds(
        lambda: aj.run_window.trace(state, task.data, task.window, window=task.window, **options)
    )


def user_seconds(task: Task, batch_size: int) -> Seconds:
    """Seconds before a jitted step with optax alone can run."""
    step, carry = task.step_by_hand(batch_size)
    program = jax.jit(lambda carry: step(carry, None), donate_argnums=0)
    return _seconds(lambda: program.trace(carry))


def _seconds(trace: Callable[[], Any]) -> Seconds:
    """Times the three parts, of a process that remembers no trace and no program."""
    jax.clear_caches()
    walls, processor = [time.perf_counter()], time.process_time()
    traced = trace()
    walls.append(time.perf_counter())
    lowered = traced.lower()
    walls.append(time.perf_counter())
    lowered.compile()
    walls.append(time.perf_counter())
    parts = [end - start for start, end in itertools.pairwise(walls)]
    return Seconds(*parts, processor=time.process_time() - processor)


def compare(network: str, rule: str, batch_size: int) -> tuple[Timed, Timed, Callable[[], str]]:
    """Milliseconds to the first step of a window and of the user's program, and the parts of both."""
    task = functools.cache(lambda: make_task(network))
    measured: list[Seconds] = []
    by_user: list[Seconds] = []

    def of_window() -> float:
        with no_program_cache():
            tx = make_rule(task(), rule, batch_size)
            measured.append(window_seconds(task(), tx, batch_size))
        return 1e3 * measured[-1].wall

    def of_user() -> float:
        with no_program_cache():
            by_user.append(user_seconds(task(), batch_size))
        return 1e3 * by_user[-1].wall

    def note() -> str:
        ratios = [a.processor / b.processor for a, b in zip(measured, by_user, strict=True)]
        return (
            f"{describe(median(measured))}; ratio of processor time {statistics.median(ratios):.2f}"
        )

    return of_window, of_user, note


def median(times: list[Seconds]) -> Seconds:
    """The median of each part."""
    return Seconds(*(statistics.median(part) for part in zip(*times, strict=True)))


def describe(times: Seconds) -> str:
    """The parts in a line."""
    return (
        f"trace {times.trace:.2f} s, lower {times.lower:.2f} s, compile {times.compile:.2f} s, "
        f"processor {times.processor:.2f} s"
    )


@functools.cache
def two_processes(network: str, batch_size: int) -> tuple[dict[str, Seconds], dict[str, Seconds]]:
    """Seconds of each rule in a process that fills a folder with programs, and in a second one."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            # By default JAX keeps only what takes a second to compile.
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        command = [
            sys.executable,
            "-c",
            "from experiments.benchmark import first_step; first_step.main()",
        ]
        runs = [
            subprocess.run(
                [*command, network, str(batch_size)],
                cwd=REPOSITORY,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            ).stdout
            for _ in range(2)
        ]
    first, second = ({k: Seconds(*v) for k, v in json.loads(run).items()} for run in runs)
    return first, second


def second_process(network: str, rule: str, batch_size: int) -> tuple[Timed, Timed, Callable]:
    """Milliseconds to the first step with programs in the cache of JAX, and without them."""
    times = lambda index: two_processes(network, batch_size)[index][rule]
    return (
        lambda: 1e3 * times(1).wall,
        lambda: 1e3 * times(0).wall,
        lambda: describe(times(1)),
    )


def rows(config: Any) -> list[Row]:
    """What is spent before the first step of a window can run."""
    size, found = config.batch_size, []
    for network in NETWORKS:
        for rule, bar in BARS.items():
            measured, reference, note = compare(network, rule, size)
            found.append(
                Row(
                    f"{network}, first step with {rule} / a jitted step of optax",
                    bar,
                    lambda pair=(measured, reference): pair,
                    pairs=3,
                    note=note,
                    only_by_name=network != "MLP",
                )
            )
        for rule in BARS:
            measured, reference, note = second_process(network, rule, size)
            found.append(
                Row(
                    f"{network}, first step with {rule}: a second process / the first one",
                    None,
                    lambda pair=(measured, reference): pair,
                    pairs=1,
                    note=note,
                    only_by_name=True,
                )
            )
    return found


@contextlib.contextmanager
def no_program_cache() -> Iterator[None]:
    """Seconds to the first step are those of a first run."""
    config: Any = jax.config
    before = config.jax_enable_compilation_cache
    config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX reads the setting once, at the first program
    try:
        yield
    finally:
        config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def main() -> None:
    """Prints the seconds to the first step of each rule, as JSON."""
    network, batch_size = sys.argv[1], int(sys.argv[2])
    task = make_task(network)
    times = {
        rule: window_seconds(task, make_rule(task, rule, batch_size), batch_size) for rule in BARS
    }
    print(json.dumps(times))
