"""What the command line shows to people, always on stderr: progress, tables, notes, the next command, errors.

stdout belongs to programs: with --json it holds exactly one JSON document.
"""

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from srdeploy.core.progress import Advance

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that a terminal obeys, as in the name of a downloaded file; line feeds and tabs are not among them."""

console = Console(stderr=True, highlight=False)
if not console.is_terminal:
    console.width = 140  # a log has no edge; 80 columns would fold most tables


class RichProgress:
    """Draws tasks as bars with the time left on a terminal, and as plain lines elsewhere."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._depth = 0

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Advance]:
        """Show a task while the block runs; nested tasks share one display."""
        if not console.is_terminal:
            self.note(description)
            yield lambda amount=1, note=None: None
            return
        if self._bars is None:
            self._bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[note]}"),
                console=console,
                transient=True,
            )
            self._bars.start()
        bars = self._bars
        self._depth += 1
        handle = bars.add_task(_line(description), total=total, note="")

        def advance(amount: float = 1, note: str | None = None) -> None:
            bars.advance(handle, amount)
            if note is not None:
                bars.update(handle, note=_line(note))

        try:
            yield advance
        finally:
            bars.remove_task(handle)
            self._depth -= 1
            if self._depth == 0:
                bars.stop()
                self._bars = None

    def note(self, message: str) -> None:
        """Print one line that stays."""
        console.print(_line(message), soft_wrap=True)


def _shown(text: str) -> str:
    """Return text to print as it is: no markup, and control characters as in Python's source."""
    return escape(_CONTROL.sub(lambda found: repr(found[0])[1:-1], text))


def _line(text: str) -> str:
    """Return text to print on one line; line feeds at its beginning stay."""
    return _shown(re.sub(r"(?<=.)\n", r"\\n", text))


def error_line(message: str) -> None:
    """Print one error line."""
    console.print(f"[bold red]error:[/] {_line(message)}", soft_wrap=True)


def warning_line(message: str) -> None:
    """Print one warning line."""
    console.print(f"[bold yellow]warning:[/] {_line(message)}", soft_wrap=True)


def next_command(*words: str) -> None:
    """Print the command that usually comes next."""
    console.print(f"[dim]next:[/] {_line(shlex.join(words))}", soft_wrap=True)


def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table: boxed on a terminal, plain ASCII elsewhere. Numbers are given as they should be read."""
    style = box.SIMPLE_HEAD if console.is_terminal else box.ASCII
    if title:  # not the table's own title, which would be folded at the width of a narrow table
        console.print(_line(title), style="italic", soft_wrap=True)
    drawn = Table(box=style)
    for index, header in enumerate(headers):
        column = [str(row[index]) for row in rows]
        drawn.add_column(header, justify="right" if _numeric(column) else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(_shown(str(cell)) for cell in row))
    console.print(drawn)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a GitHub-flavoured Markdown table."""
    lines = ["| " + " | ".join(headers) + " |", "|" + " --- |" * len(headers)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def emit_json(document: Any) -> None:
    """Print the one JSON document of --json on stdout. Infinity is written as the string "inf", as JSON has none."""
    click.echo(json.dumps(_jsonable(document), indent=2, allow_nan=False))


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(entry) for entry in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)


def _numeric(cells: Sequence[str]) -> bool:
    return bool(cells) and all(cell[:1].isdigit() or cell[:1] in "+-." or cell in ("", "inf") for cell in cells)
