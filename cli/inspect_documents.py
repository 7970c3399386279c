"""What `srdeploy inspect` reports about a file, as JSON values: one function per kind of artifact."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from srdeploy.cli.checkpoint_options import CheckpointOptions
from srdeploy.core.artifact import sha256_of_file
from srdeploy.core.contract import PREFIX, ModelContract
from srdeploy.core.errors import InputError
from srdeploy.core.manifest import manifest_path, read_manifest
from srdeploy.core.progress import Progress

ELEMENT_LIMIT = 2**31
"""Tensors of this many elements break index arithmetic in engines and in some PyTorch kernels."""


def document_of(path: Path, options: CheckpointOptions, progress: Progress) -> dict[str, Any]:
    """Detect what a path is and describe it.

    Raises:
        InputError: it does not exist, or is neither checkpoint, ONNX file, engine nor bundle.
        UsageError: options that do not fit the checkpoint.
    """
    from srdeploy.models.checkpoint import is_distributed
    from srdeploy.models.checkpoint.filebytes import step_into
    from srdeploy.runtime.bundle import is_bundle
    from srdeploy.runtime.engines.registry import is_engine

    if is_distributed(path):
        return checkpoint_document(path, options, progress)
    if path.is_dir():
        if not is_bundle(path):
            raise InputError(
                f"{path} is a folder without a manifest.json",
                expected="a file, a bundle or a distributed checkpoint",
                next_step=step_into(path),
            )
        return bundle_document(path)
    if not path.exists():
        raise InputError(f"{path} does not exist", expected="a checkpoint, ONNX file, engine or bundle")
    if is_engine(path):
        return engine_document(path)
    if path.suffix == ".onnx":
        return onnx_document(path)
    return checkpoint_document(path, options, progress)


def checkpoint_document(path: Path, options: CheckpointOptions, progress: Progress) -> dict[str, Any]:
    """Describe a checkpoint. Open questions are listed, not refused."""
    from srdeploy.models.checkpoint.load import examine_checkpoint
    from srdeploy.models.networks.spec import config_to_json, spec_of

    examined = examine_checkpoint(path, options.choices(), probe_images=options.probe_images(), progress=progress)
    raw, evidence = examined.raw, examined.evidence
    configuration = config_to_json(examined.config)
    for decision in evidence.decisions:
        if decision.by == "open":  # the configuration holds a placeholder there
            configuration |= dict.fromkeys(decision.fields)
    state = raw.alternatives[examined.weights]
    return {
        "kind": "checkpoint",
        "file": str(path),
        "bytes": raw.size_bytes,
        "sha256": raw.sha256,
        "container": raw.container,
        "wrapper_path": list(evidence.wrapper_path),
        "stripped_prefix": state.prefix,
        "ignored": list(state.ignored),
        "wrapper_members": list(raw.hints.keys),
        "weights": list(raw.alternatives),
        "tensors": len(state.tensors),
        "dtypes": dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.tensors.values())),
        "metadata": raw.metadata,
        "dialect": {"name": evidence.dialect, "title": evidence.title, "source": evidence.source},
        "configuration": configuration,
        "hyperparameters": dict(evidence.hyperparameters),
        "decisions": evidence.to_json()["decisions"],
        "probe": evidence.to_json()["ranking"],
        "notes": list(evidence.notes),
        "network": {
            **_contract_summary(spec_of(examined.config)),
            "value_range": configuration["value_range"],
            "values": sum(tensor.numel() for tensor in examined.tensors.values()),
        },
    }


def onnx_document(path: Path) -> dict[str, Any]:
    """Describe an ONNX file; one that srdeploy did not write has no contract."""
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
        graph = model.graph
        if not graph.output:
            raise InputError(f"{path} has no outputs", expected="an ONNX file")
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    except Exception as error:  # the protobuf library's own exceptions
        raise InputError(f"{path} is not an ONNX file ({str(error) or type(error).__name__})") from error
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    contract = None
    if any(name.startswith(PREFIX) for name in metadata):
        contract = ModelContract.from_metadata(metadata, name=str(path))
    constants = {entry.name for entry in graph.initializer}
    return {
        "kind": "onnx",
        "file": str(path),
        "bytes": path.stat().st_size,
        "sha256": sha256_of_file(path),
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "inputs": [_value(entry) for entry in graph.input if entry.name not in constants],
        "outputs": [_value(entry) for entry in graph.output],
        "operators": dict(Counter(node.op_type for node in graph.node).most_common()),
        "weight_types": _weight_types(graph.initializer),
        "external_data": any(entry.data_location == onnx.TensorProto.EXTERNAL for entry in graph.initializer),
        **_contract_document(contract),
        "manifest": _manifest_document(path),
    }


def engine_document(path: Path) -> dict[str, Any]:
    """Describe a built engine after checking its bytes against its sidecar."""
    from srdeploy.runtime.engines.sidecar import read_engine

    engine = read_engine(path)
    details = engine.manifest.details
    return {
        "kind": "engine",
        "file": str(path),
        "bytes": len(engine.data),
        "sha256": engine.manifest.sha256,
        "engine": engine.family,
        "precision": details.get("precision", {}),
        "profiles": [str(profile) for profile in engine.profiles],
        "target": engine.target,
        "versions": dict(engine.manifest.versions),
        "created": engine.manifest.created,
        "sources": [{"role": each.role, "name": each.name, "sha256": each.sha256} for each in engine.manifest.sources],
        "built": engine.built,
        "notes": list(details.get("notes", ())),
        **_contract_document(engine.contract),
    }


def bundle_document(path: Path) -> dict[str, Any]:
    """Describe a bundle after checking every file of it."""
    from dataclasses import asdict

    from srdeploy.runtime.bundle import CARD, read_bundle
    from srdeploy.runtime.signature import find_signature

    bundle = read_bundle(path)
    bundle.verify()
    signature = find_signature(path)
    card = path / CARD
    return {
        "kind": "bundle",
        "file": str(path),
        "bytes": sum((path / name).stat().st_size for name in bundle.files if (path / name).exists()),
        "sha256": bundle.manifest.sha256,
        "created": bundle.manifest.created,
        "files": dict(bundle.files),
        "card_edited": card.is_file() and sha256_of_file(card) != bundle.files.get(CARD),
        "signature": None if signature is None else asdict(signature),
        "engines": [asdict(engine) for engine in bundle.engines],
        "excluded": [asdict(entry) for entry in bundle.excluded],
        "sources": [{"role": each.role, "name": each.name, "sha256": each.sha256} for each in bundle.manifest.sources],
        "versions": dict(bundle.manifest.versions),
        **_contract_document(bundle.contract),
    }


def largest_square(elements_per_pixel: int) -> int:
    """Return the side of the largest square LR image whose largest tensor stays below 2^31 elements."""
    return math.isqrt((ELEMENT_LIMIT - 1) // elements_per_pixel)


def _contract_document(contract: ModelContract | None) -> dict[str, Any]:
    if contract is None:
        return {"contract": None, "network": None}
    return {
        "contract": {
            "precision": contract.precision.value,
            "weight_bits": contract.weight_bits,
            "form": contract.form.to_json(),
            "checkpoint_sha256": contract.checkpoint_sha256,
            "configuration": dict(contract.configuration),
            "provenance": dict(contract.provenance),
        },
        "network": _contract_summary(contract),
    }


def _contract_summary(contract: Any) -> dict[str, Any]:
    """Summarise a ModelContract or ModelSpec, which name these facts alike."""
    radius = contract.receptive_radius
    return {
        "architecture": contract.architecture,
        "scale": contract.scale,
        "colours": contract.colours,
        "trim": contract.trim,
        "min_size": contract.min_size,
        "receptive_field": "global" if radius is None else 2 * radius + 1,
        "macs_per_pixel": contract.macs_per_pixel,
        "largest_tensor_per_pixel": contract.largest_tensor_per_pixel,
        "largest_square_input": largest_square(contract.largest_tensor_per_pixel),
    }


def _manifest_document(path: Path) -> dict[str, Any] | None:
    """Return what the manifest next to a file says, and whether it belongs to these bytes."""
    if not manifest_path(path).is_file():
        return None
    manifest = read_manifest(path)
    return {
        "kind": manifest.kind,
        "matches": manifest.sha256 == sha256_of_file(path),
        "created": manifest.created,
        "versions": dict(manifest.versions),
        "sources": [{"role": each.role, "name": each.name, "sha256": each.sha256} for each in manifest.sources],
    }


def _value(entry: Any) -> dict[str, Any]:
    import onnx

    kind = entry.type.tensor_type
    sizes = [each.dim_param or (each.dim_value if each.HasField("dim_value") else "?") for each in kind.shape.dim]
    return {"name": entry.name, "type": onnx.TensorProto.DataType.Name(kind.elem_type).lower(), "shape": sizes}


def _weight_types(initializers: Any) -> dict[str, int]:
    import onnx

    counts: Counter[str] = Counter()
    for entry in initializers:
        counts[onnx.TensorProto.DataType.Name(entry.data_type).lower()] += math.prod(entry.dims)
    return dict(counts.most_common())
