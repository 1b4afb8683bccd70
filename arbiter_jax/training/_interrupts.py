"""SIGTERM and Ctrl-C, held back until the running window has ended."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_HELD_BACK = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """While it is open, a signal is noted in `received` instead of ending the process at once.

    A second Ctrl-C raises KeyboardInterrupt at once. Only the main thread can hold signals back: on
    another one, or where this is not enabled, they act as usual.
    """

    def __init__(self, enabled: bool):
        self.received: signal.Signals | None = None
        self._is_own = True  # not that of another process
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
        if number == signal.SIGINT and self.received is signal.SIGINT and self._is_own:
            raise KeyboardInterrupt
        self.received, self._is_own = signal.Signals(number), True

    def take_over(self, number: signal.Signals) -> None:
        """Takes a signal that another process has got as if it had come here, if none has."""
        if self.received is None:
            self.received, self._is_own = number, False

    def end(self) -> None:
        """Ends the program as the signal would have, if there was one."""
        if self.received is signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)
