"""The contract of a super-resolution graph with its callers, and how it is stored in ONNX metadata.

Outside, every graph takes `input` (N, C, H, W) float32 in [0, 1] and returns `output` (N, C, H', W') float32, not
clamped, with H' = scale * H - trim. Colours are RGB, or the Y of BT.601 in studio swing (16..235)/255 for networks of
one channel. Numbers a checkpoint was trained with (0..255, mean shift) are inside the graph and not visible here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from srdeploy.core.errors import InputError
from srdeploy.core.precision import Precision
from srdeploy.core.shapes import Shape

INPUT = "input"
OUTPUT = "output"
PREFIX = "srdeploy."
SCHEMA = 1
EDGE = "srdeploy.edge"
"""Key of the metadata of nodes that correct the edges of an image: strips, whose cost does not grow with its area."""


def corrects_edges(node: Any) -> bool:
    """Return True if an ONNX node belongs to the correction of an image's edges."""
    return any(entry.key == EDGE for entry in node.metadata_props)


@dataclass(frozen=True)
class ModelContract:
    """Everything that callers may rely on about a graph or engine.

    Attributes:
        architecture: "rcan" or "srdensenet".
        configuration: the network's frozen configuration as JSON values.
        scale: output pixels per input pixel and axis.
        colours: "rgb" (3 channels) or "y" (1 channel).
        precision: the type that the heavy layers compute in.
        receptive_radius: LR pixels on each side that an output pixel depends on; None when it depends on the whole
            image (channel attention).
        macs_per_pixel: multiply-adds per LR pixel.
        largest_tensor_per_pixel: elements of the largest intermediate tensor per LR pixel.
        trim: output pixels missing at the bottom and right: H' = scale * H - trim.
        min_size: minimum height and width of the input.
        checkpoint_sha256: of the checkpoint file that the weights are from.
        provenance: free JSON values: dialect, assumptions with their evidence, exporter, opset, versions,
            target and calibration of a quantized graph.
    """

    architecture: str
    configuration: Mapping[str, Any]
    scale: int
    colours: Literal["rgb", "y"]
    precision: Precision
    receptive_radius: int | None
    macs_per_pixel: float
    largest_tensor_per_pixel: int
    checkpoint_sha256: str
    trim: int = 0
    min_size: int = 1
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """Number of input and output channels."""
        return 3 if self.colours == "rgb" else 1

    @property
    def weight_bits(self) -> int | None:
        """Bits that the weights of an INT8 graph use: 7 where it was made to run without VNNI, else 8; else None."""
        if self.precision is not Precision.INT8:
            return None
        return int(self.provenance.get("quantization", {}).get("weight_bits", 8))

    def output_shape(self, shape: tuple[int, ...]) -> Shape:
        """Return the output shape for an input shape (N, C, H, W)."""
        n, c, h, w = shape
        return n, c, self.scale * h - self.trim, self.scale * w - self.trim

    def to_metadata(self) -> dict[str, str]:
        """Return ONNX metadata: one string per field, names starting with "srdeploy."."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        metadata = {PREFIX + name: json.dumps(value, sort_keys=True) for name, value in values.items()}
        metadata[PREFIX + "value_range"] = json.dumps([0, 1])
        metadata[PREFIX + "schema"] = json.dumps(SCHEMA)
        return metadata

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], *, name: str) -> "ModelContract":
        """Read ONNX metadata back; entries without the prefix are ignored.

        Raises:
            InputError: the metadata is missing, of another schema or incomplete; `name` is the file, for the message.
        """
        if PREFIX + "schema" not in metadata:
            raise InputError(
                f"{name} carries no srdeploy metadata",
                expected="an ONNX file written by srdeploy",
                next_step="export it from the checkpoint with: srdeploy export CHECKPOINT -o model.onnx",
            )
        try:
            schema = json.loads(metadata[PREFIX + "schema"])
            if schema == SCHEMA:
                values = {entry.name: json.loads(metadata[PREFIX + entry.name]) for entry in fields(cls)}
                values["precision"] = Precision(values["precision"])
                return cls(**values)
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"{name} carries incomplete srdeploy metadata ({error})") from error
        raise InputError(f"{name} carries srdeploy metadata of schema {schema}", expected=f"schema {SCHEMA}")
