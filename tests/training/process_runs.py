"""The runs of one of several processes: `python process_runs.py RESULTS PORT COUNT INDEX RUN...`.

With a count of 1 they are the runs on one device that the others are compared with.
"""

import functools
import itertools
import json
import os
import pathlib
import signal
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

import arbiter_jax as aj
from arbiter_jax import datasets

WINDOW, NUM_ROWS = 4, 64
INPUTS = np.random.default_rng(0).normal(size=(NUM_ROWS, 4)).astype(np.float32)
ROW_BYTES = 20
LIMITS = {"min_batch_size": 8, "max_batch_size": 64}
LABELS = INPUTS @ np.arange(4, dtype=np.float32)
LABELS += np.random.default_rng(1).normal(size=NUM_ROWS).astype(np.float32)

VALIDATION = INPUTS[:32], LABELS[:32]


def loss_fn(params, batch):
    inputs, labels = batch
    return (inputs @ params - labels) ** 2


def loss_with_aux(params, batch):
    losses = loss_fn(params, batch)
    return losses, {"losses": losses, "largest": jnp.max(losses)}


@functools.cache  # runs with the same rule share their programs
def chain(rule):
    return optax.chain(optax.sgd(0.02, momentum=0.5), rule)


@functools.cache
def constant(batch_size):
    return aj.schedulers.constant(batch_size)


@functools.cache
def growing():
    return aj.schedulers.from_schedule(optax.piecewise_constant_schedule(6, {8: 2}))


@functools.cache
def noise_scale():
    return aj.schedulers.gradient_noise_scale(decay=0.8, **LIMITS)


@functools.cache
def throughput():
    return aj.schedulers.goodput(initial_batch_size=16, **LIMITS)


