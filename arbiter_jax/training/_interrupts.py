"""SIGTERM and Ctrl-C, held back until the running window has ended."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_HELD_BACK = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """While it is open, a signal is noted in `received` instead of ending the process at once.

    A second Ctrl-C raises KeyboardInterrupt where it comes. Only the main thread can do this: on
    another one, or where it is not enabled, nothing is held back.
    """

    def __init__(self, enabled: bool):
        self.received: signal.Signals | None = None
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in _HELD_BACK if self._enabled else ():
            # A process in the background of a shell ignores Ctrl-C, and goes on doing so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._hold_back)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}

    def _hold_back(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self.received is signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def end(self) -> None:
        """Ends the program as the signal would have, if there was one."""
        if self.received is signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)
