"""Checkpoints: what is saved, when, and what happens to a run that is stopped."""

import functools
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from arbiter_jax import datasets
from arbiter_jax.callbacks._history import PackedHistory, unpack
from arbiter_jax.training import OutOfMemoryError, _fit
from tests.training.resume_runs import arrays, assert_same_run, program
from tests.training.resume_runs import fit as fit_chain

NUM_KILLS = int(os.environ.get("ARBITER_JAX_NUM_KILLS", "5"))


def loss_fn(params, batch):
    return (params["w"] - batch) ** 2 / 2


DATA = aj.Data(jnp.arange(50, dtype=jnp.float32) / 50)
START = {"w": jnp.zeros(())}


@functools.cache
def chain(optimizer=optax.sgd(0.1), rule=None):  # noqa: B008
    return optax.chain(optimizer, rule or aj.schedulers.constant(10))


def fit(directory, tx=None, *, resume=True, every=1, keep=3, data=DATA, params=START, **options):
    saved = aj.checkpoints(directory, every=every, keep=keep)
    options = {"num_examples": 240, "window": 4, "key": 1} | options
    return aj.fit(loss_fn, params, tx or chain(), data, checkpoints=saved, resume=resume, **options)


def numbers(directory):
    return sorted(int(path.name) for path in pathlib.Path(directory).iterdir())


def at_window(number, do):
    return lambda record, state: do() if record.window_index + 1 == number else None


# When a run is saved


@pytest.mark.slow
def test_every_and_keep_count_windows(tmp_path):
    fit(tmp_path / "a", every=2, keep=2)
    assert numbers(tmp_path / "a") == [4, 6]
    fit(tmp_path / "b", every=4, keep=5)
    assert numbers(tmp_path / "b") == [4, 6]  # and the end


@pytest.mark.slow
def test_a_run_that_has_ended_is_read(tmp_path):
    first, again = fit(tmp_path), fit(tmp_path)
    assert_same_run(arrays(again), arrays(first))
    assert [r.seconds for r in again.history] == [r.seconds for r in first.history]
    assert again.num_compilations == first.num_compilations
    with pytest.warns(UserWarning, match="trained nothing: state has seen 240 examples, more than"):
        assert len(fit(tmp_path, num_examples=100).history) == 6
    # A larger budget goes on from there.
    longer = fit(tmp_path, num_examples=400)
    assert [r.window_index for r in longer.history] == list(range(10))
    plain = aj.fit(loss_fn, START, chain(), DATA, num_examples=400, window=4, key=1)
    assert_same_run(arrays(longer), arrays(plain))


def test_what_a_callback_ended_stays_ended(tmp_path):
    stop = lambda record, state: record.window_index == 2
    first = fit(tmp_path, every=10, callbacks=stop)
    assert len(first.history) == 3
    assert numbers(tmp_path) == [3]
    assert_same_run(arrays(fit(tmp_path, callbacks=stop)), arrays(first))
    assert len(fit(tmp_path).history) == 6  # without it the run goes on


@pytest.mark.slow
def test_legs_go_on_from_the_checkpoints(tmp_path):
    """A script of two legs, which is started again: each has a directory of its own."""
    for _ in range(2):
        first = fit(tmp_path / "first", stop_at=95)
        rest = fit(tmp_path / "rest", state=first.state)
    whole = fit(tmp_path / "whole")
    np.testing.assert_array_equal(rest.state.params["w"], whole.state.params["w"])
    assert [r.num_steps for r in first.history] == [4, 4, 1]
    assert [r.num_steps for r in rest.history] == [3, 4, 4, 4]


# Signals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "ends_as"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_saves_the_run_and_ends_it(number, ends_as, tmp_path, capfd):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    kill = at_window(3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(ends_as) as caught:
        fit(tmp_path, every=100, callbacks=kill)
    if number == signal.SIGTERM:
        assert caught.value.code == 143
    said = capfd.readouterr().err
    assert f"arbiter_jax: {number.name} after window 3 (120 examples)" in said
    assert f"the last checkpoint is {tmp_path}/3.\n" in said
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    assert_same_run(arrays(fit(tmp_path)), arrays(fit(tmp_path / "whole")))


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, every=2, callbacks=at_window(3, twice))
    assert numbers(tmp_path) == [2]


