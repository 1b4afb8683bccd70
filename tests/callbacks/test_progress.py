"""The line that shows how far a run is: where it is shown, what it says, and that it goes away."""

import contextlib
import os
import re
import sys
import threading
import types

import jax
import jax.numpy as jnp
import pytest

import arbiter_jax as aj
from arbiter_jax.callbacks import _progress
from tests.callbacks.runs import SPLIT, TX, KilledError, fit, kill_after, loss, loss_fn, predict

pytest.importorskip("rich", reason='needs rich: pip install "arbiter-jax[progress]"')


def text_of(output):
    """Each state of the lines on a terminal, without the codes that move the cursor."""
    states = re.split(r"\r\x1b\[2K|[\r\n]+", output)
    return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", state).strip() for state in states]


@pytest.fixture
def terminal(monkeypatch):
    """Call it to make stderr a terminal of 110 columns; it returns a function that reads it all."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    stderr, parts = os.fdopen(theirs, "w"), []

    def read():
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(ours, 4096):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()

    def got():
        stderr.close()
        reader.join()
        return b"".join(parts).decode()

    def begin():  # in the test itself: pytest sets some of these before it
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "110")
        for name in ("CI", "PYTEST_CURRENT_TEST", "NO_COLOR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(_progress, "_EVERY", 0.0)
        monkeypatch.setattr(sys, "stderr", stderr)
        return got

    yield begin
    got()
    os.close(ours)


def test_a_terminal_shows_a_line_by_itself(terminal, capsys):
    got = terminal()

    def talk(record, state):
        if record.window_index == 2:
            print("to a file")
            print("to the terminal", file=sys.stderr)

    fit(talk)
    raw = got()
    states = text_of(raw)
    assert re.fullmatch("training [━╸╺]{10} 0/150 examples compiling", states[0])
    line = r"training [━╸╺]{10} 96/150 examples batch 6, loss [\d.e-]+, \d:\d\d left, [\d.]+[kM]?/s"
    assert any(re.fullmatch(line, state) for state in states)
    assert "to the terminal" in states
    assert text_of(raw)[-1] == ""  # nothing is left of it
    assert raw.rfind("\x1b[?25h") > raw.rfind("\x1b[?25l")  # but the cursor
    assert capsys.readouterr().out == "to a file\n"
    assert _progress._Rich.open is None


@pytest.mark.parametrize("where", ["pipe", "dumb", "CI", "off", "second process", "no rich"])
def test_nothing_is_shown_where_nobody_looks(terminal, monkeypatch, where):
    got = terminal()
    if where == "pipe":
        monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    elif where == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    elif where == "CI":
        monkeypatch.setenv("CI", "true")
    elif where == "second process":
        monkeypatch.setattr(jax, "process_index", lambda: 1)
    elif where == "no rich":
        monkeypatch.setitem(sys.modules, "rich", None)
    fit(stop_at=48, progress=False if where == "off" else None)
    assert got() == ""


def test_pytest_is_no_human(terminal, monkeypatch):
    got = terminal()
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "this one")
    fit(aj.callbacks.progress("shown"), stop_at=48)
    assert got() == ""


def test_it_goes_away_after_an_exception(terminal):
    got = terminal()
    with pytest.raises(KilledError):
        fit([aj.callbacks.progress("[my] run"), kill_after(2)])
    raw = got()
    assert text_of(raw)[-1] == ""
    assert any(state.startswith("[my] run ") for state in text_of(raw))
    assert "training" not in raw  # one line a run
    assert _progress._Rich.open is None


def test_a_run_inside_another_has_its_own_line(terminal):
    got = terminal()

    def inner(record, state):
        if record.window_index == 0:
            fit(aj.callbacks.progress("inner"), stop_at=48)

    fit([aj.callbacks.progress("outer"), inner], stop_at=48)
    states = text_of(got())
    at = [i for i, state in enumerate(states) if state.startswith("inner")]
    assert at
    assert all(states[i - 1].startswith("outer") for i in at)
    assert [state for state in states if state][-1].startswith("outer")


def test_several_seeds_share_a_line(terminal):
    got = terminal()
    keys = jax.random.split(jax.random.key(0), 2)
    options = {"num_examples": 150, "window": 4, "key": keys}
    aj.fit(loss_fn, jnp.zeros(2), TX, aj.Data(SPLIT), **options)
    assert any("96/300 examples batch 6, loss" in state for state in text_of(got()))


def test_evaluations_are_shown(terminal):
    got = terminal()
    fit(aj.callbacks.evaluate(predict, loss, SPLIT, name="a"), stop_at=72)
    assert re.search(r"72/72 examples batch 6, loss [^,]+, 0:00 left, a/loss [\d.]+", got())


def test_a_notebook_shows_a_bar_of_tqdm(monkeypatch):
    auto = pytest.importorskip("tqdm.auto")
    for name in ("CI", "PYTEST_CURRENT_TEST"):
        monkeypatch.delenv(name, raising=False)
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    bars = []

    class Bar(auto.tqdm):
        def __init__(self, **options):
            super().__init__(**options)
            bars.append((self, options))

        def close(self):
            self.shown = str(self)
            super().close()

    monkeypatch.setattr(auto, "tqdm", Bar)
    fit(progress=True)
    ((bar, options),) = bars
    assert (options["total"], options["leave"]) == (150, False)
    assert bar.n == 150
    assert re.search(r"training: 100%.* 150/150 .*, batch 6, loss [\d.]+\]", bar.shown)


def test_what_is_wrong_is_named_at_once(monkeypatch):
    with pytest.raises(ValueError, match=r"^description must be text, got 3\."):
        aj.callbacks.progress(3)
    with pytest.raises(ValueError, match=r"^progress must be True or False, got 'no'\."):
        fit(progress="no")
    monkeypatch.setitem(sys.modules, "rich", None)
    named = r'callbacks.progress needs rich: pip install "arbiter-jax\[progress\]"'
    with pytest.raises(ImportError, match=named):
        aj.callbacks.progress()
    with pytest.raises(ImportError, match=named):
        fit(progress=True)
