"""The numbers of every window, as a function of the user's and TensorBoard's files get them."""

import struct
import sys

import numpy as np
import pytest

import arbiter_jax as aj
from tests.callbacks.runs import SPLIT, KilledError, fit, kill_after, loss, predict


def evaluate(every=3):
    return aj.callbacks.evaluate(predict, loss, SPLIT, every=every, name="test")


def test_a_function_gets_a_flat_dict_and_the_step():
    calls = []
    log = aj.callbacks.log(lambda data, step=None, commit=True: calls.append((data, step)))
    history = fit([evaluate(), log]).history
    assert [step for _, step in calls] == [24, 48, 72, 96, 120, 144, 150, 150]
    numbers = calls[2][0]
    assert all(type(value) is float for value in numbers.values())
    record = history[2]
    assert numbers == {
        "window_index": 2.0,
        "num_examples": 72.0,
        "num_steps": 4.0,
        "batch_size": 6.0,
        "bucket_size": 8.0,
        "loss": record.loss,
        "seconds": record.seconds,
        "examples_per_second": pytest.approx(24 / record.seconds),
        "num_compilations": float(record.num_compilations),
        "shadow/nine": 9.0,
        **record.evaluation,
    }
    # The last window, which was not its turn, is evaluated after it was logged.
    assert "test/loss" not in calls[6][0]
    assert calls[7][0] == history[6].evaluation != {}


@pytest.mark.parametrize("kind", ["without", "positional", "any", "built in"])
def test_a_function_without_a_step_gets_none(kind):
    calls = []
    functions = {
        "without": lambda numbers: calls.append(numbers),
        "positional": lambda numbers, step=None, /: calls.append(numbers if step is None else 0),
        "any": lambda numbers, **others: calls.append(others or numbers),
        "built in": calls.append,
    }
    fit(aj.callbacks.log(functions[kind]), stop_at=48)
    assert [numbers["num_examples"] for numbers in calls] == [24, 48]


@pytest.mark.parametrize("value", ["text", None, [1.0], np.str_("text"), np.ones(2), 1j])
def test_a_note_that_is_no_number_is_named(value):
    def note(record, state):
        record.evaluation["odd"] = value

    message = r"record.evaluation must hold text -> one number, got 'odd': .* from a callback"
    with pytest.raises(ValueError, match=message):
        fit([note, aj.callbacks.log(lambda numbers: None)], stop_at=24)


@pytest.mark.slow
def test_a_resumed_run_logs_new_windows_only(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    steps = []
    log = aj.callbacks.log(lambda numbers, step: steps.append(step))
    saved = {"checkpoints": aj.checkpoints(tmp_path), "resume": True}
    with pytest.raises(KilledError):
        fit([evaluate(1), log, kill_after(3)], **saved)  # dies before the third one is saved
    fit([evaluate(1), log], **saved)
    fit([evaluate(1), log], **saved)
    assert steps == [24, 48, 72, 72, 96, 120, 144, 150]


@pytest.mark.parametrize("function", [3, None, "wandb"])
def test_what_is_no_function_is_named(function):
    with pytest.raises(ValueError, match=r"^function must be a function of a dict of numbers, got"):
        aj.callbacks.log(function)


# TensorBoard


def events(directory):
    """All events in a directory: each is its length, a checksum of it, its bytes, and theirs."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(directory.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


def values(directory, name):
    return [
        (event.step, value.simple_value)
        for event in events(directory)
        for value in event.summary.value
        if value.tag == name
    ]


def test_tensorboard_has_every_window(tmp_path):
    pytest.importorskip("tensorboardX")
    board = aj.callbacks.tensorboard(tmp_path / "board")
    history = fit([evaluate(), board]).history
    at = [record.num_examples for record in history]
    losses = [np.float32(record.loss) for record in history]
    assert values(tmp_path / "board", "loss") == list(zip(at, losses, strict=True))
    assert values(tmp_path / "board", "shadow/nine") == [(n, 9.0) for n in at]
    tested = [
        (r.num_examples, np.float32(r.evaluation["test/loss"])) for r in history if r.evaluation
    ]
    assert values(tmp_path / "board", "test/loss") == tested
    assert [n for n, _ in tested] == [72, 144, 150]


def test_tensorboard_goes_on_where_the_run_does(tmp_path):
    """What a stopped run has written after that point is hidden, and an exception closes the file."""
    pytest.importorskip("tensorboardX")
    board = aj.callbacks.tensorboard(tmp_path)
    state = fit(board, stop_at=48).state
    with pytest.raises(KilledError):
        fit([board, kill_after(2)])
    assert len(values(tmp_path, "loss")) == 4
    fit(board, state=state, stop_at=72)
    restarts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert restarts == [1, 1, 49]


def test_tensorboard_names_what_is_wrong(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for directory in (3, ""):
        with pytest.raises(ValueError, match=r"^directory must be a path"):
            aj.callbacks.tensorboard(directory)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r'tensorboardX: pip install "arbiter-jax\[logging\]"'):
        aj.callbacks.tensorboard(tmp_path)
    monkeypatch.undo()
    pytest.importorskip("tensorboardX")
    with pytest.raises(ValueError, match=r"^directory must be one that can be written into"):
        aj.callbacks.tensorboard(tmp_path / "file" / "board")