class Process:
    """Where this process stands, and a run on the devices of all."""

    def __init__(self, count, index, folder):
        self.count, self.index, self.folder = count, index, folder
        self.mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))

    def sharding(self, *axes):
        return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec(*axes))

    def put(self, tree, *axes):
        sharding = self.sharding(*axes)
        whole = lambda x: jax.make_array_from_callback(
            np.shape(x), sharding, np.asarray(x).__getitem__
        )
        return jax.tree.map(whole, tree)

    def fit(self, rule, train=None, validation=None, num_examples=200, loss_fn=loss_fn, **options):
        tx = chain(rule)
        state = self.put(aj.init_state(np.zeros(4, np.float32), tx, 0))
        train = self.put((INPUTS, LABELS), "data") if train is None else train
        options = {"num_examples": num_examples, "window": WINDOW, "state": state} | options
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a source has ended
            data = aj.Data(train, self.put(validation))
            result = aj.fit(loss_fn, None, tx, data, **options)
        found = {
            "windows": [(r.batch_size, r.bucket_size, r.num_steps) for r in result.history],
            "params": np.asarray(result.state.params).tolist(),
            "losses": result.per_step("loss").tolist(),
            "num_compilations": result.num_compilations,
        }
        if options.get("has_aux"):
            several = jax.device_count() > 1
            order = aj.batching.interleaved if several else aj.batching.bit_reversed
            real = lambda r: np.argsort(order(r.bucket_size))[: r.batch_size]
            found["aux"] = [r.info.aux["losses"][:, real(r)].tolist() for r in result.history]
        return found

    def stream(self, rule, lengths=(400, 400), fails=False, sizes=(6, 6), **options):
        """On the rows of a stream that two processes take in turn, two of each four in a batch.

        Batches, or groups of rows, have the first size for 48 examples, then the second.
        """
        number = np.arange(2 * max(lengths))
        in_batch = number % np.where(number < 48, *sizes)
        mine = number % NUM_ROWS
        if self.count > 1:  # as in `batching.interleaved`
            mine = mine[in_batch % 4 // 2 == self.index][: lengths[self.index]]

        def source():
            for start in range(0, len(mine), 7):
                if fails and start > 30 and self.index == self.count - 1:
                    raise OSError("the disk is gone")
                yield INPUTS[mine[start : start + 7]], LABELS[mine[start : start + 7]]

        sharding = self.sharding(None, "data")
        limits = {name: options.pop(name) for name in ("max_bytes",) if name in options}
        with datasets.host_blocks(source(), window=WINDOW, sharding=sharding, **limits) as blocks:
            found = self.fit(rule, blocks, **options)
            return found | {"drawn": [blocks.num_examples, blocks.num_local_examples]}


def fake_clock(seed):
    """Random times, so that another clock is another run."""
    times = itertools.accumulate(np.random.default_rng(seed).uniform(0.1, 10, size=1000))
    return lambda: float(next(times))


def timed(process, rule, clock=None):
    """A run of a rule that reads the clock, which is another one on each process."""
    clock = fake_clock(process.index if clock is None else clock)
    return process.fit(rule, num_examples=1200, clock=clock)


def goodput(process, clock=None):
    return timed(process, throughput(), clock)


def response_loss(params, response, meta_batch):
    inputs, labels = meta_batch
    return ((inputs * (1 + response[None])) @ params - labels) ** 2


def arbiter(process):
    agent = aj.mlp_agent((4,), hidden_sizes=(4,))
    limits = LIMITS | {"initial_batch_size": 10, "agent_optimizer": optax.adam(0.1)}
    rule = aj.arbiter(agent, response_loss, num_features=4, window=WINDOW, **limits)
    return process.fit(rule, validation=VALIDATION, num_examples=600)


def stops(process):
    """The last process has a callback that ends the run after the second window."""
    mine = [lambda record, state: record.window_index == 1]
    callbacks = mine if process.index == process.count - 1 else []
    return process.fit(constant(6), callbacks=callbacks)


def killed(process):
    """The last process gets SIGTERM in the second window, and all are started again.

    The whole run is given the source as it is, the others blocks of it.
    """
    mine = [x[process.index :: process.count] for x in (INPUTS, LABELS)]
    directory = process.folder / f"checkpoints_of_{process.count}"

    def source_of_process():
        return datasets.epochs(tuple(mine), chunk_size=5 + process.index, seed=process.index)

    def run(**options):
        source = source_of_process()
        sharding = process.sharding(None, "data")
        with datasets.host_blocks(source, window=WINDOW, sharding=sharding) as blocks:
            return process.fit(noise_scale(), blocks, num_examples=600, **options)

    def kill(record, state):
        if record.window_index == 1 and process.index == process.count - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    saved = aj.checkpoints(directory, every=3)
    found = {"whole": process.fit(noise_scale(), source_of_process(), num_examples=600)}
    try:
        run(checkpoints=saved, callbacks=kill)
    except SystemExit as end:
        found |= {"exit": end.code, "saved": sorted(path.name for path in directory.iterdir())}
    return found | {"resumed": run(checkpoints=saved, resume=True)}


def differs(process):
    """The last process has another budget."""
    end = 200 if process.index == 0 else 16
    return process.fit(constant(6), stop_at=end)


RUNS = {
    "constant": lambda process: process.fit(constant(6)),
    "noise_scale": lambda process: process.fit(noise_scale(), num_examples=1500),
    "goodput": goodput,
    "goodput_on_another_clock": lambda process: goodput(process, clock=7),
    "noise_floor": lambda process: timed(
        process, aj.schedulers.noise_floor(step_cost="measured", **LIMITS)
    ),
    "expected_gain": lambda process: process.fit(
        aj.schedulers.expected_gain(loss_fn, measure_every=2, **LIMITS),
        validation=VALIDATION,
        num_examples=1200,
    ),
    "arbiter": arbiter,
    "streamed": lambda process: process.stream(growing(), sizes=(6, 12)),
    # One process has 3 of 5 examples, the other 2, so the order is not that of one process.
    "streamed_odd": lambda process: process.stream(constant(5), num_examples=60),
    # Two steps of a bucket of 8 rows.
    "streamed_short": lambda process: process.stream(
        growing(), sizes=(6, 12), max_bytes=2 * 8 * ROW_BYTES // jax.device_count()
    ),
    # Groups of 8 rows: two of them hold a step of 12 examples.
    "streamed_groups": lambda process: process.stream(growing(), micro_batch_size=8),
    "source_ends": lambda process: process.stream(constant(8), (60, 40), sizes=(8, 8)),
    "source_fails": lambda process: process.stream(constant(8), fails=True),
    "aux": lambda process: process.stream(
        constant(6), num_examples=60, loss_fn=loss_with_aux, has_aux=True
    ),
    "stops": stops,
    "killed": killed,
    "differs": differs,
}


def outcome(run, process):
    try:
        return run(process)
    except (RuntimeError, OSError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main(results, port, count, index, *names):
    count, index = int(count), int(index)
    if count > 1:
        jax.distributed.initialize(f"localhost:{port}", count, index)
    process = Process(count, index, pathlib.Path(results).parent)
    found = {name: outcome(functools.partial(RUNS[name]), process) for name in names}
    with open(results, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
