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
    pending: list[int] = []
    previous = {
        number: signal.signal(number, lambda received, frame: pending.append(received))
        for number in _SIGNALS
        if signal.getsignal(number) not in (signal.SIG_IGN, None)  # None: a handler that Python did not install
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if pending:
            signal.raise_signal(pending[-1])


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