def test_a_signal_during_the_last_write_is_not_lost():
    class Saved:
        every = 1
        open = lambda self, identity: self
        latest = lambda self: None
        save = lambda self, checkpoint: None
        close = lambda self: os.kill(os.getpid(), signal.SIGTERM)

    options = {"num_examples": 40, "window": 4, "checkpoints": Saved()}
    with pytest.raises(SystemExit):
        aj.fit(loss_fn, START, chain(), DATA, **options)


def test_signals_are_left_alone_without_checkpoints():
    seen = []
    look = lambda record, state: seen.append(signal.getsignal(signal.SIGTERM))
    aj.fit(loss_fn, START, chain(), DATA, num_examples=40, window=4, callbacks=look)
    assert seen == [signal.getsignal(signal.SIGTERM)]


# A killed run ends as one that was not


def killed_until_done(directory, num_kills, name, kind, seed=0):
    """Starts a run again and again, kills it at random moments, and returns what it came to."""
    draw, result, kills = random.Random(seed), directory / "result.npz", 0
    while not result.exists():
        with program(name, kind, directory / "saved", result) as process:
            if kills < num_kills:
                process.stdout.readline()  # a window has run, and is being saved
                time.sleep(draw.expovariate(8))
                kills += process.poll() is None
                process.kill()
                process.wait()
            else:
                _, errors = process.communicate()
                assert process.returncode == 0, errors
    assert kills == num_kills
    return dict(np.load(result))


def undisturbed(directory, name, kind):
    with program(name, kind, directory / "undisturbed", directory / "expected.npz") as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    return dict(np.load(directory / "expected.npz"))


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(tmp_path):
    found = killed_until_done(tmp_path, 1, "gradient_noise_scale", "resident")
    expected = fit_chain("gradient_noise_scale", "resident")
    assert_same_run(found, arrays(expected))


def test_a_killed_run_goes_on_from_what_is_complete(tmp_path):
    """In one process, as after a kill during a write: the newest directory is half there."""

    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    with pytest.raises(Killed):
        fit(tmp_path, every=2, callbacks=at_window(5, kill))
    saved = numbers(tmp_path)
    assert saved[-1] == 4
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    assert_same_run(arrays(fit(tmp_path, every=2)), arrays(fit(tmp_path / "whole")))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_many_kills_change_nothing(tmp_path):
    """``ARBITER_JAX_NUM_KILLS=50`` kills more often."""
    names = itertools.cycle(["goodput", "arbiter", "noise_floor", "constant", "cabs"])
    kinds = itertools.cycle(["streamed", "resident", "batch_norm"])
    for done in range(0, NUM_KILLS, 5):
        directory = tmp_path / str(done)
        directory.mkdir()
        name, kind = next(names), next(kinds)
        expected = undisturbed(directory, name, kind)
        found = killed_until_done(directory, min(5, NUM_KILLS - done), name, kind, done)
        assert_same_run(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 1, marks=pytest.mark.exhaustive)],
)
def test_a_program_ends_as_the_signal_says(number, code, tmp_path):
    result = tmp_path / "result.npz"
    with program("constant", "streamed", tmp_path / "saved", result) as process:
        process.stdout.readline()
        process.send_signal(number)
        _, errors = process.communicate()
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
    else:
        assert process.returncode == code
    assert errors.count("arbiter_jax: ") == 1
    assert not result.exists()
    found = killed_until_done(tmp_path, 0, "constant", "streamed")
    assert_same_run(found, arrays(fit_chain("constant", "streamed")))


# What is saved


