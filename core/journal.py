"""A journal of long work: what is finished is recorded at once, so that an interrupted run resumes where it stopped.

A journal is a file of JSON objects, one per line, that is only appended to. A line cut short by a kill is ignored.
Several writers may share a journal: each appends to a file of its own, and all files are read.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from srdeploy.core.artifact import atomic_file, output_errors


class Journal:
    """Facts about finished pieces, in the order in which they were recorded.

    Attributes:
        path: the file of this writer.
        entries: of all files; the latest of a file comes last.
    """

    def __init__(self, path: Path, *, others: Callable[[], Iterable[Path]] = tuple) -> None:
        """Read what earlier runs recorded; the folder is created if it is missing.

        Args:
            path: the file of this writer, for example `segments.jsonl`.
            others: returns the files of the other writers; it is called again by `refresh`.

        Raises:
            OutputError: the folder or a file cannot be read and written.
        """
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._others = others
        self._read_bytes: dict[Path, int] = {}
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.refresh()
        with output_errors(path):
            own = self._read(path)
            self.entries += _entries(own)
            if own and not own.endswith(b"\n"):
                self._write("")  # ends a line that was cut short, so that it does not spoil the next one

    def append(self, entry: Mapping[str, Any]) -> None:
        """Record a fact.

        Raises:
            OutputError: the disk is full, or the file cannot be written.
        """
        with output_errors(self.path):
            self._write(json.dumps(entry, sort_keys=True))
        self.entries.append(dict(entry))

    def replace(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Keep these entries alone in this writer's file.

        Raises:
            OutputError: the disk is full, or the file cannot be written.
        """
        self.entries = [dict(entry) for entry in entries]
        with atomic_file(self.path, force=True) as temporary:
            lines = (json.dumps(entry, sort_keys=True) + "\n" for entry in self.entries)
            temporary.write_text("".join(lines), encoding="utf-8")

    def refresh(self) -> list[dict[str, Any]]:
        """Read what the other writers have added since, and return it.

        Raises:
            OutputError: a file cannot be read.
        """
        added: list[dict[str, Any]] = []
        with output_errors(self.path):
            for file in sorted(set(self._others()) - {self.path}):
                text = self._read(file)
                whole = text[: text.rfind(b"\n") + 1]  # the rest is being written, or was cut short
                self._read_bytes[file] = self._read_bytes.get(file, 0) + len(whole)
                added += _entries(whole)
        self.entries += added
        return added

    def _write(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def _read(self, path: Path) -> bytes:
        try:
            with path.open("rb") as stream:
                stream.seek(self._read_bytes.get(path, 0))
                return stream.read()
        except FileNotFoundError:
            return b""


def read_entries(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the entries of journal files without writing to any.

    Raises:
        OSError: a file cannot be read.
    """
    return [entry for path in sorted(paths) for entry in _entries(path.read_bytes())]


def _entries(text: bytes) -> list[dict[str, Any]]:
    found = []
    for line in text.decode("utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found
