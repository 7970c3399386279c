"""Every verb, given a file that is not what it should be: one line, the documented exit code, nothing written."""

import itertools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Verb = Callable[..., Any]  # the fixture of that name in conftest.py

CHECKPOINTS = {
    "empty.pt": "is empty",
    "text.pt": "is not a checkpoint",
    "truncated.pt": "is truncated",
    "empty_state.pt": "holds no network",
    "wrong_network.pt": "no known network",
    "evil.pt": "wants to use os.system",
    "photos": "is a folder",
    "photo.png": "is a PNG image",
    "good.engine": "is not a checkpoint",
}
CHECKPOINT_VERBS = {
    "export": ("export", "BAD", "-o", "OUT/model.onnx"),
    "deploy": ("deploy", "BAD", "--images", "photos", "--engine", "onnxruntime", "-o", "OUT/model.srd"),
    "verify": ("verify", "good.onnx", "--against", "BAD", "--images", "photo.png", "--report", "OUT/report"),
    "bench": ("bench", "good.onnx", "--against", "BAD", "--shape", "1x3x8x8", "--report", "OUT/report"),
}

GRAPHS = {
    "empty.onnx": "",
    "text.onnx": "ONNX file",
    "truncated.onnx": "ONNX file",
    "foreign.onnx": "expected",
    "bad_metadata.onnx": "incomplete srdeploy metadata",
    "outside.onnx": "",
    "cut.onnx": "",
    "good.pt": "",
    "photos": "",
}
SHAPES = ("--min-shape", "1x3x16x16", "--opt-shape", "1x3x16x16", "--max-shape", "1x3x32x32")
GRAPH_VERBS = {
    "quantize fp16": ("quantize", "BAD", "--precision", "fp16", "-o", "OUT/new/half.onnx"),
    "quantize int8": ("quantize", "BAD", "--precision", "int8", "--images", "photos", "-o", "OUT/int8.onnx"),
    "build openvino": ("build", "BAD", "--engine", "openvino", "--no-cache", "-o", "OUT/model.engine"),
    "build onnxruntime": ("build", "BAD", "--engine", "onnxruntime", "--no-cache", "-o", "OUT/model.engine"),
    "verify": ("verify", "BAD", "--against", "good.pt", "--images", "photo.png"),
    "upscale": ("upscale", "BAD", "photo.png", "-o", "OUT/large.png"),
    "bench": ("bench", "BAD", "--against", "good.pt", "--shape", "1x3x8x8"),
}

ENGINES = {
    "changed.engine": "SHA-256",
    "alone.engine": "no readable manifest",
    "bad_sidecar.engine": "not a srdeploy manifest",
    "thin_sidecar.engine": "not a srdeploy manifest",
}
ENGINE_VERBS = {name: GRAPH_VERBS[name] for name in ("verify", "upscale", "bench")}

PICTURES = {
    "no_photos": "holds no image",
    "text_only": "holds no image",
    "no_real_photos": "a.png",
    "text.png": "not an image",
    "empty.png": "is empty",
    "truncated.png": "truncated",
    "bomb.png": "100000x100000",
    "good.pt": "not an image",
}
PICTURE_VERBS = {
    "quantize": ("quantize", "good.onnx", "--precision", "int8", "--images", "BAD", "-o", "OUT/int8.onnx"),
    "deploy": ("deploy", "good.pt", "--images", "BAD", "--engine", "onnxruntime", "-o", "OUT/model.srd"),
    "verify": ("verify", "good.onnx", "--against", "good.pt", "--images", "BAD", "--report", "OUT/report"),
    "verify hr": ("verify", "good.onnx", "--against", "good.pt", "--hr", "BAD", "--report", "OUT/report"),
    "upscale": ("upscale", "good.onnx", "BAD", "-o", "OUT/large.png"),
}


def table(verbs: dict[str, tuple[str, ...]], files: dict[str, str]) -> list[object]:
    return [
        pytest.param(arguments, file, message, id=f"{verb}, {file}")
        for (verb, arguments), (file, message) in itertools.product(verbs.items(), files.items())
    ]


CASES = [
    *table(CHECKPOINT_VERBS, CHECKPOINTS),
    *table(GRAPH_VERBS, GRAPHS),
    *table(ENGINE_VERBS, ENGINES),
    *table(PICTURE_VERBS, PICTURES),
]


