"""Open media files with FFmpeg's libraries (PyAV brings them in one wheel; no system ffmpeg is used).

FFmpeg takes a name with a colon for a URL: `12:30 clip.mp4` would be an unknown protocol, `http:/host/x` a download.
Every path is therefore handed over with the prefix `file:`, and no other protocol is allowed.
"""

import io
from pathlib import Path
from typing import Any

from srdeploy.core.errors import InputError
from srdeploy.core.extras import import_extra

_FORMATS = {".mp4": "mp4", ".m4v": "ipod", ".mkv": "matroska", ".mov": "mov", ".webm": "webm"}
CONTAINERS = tuple(_FORMATS)
"""Suffixes of the outputs that can be written."""


class CannotHoldError(Exception):
    """A container or an encoder does not take what a video has; the message says which and what.

    Attributes:
        by_codec: the encoder does not take it, in any container.
    """

    def __init__(self, message: str, *, by_codec: bool = False) -> None:
        super().__init__(message)
        self.by_codec = by_codec


def pyav() -> Any:
    """Return the module `av`.

    Raises:
        MissingExtraError: PyAV is not installed.
    """
    return import_extra("av", "video")


_LISTS = {
    "applehttp", "concat", "dash", "hls", "imf", "lavfi", "rtp", "rtsp", "sap", "sdp", "tty", "webm_dash_manifest",
}  # fmt: skip
"""Formats that name other files and addresses, generate pictures, or take any text for a video."""


_TAG_ERRORS = "surrogateescape"
"""Tags of old AVI files are in the code page of some computer: their bytes are passed on as they are."""


def open_media(path: Path) -> Any:
    """Open a file for reading. No other file and no network address is opened on its behalf.

    Raises:
        av.FFmpegError: not a media file.
    """
    av = pyav()
    allowed = ",".join(sorted(av.formats_available - _LISTS))
    options = {"protocol_whitelist": "file", "format_whitelist": allowed}
    return av.open(f"file:{path}", options=options, metadata_errors=_TAG_ERRORS)


def create_media(path: Path, options: dict[str, str] | None = None) -> Any:
    """Open a file for writing; its suffix names the container."""
    return pyav().open(f"file:{path}", "w", options=options or {}, metadata_errors=_TAG_ERRORS)


def containers_of(codec: str) -> list[str]:
    """Return the suffixes of the containers that hold what an encoder makes."""
    av = pyav()
    names = {codec, av.Codec(codec, "w").canonical_name}
    found = []
    for suffix, form in _FORMATS.items():
        with av.open(io.BytesIO(), "w", format=form) as container:
            if names & set(container.supported_codecs):
                found.append(suffix)
    return found


def takes_stream(form: str, stream: Any) -> bool:
    """Return True if a container of a format, such as "mp4", can begin with a copy of one stream."""
    av = pyav()
    try:
        with av.open(io.BytesIO(), "w", format=form) as container:
            container.add_stream_from_template(stream)
            container.start_encoding()
    except (av.FFmpegError, av.codec.codec.UnknownCodecError, ValueError):
        return False
    return True


def open_video(path: Path) -> tuple[Any, Any]:
    """Open a file and return (container, the video stream that players show).

    That is the first one with the default flag, else the first; not a cover picture, and one that can be decoded.

    Raises:
        InputError: empty, not a media file, or without a video stream that can be decoded.
        MissingExtraError: PyAV is not installed.
    """
    av = pyav()
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty (0 bytes)", expected="a video")
    try:
        container = open_media(path)
    except av.FFmpegError as error:
        raise InputError(
            f"{path} is damaged or not a video ({error.strerror})", next_step="download or copy it again"
        ) from error
    films = [s for s in container.streams.video if not is_cover(s) and s.codec_context is not None and s.width]
    if not films:
        container.close()
        raise InputError(f"{path} holds no video stream that can be decoded", expected="a video")
    default = av.stream.Disposition.default
    return container, next((s for s in films if int(s.disposition) & int(default)), films[0])


def is_cover(stream: Any) -> bool:
    """Return True if a video stream is one picture that illustrates the file, such as the cover of an album."""
    return bool(int(stream.disposition) & int(pyav().stream.Disposition.attached_pic))


def time_code(container: Any, video: Any) -> str | None:
    """Return the time code of the first frame that a file states, such as "10:00:00:00"; None if it states none.

    MP4 and MOV keep it in a stream of its own, which FFmpeg reads from and writes for this tag.
    """
    tags = {key.lower(): value for tags in (container.metadata, video.metadata) for key, value in tags.items()}
    return tags.get("timecode")


def copied_streams(container: Any) -> list[Any]:
    """Return the streams whose packets are copied: audio and subtitles."""
    return [*container.streams.audio, *container.streams.subtitles]
