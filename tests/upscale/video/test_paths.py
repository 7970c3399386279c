"""A path is a file, whatever URL it looks like."""

import re
import socket
from pathlib import Path
from typing import Any

import pytest

from srdeploy.core.errors import UsageError
from srdeploy.upscale import video
from srdeploy.upscale.upscaler import Upscaler
from srdeploy.upscale.video.job import upscale_video
from srdeploy.upscale.video.probe import is_video

av = pytest.importorskip("av")


@pytest.mark.parametrize(
    "name", ["12:30:45 clip.mp4", "pipe:1.mkv", "concat:a|b.mp4", "data:x.mov", "-clip.mp4", "a?b#c.mp4"]
)
def test_colons_and_marks_in_names(
    name: str, up: Upscaler, clips: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = clips.make(Path("plain.mkv"), range(3))
    source = Path("in") / name
    source.parent.mkdir()
    source.write_bytes(plain.read_bytes())

    assert is_video(source)
    upscale_video(up, source, Path(name))

    assert clips.shown(Path(name)).numbers == [0, 1, 2]


@pytest.mark.parametrize("scheme", ["http", "tcp", "rtmp"])
def test_nothing_is_fetched(
    scheme: str, up: Upscaler, clips: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        folder = Path(f"{scheme}:") / f"127.0.0.1:{server.getsockname()[1]}"
        folder.mkdir(parents=True)
        source = clips.make(folder / "x.mp4", range(3))
        (folder / "list.m3u8").write_text(
            f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{scheme}://127.0.0.1:{server.getsockname()[1]}/x.ts\n"
        )

        upscale_video(up, source, Path("out.mp4"))
        is_video(folder / "list.m3u8")

        with pytest.raises(BlockingIOError):  # nobody has connected
            server.accept()
    assert clips.shown(Path("out.mp4")).numbers == [0, 1, 2]


def test_files_are_opened_in_one_place() -> None:
    """Where the prefix is put in front of the path."""
    folder = Path(video.__file__).parent
    opening = {path.name for path in folder.glob("*.py") if re.search(r"(\bav|pyav\(\))\.open\(", path.read_text())}

    assert opening == {"media.py"}


def test_folder_as_the_output_is_named(up: Upscaler, clips: Any, tmp_path: Path) -> None:
    source = clips.make(tmp_path / "a.mp4", range(1))

    with pytest.raises(UsageError, match="is a folder; expected a file, such as "):
        upscale_video(up, source, tmp_path)
