"""The finished segments of a video, in OUTPUT.parts/, with a journal of their content and origin."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from srdeploy.core.artifact import atomic_file, sha256_of_file
from srdeploy.core.errors import OutputError

_JOURNAL = "segments.jsonl"


@dataclass(frozen=True)
class Segment:
    """A finished segment: its frames' timestamps in order of presentation, and how long the last one is shown.

    Both in ticks of the input; 0 when the input does not say.
    """

    path: Path
    pts: tuple[int, ...]
    last_duration: int


class Parts:
    """The finished segments of one video, in OUTPUT.parts/."""

    def __init__(self, folder: Path, key: str) -> None:
        """Take up the segments made with the same key; others are removed.

        Raises:
            OutputError: the folder cannot be written.
        """
        self.folder = folder
        self.segments: list[Segment] = []
        self._key = key
        try:
            folder.mkdir(parents=True, exist_ok=True)
            journal = folder / _JOURNAL
            text = journal.read_text(encoding="utf-8", errors="replace") if journal.exists() else ""
            self._take_up(text)
            # Rewritten from what was found whole: a line cut short by a kill must not spoil the next one.
            with atomic_file(journal, force=True) as temporary:
                temporary.write_text("".join(line + "\n" for line in self._lines), encoding="utf-8")
            for path in folder.iterdir():
                if path not in (journal, *(segment.path for segment in self.segments)):
                    path.unlink()
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror}", next_step="choose another output") from error

    @property
    def frames(self) -> int:
        """Frames in the finished segments."""
        return sum(len(segment.pts) for segment in self.segments)

    def path(self, number: int) -> Path:
        """Return where a segment belongs. Matroska holds every codec."""
        return self.folder / f"{number:06d}.mkv"

    def add(self, segment: Segment) -> None:
        """Record a finished segment."""
        path = segment.path
        entry = {"key": self._key, "file": path.name, "pts": segment.pts, "last_duration": segment.last_duration}
        entry["sha256"] = sha256_of_file(path)
        with (self.folder / _JOURNAL).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        self.segments.append(segment)

    def remove(self) -> None:
        """Remove the folder; the video is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _take_up(self, text: str) -> None:
        self._lines: list[str] = []
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                path = self.path(len(self.segments))
                whole = (
                    entry["key"] == self._key
                    and entry["file"] == path.name
                    and path.is_file()
                    and sha256_of_file(path) == entry["sha256"]
                )
                segment = Segment(path, tuple(int(value) for value in entry["pts"]), int(entry["last_duration"]))
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:  # what follows a gap is of no use
                return
            self._lines.append(line)
            self.segments.append(segment)
