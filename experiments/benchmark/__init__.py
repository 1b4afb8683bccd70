"""What the engine costs: ratios of step times, each measured in interleaved pairs within one run.

Claim: hyper-learning adds one forward pass of the network's body to a plain step, and the engine adds
nothing to a hand-written scan.
Command: python -m experiments.benchmark; with `--config device`, what training costs on this device.
Time: about ten minutes on two cores; one minute with `--only "MLP, "`; at most five on one accelerator.
Expected: every ratio at most its bar on an idle machine.
Measured: 15 of 25 ratios within their bar; LeNet with Arbiter 1.56 plain steps (bar 1.50). All numbers:
README.md in this folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optax

import arbiter_jax as aj
from arbiter_jax import models, plotting
from experiments import _runner
from experiments.benchmark import device, programs
from experiments.benchmark.networks import SHAPE, LeNet, Network, Timed, WideResNet


@dataclasses.dataclass(frozen=True)
class Config:
    pairs: int = _runner.flag(15, "measured pairs per row")
    window: int = _runner.flag(50, "training steps per measurement")
    batch_size: int = 64
    statistics_batch_size: int = _runner.flag(256, "batch size of the rows on noise statistics")
    subset_batch_size: int = _runner.flag(128, "batch size of the rows on subset selection")
    only: str = _runner.flag("", "run only the rows whose name contains this text")
    on_device: bool = _runner.flag(
        False, "measure training on this device instead, with shapes of its own"
    )


CONFIGS = {
    "smoke": Config(pairs=1, window=2, only="MLP, p"),
    "default": Config(),
    "paper": Config(pairs=51),
    "device": Config(pairs=7, on_device=True),
}

# (name, bar, make): `make` returns the two programs whose ratio is measured.
Row = tuple[str, float, Callable[[], tuple[Timed, Timed]]]


def build(config: Config) -> list[Row]:
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
        *_other_rows(config),
    ]


def _against_plain(name: str, bar: float, network: Network, tx, config: Config, **options) -> Row:
    """A row that compares windows with a transformation to plain ones."""
    size, window = config.batch_size, config.window
    make = lambda: (network.timed(tx, size, window, **options), network.plain(size, window))
    return f"{name} / plain step", bar, make


def _arbiter_rows(lenet: Network, mlp: Network, config: Config) -> list[Row]:
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


def _engine_rows(lenet: Network, mlp: Network, config: Config) -> list[Row]:
    """What a compiled window adds to a training loop with optax alone."""
    size, window = config.batch_size, config.window
    against_scan = lambda network: (
        network.plain(size, window),
        network.by_hand(size, window, scan=True),
    )
    return [
        ("LeNet, plain window / hand-written scan", 1.03, lambda: against_scan(lenet)),
        ("MLP, plain window / hand-written scan", 1.03, lambda: against_scan(mlp)),
        (
            "MLP, plain window / Python loop over a jitted step",
            0.70,
            lambda: (mlp.plain(size, window), mlp.by_hand(size, window, scan=False)),
        ),
        (
            "MLP, window of 2 after a bucket change / same",
            2.0,
            lambda: programs.bucket_change(mlp, size),
        ),
    ]


def _noise_rows(lenet: Network, mlp: Network, config: Config) -> list[Row]:
    """What the statistics of the gradient noise add, and the rules that use them."""
    size, large, window = config.batch_size, config.statistics_batch_size, config.window
    held = {"min_batch_size": large, "max_batch_size": large, "initial_batch_size": large}

    def statistics(network: Network) -> tuple[Timed, Timed]:
        tx = optax.chain(network.optimizer, aj.schedulers.gradient_noise_scale(**held))
        return network.timed(tx, large, window), network.plain(large, window)

    held = {"min_batch_size": size, "max_batch_size": size}
    loss_fn = mlp.losses.loss_fn
    objective = aj.noise_response("noise_floor", loss_fn=loss_fn)
    noise_rules = {
        "noise floor": aj.schedulers.noise_floor(loss_fn, measure_every=10, **held),
        "expected gain": aj.schedulers.expected_gain(loss_fn, measure_every=10, **held),
        "Arbiter, noise response,": aj.arbiter(
            mlp.agent, objective=objective, initial_batch_size=size, window=10**9, hyper_every=10
        ),
    }
    return [
        *(
            (
                f"{network.name}, noise-scale statistics / plain step, B = {large}",
                1.10,
                lambda network=network: statistics(network),
            )
            for network in (lenet, mlp)
        ),
        *(
            _against_plain(
                f"MLP, {name} every 10th step",
                1.25,
                mlp,
                optax.chain(mlp.optimizer, rule),
                config,
            )
            for name, rule in noise_rules.items()
        ),
    ]


def _seesaw_rows(mlp: Network, config: Config) -> list[Row]:
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
        ("MLP, seesaw / the same decay at a constant size", 1.02, lambda: against_constant(None)),
        (
            "MLP, seesaw up to the noise scale / the same decay at a constant size",
            1.05,
            lambda: against_constant("noise_scale"),
        ),
        (
            "Transformer, noise scale from normalization layers / plain step",
            1.02,
            lambda: programs.normalization(config.batch_size, window),
        ),
    ]


def _subset_rows(mlp: Network, config: Config) -> list[Row]:
    """What a gradient over selected examples costs."""
    wide = Network("MLP 784-512-10", models.mlp(SHAPE, (512,), 10), mlp.agent)
    size, window = config.subset_batch_size, config.window
    name = f"{wide.name}, subset of n = {size}"

    def whole_step() -> tuple[Timed, Timed]:
        tx = optax.chain(wide.optimizer, aj.schedulers.constant(size))
        gradient_fn = aj.subset_gradients(wide.losses.loss_fn)
        return wide.timed(tx, size, window, gradient_fn=gradient_fn), wide.plain(size, window)

    return [
        (f"{name}: layers / per-example gradients", 0.20, lambda: programs.subset(wide, size)[0]),
        (f"{name}: the same, memory [MB]", 0.20, lambda: programs.subset(wide, size)[1]),
        (f"{name}: whole step / plain step", 3.00, whole_step),
    ]


def _micro_batch_rows(lenet: Network, mlp: Network, config: Config) -> list[Row]:
    """What batches of any size in one program cost."""
    total = config.window * config.batch_size
    rows: list[Row] = [
        (
            f"MLP, an example at {size:,} in groups of 256 / in a bucket of 1,024",
            1.25,
            lambda size=size: programs.micro_batches(mlp, size, 256, 1024, 8 * total),
        )
        for size in (1024, 4096)
    ]
    rows.append(
        (
            "LeNet, an example at 1,024 in groups of 64 / in a bucket of 64",
            1.10,
            lambda: programs.micro_batches(lenet, 1024, 64, 64, 2 * total),
        )
    )
    for network in (lenet, mlp):
        rows.append(
            (
                f"{network.name}, memory at 65,536 in groups of 64 / a bucket of 64",
                1.50,
                lambda network=network: programs.micro_batch_memory(network, 65_536, 64),
            )
        )
    return rows


def _other_rows(config: Config) -> list[Row]:
    """Convolutions, data on the host, and AutoWU's test."""
    size, window = config.batch_size, config.window

    def convolutions(module, batch_size: int, window: int, lax_in_scan: bool):
        make = lambda **kind: programs.convolution(module, batch_size, window, **kind)
        return make(by_lax=False, scan=True), make(by_lax=True, scan=lax_in_scan)

    def trainings(sizes: tuple[int, ...]) -> tuple[Timed, Timed]:
        make = lambda host: programs.training(48_000, sizes, window, host=host)
        return make(True), make(False)

    return [
        (
            "LeNet, convolutions as patches / by lax, both in a scan",
            0.10,
            lambda: convolutions(LeNet, size, 10, lax_in_scan=True),
        ),
        (
            "WRN-16-4, convolutions as patches in a scan / by lax outside, B = 32",
            1.10,
            lambda: convolutions(WideResNet, 32, 2, lax_in_scan=False),
        ),
        ("LeNet, host blocks / data on the device", 1.10, lambda: trainings((size,))),
        (
            "LeNet, host blocks / data on the device, sizes that change",
            1.10,
            lambda: trainings((size * 5 // 8, size * 7 // 8)),
        ),
        ("AutoWU, one test / 50 ms", 1.00, lambda: (programs.autowu_test(), lambda: 50.0)),
    ]


def run(config: Config) -> _runner.Results:
    if config.on_device:
        return device.run(config)
    results = _runner.Results(extra={"config": config})
    cases = [case for case in build(config) if config.only in case[0]]
    if not cases:
        raise _runner.UsageError(f"--only must be part of the name of a row, got {config.only!r}.")
    for name, bar, make in cases:
        measured, reference = make()
        measured(), reference()  # compile
        pairs = np.array([(measured(), reference()) for _ in range(config.pairs)])
        ratios = pairs[:, 0] / pairs[:, 1]
        low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        row = {
            "method": name,
            "ratio": median,
            "quartiles": (low, high),
            "bar": bar,
            "milliseconds": np.median(pairs[:, 0]),
            "reference_milliseconds": np.median(pairs[:, 1]),
        }
        results.rows.append(row)
        results.windows += [
            {"method": name, "pair": i, "milliseconds": a, "reference_milliseconds": b}
            for i, (a, b) in enumerate(pairs)
        ]
    return results


def table(results: _runner.Results):
    if results.extra["config"].on_device:
        return device.table(results)
    rows = [
        [
            row["method"],
            f"{row['ratio']:.3f}",
            "{:.3f}-{:.3f}".format(*row["quartiles"]),
            f"{row['bar']:.2f}",
            "yes" if row["ratio"] <= row["bar"] else "no",
            f"{row['milliseconds']:.3f}",
            f"{row['reference_milliseconds']:.3f}",
        ]
        for row in results.rows
    ]
    config = results.extra["config"]
    return _runner.make_table(
        f"ratios of step times, median of {config.pairs} interleaved pairs, B = {config.batch_size}",
        ["what", "ratio", "quartiles", "bar", "met", "ms", "ms (reference)"],
        rows,
        "memory: of the intermediate results of the compiled program, in MB instead of ms.",
    )


def plot(results: _runner.Results, output: Path) -> None:
    rows = [row for row in results.rows if "quartiles" in row]
    fig, ax = plotting.figure(size=(8.5, 0.42 * len(rows) + 1.2))
    for y, row in enumerate(reversed(rows)):
        low, high = row["quartiles"]
        ax.plot([low, high], [y, y], color=plotting.COLORS[0], linewidth=3, alpha=0.5)
        ax.plot(
            row["ratio"], y, "o", color=plotting.COLORS[0], label="measured" if y == 0 else None
        )
        if "bar" not in row:
            continue
        ax.plot(
            row["bar"],
            y,
            "|",
            color=plotting.COLORS[1],
            markersize=16,
            markeredgewidth=2,
            label="bar" if y == 0 else None,
        )
    ax.set_yticks(range(len(rows)), [row["method"] for row in reversed(rows)])
    ax.tick_params(axis="y", labelsize=8)
    ax.set_xlabel("ratio of step times: median and quartiles over the pairs")
    fig.legend(loc="outside right upper", frameon=False, fontsize=8)
    fig.savefig(output / "benchmark.png")
