"""Progress of long work, without a dependency: stages report it, the command line displays it.

A stage takes `progress: Progress = SILENT` and writes

    with progress.task("collecting ranges", total=len(crops)) as advance:
        for crop in crops:
            ...
            advance()
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Called when a piece of a task is done."""

    def __call__(self, amount: float = 1, note: str | None = None) -> None:
        """Add `amount` to the task, and show `note` next to it if given."""


class Progress(Protocol):
    """Where a stage reports what it does."""

    def task(self, description: str, total: float | None = None) -> AbstractContextManager[Advance]:
        """Start a task of `total` pieces (None: unknown) and yield the function that advances it."""

    def note(self, message: str) -> None:
        """Show one line that stays."""


class _Silent:
    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Advance]:
        yield lambda amount=1, note=None: None

    def note(self, message: str) -> None:
        pass


SILENT: Progress = _Silent()
"""Discards all reports."""
