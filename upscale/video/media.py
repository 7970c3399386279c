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


def open_media(path: Path) -> Any:
    """Open a file for reading. No other file and no network address is opened on its behalf.

    Raises:
        av.FFmpegError: not a media file.
    """
    av = pyav()
    allowed = ",".join(sorted(av.formats_available - _LISTS))
    return av.open(f"file:{path}", options={"protocol_whitelist": "file", "format_whitelist": allowed})


def create_media(path: Path, options: dict[str, str] | None = None) -> Any:
    """Open a file for writing; its suffix names the container."""
    return pyav().open(f"file:{path}", "w", options=options or {})


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


def open_video(path: Path) -> tuple[Any, Any]:
    """Open a file and return (container, its first video stream that is not a cover picture).

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
    films = [stream for stream in container.streams.video if not is_cover(stream)]
    if not films or films[0].codec_context is None or not films[0].width:
        container.close()
        raise InputError(f"{path} holds no video stream that can be decoded", expected="a video")
    return container, films[0]


def is_cover(stream: Any) -> bool:
    """Return True if a video stream is one picture that illustrates the file, such as the cover of an album."""
    return bool(int(stream.disposition) & int(pyav().stream.Disposition.attached_pic))


def copied_streams(container: Any) -> list[Any]:
    """Return the streams whose packets are copied: audio and subtitles."""
    return [*container.streams.audio, *container.streams.subtitles]
