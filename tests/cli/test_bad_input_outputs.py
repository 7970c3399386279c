"""Outputs that cannot be written: found out soon, one line, and what was there before stays as it was."""

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

Verb = Callable[..., Any]  # the fixture of that name in conftest.py

VERBS = {
    "export": ("export", "good.pt", "-o"),
    "quantize fp16": ("quantize", "good.onnx", "--precision", "fp16", "-o"),
    "quantize int8": (
        "quantize", "good.onnx", "--precision", "int8", "--images", "photos", "--crops", "2", "--crop-size", "16", "-o",
    ),
    "compress": (
        "compress", "good.onnx", "--images", "photos", "--target", "tensorrt", "--max-psnr-drop", "3", "-o",
    ),
    "build openvino": ("build", "good.onnx", "--engine", "openvino", "--no-cache", "-o"),
    "build onnxruntime": ("build", "good.onnx", "--engine", "onnxruntime", "--no-cache", "-o"),
    "upscale": ("upscale", "good.engine", "photo.png", "-o"),
    "verify report": ("verify", "good.engine", "--against", "good.pt", "--images", "photo.png", "--report"),
    "bench report": ("bench", "good.engine", "--against", "good.pt", "--shape", "1x3x8x8", "--report"),
    "deploy": ("deploy", "good.pt", "--images", "photos", "--engine", "onnxruntime", "-o"),
}  # fmt: skip
SUFFIX = {"upscale": ".png", "deploy": ".srd", "verify report": "", "bench report": ""}
FOLDERS = ("deploy", "verify report", "bench report")
FILES = [verb for verb in VERBS if verb not in FOLDERS]


def words(verb: str, workshop: Path) -> list[str]:
    return [str(workshop / word) if (workshop / word).exists() else word for word in VERBS[verb]]


def named(verb: str, folder: Path, stem: str = "output") -> Path:
    return folder / f"{stem}{SUFFIX.get(verb, '.onnx')}"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("verb", VERBS)
def test_an_existing_output_stays_without_force(srdeploy: Verb, workshop: Path, tmp_path: Path, verb: str) -> None:
    output = named(verb, tmp_path)
    output.write_text("precious")

    outcome = srdeploy(*words(verb, workshop), output)

    assert outcome.code == 2
    assert "exists already" in outcome.errors[0]
    assert content(tmp_path) == {output.name: b"precious"}


@pytest.mark.parametrize("verb", FILES)
def test_an_existing_manifest_is_an_existing_output(srdeploy: Verb, workshop: Path, tmp_path: Path, verb: str) -> None:
    if verb == "upscale":
        pytest.skip("pictures have no manifest")
    output = named(verb, tmp_path)
    (tmp_path / f"{output.name}.json").write_text("precious")

    outcome = srdeploy(*words(verb, workshop), output)

    assert outcome.code == 2
    assert content(tmp_path) == {f"{output.name}.json": b"precious"}


@pytest.mark.parametrize("verb", FILES)
def test_force_does_not_put_a_file_in_the_place_of_a_folder(
    srdeploy: Verb, workshop: Path, tmp_path: Path, verb: str
) -> None:
    output = named(verb, tmp_path)
    output.mkdir()
    (output / "mine.txt").write_text("precious")

    outcome = srdeploy(*words(verb, workshop), output, "--force")

    assert outcome.code == 2
    assert "is a folder" in outcome.errors[0]
    assert content(tmp_path) == {f"{output.name}/mine.txt": b"precious"}


@pytest.mark.parametrize("verb", FOLDERS)
def test_force_does_not_remove_a_folder_of_other_files(
    srdeploy: Verb, workshop: Path, tmp_path: Path, verb: str
) -> None:
    output = named(verb, tmp_path)
    output.mkdir()
    (output / "mine.txt").write_text("precious")

    outcome = srdeploy(*words(verb, workshop), output, "--force")

    assert outcome.code == 2
    assert "folder of other files" in outcome.errors[0]
    assert content(tmp_path) == {f"{output.name}/mine.txt": b"precious"}


