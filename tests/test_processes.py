"""What several processes agree on, without the processes: the exchange between them is simulated."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from arbiter_jax import _processes


@pytest.fixture
def others(monkeypatch):
    """Sets what the other processes send: a list of the arguments of their `gather`."""
    sent = []

    def process_allgather(words):
        rest = [np.array([(n % 2**32, n >> 32) for n in row], np.uint32) for row in sent]
        return np.stack([np.asarray(words), *rest])

    monkeypatch.setattr(multihost_utils, "process_allgather", process_allgather)
    return sent


def bits(seconds):
    return int(np.float32(seconds).view(np.uint32))


def test_numbers_of_all_processes(others):
    others[:] = [(2**63, 0, 5)]
    assert _processes.gather(2**40 + 1, 7, 5) == [[2**40 + 1, 2**63], [7, 0], [5, 5]]


def test_one_clock_and_any_stop(others):
    others[:] = [(bits(0.5), 1, 8, 2**33)]
    assert _processes.agree(0.25, False, batch_size=8, num_examples=2**33) == (0.25, True)
    others[:] = [(bits(0.5), 0, 8)]
    seconds, stop = _processes.agree(math.nan, False, batch_size=8)
    assert math.isnan(seconds)
    assert not stop


def test_every_reason_to_stop_is_kept(others):
    others[:] = [(bits(0.5), 4), (bits(0.5), 1)]
    assert _processes.agree(0.5, 0) == (0.5, 5)


def test_a_text_of_every_process(monkeypatch):
    theirs = b"a longer text"

    def process_allgather(x):
        if x.dtype == np.uint8:
            assert len(x) == len(theirs)
            return np.stack([x, np.frombuffer(theirs, np.uint8)])
        return np.stack([x, np.array([(len(theirs), 0)], np.uint32)])

    monkeypatch.setattr(multihost_utils, "process_allgather", process_allgather)
    assert _processes.gather_text("größer") == ["größer", "a longer text"]


def test_a_difference_is_an_error(others):
    others[:] = [(bits(0.5), 0, 16, 3, 96)]
    message = r"differ in batch_size, \[8, 16\] and in num_examples, \[64, 96\] \(process 0, 1"
    with pytest.raises(RuntimeError, match=message):
        _processes.agree(0.5, False, batch_size=8, num_steps=3, num_examples=64)


def test_one_process_exchanges_nothing(monkeypatch):
    monkeypatch.setattr(multihost_utils, "process_allgather", None)
    tree = {"x": jnp.arange(3), "y": np.float32(2)}
    assert not _processes.spans_processes(tree)
    read = _processes.read(tree)
    assert isinstance(read["x"], np.ndarray)
    assert read["x"].tolist() == [0, 1, 2]
    assert jax.process_count() == 1
