"""Name containers and codecs that take a video which the given ones do not: each is rehearsed before it is named."""

import tempfile
from pathlib import Path

from srdeploy.core.errors import InputError, UsageError
from srdeploy.upscale.video.encoding import DEFAULT_QUALITY, choose_encoding
from srdeploy.upscale.video.media import CONTAINERS, CannotHoldError
from srdeploy.upscale.video.reader import VideoReader
from srdeploy.upscale.video.rehearsal import rehearse

_OTHERS = (
    ("ffv1", ".mkv"), ("prores_ks", ".mov"), ("png", ".mov"), ("libvpx-vp9", ".webm"), ("libx264", ".mp4"),
    ("libx264", ".mkv"),
)  # fmt: skip
"""Codecs and containers that together keep most of what videos have; lossless ones of any size and depth first."""
_NAMED = 3


def refusal(
    error: CannotHoldError, reader: VideoReader, size: tuple[int, int], *, codec: str | None, quality: int | None
) -> UsageError:
    """Return the error for a user, with the containers and codecs that hold what the given ones do not.

    Args:
        error: what they cannot hold.
        reader: the opened source.
        size: (height, width) of the output.
        codec, quality: the user's options.
    """
    able = [suffix for suffix in CONTAINERS if _takes(reader, size, codec, suffix, quality)]
    expected = f"an output ending in {' or '.join(able)}" if able else None
    others = []
    if error.by_codec or not able:
        others = [
            f"--codec {name}{_without(name, quality)} with an {suffix} output"
            for name, suffix in _OTHERS
            if name != codec and suffix not in able
            and _takes(reader, size, name, suffix, quality if name in DEFAULT_QUALITY else None)
        ]  # fmt: skip
    if others:
        return UsageError(
            str(error), expected=expected, next_step=f"{'or ' if able else ''}pass {', or '.join(others[:_NAMED])}"
        )
    if able:
        return UsageError(str(error), expected=expected)
    return UsageError(str(error), next_step="copy the source without that first; no container here holds all of it")


def _without(codec: str, quality: int | None) -> str:
    return " (without --quality)" if quality is not None and codec not in DEFAULT_QUALITY else ""


def _takes(reader: VideoReader, size: tuple[int, int], codec: str | None, suffix: str, quality: int | None) -> bool:
    with tempfile.TemporaryDirectory(prefix="srdeploy-") as folder:
        output = Path(folder) / f"out{suffix}"
        try:
            encoding = choose_encoding(reader.info, output, size=size, codec=codec, quality=quality)
            rehearse(reader, encoding, size, output, Path(folder))
        except (CannotHoldError, UsageError, InputError, OSError):
            return False
    return True
