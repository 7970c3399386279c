"""Folders: the same tree out, resumable by content, and failures listed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from srdeploy.core.errors import InputError, UsageError
from srdeploy.core.imaging.read import read_image
from srdeploy.upscale.budget import TileSettings
from srdeploy.upscale.folders import upscale_folder
from srdeploy.upscale.image_writer import write_image
from srdeploy.upscale.read_compute_write import Pipeline
from srdeploy.upscale.scale.folder_journal import JOURNALS, OLD_JOURNAL
from srdeploy.upscale.single_image import OutputOptions
from srdeploy.upscale.upscaler import Upscaler

RANDOM = np.random.default_rng(0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    for name in ("a.png", "sub/b.jpg", "sub/deep/c.tif", "d.bmp"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = RANDOM.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        if path.suffix == ".bmp":
            write_image(path.with_suffix(".png"), pixels)
            path.with_suffix(".png").rename(path)  # the content decides
        else:
            write_image(path, pixels)
    return folder


@pytest.fixture
def up(nearest_onnx: Callable[..., Path]) -> Upscaler:
    return Upscaler.open(nearest_onnx(), threads=1)


def made(folder: Path) -> list[str]:
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in files if JOURNALS not in path.parents)


def only_journal(folder: Path) -> Path:
    (path,) = (folder / JOURNALS).glob("*.jsonl")
    return path


def test_tree_is_mirrored(source: Path, up: Upscaler, tmp_path: Path) -> None:
    report = upscale_folder(up, source, tmp_path / "out")

    assert made(tmp_path / "out") == ["a.png", "d.png", "sub/b.jpg", "sub/deep/c.tif"]
    assert len(report.made) == 4
    for name in ("a.png", "sub/deep/c.tif"):
        before, after = read_image(source / name).pixels, read_image(tmp_path / "out" / name).pixels
        np.testing.assert_array_equal(after, before.repeat(2, axis=0).repeat(2, axis=1))


def test_second_run_makes_only_what_changed_or_is_gone(source: Path, up: Upscaler, tmp_path: Path) -> None:
    out = tmp_path / "out"
    upscale_folder(up, source, out)
    write_image(source / "new.png", RANDOM.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    (out / "sub/b.jpg").unlink()

    report = upscale_folder(up, source, out)

    assert sorted(report.made) == ["new.png", "sub/b.jpg"]
    assert sorted(report.skipped) == ["a.png", "d.bmp", "sub/deep/c.tif"]


def test_changed_input_other_settings_and_strangers_need_force(
    source: Path, up: Upscaler, nearest_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    upscale_folder(up, source, out)
    write_image(source / "a.png", RANDOM.integers(0, 256, (9, 9, 3), dtype=np.uint8))

    changed = upscale_folder(up, source, out)
    with Upscaler.open(nearest_onnx(), TileSettings(side=4), threads=1) as other, pytest.MonkeyPatch.context() as patch:
        patch.setattr(other, "upscale", None)  # nothing is computed that will not be written
        others = upscale_folder(other, source, out)
    forced = upscale_folder(up, source, out, OutputOptions(force=True))

    assert list(changed.failed) == ["a.png"]
    assert "exists already" in str(changed.failed["a.png"])
    assert len(others.failed) == 4
    assert sorted(forced.made) == ["a.png"]
    assert read_image(out / "a.png").pixels.shape == (18, 18, 3)


def test_failures_are_listed_with_their_exit_code_and_do_not_stop_the_rest(
    source: Path, up: Upscaler, tmp_path: Path
) -> None:
    (source / "broken.png").write_bytes((source / "a.png").read_bytes()[:60])
    (source / "empty.jpg").touch()

    report = upscale_folder(up, source, tmp_path / "out")

    assert list(report.failed) == ["broken.png", "empty.jpg"]
    assert len(report.made) == 4
    with pytest.raises(InputError, match=r"2 of 6 images failed, the first of them broken\.png"):
        report.raise_failures()
    assert report.to_json()["failed"]["empty.jpg"]["exit_code"] == 3


def test_good_folder_raises_nothing(source: Path, up: Upscaler, tmp_path: Path) -> None:
    upscale_folder(up, source, tmp_path / "out").raise_failures()


def test_an_output_that_another_image_takes_is_listed_as_failed_and_the_rest_is_made(
    source: Path, up: Upscaler, tmp_path: Path
) -> None:
    write_image(source / "a.jpg", RANDOM.integers(0, 256, (3, 3, 3), dtype=np.uint8))

    report = upscale_folder(up, source, tmp_path / "out", suffix=".png")

    assert list(report.failed) == ["a.png"]
    assert "would both become" in str(report.failed["a.png"])
    assert len(report.made) == 4
    with pytest.raises(UsageError, match="1 of 5 images failed"):
        report.raise_failures()


def test_names_that_differ_in_case_are_two_outputs(source: Path, up: Upscaler, tmp_path: Path) -> None:
    for name in ("P.JPG", "P.jpg", "q.jfif"):
        write_image(source / name, RANDOM.integers(0, 256, (3, 3, 3), dtype=np.uint8))

    report = upscale_folder(up, source, tmp_path / "out")

    assert not report.failed
    assert {"P.JPG", "P.jpg", "q.jfif"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_files_that_are_no_pictures_are_counted_by_suffix(source: Path, up: Upscaler, tmp_path: Path) -> None:
    for name in ("clip.mp4", "sub/x.AVIF", "y.avif", "notes", ".hidden.mov"):
        (source / name).write_bytes(b"content")

    report = upscale_folder(up, source, tmp_path / "out")

    assert report.unread == {"": 1, ".avif": 2, ".mp4": 1}
    assert report.to_json()["unread"] == report.unread


def test_a_pipe_named_like_an_image_is_not_waited_for(source: Path, up: Upscaler, tmp_path: Path) -> None:
    os.mkfifo(source / "pipe.png")

    report = upscale_folder(up, source, tmp_path / "out")

    assert report.unread == {"pipe or device": 1}
    assert not report.failed


def test_a_name_that_becomes_too_long_is_listed_and_the_rest_is_made(
    source: Path, up: Upscaler, tmp_path: Path
) -> None:
    longest = "é" * 125 + "e" + ".png"
    write_image(source / longest, RANDOM.integers(0, 256, (3, 3, 3), dtype=np.uint8))

    report = upscale_folder(up, source, tmp_path / "out", suffix=".tiff")

    assert list(report.failed) == [longest]
    assert len(report.made) == 4


def test_output_inside_the_input_is_refused(source: Path, up: Upscaler) -> None:
    with pytest.raises(UsageError, match="is inside the input folder"):
        upscale_folder(up, source, source / "out")


def test_journal_line_cut_by_a_kill_is_passed_over(source: Path, up: Upscaler, tmp_path: Path) -> None:
    out = tmp_path / "out"
    upscale_folder(up, source, out)
    journal = only_journal(out)
    lines = journal.read_text().splitlines()
    last = json.loads(lines[-1])["output"]
    journal.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])  # the last "done" is lost, its "started" is there

    report = upscale_folder(up, source, out)

    assert [Path(name).stem for name in report.made] == [Path(last).stem]
    assert len(upscale_folder(up, source, out).skipped) == 4


def test_journal_of_an_earlier_version_is_read_and_not_written(source: Path, up: Upscaler, tmp_path: Path) -> None:
    out = tmp_path / "out"
    upscale_folder(up, source, out)
    old = "".join(line + "\n" for line in only_journal(out).read_text().splitlines() if '"output"' in line)
    shutil.rmtree(out / JOURNALS.parts[0])
    (out / OLD_JOURNAL).write_text(old)

    report = upscale_folder(up, source, out)

    assert len(report.skipped) == 4
    assert (out / OLD_JOURNAL).read_text() == old


KILLED = """
import os, signal, sys
from pathlib import Path
from srdeploy.upscale import folders
from srdeploy.upscale.upscaler import Upscaler
write, calls = folders.write_image, []
def write_image(path, *arguments, **options):
    calls.append(path)
    notes = write(path, *arguments, **options)
    if len(calls) == 10:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return notes
