"""From a loaded checkpoint to an ONNX file that is checked against the network.

    checkpoint --folding--> network on 0..1 --capture--> graph --canonical--> canonical graph --checks--> file, manifest

`export_form` puts such a file, or what `quantize` made of it, into another form for a consumer
(`srdeploy.export.forms`); `export_onnx` does so with the graph that it exported. The file and its manifest appear
together at the end, or not at all.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir

from srdeploy.core.artifact import atomic_files, sha256_of_file
from srdeploy.core.contract import PLAIN, GraphForm, ModelContract
from srdeploy.core.environment import package_versions
from srdeploy.core.errors import REPORT, ExportError, SrdeployError, UsageError
from srdeploy.core.manifest import Manifest, Source, manifest_path
from srdeploy.core.onnx_file import GraphFile, read_graph
from srdeploy.core.progress import SILENT, Progress
from srdeploy.export.canonical import canonical_graph, operators
from srdeploy.export.capture import graph_from_network
from srdeploy.export.checks import GridCheck, check_against_network, check_structure
from srdeploy.export.folding import Folded, fold_network
from srdeploy.export.form_checks import FormCheck, check_against_plain
from srdeploy.export.forms import check_form, formed_graph
from srdeploy.models.checkpoint.load import LoadedCheckpoint
from srdeploy.models.networks.rcan import RcanConfig

MIN_OPSET = 20
MAX_OPSET = 23  # the newest that torch 2.13 translates to

EXPORTER = "torch.onnx.export(dynamo=True)"

_INLINE_BYTES = 2_000_000_000
"""Weights up to this stay inside the file; a protobuf message ends at 2 GiB."""

_VERSIONS = ("srdeploy", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExportResult:
    """The result of an export.

    Attributes:
        path: the ONNX file; its manifest is next to it.
        external_data: the file that holds the weights when they do not fit inside, else None.
        contract: what the graph promises.
        opset: ONNX operator set.
        operators: nodes by operator.
        folded: changes made to the network before, one sentence each.
        check: the comparison of the plain graph with the network; None when the source was an ONNX file.
        form_check: the comparison with the plain graph; None for a plain graph.
        seconds: time spent in each step.
    """

    path: Path
    external_data: Path | None
    contract: ModelContract
    opset: int
    operators: Mapping[str, int]
    folded: tuple[str, ...]
    check: GridCheck | None
    form_check: FormCheck | None
    seconds: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "output": str(self.path),
            "external_data": None if self.external_data is None else str(self.external_data),
            "architecture": self.contract.architecture,
            "scale": self.contract.scale,
            "colours": self.contract.colours,
            "opset": self.opset,
            "operators": dict(self.operators),
            "folded": list(self.folded),
            "form": self.contract.form.to_json(),
            "check": None if self.check is None else self.check.to_json(),
            "form_check": None if self.form_check is None else self.form_check.to_json(),
            "seconds": dict(self.seconds),
        }


def export_onnx(
    checkpoint: LoadedCheckpoint,
    output: Path,
    *,
    opset: int = MIN_OPSET,
    form: GraphForm = PLAIN,
    force: bool = False,
    progress: Progress = SILENT,
    inline_bytes: int = _INLINE_BYTES,
) -> ExportResult:
    """Export a checkpoint to ONNX and check the file against the network.

    Args:
        checkpoint: with its network.
        output: the ONNX file to write; its manifest is `output` with ".json" added.
        opset: ONNX operator set, 20 to 23.
        form: how the graph is to take and return images; the plain graph is checked first, then its new form.
        force: replace existing files.
        progress: where to report.
        inline_bytes: weights of more bytes than this go to a file of their own, `output` with ".data" added.

    Raises:
        UsageError: the opset or the form is not supported, or the output exists already.
        ExportError: the export, or the check of the file against the network, failed. Nothing is written.
        OutputError: the disk is full, or the folder cannot be written.
    """
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise UsageError(f"opset {opset}", expected=f"{MIN_OPSET} to {MAX_OPSET}")
    check_form(form, checkpoint.contract())
    seconds: dict[str, float] = {}
    data, manifest_file = output.with_name(output.name + ".data"), manifest_path(output)
    with atomic_files(data, output, manifest_file, force=force) as (data_temporary, temporary, manifest_temporary):
        with _timed("fold", seconds):
            folded = fold_network(checkpoint.network, checkpoint.config)
        with _timed("export", seconds), progress.task("exporting the network"):
            model = _captured(folded, checkpoint, opset)
        contract = _contract(checkpoint, folded, opset)
        model.metadata_props.update(contract.to_metadata())
        # Names inside the file refer to the file with the weights: both get their final names in a folder of their own.
        with tempfile.TemporaryDirectory(prefix=".export.", dir=output.parent) as folder:
            staged, staged_data = Path(folder) / output.name, Path(folder) / data.name
            external = _weight_bytes(model) > inline_bytes
            with _timed("write", seconds):
                onnx_ir.save(model, staged, external_data=data.name if external else None)
            with _timed("check", seconds):
                check_structure(staged)
                check = check_against_network(staged, checkpoint.reference, contract, progress=progress)
            counts, form_check = operators(model), None
            if not form.plain:
                with _timed("form", seconds):
                    formed, form_check = _formed(read_graph(staged), form)
                contract, counts, external = formed.contract, _operators(formed), False
                staged.write_bytes(formed.serialized())
            staged.replace(temporary)
            if external:
                staged_data.replace(data_temporary)
        result = ExportResult(
            output, data if external else None, contract, opset, counts, folded.notes, check, form_check, seconds
        )
        source = Source("checkpoint", checkpoint.path.name, checkpoint.sha256)
        manifest = _manifest(result, source, temporary, data_temporary)
        manifest_temporary.write_text(manifest.to_json(), encoding="utf-8")
    return result


def export_form(source: Path, output: Path, *, form: GraphForm, force: bool = False) -> ExportResult:
    """Put an ONNX file of srdeploy, of any precision, into another form and check it against the file.

    Args:
        source: a plain graph.
        output: the ONNX file to write; its manifest is `output` with ".json" added.
        form: how the graph is to take and return images; the plain form copies it.
        force: replace existing files.

    Raises:
        UsageError: the form does not fit the graph, or the output exists already.
        InputError: the file is not an ONNX file of srdeploy, or in another form already.
        ExportError: the check against the file failed. Nothing is written.
        OutputError: the disk is full, or the folder cannot be written.
    """
    seconds: dict[str, float] = {}
    with atomic_files(output, manifest_path(output), force=force) as (temporary, manifest_temporary):
        with _timed("form", seconds):
            plain = read_graph(source)
            formed, check = _formed(plain, form)
        temporary.write_bytes(formed.serialized())
        result = ExportResult(output, None, formed.contract, formed.opset, _operators(formed), (), None, check, seconds)
        manifest = _manifest(result, Source("onnx", source.name, plain.sha256), temporary, temporary)
        manifest_temporary.write_text(manifest.to_json(), encoding="utf-8")
    return result


def _formed(plain: GraphFile, form: GraphForm) -> tuple[GraphFile, FormCheck]:
    """Put a graph into another form; the result is valid ONNX and was compared with the plain graph."""
    formed = formed_graph(plain, form)
    with tempfile.TemporaryDirectory(prefix="srdeploy-form-") as folder:
        path = Path(folder) / plain.path.name
        path.write_bytes(formed.serialized())
        check_structure(path)
    return formed, check_against_plain(formed, plain)


def _operators(graph: GraphFile) -> dict[str, int]:
    return dict(Counter(node.op_type for node in graph.model.graph.node).most_common())


def _captured(folded: Folded, checkpoint: LoadedCheckpoint, opset: int) -> onnx_ir.Model:
    """Export the network and bring the graph into its canonical form."""
    config, spec = checkpoint.config, checkpoint.spec
    try:
        model = graph_from_network(folded.network, channels=config.channels, opset=opset)
        canonical_graph(
            model,
            name=f"{spec.architecture}_x{spec.scale}",
            pads_to_multiple=isinstance(config, RcanConfig) and config.unshuffle > 1,
        )
    except SrdeployError:
        raise
    except Exception as error:  # the exporter raises whatever its layers raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ExportError(f"the PyTorch exporter failed: {reason}", next_step=REPORT) from error
    return model


def _weight_bytes(model: onnx_ir.Model) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _contract(checkpoint: LoadedCheckpoint, folded: Folded, opset: int) -> ModelContract:
    contract = checkpoint.contract()
    provenance = {
        **contract.provenance,
        "exporter": EXPORTER,
        "opset": opset,
        "folded": list(folded.notes),
        "versions": package_versions(_VERSIONS),
    }
    return replace(contract, provenance=provenance)


def _manifest(result: ExportResult, source: Source, model: Path, data: Path) -> Manifest:
    """Return the manifest of the file; `model` and `data` are the temporary files."""
    details = result.to_json()
    del details["output"], details["seconds"]
    if result.external_data is not None:
        details["external_data"] = {"name": result.external_data.name, "sha256": sha256_of_file(data)}
    return Manifest(
        kind="onnx",
        sha256=sha256_of_file(model),
        sources=(source,),
        details={**details, "precision": str(result.contract.precision)},
        versions=package_versions(_VERSIONS),
    )


@contextmanager
def _timed(step: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[step] = round(time.perf_counter() - started, 3)
