"""A journal of long work: what is finished is recorded at once, so that an interrupted run resumes where it stopped.

A journal is a file of JSON objects, one per line, that is only appended to. A line cut short by a kill is ignored.
Several workers may share a journal: each appends to a file of its own, and all files are read.
"""

import glob
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from srdeploy.core.artifact import atomic_file, output_errors


class Journal:
    """Facts about finished pieces, in the order in which they were recorded.

    Attributes:
        entries: of all workers' files; the latest of a file comes last.
    """

    def __init__(self, path: Path, *, worker: str = "") -> None:
        """Read what earlier runs recorded; the folder is created if it is missing.

        Args:
            path: the journal, for example `.srdeploy-upscale.jsonl`.
            worker: name of this writer among several; its file is `.srdeploy-upscale.WORKER.jsonl`.

        Raises:
            OutputError: the folder or the file cannot be read and written.
        """
        self._path = path.with_name(f"{path.stem}.{worker}{path.suffix}") if worker else path
        others = path.parent.glob(f"{glob.escape(path.stem)}.*{path.suffix}")
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            texts = [_read(file) for file in (path, *sorted(others))]
            if not _read(self._path).endswith("\n"):
                self._write("")  # ends a line that was cut short, so that it does not spoil the next one
        self.entries = [entry for text in texts for entry in _entries(text)]

    def append(self, entry: Mapping[str, Any]) -> None:
        """Record a fact.

        Raises:
            OutputError: the disk is full, or the file cannot be written.
        """
        with output_errors(self._path):
            self._write(json.dumps(entry, sort_keys=True))
        self.entries.append(dict(entry))

    def replace(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Keep these entries alone in this worker's file.

        Raises:
            OutputError: the disk is full, or the file cannot be written.
        """
        self.entries = [dict(entry) for entry in entries]
        with atomic_file(self._path, force=True) as temporary:
            lines = (json.dumps(entry, sort_keys=True) + "\n" for entry in self.entries)
            temporary.write_text("".join(lines), encoding="utf-8")

    def _write(self, line: str) -> None:
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else "\n"


def _entries(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found
