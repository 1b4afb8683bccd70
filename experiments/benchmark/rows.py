"""The rows of :mod:`experiments.benchmark`: what is compared with what, and its bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

import arbiter_jax as aj
from arbiter_jax import models
from experiments.benchmark import first_step, floor, programs, torch_steps
from experiments.benchmark.networks import SHAPE, LeNet, Network, Timed, WideResNet
from experiments.benchmark.row import Row


def build(config: Any) -> list[Row]:
    """All rows, in the order of the table."""
    mlp = Network("MLP", models.mlp(SHAPE, (256,), 10), aj.mlp_agent(SHAPE, hidden_sizes=(32,)))
    lenet = Network("LeNet", models.lenet(SHAPE, 10), aj.conv_agent(SHAPE))
    return [
        *_arbiter_rows(lenet, mlp, config),
        *_engine_rows(lenet, mlp, config),
        *_noise_rows(lenet, mlp, config),
        *_seesaw_rows(mlp, config),
        *_subset_rows(mlp, config),
        *_micro_batch_rows(lenet, mlp, config),
        *_other_rows(lenet, config),
        *first_step.rows(config),
        *_host_rows(mlp, config),
        *(torch_steps.rows(lenet, mlp, config) if config.compare == "torch" else ()),
    ]


def _work(network: Network, batch_size: int) -> Callable[[], floor.Work]:
    return lambda: floor.network_work(network, batch_size)


def _against_plain(name: str, bar: float, network: Network, tx, config: Any, **options) -> Row:
    """A row that compares windows with a transformation to plain ones."""
    size, window = config.batch_size, config.window
    make = lambda: (network.timed(tx, size, window, **options), network.plain(size, window))
    return Row(f"{name} / plain step", bar, make, _work(network, size))


def _arbiter_rows(lenet: Network, mlp: Network, config: Any) -> list[Row]:
    """What hyper-learning adds to a plain step."""
    size = config.batch_size
    published = aj.conv_agent(SHAPE, channels=64)
    tenth = lambda network: network.arbiter(size, hyper_every=10)
    return [
        _against_plain("LeNet, Arbiter", 1.50, lenet, lenet.arbiter(size), config),
        _against_plain(
            "LeNet, Arbiter with the published agent on B inputs",
            1.95,
            lenet,
            lenet.arbiter(size, published),
            config,
            num_agent_inputs=size,
        ),
        _against_plain("MLP, Arbiter", 1.75, mlp, mlp.arbiter(size), config),
        _against_plain("LeNet, Arbiter every 10th step", 1.10, lenet, tenth(lenet), config),
        _against_plain("MLP, Arbiter every 10th step", 1.10, mlp, tenth(mlp), config),
    ]


def _engine_rows(lenet: Network, mlp: Network, config: Any) -> list[Row]:
    """What a compiled window adds to a training loop with optax alone."""
    size, window = config.batch_size, config.window
    against_scan = lambda network: (
        network.plain(size, window),
        network.by_hand(size, window, scan=True),
    )
    return [
        *(
            Row(
                f"{network.name}, plain window / hand-written scan",
                1.03,
                lambda network=network: against_scan(network),
                _work(network, size),
            )
            for network in (lenet, mlp)
        ),
        Row(
            "MLP, plain window / Python loop over a jitted step",
            0.70,
            lambda: (mlp.plain(size, window), mlp.by_hand(size, window, scan=False)),
            _work(mlp, size),
        ),
        Row(
            "MLP, window of 2 after a bucket change / same",
            2.0,
            lambda: programs.bucket_change(mlp, size),
        ),
    ]


def _noise_rows(lenet: Network, mlp: Network, config: Any) -> list[Row]:
    """What the statistics of the gradient noise add, and the rules that use them."""
    size, large, window = config.batch_size, config.statistics_batch_size, config.window
    held = {"min_batch_size": large, "max_batch_size": large, "initial_batch_size": large}

    def statistics(network: Network) -> tuple[Timed, Timed]:
        tx = optax.chain(network.optimizer, aj.schedulers.gradient_noise_scale(**held))
        return network.timed(tx, large, window), network.plain(large, window)

    held = {"min_batch_size": size, "max_batch_size": size}

    def noise_rules(network: Network) -> dict[str, Any]:
        loss_fn = network.losses.loss_fn
        objective = aj.noise_response("noise_floor", loss_fn=loss_fn)
        return {
            "noise floor": aj.schedulers.noise_floor(loss_fn, measure_every=10, **held),
            "expected gain": aj.schedulers.expected_gain(loss_fn, measure_every=10, **held),
            "Arbiter, noise response,": aj.arbiter(
                network.agent,
                objective=objective,
                initial_batch_size=size,
                window=10**9,
                hyper_every=10,
            ),
        }

    return [
        *(
            Row(
                f"{network.name}, noise-scale statistics / plain step, B = {large}",
                1.10,
                lambda network=network: statistics(network),
                _work(network, large),
            )
            for network in (lenet, mlp)
        ),
        *(
            _against_plain(
                f"{network.name}, {name} every 10th step",
                bar,
                network,
                optax.chain(network.optimizer, rule),
                config,
            )
            for network, bar in ((mlp, 1.25), (lenet, 1.15))
            for name, rule in noise_rules(network).items()
        ),
    ]


def _seesaw_rows(mlp: Network, config: Any) -> list[Row]:
    """What a batch that grows as the rate decays adds to a step, and the noise scale as its limit."""
    size, window = config.batch_size, config.window
    # At its first size throughout, so that both programs do the same work.
    cosine = optax.cosine_decay_schedule(0.01, 10**9)
    optimizer = optax.sgd(1.0, momentum=0.9)
    constant = optax.chain(
        optimizer,
        aj.learning_rate.scale_by_schedule(cosine),
        aj.schedulers.constant(size),
    )

    def against_constant(limit: str | None) -> tuple[Timed, Timed]:
        plan = {"num_examples": 10**9, "batch_size": size, "max_batch_size": 64 * size}
        tx = aj.seesaw(optimizer, cosine, exponent=1.0, limit=limit, **plan)
        return mlp.timed(tx, size, window), mlp.timed(constant, size, window)

    return [
        Row(
            "MLP, seesaw / the same decay at a constant size",
            1.02,
            lambda: against_constant(None),
            _work(mlp, size),
        ),
        Row(
            "MLP, seesaw up to the noise scale / the same decay at a constant size",
            1.05,
            lambda: against_constant("noise_scale"),
            _work(mlp, size),
        ),
        Row(
            "Transformer, noise scale from normalization layers / plain step",
            1.02,
            lambda: programs.normalization(size, window),
            lambda: floor.work_of(*programs.transformer(), size),
        ),
    ]


def _subset_rows(mlp: Network, config: Any) -> list[Row]:
    """What a gradient over selected examples costs."""
    wide = Network("MLP 784-512-10", models.mlp(SHAPE, (512,), 10), mlp.agent)
    size, window = config.subset_batch_size, config.window
    name = f"{wide.name}, subset of n = {size}"

    def whole_step() -> tuple[Timed, Timed]:
        tx = optax.chain(wide.optimizer, aj.schedulers.constant(size))
        gradient_fn = aj.subset_gradients(wide.losses.loss_fn)
        return wide.timed(tx, size, window, gradient_fn=gradient_fn), wide.plain(size, window)

    return [
        Row(
            f"{name}: layers / per-example gradients", 0.20, lambda: programs.subset(wide, size)[0]
        ),
        Row(f"{name}: the same, memory [MB]", 0.20, lambda: programs.subset(wide, size)[1]),
        Row(f"{name}: whole step / plain step", 3.00, whole_step, _work(wide, size)),
    ]


def _micro_batch_rows(lenet: Network, mlp: Network, config: Any) -> list[Row]:
    """What batches of any size in one program cost."""
    total = config.window * config.batch_size
    rows: list[Row] = [
        Row(
            f"MLP, an example at {size:,} in groups of 256 / in a bucket of 1,024",
            1.25,
            lambda size=size: programs.micro_batches(mlp, size, 256, 1024, 8 * total),
        )
        for size in (1024, 4096)
    ]
    rows.append(
        Row(
            "LeNet, an example at 1,024 in groups of 64 / in a bucket of 64",
            1.10,
            lambda: programs.micro_batches(lenet, 1024, 64, 64, 2 * total),
        )
    )
    for network in (lenet, mlp):
        rows.append(
            Row(
                f"{network.name}, memory at 65,536 in groups of 64 / a bucket of 64",
                1.50,
                lambda network=network: programs.micro_batch_memory(network, 65_536, 64),
            )
        )
    return rows


def _other_rows(lenet: Network, config: Any) -> list[Row]:
    """Convolutions, data on the host, and AutoWU's test."""
    size, window = config.batch_size, config.window

    def convolutions(module, batch_size: int, window: int, lax_in_scan: bool):
        make = lambda **kind: programs.convolution(module, batch_size, window, **kind)
        return make(by_lax=False, scan=True), make(by_lax=True, scan=lax_in_scan)

    def trainings(sizes: tuple[int, ...]) -> tuple[Timed, Timed]:
        make = lambda host: programs.training(48_000, sizes, window, host=host)
        return make(True), make(False)

    return [
        Row(
            "LeNet, convolutions as patches / by lax, both in a scan",
            0.10,
            lambda: convolutions(LeNet, size, 10, lax_in_scan=True),
            _work(lenet, size),
        ),
        Row(
            "WRN-16-4, convolutions as patches in a scan / by lax outside, B = 32",
            1.10,
            lambda: convolutions(WideResNet, 32, 2, lax_in_scan=False),
            lambda: floor.task_work(programs.wide_resnet_task(), 32),
        ),
        Row(
            "LeNet, host blocks / data on the device",
            1.10,
            lambda: trainings((size,)),
            _work(lenet, size),
        ),
        Row(
            "LeNet, host blocks / data on the device, sizes that change",
            1.10,
            lambda: trainings((size * 5 // 8, size * 7 // 8)),
        ),
        Row("AutoWU, one test / 50 ms", 1.00, lambda: (programs.autowu_test(), lambda: 50.0)),
    ]


def _host_rows(mlp: Network, config: Any) -> list[Row]:
    """What the host does between two windows."""
    size, window = config.batch_size, 2 * config.window

    def windows() -> tuple[Timed, Timed]:
        tx = optax.chain(mlp.optimizer, aj.schedulers.constant(size))
        program = mlp.timed(tx, size, window)
        return programs.host(mlp.losses.loss_fn, mlp.params, tx, mlp.data, size, window, program)

    name = f"MLP, window of fit / its program, {window} steps"
    return [Row(name, 1.15, windows, _work(mlp, size))]
