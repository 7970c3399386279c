"""The contract of a super-resolution graph with its callers, and how it is stored in ONNX metadata.

Outside, every graph takes `input` (N, C, H, W) float32 in [0, 1] and returns `output` (N, C, H', W') float32, not
clamped, with H' = scale * H - trim. Colours are RGB, or the Y of BT.601 in studio swing (16..235)/255 for networks of
one channel. Numbers a checkpoint was trained with (0..255, mean shift) are inside the graph and not visible here.

A graph may be exported in another form for a consumer that needs it (`GraphForm`): one fixed shape, uint8 images, or
RGB around a network of one channel.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from srdeploy.core.errors import InputError
from srdeploy.core.precision import Precision
from srdeploy.core.shapes import Shape, ShapeProfile, format_shape

INPUT = "input"
OUTPUT = "output"
PREFIX = "srdeploy."
SCHEMA = 1
EDGE = "srdeploy.edge"
"""Key of the metadata of nodes that correct the edges of an image: strips, whose cost does not grow with its area."""

FORM = "form."
"""Prefix of the names of nodes that a graph has around its network (`srdeploy.export.forms`)."""


def corrects_edges(node: Any) -> bool:
    """Return True if an ONNX node belongs to the correction of an image's edges."""
    return any(entry.key == EDGE for entry in node.metadata_props)


@dataclass(frozen=True)
class GraphForm:
    """How a graph takes and returns images, where a consumer needs another form than the plain one.

    Attributes:
        shape: the only input shape, (N, C, H, W); None when batch, height and width are free.
        io: element type of input and output: "float32" in [0, 1], or "uint8" in 0..255: the output is then clamped and
            rounded half to even.
        color_wrapper: whether a network of one channel is wrapped to take and return RGB.
    """

    shape: Shape | None = None
    io: Literal["float32", "uint8"] = "float32"
    color_wrapper: bool = False

    @property
    def plain(self) -> bool:
        """Return True if nothing differs from the plain form: free sizes, float32, the network's own channels."""
        return self == GraphForm()

    def __str__(self) -> str:
        parts = [] if self.shape is None else [f"static {format_shape(self.shape)}"]
        parts += ["uint8 in and out"] if self.io == "uint8" else []
        parts += ["RGB around a network of one channel"] if self.color_wrapper else []
        return ", ".join(parts) or "plain"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "GraphForm":
        """Read `to_json` back.

        Raises:
            ValueError, TypeError: fields are missing, unknown or of other values.
        """
        form = cls(**value)
        n, c, h, w = form.shape or (1, 1, 1, 1)
        if form.io not in ("float32", "uint8"):
            raise ValueError(f"io {form.io!r}")
        return cls(None if form.shape is None else (n, c, h, w), form.io, bool(form.color_wrapper))


PLAIN = GraphForm()
"""The form that every stage works on."""


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
        form: how the graph takes and returns images. `colours` is what it takes: "rgb" behind a color wrapper.
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
    form: GraphForm = PLAIN

    @property
    def profiles(self) -> tuple[ShapeProfile, ...]:
        """The one shape that a static graph takes, as a profile; empty for a graph of free sizes."""
        shape = self.form.shape
        return () if shape is None else (ShapeProfile(shape, shape, shape),)

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

    @property
    def compression(self) -> Mapping[str, Any] | None:
        """What `compress` wrote about a graph that is another network than the trained one; None for all others."""
        found = self.provenance.get("compression")
        return found if isinstance(found, Mapping) else None

    def output_shape(self, shape: tuple[int, ...]) -> Shape:
        """Return the output shape for an input shape (N, C, H, W)."""
        n, c, h, w = shape
        return n, c, self.scale * h - self.trim, self.scale * w - self.trim

    def to_metadata(self) -> dict[str, str]:
        """Return ONNX metadata: one string per field, names starting with "srdeploy."."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)} | {"form": self.form.to_json()}
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
                names = [entry.name for entry in fields(cls) if entry.name != "form"]
                values = {name: json.loads(metadata[PREFIX + name]) for name in names}
                values["precision"] = Precision(values["precision"])
                # Files of earlier versions have no form: all their graphs are plain.
                form = GraphForm.from_json(json.loads(metadata.get(PREFIX + "form", "{}")))
                return cls(**values, form=form)
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"{name} carries incomplete srdeploy metadata ({error})") from error
        raise InputError(f"{name} carries srdeploy metadata of schema {schema}", expected=f"schema {SCHEMA}")
