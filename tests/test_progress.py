"""The live progress line."""

import io
import sys
import types

import pytest

from arbiter_jax import progress

rich_progress = pytest.importorskip(
    "rich.progress", reason='needs rich: pip install "arbiter-jax[experiments]"'
)

RECORD = types.SimpleNamespace(
    num_examples=250, batch_size=32, loss=0.5, num_steps=20, seconds=0.125
)


@pytest.fixture
def display(monkeypatch):
    """The rich display, which prints to memory as if that were a terminal."""
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    displays = []

    class Recorded(rich_progress.Progress):
        def __init__(self, *columns, **options):
            super().__init__(*columns, console=console, auto_refresh=False, **options)
            displays.append(self)

        def text(self):
            with console.capture() as capture:
                console.print(self.get_renderable())
            return capture.get()

    monkeypatch.setattr(rich_progress, "Progress", Recorded)
    return displays


def test_shows_the_state_of_the_current_run(display):
    with progress.live() as start:
        callback = start("constant 32", num_examples=1000)
        assert callback(RECORD, None) is None  # a true result would end the run
        text = display[0].text()
        for part in ("constant 32", "25%", "batch    32", "loss  0.5000", "5,120 examples/s"):
            assert part in text


def test_the_next_run_replaces_the_line(display):
    with progress.live() as start:
        start("first", num_examples=1000)(RECORD, None)
        start("second", num_examples=500)
        (task,) = display[0].tasks
        assert (task.description, task.total, task.completed) == ("second", 500, 0)


def test_disabled_it_does_not_need_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    with progress.live(enabled=False) as start:
        assert start("constant 32", num_examples=1000)(RECORD, None) is None
    assert capsys.readouterr() == ("", "")


def test_without_rich_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    with (
        pytest.raises(ImportError, match=r'pip install "arbiter-jax\[experiments\]"'),
        progress.live(),
    ):
        pass
