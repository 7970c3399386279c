"""Signals are handled in one module."""

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from srdeploy.core import interrupts

ROOT = Path(__file__).parents[2]
FOLDERS = ("core", "models", "export", "calibration", "runtime", "upscale", "cli")


def test_no_other_module_sets_a_handler() -> None:
    handlers = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"\bsignal\.signal\(", path.read_text(encoding="utf-8"))
    }

    assert handlers == {"core/interrupts.py"}


@pytest.fixture
def handlers() -> Iterator[list[str]]:
    """Install a handler per signal that notes its name and raises; put the present ones back afterwards."""
    received: list[str] = []

    def handle(number: int, frame: object) -> None:
        received.append(signal.Signals(number).name)
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in numbers]
    yield received
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("moment", range(4))
def test_a_signal_while_handlers_are_changed_loses_no_later_one(
    handlers: list[str], monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """SIGINT just after each of the four changes of a handler that holding signals back takes."""
    changed = []
    real = signal.signal

    def change(number: int, handler: object) -> object:
        found = real(number, handler)  # type: ignore[arg-type]
        changed.append(number)
        if len(changed) == moment + 1:
            signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(signal, "signal", change)
    with pytest.raises(KeyboardInterrupt), interrupts.held():
        pass
    monkeypatch.setattr(signal, "signal", real)

    assert handlers == ["SIGINT"]
    for number in (signal.SIGTERM, signal.SIGINT):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert handlers == ["SIGINT", "SIGTERM", "SIGINT"]
