"""Write one segment of a video."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from srdeploy.core.artifact import atomic_file
from srdeploy.upscale.video.encoding import Encoding
from srdeploy.upscale.video.parts import Segment
from srdeploy.upscale.video.probe import VideoInfo
from srdeploy.upscale.video.reader import Frame
from srdeploy.upscale.video.writer import VideoWriter


def open_segment(path: Path, info: VideoInfo, encoding: Encoding, size: tuple[int, int]) -> "OpenSegment":
    """Begin a segment.

    Args:
        path: its file, which appears when the segment is finished.
        info: of the source.
        encoding: how frames are encoded.
        size: (height, width) of the frames.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    with contextlib.ExitStack() as file:
        temporary = file.enter_context(atomic_file(path, force=True))
        return OpenSegment(path, VideoWriter(temporary, info, encoding, size), file.pop_all())


@dataclass
class OpenSegment:
    """A segment that is being written."""

    path: Path
    writer: VideoWriter
    file: contextlib.ExitStack
    pts: list[int] = field(default_factory=list)
    last_duration: int = 0

    def write(self, frame: Frame) -> None:
        """Encode one frame."""
        self.writer.write(frame)
        self.pts.append(frame.pts)
        self.last_duration = frame.duration

    def finish(self) -> Segment:
        """Flush the encoder and rename the file to its name; on failure the file is removed."""
        with self.file:
            try:
                self.writer.close()
            except BaseException:
                self._abort()
                raise
        return Segment(self.path, tuple(self.pts), self.last_duration)

    def drop(self) -> None:
        """Discard an unfinished segment."""
        self._abort()
        with contextlib.suppress(_Dropped), self.file:
            raise _Dropped

    def _abort(self) -> None:
        with contextlib.suppress(OSError):  # a full disk was met before, and closing meets it again
            self.writer.abort()


class _Dropped(Exception):  # noqa: N818 - not an error: it tells atomic_file not to keep the file
    pass
