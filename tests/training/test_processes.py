"""Two processes of two devices each train as one process with one device does."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

import arbiter_jax

pytestmark = pytest.mark.slow

SCRIPT = pathlib.Path(__file__).with_name("process_runs.py")
SECONDS = 900  # after which it is a deadlock
SAME = ["constant", "noise_scale", "arbiter", "streamed"]  # on two processes as on one
MORE_OF_THE_SAME = [
    "noise_floor",
    "expected_gain",
    "goodput",
    "streamed_short",
    "streamed_groups",
    "aux",
]


def start(folder, name, port, count, index, num_devices, runs):
    flags = os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={num_devices}"
    package = pathlib.Path(arbiter_jax.__file__).parents[1]
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{package}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    results = folder / f"{name}.json"
    arguments = [sys.executable, SCRIPT, results, port, count, index, *runs]
    with (folder / f"{name}.log").open("w") as log:
        command = [str(argument) for argument in arguments]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    return process, results


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The results of the runs that CI makes."""
    others = ["source_fails", "stops", "killed", "differs", "streamed_odd"]
    return results_of([*SAME, *others], tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory):
    """The results of the others."""
    others = ["goodput_on_another_clock", "source_ends"]
    return results_of([*MORE_OF_THE_SAME, *others], tmp_path_factory.mktemp("processes"))


def results_of(names, folder):
    """The results of some runs: on one process, and on each of two."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        start(folder, "one", port, 1, 0, 1, names),
        start(folder, "first", port, 2, 0, 2, names),
        start(folder, "second", port, 2, 1, 2, names),
    ]
    try:
        codes = [process.wait(SECONDS) for process, _ in processes]
    finally:
        for process, _ in processes:
            process.kill()
            process.wait()
        logs = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("*.log")))
    assert codes == [0, 0, 0], logs
    return [json.loads(results.read_text()) for _, results in processes]


def of(runs, name):
    one, first, second = (run[name] for run in runs)
    return one, first, second


@pytest.mark.parametrize("name", SAME)
def test_two_processes_equal_one(runs, name):
    assert_same(runs, name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MORE_OF_THE_SAME)
def test_more_runs_of_two_processes_equal_one(more_runs, name):
    assert_same(more_runs, name)


def assert_same(runs, name):
    one, *both = of(runs, name)
    for found in both:
        assert found["windows"] == one["windows"]
        np.testing.assert_allclose(found["params"], one["params"], atol=1e-5)
        np.testing.assert_allclose(found["losses"], one["losses"], atol=1e-5)
        if name == "aux":  # of each example, in parts on the two processes
            for rows, expected in zip(found["aux"], one["aux"], strict=True):
                np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.exhaustive
def test_the_time_of_a_step_is_that_of_process_0(more_runs):
    one, first, second = of(more_runs, "goodput")
    other = more_runs[0]["goodput_on_another_clock"]
    assert first["windows"] == second["windows"] == one["windows"] != other["windows"]


@pytest.mark.exhaustive
def test_blocks_are_short_of_few_bytes(more_runs):
    for found in of(more_runs, "streamed_short"):
        assert {(8, 2), (16, 1)} >= {(bucket, steps) for _, bucket, steps in found["windows"]}
        assert len(found["windows"]) > 8


def test_each_process_draws_its_share(runs):
    one, first, second = (run["drawn"] for run in of(runs, "streamed_odd"))
    assert (one, first, second) == ([60, 60], [60, 36], [60, 24])


@pytest.mark.exhaustive
def test_a_source_that_ends_ends_the_run_of_all(more_runs):
    """After the 10 steps of 4 examples that the shorter of the two sources has."""
    one, *both = of(more_runs, "source_ends")
    for found in both:
        assert found["windows"] == [[8, 8, 4], [8, 8, 4], [8, 8, 2]]
        np.testing.assert_allclose(found["losses"], one["losses"][:10], atol=1e-5)


def test_an_error_of_a_source_is_one_on_all(runs):
    one, first, second = (run["error"] for run in of(runs, "source_fails"))
    assert one == second == "OSError: the disk is gone"
    assert first.startswith("RuntimeError: the source of process 1 has raised an error")


def test_a_stop_on_one_process_ends_all(runs):
    one, *both = of(runs, "stops")
    assert len(one["windows"]) == 2
    assert [found["windows"] for found in both] == [one["windows"]] * 2


def test_a_signal_to_one_process_ends_all(runs):
    """After the same window, with a checkpoint that each goes on from in its own source."""
    for found in of(runs, "killed"):
        assert (found["exit"], found["saved"]) == (143, ["2"])
        for quantity in ("windows", "params", "losses"):
            assert found["resumed"][quantity] == found["whole"][quantity]


def test_another_decision_is_an_error_on_all(runs):
    _, *both = of(runs, "differs")
    assert both[0]["error"] == both[1]["error"]
    assert both[0]["error"].startswith(
        "RuntimeError: the processes must train alike, but they differ in num_steps, [4, 2] "
    )