def test_a_history_survives_as_it_is(tmp_path):
    with_aux = lambda params, batch: (loss_fn(params, batch), {"two": (batch * params["w"], None)})
    saved = aj.checkpoints(tmp_path)
    run = lambda: aj.fit(
        with_aux,
        START,
        chain(),
        DATA,
        num_examples=90,
        window=4,
        has_aux=True,
        checkpoints=saved,
        resume=True,
    )
    first, again = run(), run()
    assert jax.tree.structure(first.history) == jax.tree.structure(again.history)
    for x, y in zip(jax.tree.leaves(first.history), jax.tree.leaves(again.history), strict=True):
        np.testing.assert_array_equal(x, y)
        assert np.asarray(x).dtype == np.asarray(y).dtype


def record(index, num_steps, **metrics):
    info = aj.StepInfo(
        np.arange(num_steps, dtype=np.float32), np.full(num_steps, 4, np.int32), metrics
    )
    return aj.WindowRecord(index, 4, 4, num_steps, 2**40 + index, 1.5, 0.1 + index, 1, info, {})


def test_a_packed_history_grows():
    """Windows of another form, and more windows than fit at first."""
    history = [record(i, 3, noise=np.full(3, i, np.float32)) for i in range(40)]
    history += [record(40, 2, other=np.zeros((2, 0, 3), np.int8))]
    history[2].evaluation["test/loss"] = 0.1
    history[40].evaluation.update({"gap": float("nan"), "test/loss": 0.2})
    packed = PackedHistory()
    early = packed.pack(history[:5])
    arrays_, segments = packed.pack(history)
    assert all(x.size for x in arrays_.values())
    for found, expected in ((unpack(arrays_, segments), history), (unpack(*early), history[:5])):
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_what_orbax_cannot_write_comes_back(tmp_path):
    """Empty arrays, bfloat16, a state without arrays."""
    params = {"w": jnp.ones((), jnp.bfloat16), "none": jnp.zeros((0, 3))}
    stop = at_window(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, params=params, callbacks=stop)
    state = fit(tmp_path, params=params).state
    assert state.params["none"].shape == (0, 3)
    assert state.params["w"].dtype == jnp.bfloat16
    whole = aj.fit(loss_fn, params, chain(), DATA, num_examples=240, window=4, key=1).state
    assert state.params["w"] == whole.params["w"]


def test_the_state_is_an_ordinary_checkpoint(tmp_path):
    import orbax.checkpoint as ocp

    result = fit(tmp_path)
    like = aj.init_state(START, chain(), 0)
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(tmp_path / "6" / "state", like)
    np.testing.assert_array_equal(state.params["w"], result.state.params["w"])


# What is refused


def test_another_run_is_refused_by_its_difference(tmp_path):
    fit(tmp_path)
    wide = aj.schedulers.gradient_noise_scale(max_batch_size=64)
    for options, difference in [
        ({"params": {"w": jnp.zeros(1)}}, r"state.params\['w'\] is float32\[\], not float32\[1\]"),
        ({"params": {"v": jnp.zeros(())}}, r"has no state.params\['v'\]"),
        (
            {"tx": chain(optax.adam(0.1))},
            r"state.opt_state\[0\]\[0\] is EmptyState, not ScaleByAdam",
        ),
        (
            {"tx": chain(rule=wide)},
            r"state.opt_state\[1\] is ConstantState, not GradientNoiseScale",
        ),
        (
            {"tx": chain(rule=aj.schedulers.constant(10, max_batch_size=11))},
            r"state.opt_state\[1\].max_batch_size is int32\[\] of .*, not int32\[\] of 11",
        ),
    ]:
        with pytest.raises(
            ValueError, match=rf"/6 must be .* range, but its {difference}"
        ) as error:
            fit(tmp_path, **options)
        assert str(error.value).endswith("pass another directory to aj.checkpoints for this run.")


def test_another_key_is_refused(tmp_path):
    """A loop over seeds that forgets to change the directory would get one seed again and again."""
    fit(tmp_path)
    with pytest.raises(
        ValueError, match=r"/6 must be a checkpoint of a run with this key, got one"
    ):
        fit(tmp_path, key=2)


