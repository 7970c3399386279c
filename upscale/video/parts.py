"""The finished segments of a video, in OUTPUT.parts/, with a journal of their content and origin."""

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srdeploy.core import file_lock
from srdeploy.core.artifact import output_errors, sha256_of_file
from srdeploy.core.errors import UsageError
from srdeploy.core.journal import Journal

_JOURNAL = "segments.jsonl"
_TRIES, _PAUSE_SECONDS = 20, 0.05
"""A run that takes a folder over, or removes its own, holds the lock for a moment only."""


@dataclass(frozen=True)
class Segment:
    """A finished segment: its frames' timestamps in order of presentation, and how long the last one is shown.

    Both in ticks of the input; 0 when the input does not say.
    """

    path: Path
    pts: tuple[int, ...]
    last_duration: int


def adopt_parts(folder: Path, others: Iterable[Path], key: str) -> None:
    """Take over the first of the other folders that holds segments made with the same key, if `folder` is absent.

    The same video written to another container: segments do not depend on it. A folder that a run uses now stays its.
    """
    if folder.exists():
        return
    for other in others:
        with contextlib.suppress(OSError), _opened(other) as descriptor:
            same = key in (other / _JOURNAL).read_text(encoding="utf-8", errors="replace")
            if same and file_lock.hold_now(descriptor):
                other.rename(folder)
                return


class Parts:
    """The finished segments of one video, in OUTPUT.parts/; close it to let another run have them.

    Attributes:
        folder: OUTPUT.parts/.
        finished: the segments by number; several machines finish them out of order.
    """

    def __init__(self, folder: Path, key: str, suffix: str = ".mkv") -> None:
        """Load the segments made with the same key; others are removed.

        Args:
            folder: OUTPUT.parts/.
            key: hash of everything that determines the segments.
            suffix: of their container.

        Raises:
            UsageError: another run writes them now.
            OutputError: the folder cannot be written.
        """
        self.folder = folder
        self.finished: dict[int, Segment] = {}
        self._key = key
        self._suffix = suffix
        with contextlib.ExitStack() as held:
            _hold(folder, held)
            self._journal = Journal(folder / _JOURNAL)
            self._take_up()
            with output_errors(folder):
                for path in folder.iterdir():
                    if path not in (folder / _JOURNAL, *(segment.path for segment in self.finished.values())):
                        path.unlink()
            self._held = held.pop_all()

    @property
    def segments(self) -> list[Segment]:
        """The finished segments from the first one to the first that is missing."""
        numbers = itertools.takewhile(self.finished.__contains__, itertools.count())
        return [self.finished[number] for number in numbers]

    @property
    def frames(self) -> int:
        """Frames in `segments`."""
        return sum(len(segment.pts) for segment in self.segments)

    def path(self, number: int) -> Path:
        """Return the path of a segment."""
        return self.folder / f"{number:06d}{self._suffix}"

    def add(self, segment: Segment) -> None:
        """Record a finished segment."""
        path = segment.path
        entry = {"key": self._key, "file": path.name, "pts": segment.pts, "last_duration": segment.last_duration}
        entry["sha256"] = sha256_of_file(path)
        self._journal.append(entry)
        self.finished[int(path.stem)] = segment

    def clear(self) -> None:
        """Forget all segments."""
        self._journal.replace([])
        self.finished.clear()

    def remove(self) -> None:
        """Remove the folder; the video is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let another run use the folder."""
        self._held.close()

    def _take_up(self) -> None:
        whole: dict[int, Mapping[str, Any]] = {}
        for entry in self._journal.entries:
            segment = self._segment(entry)
            if segment is not None:
                number = int(segment.path.stem)
                whole[number] = entry
                self.finished[number] = segment
        self._journal.replace(whole.values())

    def _segment(self, entry: Mapping[str, Any]) -> Segment | None:
        """Return the segment that an entry describes if it was made with the same key and its file is whole."""
        try:
            path = self.path(int(Path(str(entry["file"])).stem))
            if (entry["key"], entry["file"]) != (self._key, path.name) or sha256_of_file(path) != entry["sha256"]:
                return None
            return Segment(path, tuple(int(value) for value in entry["pts"]), int(entry["last_duration"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _hold(folder: Path, held: contextlib.ExitStack) -> None:
    """Make a folder if it is missing, and hold its lock: two runs would remove each other's files."""
    for _ in range(_TRIES):
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as opened:
            descriptor = opened.enter_context(_opened(folder))
            if not file_lock.hold_now(descriptor):
                time.sleep(_PAUSE_SECONDS)
            elif os.path.samestat(os.fstat(descriptor), folder.stat()):  # else another has just removed or moved it
                held.enter_context(opened.pop_all())
                return
    raise UsageError(
        f"another run writes the segments of a video into {folder}",
        next_step="wait for it, or choose another output name",
    )


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
