"""What is decided about a video before its first frame is computed: encoding, size, and where its segments are."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srdeploy.core.artifact import sha256_of_bytes, sha256_of_file
from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import UsageError
from srdeploy.core.progress import Progress
from srdeploy.upscale.single_image import refuse_folder, refuse_same
from srdeploy.upscale.video.alternatives import refusal
from srdeploy.upscale.video.encoding import choose_encoding
from srdeploy.upscale.video.media import CONTAINERS, CannotHoldError
from srdeploy.upscale.video.mux import join_segments, lost_streams
from srdeploy.upscale.video.parts import Parts, adopt_parts
from srdeploy.upscale.video.reader import VideoReader
from srdeploy.upscale.video.rehearsal import rehearse
from srdeploy.upscale.video.survey import Survey

SEGMENT_FRAMES = 120
"""Frames per segment: the work that a kill can lose, and the maximum distance between key frames."""

_MISSING_SECONDS = 1.0
"""How much earlier than stated a file may end without a note: files state their longest stream, to a frame or two."""


@dataclass(frozen=True)
class VideoOptions:
    """Options of the output.

    Attributes:
        codec: FFmpeg's name of the encoder; None for libx264, libvpx-vp9 in .webm.
        quality: the codec's CRF, lower is better; None for a transparent one.
        force: replace an existing output.
        progressive: take frames that are marked as interlaced for whole ones.
        segment_frames: frames per segment.
    """

    codec: str | None = None
    quality: int | None = None
    force: bool = False
    progressive: bool = False
    segment_frames: int = SEGMENT_FRAMES


def check_video_output(source: Path, output: Path) -> None:
    """Refuse an output that cannot be one.

    Raises:
        UsageError: it is the source or a folder, or its suffix names no container that can be written.
    """
    refuse_same(source, output)
    refuse_folder(output)
    if output.suffix.lower() not in CONTAINERS:
        raise UsageError(f"video output {output}", expected="a name ending in " + ", ".join(CONTAINERS))


class VideoPlan:
    """How a video is written.

    Attributes:
        reader: the opened source.
        output: the file to write.
        size: (height, width) of the output.
        encoding: codec, stored format, options.
        parts: the segments, some of an earlier run.
    """

    def __init__(
        self, reader: VideoReader, output: Path, options: VideoOptions, contract: ModelContract, identity: str
    ) -> None:
        """Decide, and load the segments of an earlier run.

        Args:
            reader: the opened source.
            output: the file to write.
            options: how.
            contract: of the network.
            identity: see `srdeploy.upscale.upscaler.Upscaler.identity`.

        Raises:
            UsageError: the container or codec cannot hold the result, or another run writes the same output now.
            OutputError: the folder of the output cannot be written.
        """
        info = reader.info
        _, _, *size = contract.output_shape((1, contract.channels, info.height, info.width))
        self.reader = reader
        self.output = output
        self.size = (size[0], size[1])
        self._options = options
        with self._refusing():
            self.encoding = choose_encoding(info, output, size=self.size, codec=options.codec, quality=options.quality)
        facts = [sha256_of_file(reader.path), identity, self.encoding.codec, self.encoding.pix_fmt]
        key = sha256_of_bytes(json.dumps([*facts, self.encoding.options, options.segment_frames]).encode())
        folder, *others = (output.with_name(f"{output.stem}{suffix}.parts") for suffix in (output.suffix, *CONTAINERS))
        adopt_parts(folder, others, key)
        self.parts = Parts(folder, key, self.encoding.segment_suffix)

    def close(self) -> None:
        """Let another run use the segments."""
        self.parts.close()

    def describe_encoding(self) -> dict[str, Any]:
        """Return codec, stored format and options as JSON values."""
        encoding = self.encoding
        return {"codec": encoding.codec, "pix_fmt": encoding.pix_fmt, "options": encoding.options}

    def rehearse(self, progress: Progress) -> tuple[str, ...]:
        """Return what the output will lack, one line each, and print it, before anything is computed.

        Raises:
            UsageError: the container or codec cannot hold the result.
        """
        with self._refusing():
            notes = rehearse(self.reader, self.encoding, self.size, self.output, self.parts.folder)
        lost = lost_streams(self.reader.path, self.output)
        lines = (
            *_notes_about(self.reader.survey),
            *self.encoding.notes,
            *(f"not kept: {name}" for name in lost),
            *notes,
        )
        for line in lines:
            progress.note(line)
        return lines

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Turn what the container or codec cannot hold into an error that names others."""
        try:
            yield
        except CannotHoldError as error:
            codec, quality = self._options.codec, self._options.quality
            raise refusal(error, self.reader, self.size, codec=codec, quality=quality) from error

    def keep_or_remove_parts(self, error: BaseException, progress: Progress) -> None:
        """After an error: remove the folder of the segments if it is empty, else say that they are kept."""
        if not self.parts.finished:
            self.parts.remove()
        elif isinstance(error, KeyboardInterrupt):
            progress.note(f"{self.parts.frames} frames are kept in {self.parts.folder}; run the same command to resume")

    def join(self, temporary: Path, progress: Progress) -> None:
        """Join the segments with the other streams of the source.

        Raises:
            UsageError: the container cannot hold a stream.
        """
        with progress.task("joining segments, copying audio and subtitles"):
            try:
                join_segments(self.parts.segments, self.reader.path, temporary, self.reader.info)
            except CannotHoldError as error:
                reused = "write an .mkv; the finished frames are reused"
                step = None if self.output.suffix.lower() == ".mkv" else reused
                raise UsageError(str(error), next_step=step) from error


def _notes_about(survey: Survey) -> Iterator[str]:
    if survey.clock_jumps:
        times = "once" if survey.clock_jumps == 1 else f"{survey.clock_jumps} times"
        yield f"the clock of the input jumps {times}: the parts follow each other in the output"
    if survey.damaged:
        packets = "packet of the input is" if survey.damaged == 1 else "packets of the input are"
        yield f"{survey.damaged} {packets} damaged: frames may be missing there, as in a player"
    if survey.unreadable_bytes:
        yield (
            f"{survey.unreadable_bytes:,} bytes of the input cannot be read: frames may be missing there, as in a "
            "player; download or copy it again"
        )
    if survey.missing_seconds > _MISSING_SECONDS:
        yield (
            f"the input ends {survey.missing_seconds:.1f} s earlier than it states: part of it cannot be read, and "
            "players skip it too; download or copy it again"
        )
