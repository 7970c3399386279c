"""The sidecar of an engine: a manifest next to the file that describes its bytes, which stay unchanged.

Keys of `details`:

    engine             family: "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"
    key, key_sha256    everything that decides the bytes (see `srdeploy.runtime.engines.cache`), and its hash
    contract           the ONNX metadata of the graph, unchanged
    inputs, outputs    name, type and shape (-1: free)
    profiles           shape ranges, empty if all shapes are accepted
    precision          {"asked": ..., "layers_asked": ..., "built": ...}
    built              layers or kernels by kind and data type, memory in bytes, the source of these numbers
    target             GPUs or instruction sets the engine runs on
    notes              warnings for the user
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srdeploy.core.artifact import sha256_of_bytes
from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import InputError
from srdeploy.core.manifest import Manifest, Source, manifest_path, read_verified
from srdeploy.core.onnx_file import GraphFile
from srdeploy.core.shapes import ShapeProfile, TensorSpec, format_shape
from srdeploy.runtime.engines.options import BuildOptions, BuiltEngine, profile_from_json, profile_to_json

KIND = "engine"


@dataclass(frozen=True)
class Engine:
    """An engine file whose bytes match its sidecar, read into memory once so that they cannot change afterwards."""

    path: Path
    data: bytes
    manifest: Manifest

    @property
    def family(self) -> str:
        """Engine family."""
        return str(self._detail("engine"))

    @property
    def contract(self) -> ModelContract:
        """The contract of the graph it was built from."""
        return ModelContract.from_metadata(self._detail("contract"), name=str(manifest_path(self.path)))

    @property
    def profiles(self) -> tuple[ShapeProfile, ...]:
        """The shape ranges; empty if all shapes are accepted."""
        return tuple(profile_from_json(value) for value in self._detail("profiles"))

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs."""
        return tuple(TensorSpec.from_json(value) for value in self._detail("inputs"))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs."""
        return tuple(TensorSpec.from_json(value) for value in self._detail("outputs"))

    @property
    def built(self) -> dict[str, Any]:
        """The counts that were read back from the engine after the build."""
        return dict(self._detail("built"))

    @property
    def precision_built(self) -> str:
        """The type that the layers with weights were built in."""
        return str(self._detail("precision")["built"])

    @property
    def target(self) -> dict[str, Any]:
        """The GPUs or instruction sets that it runs on."""
        return dict(self._detail("target"))

    @property
    def shape_options(self) -> str:
        """The options of `srdeploy build` for its profiles."""
        return " ".join(
            f"--min-shape {format_shape(each.min)} --opt-shape {format_shape(each.opt)} "
            f"--max-shape {format_shape(each.max)}"
            for each in self.profiles
        )

    def _detail(self, name: str) -> Any:
        try:
            return self.manifest.details[name]
        except KeyError as error:
            raise InputError(
                f"{manifest_path(self.path)} lacks {name!r}", next_step="build the engine again with srdeploy build"
            ) from error


def read_engine(path: Path) -> Engine:
    """Read an engine and its sidecar, and check that they belong together before the bytes are used.

    An engine is native code. It is opened only if its SHA-256 is the one in its sidecar.

    Raises:
        InputError: the file or the sidecar is missing, the SHA-256 differs, or the sidecar is not an engine's.
    """
    data, manifest = read_verified(path)
    if manifest.kind != KIND:
        raise InputError(f"{manifest_path(path)} describes a file of kind {manifest.kind!r}", expected=KIND)
    return Engine(path, data, manifest)


def key_sha256(key: Mapping[str, Any]) -> str:
    """Return the hash that names a cache key: SHA-256 of its JSON with sorted names and no spaces."""
    return sha256_of_bytes(json.dumps(key, sort_keys=True, separators=(",", ":")).encode())


def engine_manifest(
    graph: GraphFile, engine: str, options: BuildOptions, key: dict[str, Any], built: BuiltEngine
) -> Manifest:
    """Assemble the sidecar of a freshly built engine."""
    details = {
        "engine": engine,
        "key": key,
        "key_sha256": key_sha256(key),
        "contract": graph.contract.to_metadata(),
        "inputs": [spec.to_json() for spec in graph.inputs],
        "outputs": [spec.to_json() for spec in graph.outputs],
        "profiles": [profile_to_json(profile) for profile in options.profiles],
        "precision": {
            "asked": graph.contract.precision.value,
            "layers_asked": graph.layers_by_type(),
            "built": built.precision_built,
        },
        "built": dict(built.built),
        "target": dict(built.target),
        "notes": list(built.notes),
    }
    return Manifest(
        kind=KIND,
        sha256=sha256_of_bytes(built.data),
        sources=(Source("onnx", graph.path.name, graph.sha256),),
        details=details,
        versions=dict(built.versions),
    )
