"""SIGINT and SIGTERM, handled in one place: they unwind the stack, so that temporary files are removed.

They never interrupt an import: an exception raised while an extension module is loaded is swallowed by some modules,
makes others report that they are broken, and crashes OpenVINO's. A signal that arrives during an import is delivered
after it; a second one is delivered at once. A few renames that belong together are not interrupted either (`held`).
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WAIT_SECONDS = 0.05


def install() -> None:
    """Raise `KeyboardInterrupt` on SIGINT and `SystemExit` (143) on SIGTERM from now on.

    An ignored signal stays ignored: shells start background jobs that way, and so does `nohup`.
    """
    handler = _Handler()
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def ignore() -> None:
    """Ignore both signals from now on: the outputs are complete, and only Python's own clean-up remains."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def held() -> Iterator[None]:
    """Hold both signals back while the block runs, and deliver the last one afterwards.

    Signals are handled in the main thread alone; in another thread nothing needs to be held.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held_back = _HeldBack()
    try:
        for number in _SIGNALS:
            held_back.begin(number)
        yield
    finally:
        held_back.end()


class _HeldBack:
    """Keeps signals for later. One may arrive at any point of `begin` and `end`, and raise there.

    A handler that is left behind by that passes signals on to the one that it stands for.
    """

    def __init__(self) -> None:
        self._pending: list[int] = []
        self._previous: dict[int, Any] = {}
        self._ended = False

    def begin(self, number: int) -> None:
        handler = signal.getsignal(number)
        if handler not in (signal.SIG_IGN, None):  # None: a handler that Python did not install
            self._previous[number] = handler
            signal.signal(number, self._receive)

    def end(self) -> None:
        self._ended = True
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pending:
            signal.raise_signal(self._pending[-1])

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._ended:
            self._pending.append(number)
            return
        signal.signal(number, self._previous[number])
        signal.raise_signal(number)


class _Handler:
    """Raises the exception of a signal, or sends the signal again while an import is in progress."""

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
