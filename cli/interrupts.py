"""Ctrl-C and a polite kill unwind the stack, so that temporary files go; but never in the middle of an import.

An exception that strikes while an extension module is being loaded is swallowed by some of them, makes others report
that they are broken, and crashes OpenVINO's. A signal that comes during an import therefore waits until it is over; a
second one does not.
"""

import os
import signal
import threading
from types import FrameType

_WAIT_SECONDS = 0.05


def install() -> None:
    """Handle SIGINT (`KeyboardInterrupt`) and SIGTERM (`SystemExit` 143) from here on.

    One that is ignored stays so: shells start background jobs that way, and `nohup` means it.
    """
    handler = _Handler()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def ignore() -> None:
    """Ignore both from here on: the result stands, and only Python's own tidying up is left to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Handler:
    """Raises the exception that a signal stands for, or sends the signal again when an import is under way."""

    def __init__(self) -> None:
        self._waiting = False
        self._sent_again = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        mine, self._sent_again = self._sent_again, False
        if _importing(frame) and (mine or not self._waiting):
            self._waiting = True
            again = threading.Timer(_WAIT_SECONDS, self._send, (number,))
            again.daemon = True
            again.start()
            return
        self._waiting = False
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def _send(self, number: int) -> None:
        self._sent_again = True
        os.kill(os.getpid(), number)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
