"""The manifest next to an artifact: what made it, from which bytes, with which versions.

The manifest of `model.onnx` is `model.onnx.json`; that of an engine is its sidecar. The artifact itself is not
modified: other tools open it without knowing about srdeploy.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from srdeploy.core.artifact import sha256_of_bytes, sha256_of_file
from srdeploy.core.errors import InputError

SCHEMA = 1


@dataclass(frozen=True)
class Source:
    """One file an artifact was made from: its role ("checkpoint", "onnx", "calibration-set"), name and SHA-256."""

    role: str
    name: str
    sha256: str

    @classmethod
    def of(cls, role: str, path: Path) -> "Source":
        """Hash a file and record it under a role."""
        return cls(role, path.name, sha256_of_file(path))


@dataclass(frozen=True)
class Manifest:
    """What is known about one artifact.

    Attributes:
        kind: "onnx", "engine", "calibration-set", "ranges", "bundle" or "report".
        sha256: of the artifact's bytes.
        sources: the files it was made from.
        details: everything else the stage records, as JSON values; the stage documents its keys.
        versions: of the packages that took part, by distribution name.
        created: UTC time, ISO 8601.
        schema: version of this layout.
    """

    kind: str
    sha256: str
    sources: tuple[Source, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = SCHEMA

    def to_json(self) -> str:
        """Return the manifest as an indented JSON document with a final newline."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, name: str) -> "Manifest":
        """Read a manifest.

        Raises:
            InputError: the text is not a manifest of this schema; `name` is the file, for the message.
        """
        try:
            data = json.loads(text)
            schema = data["schema"]
            sources = tuple(Source(**source) for source in data["sources"])
            if schema == SCHEMA:
                return cls(**{**data, "sources": sources})
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{name} is not a srdeploy manifest ({error})") from error
        raise InputError(
            f"{name} has manifest schema {schema}",
            expected=f"schema {SCHEMA}",
            next_step="make the artifact again with this version of srdeploy",
        )


def manifest_path(artifact: Path) -> Path:
    """Return the path of an artifact's manifest: the artifact's name with ".json" added."""
    return artifact.with_name(artifact.name + ".json")


def read_manifest(artifact: Path) -> Manifest:
    """Read the manifest next to an artifact.

    Raises:
        InputError: it is missing or unreadable.
    """
    path = manifest_path(artifact)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{artifact} has no readable manifest {path.name} next to it",
            next_step="copy both files together, or make the artifact again",
        ) from error
    return Manifest.from_json(text, name=str(path))


def read_verified(artifact: Path) -> tuple[bytes, Manifest]:
    """Read an artifact and its manifest, and check that they belong together before anything looks at the bytes.

    Raises:
        InputError: the file or its manifest is missing or unreadable, or the manifest belongs to other bytes.
    """
    try:
        data = artifact.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {artifact}: {(error.strerror or str(error)).lower()}") from error
    manifest = read_manifest(artifact)
    check_sha256(artifact, sha256_of_bytes(data), manifest.sha256, stated_by="its manifest")
    return data, manifest


def check_sha256(path: Path, actual: str, stated: str, *, stated_by: str) -> None:
    """Check a file's SHA-256 against the one that was recorded when the file was made.

    Raises:
        InputError: they differ; `stated_by` names what recorded it.
    """
    if actual != stated:
        raise InputError(
            f"{path} has SHA-256 {actual[:16]}…",
            expected=f"{stated[:16]}… as recorded in {stated_by}",
            next_step=f"the file was changed or truncated, or {stated_by} belongs to another file: copy both again, or "
            "make them again",
        )
