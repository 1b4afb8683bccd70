"""The next window of several processes, without the processes: what the others want is simulated."""

import functools
import signal

import jax.numpy as jnp
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax.training import _next_plan
from arbiter_jax.training._auto_micro_batch import MicroBatch
from arbiter_jax.training._interrupts import Interrupts
from arbiter_jax.training._run import Run

TERM, INT = 1 << signal.SIGTERM, 1 << signal.SIGINT


@pytest.fixture
def run():
    tx = optax.chain(optax.sgd(0.1), aj.schedulers.constant(6))
    state = aj.init_state(jnp.zeros(()), tx, 0)
    data, advance = aj.Data(jnp.ones(50)), functools.partial(aj.run_window, tx=tx)
    return Run(state, data, advance, 100, end=20, window=10, mesh=None, micro=MicroBatch(None))


def decide(monkeypatch, run, theirs=0, own=None, is_ended=False):
    """What this process does where the others want to stop for these reasons."""
    told = []

    def agree(step_seconds, stop, **decision):
        told.append((stop, decision))
        return 0.5, stop | theirs

    monkeypatch.setattr(_next_plan, "agree", agree)
    interrupts = Interrupts(enabled=False)
    interrupts.received = own
    plan, is_ended = _next_plan.next_plan(run, is_ended, interrupts, shared=True)
    return plan, is_ended, interrupts.received, told[0]


def test_all_compare_what_they_take(monkeypatch, run):
    """Three steps of the ten, because the call ends there; the plan is that of the whole window."""
    plan, *_, (stop, decision) = decide(monkeypatch, run)
    assert plan == (6, 8, 10)
    expected = {"batch_size": 6, "bucket_size": 8, "num_steps": 3, "num_examples": 0}
    assert (stop, decision) == (0, expected)
    assert run.step_seconds == 0.5
    assert run.begin(plan) == (6, 8, 3)


@pytest.mark.parametrize(
    ("theirs", "own", "is_ended", "expected"),
    [
        (1, None, False, (True, None)),
        (0, None, True, (True, None)),
        (TERM, None, False, (False, signal.SIGTERM)),
        (TERM | INT, None, False, (False, signal.SIGTERM)),
        (TERM | 1, signal.SIGINT, False, (True, signal.SIGINT)),
    ],
)
def test_one_process_ends_all(monkeypatch, run, theirs, own, is_ended, expected):
    plan, *ends, _ = decide(monkeypatch, run, theirs, own, is_ended)
    assert plan is None
    assert tuple(ends) == expected
    # The run was not begun: its state is as after the last window.
    assert run.rest is None
    assert not run.is_cut


def test_a_signal_of_another_process_is_no_first_one():
    interrupts = Interrupts(enabled=False)
    interrupts.take_over(signal.SIGINT)
    interrupts._hold_back(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        interrupts._hold_back(signal.SIGINT, None)


def test_processes_cannot_share_auto():
    with pytest.raises(
        ValueError, match=r"^micro_batch_size must be .* together, got 'auto': each"
    ):
        MicroBatch("auto", shared=True)
