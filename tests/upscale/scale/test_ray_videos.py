"""Videos on a real Ray cluster: the same frames as on one machine."""

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray_cluster import Cluster

from srdeploy.cli.main import run
from srdeploy.upscale.video.reader import VideoReader

av = pytest.importorskip("av")
FRAMES = 290


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames with B-frames, key frames that are no multiples of a segment, and a variable rate."""
    path = tmp_path_factory.mktemp("clip") / "in.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={"crf": "18", "g": "50", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        rows, columns = np.mgrid[0:32, 0:48]
        for number in range(FRAMES):
            planes = [(columns * 3 + number) % 256, (rows * 5 + 2 * number) % 256, np.full_like(rows, number % 256)]
            frame = av.VideoFrame.from_ndarray(np.dstack(planes).astype(np.uint8), format="rgb24")
            frame.pts = number + (number > 100)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def frames(path: Path) -> list[tuple[int, str]]:
    with contextlib.closing(VideoReader(path)) as reader:
        return [(frame.pts, hashlib.sha256(frame.pixels.tobytes()).hexdigest()) for frame in reader.frames()]


@pytest.mark.parametrize(("start", "stop"), [(120, 240), (240, 360), (1, 3), (50, 51), (289, 290), (99, 103)])
def test_frames_from_a_key_frame_are_those_from_the_start(start: int, stop: int, clip: Path) -> None:
    with contextlib.closing(VideoReader(clip)) as reader:
        assert reader.can_seek()
        found = list(reader.frames_between(start, stop))
    with contextlib.closing(VideoReader(clip)) as reader:
        expected = list(reader.frames())[start:stop]

    assert [(frame.pts, frame.duration) for frame in found] == [(frame.pts, frame.duration) for frame in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)


def test_frames_that_are_elsewhere_are_noticed(clip: Path) -> None:
    with contextlib.closing(VideoReader(clip)) as reader:
        times = [*reader.survey.times]
        times[130] += 1 if times[130] + 1 < times[131] else -1
        object.__setattr__(reader.survey, "times", times)
        with pytest.raises(LookupError):
            list(reader.frames_between(120, 240))


def test_a_video_has_the_frames_of_a_local_run(
    shared_cluster: Cluster, clip: Path, nearest_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    words: list[Any] = ["upscale", nearest_onnx(), clip, "--codec", "ffv1", "-o"]
    assert run([*map(str, words), str(tmp_path / "local.mkv"), "--threads", "1"]) == 0
    more = ("--json", "--ray", shared_cluster.address)

    done = subprocess.run(
        [sys.executable, "-m", "srdeploy.cli.main", *map(str, words), str(tmp_path / "cluster.mkv"), *more],
        capture_output=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr.decode()
    document = json.loads(done.stdout)
    assert document["frames"] == FRAMES
    assert frames(tmp_path / "cluster.mkv") == frames(tmp_path / "local.mkv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cluster.mkv", "local.mkv"]
