"""Manifests survive the disk and refuse other bytes, other schemas and rubbish."""

import json
from pathlib import Path

import pytest

from srdeploy.core.artifact import sha256_of_file
from srdeploy.core.errors import InputError
from srdeploy.core.manifest import Manifest, Source, manifest_path, read_manifest, read_verified


def written(folder: Path, data: bytes = b"engine") -> Path:
    artifact = folder / "model.onnx"
    artifact.write_bytes(data)
    manifest = Manifest(
        kind="onnx",
        sha256=sha256_of_file(artifact),
        sources=(Source.of("checkpoint", artifact),),
        details={"opset": 20, "nested": {"list": [1, 2.5, None]}},
        versions={"onnx": "1.23.2"},
    )
    manifest_path(artifact).write_text(manifest.to_json(), encoding="utf-8")
    return artifact


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    artifact = written(tmp_path)

    manifest = read_verified(artifact)[1]

    assert manifest == read_manifest(artifact)
    assert manifest.sources == (Source("checkpoint", "model.onnx", manifest.sha256),)
    assert manifest.details == {"opset": 20, "nested": {"list": [1, 2.5, None]}}
    assert manifest.created.endswith("+00:00")
    assert Manifest.from_json(manifest.to_json(), name="again") == manifest


def test_the_manifest_lies_beside_its_artifact() -> None:
    assert manifest_path(Path("a/model.fp16.onnx")) == Path("a/model.fp16.onnx.json")


@pytest.mark.parametrize("change", [b"engin3", b"engine\0", b""], ids=["bit", "appended", "truncated"])
def test_other_bytes_are_refused(tmp_path: Path, change: bytes) -> None:
    artifact = written(tmp_path)
    artifact.write_bytes(change)

    with pytest.raises(InputError, match=r"SHA-256.*as recorded in its manifest"):
        read_verified(artifact)[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a srdeploy manifest"),
        ("[]", "is not a srdeploy manifest"),
        ('{"schema": 1}', "is not a srdeploy manifest"),
        ('{"schema": 1, "sources": [{"role": "x"}], "kind": "onnx", "sha256": ""}', "is not a srdeploy manifest"),
        ('{"schema": 1, "sources": [], "kind": "onnx", "sha256": "", "more": 1}', "is not a srdeploy manifest"),
        ('{"schema": 99, "sources": [], "kind": "onnx", "sha256": ""}', "schema 99; expected schema 1"),
    ],
    ids=["empty", "list", "incomplete", "half a source", "unknown field", "newer schema"],
)
def test_rubbish_is_refused_with_the_file_named(tmp_path: Path, text: str, words: str) -> None:
    artifact = written(tmp_path)
    manifest_path(artifact).write_text(text)

    with pytest.raises(InputError, match=words) as caught:
        read_manifest(artifact)

    assert "model.onnx.json" in str(caught.value)


def test_a_missing_or_binary_manifest_says_what_to_do(tmp_path: Path) -> None:
    artifact = written(tmp_path)
    manifest_path(artifact).write_bytes(b"\xff\xfe\x00")

    with pytest.raises(InputError, match="copy both files together"):
        read_manifest(artifact)

    manifest_path(artifact).unlink()

    with pytest.raises(InputError, match="copy both files together"):
        read_manifest(artifact)


def test_numbers_that_json_lacks_are_refused_when_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        Manifest(kind="onnx", sha256="", details={"psnr_db": float("inf")}).to_json()


def test_the_document_is_stable(tmp_path: Path) -> None:
    keys = list(json.loads(read_manifest(written(tmp_path)).to_json()))

    assert keys == sorted(keys)