@pytest.mark.parametrize(("arguments", "file", "message"), CASES)
def test_a_bad_file_is_one_line_and_leaves_nothing(
    srdeploy: Verb, workshop: Path, tmp_path: Path, arguments: tuple[str, ...], file: str, message: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()

    outcome = srdeploy(*(filled(argument, workshop, out, file) for argument in arguments))

    # A folder in place of a file is a wrong command (2); a graph that only the engine can judge fails the build (5).
    allowed = {3, 2} if file == "photos" else {3, 5} if file == "cut.onnx" else {3}
    assert outcome.code in allowed, outcome.stderr
    assert len(outcome.errors) == 1, outcome.stderr
    assert message in outcome.errors[0]
    assert Path(file).name in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""
    # A journal records the failed picture for `upscale --status`.
    assert [path for path in out.rglob("*") if path.is_file() and ".srdeploy" not in path.parts] == []
    assert not (workshop / "canary").exists()


def filled(argument: str, workshop: Path, out: Path, file: str) -> str:
    if argument == "BAD":
        return str(workshop / file)
    if argument.startswith("OUT/"):
        return str(out / argument.removeprefix("OUT/"))
    return str(workshop / argument) if (workshop / argument).exists() else argument


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "good.onnx", "--precision", "fp16", "-o", "OUT/half.onnx"),
        ("build", "good.onnx", "--engine", "onnxruntime", "--no-cache", "-o", "OUT/model.engine"),
        ("verify", "good.engine", "--against", "good.pt", "--images", "photo.png"),
        ("upscale", "good.engine", "photo.png", "-o", "OUT/large.png"),
        ("upscale", "good.onnx", "photos", "-o", "OUT/large"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_the_same_commands_work_with_good_files(
    srdeploy: Verb, workshop: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """Without this, the table above could pass because the commands never work."""
    outcome = srdeploy(*(filled(argument, workshop, tmp_path, "") for argument in arguments))

    assert outcome.code == 0, outcome.stderr
    assert outcome.errors == []


@pytest.mark.parametrize("verb", ["inspect", "upscale"])
def test_a_file_that_is_not_there(srdeploy: Verb, workshop: Path, tmp_path: Path, verb: str) -> None:
    more = () if verb == "inspect" else (workshop / "photo.png", "-o", tmp_path / "x.png")

    outcome = srdeploy(verb, tmp_path / "missing.pt", *more)

    assert outcome.code == 3
    assert "does not exist" in outcome.errors[0]


def test_one_bad_picture_in_a_folder_does_not_cost_the_others(srdeploy: Verb, workshop: Path, tmp_path: Path) -> None:
    outcome = srdeploy("upscale", workshop / "good.onnx", workshop / "one_bad_photo", "-o", tmp_path / "large")

    assert outcome.code == 3
    assert "1 of 2 images failed" in outcome.errors[0]
    assert (tmp_path / "large" / "b.png").exists()
    assert not (tmp_path / "large" / "a.png").exists()


@pytest.mark.parametrize("verb", ["quantize", "deploy", "verify"])
def test_one_bad_picture_is_not_passed_over_in_silence(
    srdeploy: Verb, workshop: Path, tmp_path: Path, verb: str
) -> None:
    arguments = PICTURE_VERBS[verb]

    outcome = srdeploy(*(filled(argument, workshop, tmp_path, "one_bad_photo") for argument in arguments))

    assert outcome.code == 3
    assert "a.png" in outcome.errors[0]
    assert list(tmp_path.iterdir()) == []


def test_a_zip_bomb_among_calibration_images_is_refused(srdeploy: Verb, workshop: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.write(workshop / "photo.png", "a.png")
        with archive.open("b.png", "w") as stream:
            for _ in range(33):
                stream.write(bytes(1 << 24))

    outcome = srdeploy(
        "quantize", workshop / "good.onnx", "--precision", "int8",
        "--images", tmp_path / "photos.zip", "-o", tmp_path / "int8.onnx",
    )  # fmt: skip

    assert outcome.code == 3
    assert "b.png" in outcome.errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["photos.zip"]
