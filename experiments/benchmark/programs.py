"""The programs that :mod:`experiments.benchmark` compares with each other, except plain windows."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import arbiter_jax as aj
from arbiter_jax import datasets, gradients, models
from experiments.benchmark.networks import (
    LeNet,
    Network,
    Task,
    Timed,
    WideResNet,
    timed_steps,
    timed_windows,
)

HOST_WINDOWS = 20


def bucket_change(network: Network, batch_size: int) -> tuple[Timed, Timed]:
    """Two windows: one right after a change of bucket, one in the same bucket as the last."""
    same, other = (network.plain(size, 2) for size in (batch_size, batch_size // 2))

    def changed() -> float:
        other()
        return same()

    def unchanged() -> float:
        same()
        return same()

    return changed, unchanged


def micro_batches(
    network: Network, batch_size: int, micro_batch_size: int, bucket_size: int, num_examples: int
) -> tuple[Timed, Timed]:
    """Time of an example: batches in groups of rows, and batches that fill one bucket.

    Args:
      network: What trains.
      batch_size: Examples of a batch in groups.
      micro_batch_size: Rows of a group.
      bucket_size: Examples of a batch in one bucket.
      num_examples: Examples per run of either.
    """

    def per_example(size: int, **options: int) -> Timed:
        tx = optax.chain(network.optimizer, aj.schedulers.constant(size, max_batch_size=size))
        run = network.timed(tx, size, max(1, num_examples // size), **options)
        return lambda: run() / size

    rows = {"bucket_size": micro_batch_size, "micro_batch_size": micro_batch_size}
    return per_example(batch_size, **rows), per_example(bucket_size)


def micro_batch_memory(
    network: Network, batch_size: int, micro_batch_size: int
) -> tuple[Timed, Timed]:
    """Temporary memory of a window in MB: of a large batch in groups, and of one such group."""

    def megabytes(size: int, **options: int) -> float:
        tx = optax.chain(network.optimizer, aj.schedulers.constant(size, max_batch_size=size))
        lowered = aj.run_window.lower(
            aj.init_state(network.params, tx, 0),
            network.data,
            loss_fn=network.losses.loss_fn,
            tx=tx,
            bucket_size=micro_batch_size,
            window=10,
            **options,
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes / 2**20

    many = functools.partial(megabytes, batch_size, micro_batch_size=micro_batch_size)
    one = functools.partial(megabytes, micro_batch_size)
    return functools.cache(many), functools.cache(one)


def subset(network: Network, batch_size: int) -> tuple[tuple[Timed, Timed], tuple[Timed, Timed]]:
    """A gradient over selected examples, from layers and from per-example gradients.

    Returns:
      ((time from layers, time from per-example gradients), (the same, memory in MB)).
    """
    inputs, labels = network.data.train
    batch = (inputs[:batch_size], labels[:batch_size])

    def measured(factorize: bool) -> tuple[Timed, Timed]:
        gradient_fn = jax.jit(
            aj.subset_gradients(network.losses.loss_fn, factorize=factorize, max_bytes=2**31)
        )

        def run() -> float:
            start = time.perf_counter()
            jax.block_until_ready(gradient_fn(network.params, batch))
            return 1e3 * (time.perf_counter() - start)

        def megabytes() -> float:
            compiled = gradient_fn.lower(network.params, batch).compile()
            return compiled.memory_analysis().temp_size_in_bytes / 2**20

        return run, functools.cache(megabytes)

    seconds, memory = zip(measured(True), measured(False), strict=True)
    return seconds, memory


def convolution(
    module: type[LeNet | WideResNet], batch_size: int, window: int, *, by_lax: bool, scan: bool
) -> Timed:
    """Steps of SGD on a network whose convolutions are the library's, or those of `lax`.

    Args:
      module: The network.
      batch_size: Images per batch.
      window: Steps per run.
      by_lax: Whether every convolution is ``jax.lax.conv_general_dilated``, derivatives included.
      scan: Whether the steps are one ``lax.scan``, or a Python loop over a jitted step.
    """
    convolve = jax.lax.conv_general_dilated if by_lax else models.conv_general_dilated
    build = lambda rngs: module(convolve, rngs=rngs)
    model = models.attach(build, "head", jax.ShapeDtypeStruct((1, *module.shape), jnp.float32))
    loss_fn = models.make_losses(model, optax.softmax_cross_entropy_with_integer_labels).loss_fn
    key = jax.random.PRNGKey(0)
    inputs = jax.random.normal(key, (batch_size, *module.shape))
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
    """Windows of LeNet on data in the shape of Fashion-MNIST, on the device or on the host.

    Args:
      num_examples: Size of the data set.
      batch_sizes: Batch sizes of successive windows, in one bucket, repeated without end.
      window: Steps per window.
      host: Whether the examples come in blocks from the host.
    """
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((num_examples, *LeNet.shape), np.float32)
    labels = rng.integers(0, 10, num_examples, np.int32)
    model = models.lenet(LeNet.shape, 10)
    loss_fn = models.make_losses(model, optax.softmax_cross_entropy_with_integer_labels).loss_fn
    cycle = jnp.repeat(jnp.asarray(batch_sizes), window)
    rule = aj.schedulers.from_schedule(lambda count: cycle[count % len(cycle)])
    tx = optax.chain(optax.sgd(0.01, momentum=0.9), rule)
    params, _ = model.init(jax.random.PRNGKey(0))
    state = [aj.init_state(params, tx, jax.random.PRNGKey(1))]
    blocks = resident = None
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


def host(
    loss_fn, params, tx, data: aj.Data, batch_size: int, window: int, program: Timed
) -> tuple[Timed, Timed]:
    """Milliseconds of a step in windows of `fit`, and in those of its compiled program alone.

    A window of `fit` is what the host does as well: it reads the size, dispatches the program and
    reads what came of it.

    Args:
      loss_fn: As in `fit`; so are `params`, `tx` and `data`.
      batch_size: Examples of each batch.
      window: Steps of a window.
      program: Runs the compiled program of that window.
    """
    num_examples = batch_size * window * (HOST_WINDOWS + 1)

    def windows_of_fit() -> float:
        ends: list[float] = []
        note = lambda record, state: ends.append(time.perf_counter())
        options = {"num_examples": num_examples, "window": window, "callbacks": note}
        aj.fit(loss_fn, params, tx, data, **options)
        return 1e3 * float(np.median(np.diff(ends))) / window

    return windows_of_fit, lambda: float(np.median([program() for _ in range(HOST_WINDOWS)]))


def autowu_test(num_losses: int = 1000, steps_per_epoch: int = 20) -> Timed:
    """The step of AutoWU at the end of an epoch, after a warm-up of `num_losses` losses."""
    num_epochs = 2 * (num_losses // steps_per_epoch + 1)  # the warm-up is at most half of the steps
    tx = aj.autowu(steps_per_epoch, num_epochs, patience=num_epochs)  # no test ends it
    grads = jnp.ones(())
    update = jax.jit(lambda state, loss: tx.update(grads, state, value=loss)[1])
    losses = 2 + 0.1 * jax.random.normal(jax.random.PRNGKey(0), (num_losses,))
    fill = jax.jit(lambda state: jax.lax.scan(lambda s, x: (update(s, x), None), state, losses[1:]))
    state, _ = fill(tx.init(grads))

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(update(state, losses[0]))
        return 1e3 * (time.perf_counter() - start)

    return run


def transformer() -> tuple[str, Callable, Any, Any]:
    """A small transformer with random data: its name, loss, parameters and examples."""
    model = models.transformer(96, 32, num_layers=2, num_heads=4, width=64)
    loss_fn = models.make_losses(model, models.token_cross_entropy).loss_fn
    tokens = jax.random.randint(jax.random.key(0), (4096, 33), 0, 96)
    params, _ = model.init(jax.random.key(1))
    return "Transformer", loss_fn, params, (tokens[:, :-1], tokens[:, 1:])


def normalization(batch_size: int, window: int) -> tuple[Timed, Timed]:
    """Steps of a transformer: with the noise scale of its normalization layers, and plain ones."""
    _, loss_fn, params, texts = transformer()
    data = aj.Data(texts)
    held: dict[str, Any] = {"min_batch_size": batch_size, "max_batch_size": batch_size}
    measured = gradients.value_grad_and_stats(loss_fn, method="normalization")

    def timed(rule, gradient_fn) -> Timed:
        tx = optax.chain(optax.sgd(0.01), rule)
        return timed_windows(params, data, tx, batch_size, window, gradient_fn=gradient_fn)

    plain = gradients.masked_value_and_grad(loss_fn)
    noise_scale = aj.schedulers.gradient_noise_scale(**held)
    return timed(noise_scale, measured), timed(aj.schedulers.constant(batch_size), plain)


@functools.cache
def wide_resnet_task() -> Task:
    """WRN-16-4 with random images of 32 x 32 pixels, in windows of 2 steps."""
    key, shape = jax.random.key(0), WideResNet.shape
    data = (jax.random.normal(key, (256, *shape)), jax.random.randint(key, (256,), 0, 10))
    loss = optax.softmax_cross_entropy_with_integer_labels
    return Task("WRN-16-4", models.wide_resnet(shape), data, loss, 2)