@pytest.mark.parametrize("part", ["state", "history"])
def test_damaged_files_are_named(part, tmp_path):
    whole = fit(tmp_path)
    files = [path for path in (tmp_path / "6" / part).rglob("*") if path.is_file()]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"/6 must be a whole checkpoint, got .*: delete it to go"):
        fit(tmp_path)
    shutil.rmtree(tmp_path / "6")
    assert_same_run(arrays(fit(tmp_path)), arrays(whole))


def test_a_place_that_cannot_be_written_is_named():
    message = (
        r"^directory of aj.checkpoints must be one that can be written into, got /dev/null/a: N"
    )
    with pytest.raises(ValueError, match=message):
        fit("/dev/null/a")


def test_another_format_is_refused(tmp_path):
    fit(tmp_path)
    path = tmp_path / "6" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"format": 99}))
    with pytest.raises(
        ValueError, match=r"/6 must be .* of format 2, got one of format 99, which "
    ):
        fit(tmp_path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"/6 must be a checkpoint of aj\.fit, got another: pass"):
        fit(tmp_path)


def test_an_earlier_run_is_not_written_over(tmp_path):
    fit(tmp_path)
    message = r"^checkpoints must be in a directory without .* earlier run, got .*/6: pass resume="
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, resume=False)
    assert numbers(tmp_path) == [4, 5, 6]


def test_arguments_are_checked(tmp_path):
    plain = functools.partial(aj.fit, loss_fn, START, chain(), DATA, num_examples=40, window=4)
    for options, message in [
        ({"resume": True}, "resume must be False without checkpoints, got True"),
        ({"resume": 1}, "resume must be"),
        (
            {"checkpoints": str(tmp_path)},
            r"checkpoints must be aj\.checkpoints\(directory\), got '/",
        ),
        ({"clock": 3.0}, r"clock must be a function clock\(\) -> seconds, got 3.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            plain(**options)
    (tmp_path / "file").write_text("")
    for arguments, message in [
        ({"directory": tmp_path / "file"}, "must be a directory to write into, got the file /"),
        ({"directory": 3}, "directory must be a path, got 3"),
        ({"directory": tmp_path, "every": 0}, "every must be an integer >= 1, got 0"),
        ({"directory": tmp_path, "keep": 0}, "keep must be an integer >= 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            aj.checkpoints(**arguments)


# The place in the data


def test_a_source_without_a_place_is_refused(tmp_path):
    chunks = iter([np.zeros(400, np.float32)])
    with (
        datasets.host_blocks(chunks, window=4) as blocks,
        pytest.raises(ValueError, match=r"^source must be an iterator with get_state\(\) and "),
    ):
        fit(tmp_path, data=aj.Data(blocks))


class Reader:
    """A reader with a place, as grain's have: bytes, and chunks of several lengths."""

    def __init__(self):
        self.index = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.index += 1
        return np.full(1 + self.index % 7, self.index, np.float32)

    def get_state(self):
        return json.dumps({"index": self.index}).encode()

    def set_state(self, state):
        self.index = json.loads(state.decode())["index"]


@pytest.mark.slow
def test_any_reader_with_a_place_goes_on(tmp_path):
    def run(directory, **options):
        with datasets.host_blocks(Reader(), window=4) as blocks:
            return fit(directory, data=aj.Data(blocks), **options)

    stop = at_window(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        run(tmp_path / "stopped", callbacks=stop)
    assert_same_run(arrays(run(tmp_path / "stopped")), arrays(run(tmp_path / "whole")))


# Out of memory


def test_out_of_memory_names_the_last_checkpoint(tmp_path, monkeypatch):
    original = _fit.run_window

    def run_window(state, *args, **options):
        if int(state.num_steps) >= 8:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")
        return original(state, *args, **options)

    monkeypatch.setattr(_fit, "run_window", run_window)
    with pytest.raises(OutOfMemoryError, match=rf"the last checkpoint is {tmp_path}/2\.$"):
        fit(tmp_path)
