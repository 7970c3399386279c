"""Rules and data that all stages share: errors, files and manifests, the graph contract, shapes, precisions, runners.

What is handed on here needs the standard library alone; graphs (`onnx_graph`), sessions (`ort`), samples and imaging
are modules of their own.
"""

from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import (
    BuildError,
    CapabilityError,
    ExportError,
    GateError,
    InputError,
    SrdeployError,
    UnstableError,
    UsageError,
)
from srdeploy.core.manifest import Manifest, read_manifest
from srdeploy.core.precision import Precision, Target
from srdeploy.core.progress import SILENT, Progress
from srdeploy.core.shapes import Shape, ShapeProfile, format_shape, parse_shape

__all__ = [
    "SILENT",
    "BuildError",
    "CapabilityError",
    "ExportError",
    "GateError",
    "InputError",
    "Manifest",
    "ModelContract",
    "Precision",
    "Progress",
    "Shape",
    "ShapeProfile",
    "SrdeployError",
    "Target",
    "UnstableError",
    "UsageError",
    "format_shape",
    "parse_shape",
    "read_manifest",
]