@pytest.mark.parametrize("verb", VERBS)
def test_a_file_where_the_folder_should_be(srdeploy: Verb, workshop: Path, tmp_path: Path, verb: str) -> None:
    (tmp_path / "file").write_text("precious")

    outcome = srdeploy(*words(verb, workshop), named(verb, tmp_path / "file"))

    assert outcome.code == 8
    assert "cannot" in outcome.errors[0]
    assert content(tmp_path) == {"file": b"precious"}


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_that_takes_no_files(srdeploy: Verb, workshop: Path, verb: str) -> None:
    """/proc takes none from anybody, root included."""
    outcome = srdeploy(*words(verb, workshop), named(verb, Path("/proc")))

    assert outcome.code == 8
    assert "cannot write" in outcome.errors[0]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["", " ", "x" * 300], ids=["empty", "blank", "too long"])
def test_a_name_that_is_none(srdeploy: Verb, workshop: Path, verb: str, name: str) -> None:
    outcome = srdeploy(*words(verb, workshop), name)

    assert outcome.code == 2
    assert len(outcome.errors) == 1


@pytest.mark.parametrize("verb", FILES)
def test_force_does_not_write_over_the_input(srdeploy: Verb, workshop: Path, verb: str) -> None:
    arguments = words(verb, workshop)
    source = Path(arguments[2] if verb == "upscale" else arguments[1])
    before = source.read_bytes()

    outcome = srdeploy(*arguments, source, "--force")

    assert outcome.code == 2
    assert "is the input itself" in outcome.errors[0]
    assert source.read_bytes() == before


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "bench report"])
def test_a_folder_made_for_an_output_goes_when_the_output_does_not_come(
    srdeploy: Verb, workshop: Path, tmp_path: Path, verb: str
) -> None:
    with files_limited_to(512):
        outcome = srdeploy(*words(verb, workshop), named(verb, tmp_path / "new" / "deeper"))

    assert outcome.code == 8, outcome.stderr
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------------
# Full disks


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes in the block: writing fails as on a full disk, for everybody, root included."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in FOLDERS])
def test_what_was_there_survives_a_disk_that_is_full(srdeploy: Verb, workshop: Path, tmp_path: Path, verb: str) -> None:
    output = named(verb, tmp_path)
    before = dict.fromkeys((output.name, *(() if verb == "upscale" else (f"{output.name}.json",))), b"precious")
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)

    with files_limited_to(2048):
        outcome = srdeploy(*words(verb, workshop), output, "--force")

    assert outcome.code == 8, outcome.stderr
    assert len(outcome.errors) == 1
    assert content(tmp_path) == before


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
def test_no_format_leaves_half_a_picture(srdeploy: Verb, workshop: Path, tmp_path: Path, suffix: str) -> None:
    picture = workshop / "photos" / "0.png"

    with files_limited_to(1024):
        outcome = srdeploy("upscale", workshop / "good.engine", picture, "-o", tmp_path / f"large{suffix}")

    assert outcome.code == 8, outcome.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.tmpfs
def test_a_disk_that_is_really_full(srdeploy: Verb, workshop: Path, tmp_path: Path) -> None:
    """With a file system of 48 KB, where root is allowed to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        (disk / "half.onnx").write_text("precious")
        outcome = srdeploy(*words("build openvino", workshop), disk / "half.onnx", "--force")
        after = content(disk)
    finally:
        subprocess.run(["umount", disk], check=True)

    assert outcome.code == 8, outcome.stderr
    assert "no space left" in outcome.errors[0]
    assert after == {"half.onnx": b"precious"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("verb", FILES)
def test_a_folder_without_permission(srdeploy: Verb, workshop: Path, tmp_path: Path, verb: str) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)

    outcome = srdeploy(*words(verb, workshop), named(verb, closed))

    assert outcome.code == 8
    assert "permission denied" in outcome.errors[0]