folders.write_image = write_image
folders.upscale_folder(Upscaler.open(Path(sys.argv[1]), threads=1), Path(sys.argv[2]), Path(sys.argv[3]))
"""
"""Upscales a folder and kills itself in the middle of the tenth picture."""


def test_killed_run_leaves_no_half_picture_and_is_taken_up(
    source: Path, nearest_onnx: Callable[..., Path], up: Upscaler, tmp_path: Path
) -> None:
    for index in range(40):
        write_image(source / f"many{index:02d}.png", RANDOM.integers(0, 256, (90, 90, 3), dtype=np.uint8))
    out = tmp_path / "out"
    child = subprocess.run([sys.executable, "-c", KILLED, nearest_onnx(), source, out])
    assert child.returncode == -signal.SIGKILL
    finished = [out / name for name in made(out) if not Path(name).name.startswith(".")]
    for path in finished:
        read_image(path)
    assert (len(finished), len(made(out))) == (9, 10)

    report = upscale_folder(up, source, out)

    assert not report.failed
    assert len(report.made) + len(report.skipped) == 44
    assert len(report.skipped) == 9
    assert len(made(out)) == 44  # also no unfinished file


class TestPipeline:
    """Reading, computing and writing at the same time."""

    def test_order_is_kept(self) -> None:
        written: list[int] = []

        Pipeline(range(50), lambda item: item * 2, written.append).run()

        assert written == list(range(0, 100, 2))

    @pytest.mark.parametrize("place", ["read", "compute", "write"])
    def test_error_of_any_stage_comes_out_and_the_threads_end(self, place: str) -> None:
        def fail(item: int) -> int:
            if item == 20:
                raise RuntimeError(place)
            return item

        same = {"read": lambda item: item, "compute": lambda item: item, "write": lambda item: None}
        stages = same | {place: fail}

        with pytest.raises(RuntimeError, match=place):
            Pipeline((stages["read"](item) for item in range(10_000)), stages["compute"], stages["write"]).run()

    def test_stages_overlap(self) -> None:
        """An item is read while the one before it is computed and the one before that is written, or nobody goes on."""
        together = threading.Barrier(3, timeout=120)
        written: list[int] = []

        def read() -> Iterator[int]:
            for item in range(20):
                if item >= 2:
                    together.wait()
                yield item

        def compute(item: int) -> int:
            if 1 <= item < 19:
                together.wait()
            return item

        def write(item: int) -> None:
            if item < 18:
                together.wait()
            written.append(item)

        Pipeline(read(), compute, write).run()

        assert written == list(range(20))
