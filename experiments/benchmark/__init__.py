"""What the engine costs: ratios of step times, each measured in interleaved pairs within one run.

Claim: hyper-learning needs one forward pass of the network's body beside the plain step, and the
engine adds nothing to a hand-written scan.
Command: python -m experiments.benchmark
Time: about ten minutes on two cores; `--only "MLP, "` one.
Expected: every ratio at most its bar on an idle machine.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import arbiter_jax as aj
from arbiter_jax import models, plotting
from experiments import _runner
from experiments.benchmark import networks
from experiments.benchmark.networks import Timed, timed_steps

SHAPE = (28, 28, 1)
NUM_TRAIN, NUM_VALIDATION = 8192, 2048


@dataclasses.dataclass(frozen=True)
class Config:
    pairs: int = 15
    window: int = 50
    batch_size: int = 64
    statistics_batch_size: int = 256
    subset_batch_size: int = 128
    only: str = ""  # run the rows whose name contains this


CONFIGS = {
    "smoke": Config(pairs=1, window=2, only="MLP, p"),
    "default": Config(),
    "paper": Config(pairs=51),
}


@dataclasses.dataclass
class Network:
    """A model with arrays of the right shape: a step takes as long whatever the values."""

    name: str
    model: models.Model
    agent: aj.Agent

    def __post_init__(self) -> None:
        key = jax.random.PRNGKey(0)
        inputs = jax.random.normal(key, (NUM_TRAIN, *SHAPE))
        labels = jax.random.randint(key, (NUM_TRAIN,), 0, 10)
        self.data = aj.Data((inputs, labels), (inputs[:NUM_VALIDATION], labels[:NUM_VALIDATION]))
        self.losses = models.make_losses(
            self.model, optax.softmax_cross_entropy_with_integer_labels
        )
        self.params, _ = self.model.init(key)
        self.optimizer = optax.sgd(0.01, momentum=0.9)

    def arbiter(self, batch_size: int, agent: aj.Agent | None = None, **options):
        # One endless window: the batch size stays what it is, every other cost is there.
        rule = aj.arbiter(
            agent or self.agent,
            self.losses.response_loss,
            num_features=self.model.num_features,
            initial_batch_size=batch_size,
            window=10**9,
            **options,
        )
        return optax.chain(self.optimizer, rule)

    def timed(self, tx, batch_size: int, window: int, **options) -> Timed:
        state = [aj.init_state(self.params, tx, jax.random.PRNGKey(1))]

        def run() -> float:
            start = time.perf_counter()
            state[0], info = aj.run_window(
                state[0],
                self.data,
                window,  # said, as `fit` says it: of the steps of a window it may take fewer
                loss_fn=None if "gradient_fn" in options else self.losses.loss_fn,
                tx=tx,
                bucket_size=aj.next_bucket(batch_size),
                window=window,
                **options,
            )
            jax.block_until_ready((state[0], info))
            return 1e3 * (time.perf_counter() - start) / window

        return run

    def plain(self, batch_size: int, window: int) -> Timed:
        tx = optax.chain(self.optimizer, aj.schedulers.constant(batch_size))
        return self.timed(tx, batch_size, window)

    def by_hand(self, batch_size: int, window: int, scan: bool) -> Timed:
        """What a user of optax writes: a scan, or a Python loop over a jitted step."""
        inputs, labels = self.data.train

        def step(carry, _):
            params, opt_state, key = carry
            key, batch_key = jax.random.split(key)
            rows = jax.random.randint(batch_key, (batch_size,), 0, NUM_TRAIN)
            loss = lambda p: jnp.mean(self.losses.loss_fn(p, (inputs[rows], labels[rows])))
            value, grads = jax.value_and_grad(loss)(params)
            updates, opt_state = self.optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state, key), value

        start = (self.params, self.optimizer.init(self.params), jax.random.PRNGKey(2))
        carry = jax.tree.map(lambda x: jnp.array(x, copy=True), start)
        return timed_steps(step, carry, window, scan)


def bucket_change(network: Network, batch_size: int) -> tuple[Timed, Timed]:
    """A window right after the bucket changed, against one whose bucket is that of the last."""
    same, other = (network.plain(size, 2) for size in (batch_size, batch_size // 2))

    def changed() -> float:
        other()
        return same()

    def unchanged() -> float:
        same()
        return same()

    return changed, unchanged


def subset(network: Network, batch_size: int) -> tuple[list[Timed], list[Timed]]:
    """A gradient over chosen examples, from layers and from per-example gradients: (time, MB)."""
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

    return tuple(zip(measured(True), measured(False), strict=True))


def build(config: Config) -> list[tuple[str, float, Callable[[], tuple[Timed, Timed]]]]:
    """(name, bar, make) of each row; make compiles its two programs: what is measured, and against."""
    size, window = config.batch_size, config.window
    mlp = Network("MLP", models.mlp(SHAPE, (256,), 10), aj.mlp_agent(SHAPE, hidden_sizes=(32,)))
    lenet = Network("LeNet", models.lenet(SHAPE, 10), aj.conv_agent(SHAPE))
    published = aj.conv_agent(SHAPE, channels=64)
    rows: list = []

    def against_plain(name, bar, network, tx, **options):
        rows.append(
            (
                name,
                bar,
                lambda: (
                    network.timed(tx, size, window, **options),
                    network.plain(size, window),
                ),
            )
        )

    against_plain("LeNet, Arbiter / plain step", 1.50, lenet, lenet.arbiter(size))
    against_plain(
        "LeNet, Arbiter with the published agent on B inputs / plain step",
        1.95,
        lenet,
        lenet.arbiter(size, published),
        num_agent_inputs=size,
    )
    against_plain("MLP, Arbiter / plain step", 1.75, mlp, mlp.arbiter(size))
    for network in (lenet, mlp):
        tx = network.arbiter(size, hyper_every=10)
        against_plain(f"{network.name}, Arbiter every 10th step / plain step", 1.10, network, tx)
    for network in (lenet, mlp):
        rows.append(
            (
                f"{network.name}, plain window / hand-written scan",
                1.03,
                lambda n=network: (n.plain(size, window), n.by_hand(size, window, scan=True)),
            )
        )
    rows.append(
        (
            "MLP, plain window / Python loop over a jitted step",
            0.70,
            lambda: (mlp.plain(size, window), mlp.by_hand(size, window, scan=False)),
        )
    )
    rows.append(
        ("MLP, window of 2 after a bucket change / same", 2.0, lambda: bucket_change(mlp, size))
    )
    large = config.statistics_batch_size
    for network in (lenet, mlp):
        tx = optax.chain(
            network.optimizer,
            aj.schedulers.gradient_noise_scale(
                min_batch_size=large, max_batch_size=large, initial_batch_size=large
            ),
        )
        rows.append(
            (
                f"{network.name}, noise-scale statistics / plain step, B = {large}",
                1.10,
                lambda n=network, tx=tx: (n.timed(tx, large, window), n.plain(large, window)),
            )
        )
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
    for name, rule in noise_rules.items():
        tx = optax.chain(mlp.optimizer, rule)
        against_plain(f"MLP, {name} every 10th step / plain step", 1.25, mlp, tx)
    wide = Network("MLP 784-512-10", models.mlp(SHAPE, (512,), 10), mlp.agent)
    chosen = config.subset_batch_size
    name = f"{wide.name}, subset of n = {chosen}"
    rows += [
        (f"{name}: layers / per-example gradients", 0.20, lambda: subset(wide, chosen)[0]),
        (f"{name}: the same, memory [MB]", 0.20, lambda: subset(wide, chosen)[1]),
        (
            f"{name}: whole step / plain step",
            3.00,
            lambda: (
                wide.timed(
                    optax.chain(wide.optimizer, aj.schedulers.constant(chosen)),
                    chosen,
                    window,
                    gradient_fn=aj.subset_gradients(wide.losses.loss_fn),
                ),
                wide.plain(chosen, window),
            ),
        ),
    ]
    rows += networks.rows(size, window)
    return rows


def run(config: Config) -> _runner.Results:
    results = _runner.Results(extra={"config": config})
    for name, bar, make in build(config):
        if config.only not in name:
            continue
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
        "memory: of the intermediate results of the compiled program, in MB in place of ms.",
    )


def plot(results: _runner.Results, output: Path) -> None:
    fig, ax = plotting.figure(size=(8.5, 0.42 * len(results.rows) + 1.2))
    for y, row in enumerate(reversed(results.rows)):
        low, high = row["quartiles"]
        ax.plot([low, high], [y, y], color=plotting.COLORS[0], linewidth=3, alpha=0.5)
        ax.plot(
            row["ratio"], y, "o", color=plotting.COLORS[0], label="measured" if y == 0 else None
        )
        ax.plot(
            row["bar"],
            y,
            "|",
            color=plotting.COLORS[1],
            markersize=16,
            markeredgewidth=2,
            label="bar" if y == 0 else None,
        )
    ax.set_yticks(range(len(results.rows)), [row["method"] for row in reversed(results.rows)])
    ax.tick_params(axis="y", labelsize=8)
    ax.set_xlabel("ratio of step times: median and quartiles over the pairs")
    fig.legend(loc="outside right upper", frameon=False, fontsize=8)
    fig.savefig(output / "benchmark.png")
