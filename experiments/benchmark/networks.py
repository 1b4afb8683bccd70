"""More rows of :mod:`experiments.benchmark`: convolutions, where the data is, AutoWU's test."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import arbiter_jax as aj
from arbiter_jax import datasets, models
from arbiter_jax.learning_rate import _gaussian_process, _turning_point
from arbiter_jax.models._lenet import LeNet
from arbiter_jax.models._wide_resnet import WideResNet

Timed = Callable[[], float]  # runs once and returns the milliseconds of a step


def timed_steps(step: Callable, carry: Any, window: int, scan: bool) -> Timed:
    """A window of ``step(carry, None) -> (carry, value)``: one `lax.scan`, or a loop in Python."""

    @functools.partial(jax.jit, donate_argnums=0)
    def program(carry):
        return jax.lax.scan(step, carry, length=window) if scan else step(carry, None)

    def run() -> float:
        nonlocal carry
        start = time.perf_counter()
        for _ in range(1 if scan else window):
            carry, value = program(carry)
        jax.block_until_ready((carry, value))
        return 1e3 * (time.perf_counter() - start) / window

    return run


MODULES = {
    "LeNet": ((28, 28, 1), lambda shape: functools.partial(LeNet, shape, 10, None)),
    "WRN-16-4": (
        (32, 32, 3),
        lambda shape: functools.partial(WideResNet, shape[-1], 10, 2, 4, 0.0, None),
    ),
}


def convolution(name: str, batch_size: int, window: int, *, by_lax: bool, scan: bool) -> Timed:
    """Steps of SGD on a network whose convolutions are the library's, or those of `lax`.

    Args:
      name: Of :data:`MODULES`.
      batch_size: Images of a batch.
      window: Steps of a run.
      by_lax: Whether every convolution, and so its derivatives, is ``lax.conv_general_dilated``.
      scan: Whether the steps are one ``lax.scan``, or a Python loop over a jitted step.
    """
    shape, make = MODULES[name]

    def build(rngs: nnx.Rngs) -> nnx.Module:
        module = make(shape)(rngs=rngs, kernel_init=nnx.initializers.lecun_normal())
        for _, layer in nnx.iter_graph(module):
            if by_lax and isinstance(layer, nnx.Conv):
                layer.conv_general_dilated = jax.lax.conv_general_dilated
        return module

    model = models.attach(build, "head", jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    loss_fn = models.make_losses(model, optax.softmax_cross_entropy_with_integer_labels).loss_fn
    key = jax.random.PRNGKey(0)
    inputs = jax.random.normal(key, (batch_size, *shape))
    labels = jax.random.randint(key, (batch_size,), 0, 10)

    def step(carry, _):
        params, model_state = carry

        def loss(params):
            batch = (inputs, labels)
            if model_state is None:
                return jnp.mean(loss_fn(params, batch)), None
            mask = jnp.ones(batch_size, bool)
            values, new_state = loss_fn(params, batch, model_state, mask, key)
            return jnp.mean(values), new_state

        (value, model_state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)
        return (params, model_state), value

    return timed_steps(step, jax.jit(model.init)(key), window, scan)


def training(num_examples: int, batch_sizes: tuple[int, ...], window: int, *, host: bool) -> Timed:
    """Windows of LeNet on data of Fashion-MNIST's shape, from host blocks or from the device.

    Args:
      num_examples: Of the data set.
      batch_sizes: Of one window after the other, round and round, of one bucket.
      window: Steps of a window.
      host: Whether the examples come in blocks from the host.
    """
    shape, _ = MODULES["LeNet"]
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((num_examples, *shape), np.float32)
    labels = rng.integers(0, 10, num_examples, np.int32)
    model = models.lenet(shape, 10)
    loss_fn = models.make_losses(model, optax.softmax_cross_entropy_with_integer_labels).loss_fn
    cycle = jnp.repeat(jnp.asarray(batch_sizes), window)
    rule = aj.schedulers.from_schedule(lambda count: cycle[count % len(cycle)])
    tx = optax.chain(optax.sgd(0.01, momentum=0.9), rule)
    params, _ = model.init(jax.random.PRNGKey(0))
    state = [aj.init_state(params, tx, jax.random.PRNGKey(1))]
    blocks = None
    if host:
        blocks = datasets.host_blocks(datasets.epochs((inputs, labels)), window=window)
    else:
        resident = jax.tree.map(jnp.asarray, aj.Data((inputs, labels)))

    def run() -> float:
        start = time.perf_counter()
        for _ in batch_sizes:
            size, bucket_size, _ = aj.next_window(state[0].opt_state)
            data = aj.Data(blocks.next_block(size, bucket_size)) if blocks else resident
            state[0], info = aj.run_window(
                state[0],
                data,
                window,
                loss_fn=loss_fn,
                tx=tx,
                bucket_size=bucket_size,
                window=window,
            )
            jax.block_until_ready((state[0], info))
        return 1e3 * (time.perf_counter() - start) / (window * len(batch_sizes))

    return run


def autowu_test(num_losses: int = 1000) -> Timed:
    """One statistical test of AutoWU on a full memory of losses."""
    losses = 2 + 0.1 * jax.random.normal(jax.random.PRNGKey(0), (num_losses,))

    @jax.jit
    def test(key):
        count, rate = jnp.asarray(num_losses, jnp.int32), jnp.asarray(0.1)
        indices = _turning_point.draw_subsets(key, losses, num_tests=5)
        options = {"steps_per_epoch": 20, "min_learning_rate": 1e-5}
        process = _gaussian_process.init()
        return _turning_point.find_turning_point(process, losses, count, rate, *indices, **options)

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(test(jax.random.PRNGKey(1)))
        return 1e3 * (time.perf_counter() - start)

    return run


Row = tuple[str, float, Callable[[], tuple[Timed, Timed]]]


def rows(batch_size: int, window: int) -> list[Row]:
    """(name, bar, make) of each row: what is measured, and against what."""
    changing = (batch_size * 5 // 8, batch_size * 7 // 8)

    def convolutions(name, batch_size, window, lax_in_scan):
        make = functools.partial(convolution, name, batch_size, window)
        return make(by_lax=False, scan=True), make(by_lax=True, scan=lax_in_scan)

    def trainings(sizes):
        make = functools.partial(training, 48_000, sizes, window)
        return make(host=True), make(host=False)

    return [
        (
            "LeNet, convolutions as patches / by lax, both in a scan",
            0.10,
            lambda: convolutions("LeNet", batch_size, 10, lax_in_scan=True),
        ),
        (
            "WRN-16-4, convolutions as patches in a scan / by lax outside, B = 32",
            1.10,
            lambda: convolutions("WRN-16-4", 32, 2, lax_in_scan=False),
        ),
        (
            "LeNet, host blocks / data on the device",
            1.10,
            lambda: trainings((batch_size,)),
        ),
        (
            "LeNet, host blocks / data on the device, sizes that change",
            1.10,
            lambda: trainings(changing),
        ),
        ("AutoWU, one test / 50 ms", 1.00, lambda: (autowu_test(), lambda: 50.0)),
    ]
