"""The floor under a step: the work that no training can do without, and how long it takes here.

Three numbers for a network and a batch size: its floating-point operations over the machine's rate of
matrix products, its bytes over the machine's rate of copies, and the time of one forward and backward
pass of the mean loss alone, in a scan, so that nothing is dispatched and the gradient is written in
place. The first two are estimates: small matrices run below that rate, and what stays in the caches
moves faster than a copy. The third is measured beside each row.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.networks import Network, Task, Timed

MATRIX_WIDTH = 2048
COPIED_BYTES = 2**28  # more than any cache holds


class Work(NamedTuple):
    """A forward and backward pass of the mean loss on a batch."""

    name: str
    mean_loss: Callable[..., tuple[jax.Array, Any]]  # (params, model_state, batch)
    params: Any
    model_state: Any
    batches: Any  # two of them: leaves [2, B, ...]
    window: int | None = None  # steps of a measurement, where a step takes long


class Rates(NamedTuple):
    """What this machine does in a second."""

    flops: float  # of a large matrix product in float32
    bytes: float  # read and written by a copy larger than the caches


def work_of(
    name: str, loss_fn: Callable, params: Any, data: Any, batch_size: int, model_state: Any = None
) -> Work:
    """The work of a step: `loss_fn` as `run_window` takes it, and the first two batches of the data."""

    def mean_loss(params, model_state, batch):
        if model_state is None:
            losses, new_state = loss_fn(params, batch), None
        else:
            mask = jnp.ones(batch_size, bool)
            losses, new_state = loss_fn(params, batch, model_state, mask, jax.random.key(0))
        return jnp.mean(getattr(losses, "losses", losses)), new_state

    in_two = lambda x: x[: 2 * batch_size].reshape(2, batch_size, *x.shape[1:])
    batches = jax.tree.map(in_two, data)
    return Work(f"{name}, B = {batch_size}", mean_loss, params, model_state, batches)


def network_work(network: Network, batch_size: int) -> Work:
    """The work of a step of one of the networks of the benchmark."""
    train = network.data.train
    return work_of(network.name, network.losses.loss_fn, network.params, train, batch_size)


def task_work(task: Task, batch_size: int) -> Work:
    """The work of a step of a task, measured in windows as long as its own."""
    loss_fn, train = task.losses.loss_fn, task.data.train
    work = work_of(task.name, loss_fn, task.params, train, batch_size, task.model_state)
    return work._replace(window=task.window)


def timed_work(work: Work, window: int) -> Timed:
    """Milliseconds of one forward and backward pass, of `window` in a scan."""
    gradient = jax.value_and_grad(work.mean_loss, has_aux=True)

    # Two batches in turn: of a single one, XLA would compute the gradient once, before the loop.
    def step(carry, i):
        take = lambda x: jax.lax.dynamic_index_in_dim(x, i % 2, keepdims=False)
        batch = jax.tree.map(take, work.batches)
        (value, model_state), grads = gradient(work.params, carry[1], batch)
        return (value, model_state, grads), None

    @functools.partial(jax.jit, donate_argnums=0)
    def program(carry):
        return jax.lax.scan(step, carry, jnp.arange(window))[0]

    start = (jnp.zeros(()), work.model_state, jax.tree.map(jnp.zeros_like, work.params))
    carry = jax.tree.map(lambda x: jnp.array(x, copy=True), start)

    def run() -> float:
        nonlocal carry
        start = time.perf_counter()
        carry = jax.block_until_ready(program(carry))
        return 1e3 * (time.perf_counter() - start) / window

    return run


def cost(work: Work) -> tuple[float, float]:
    """(floating-point operations, bytes read and written) of the work, of its compiled program."""
    batch = jax.tree.map(lambda x: x[0], work.batches)
    gradient = jax.jit(jax.value_and_grad(work.mean_loss, has_aux=True))
    lowered = gradient.lower(work.params, work.model_state, batch)
    written: Any = lowered.cost_analysis()
    compiled: Any = lowered.compile().cost_analysis()
    # Where a product is a call of a library, only the program as written counts its operations.
    flops = max(written["flops"], compiled["flops"])
    return flops, compiled["bytes accessed"]


@functools.cache
def machine_rates(repeats: int = 5) -> Rates:
    """Measures the rates: the best of some runs."""
    square = jnp.ones((MATRIX_WIDTH, MATRIX_WIDTH))
    product = _fastest(lambda x: x @ square, square, repeats)
    # In place: the pages of a new array would cost more than what is written to them.
    copy = _fastest(lambda x: x + 1, jnp.zeros(COPIED_BYTES // 4), repeats)
    return Rates(2 * MATRIX_WIDTH**3 / product, 2 * COPIED_BYTES / copy)


def _fastest(function: Callable, x: jax.Array, repeats: int) -> float:
    """The shortest of some runs, each on the result of the last one, in seconds."""
    program, seconds = jax.jit(function, donate_argnums=0), []
    for _ in range(repeats + 1):  # the first one compiles
        start = time.perf_counter()
        x = jax.block_until_ready(program(x))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def machine() -> str:
    """The name of the device, and of the processor and its cores where it is one."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():  # only Linux has it
        lines = [line.partition(":") for line in info.read_text().splitlines()]
        name = next((text.strip() for key, _, text in lines if key.strip() == "model name"), name)
    return f"{name}, {cores()} cores"


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def describe(works: dict[str, Work], milliseconds: dict[str, list[float]]) -> list[str]:
    """The machine's rates in a line, and a line for the floor of each network."""
    if not works:
        return []
    rates = machine_rates()
    lines = [
        f"{machine()}: {rates.flops / 1e9:.0f} GFLOP/s in a product of two {MATRIX_WIDTH:,} x "
        f"{MATRIX_WIDTH:,} matrices in float32, {rates.bytes / 1e9:.1f} GB/s in a copy of "
        f"{COPIED_BYTES / 2**20:.0f} MiB"
    ]
    for name, work in works.items():
        flops, size = cost(work)
        lines.append(
            f"floor of {name}: {flops / 1e6:.0f} MFLOP = {1e3 * flops / rates.flops:.3f} ms, "
            f"{size / 1e6:.1f} MB = {1e3 * size / rates.bytes:.3f} ms, forward and backward alone "
            f"{np.median(milliseconds[name]):.3f} ms"
        )
    return lines
