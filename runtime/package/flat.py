"""ONNX files with the names and the ONNX version that ComfyUI's and chaiNNer's nodes take: 4x_NAME_fp16.onnx.

Such programs bring an ONNX Runtime of their own, chaiNNer 1.17, which refuses files of a newer IR version before it
looks at an operator. The graphs are written in opset 17 (IR version 8), which releases since 2022 read; those with
operators that cannot be converted keep opset 20 (IR version 9).
"""

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.version_converter

from srdeploy.core.errors import InputError
from srdeploy.core.onnx_file import GraphFile, read_graph
from srdeploy.core.precision import Precision
from srdeploy.runtime.bundle import Bundle
from srdeploy.runtime.package.packaged import Packaged, package_folder, package_name

OPSET, IR_VERSION = 17, 8
NEWER_OPSET, NEWER_IR_VERSION = 20, 9
_PRECISIONS = (Precision.FP32, Precision.FP16)


def write_flat(
    bundle: Bundle,
    output: Path,
    *,
    in_rgb: Callable[[GraphFile], GraphFile],
    name: str | None = None,
    force: bool = False,
) -> Packaged:
    """Write the FP32 and FP16 graphs of a bundle as flat files.

    Args:
        bundle: verified.
        output: the folder to write.
        in_rgb: returns a graph of one channel in a wrapper that takes and returns RGB.
        name: NAME in the files' names; default: the bundle's.
        force: replace a folder that `package` wrote.

    Raises:
        UsageError: the folder exists and `force` is false, or the name cannot be part of a file's name.
        InputError: a graph is newer than opset 20.
        OutputError: the folder cannot be written.
    """
    stem = f"{bundle.contract.scale}x_{package_name(bundle, name)}"
    held = [precision for precision in _PRECISIONS if f"model.{precision}.onnx" in bundle.files]
    notes = ["both files take and return RGB in 0..1 as 32-bit floats"]
    if Precision.FP16 not in held:
        notes = ["the bundle has no FP16 graph", "the file takes and returns RGB in 0..1 as 32-bit floats"]
    with package_folder(bundle, output, target="flat", force=force) as folder:
        for precision in held:
            graph = read_graph(bundle.onnx(precision))
            model = flat_model(in_rgb(graph) if graph.contract.colours == "y" else graph)
            (folder / f"{stem}_{precision}.onnx").write_bytes(model.SerializeToString())
            if model.ir_version == NEWER_IR_VERSION:
                notes.append(f"{stem}_{precision}.onnx is of opset {NEWER_OPSET}: some operators cannot be converted")
    return Packaged("flat", output, tuple(f"{stem}_{precision}.onnx" for precision in held), tuple(notes))


def flat_model(graph: GraphFile) -> onnx.ModelProto:
    """Return a graph in opset 17, or in opset 20 where an operator cannot be converted; weights are inside.

    Raises:
        InputError: it is of a newer opset.
    """
    if graph.opset > NEWER_OPSET:
        raise InputError(
            f"{graph.path} is of ONNX opset {graph.opset}",
            expected=f"at most {NEWER_OPSET}",
            next_step=f"export it again with --opset {NEWER_OPSET}",
        )
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    try:
        older = onnx.version_converter.convert_version(model, OPSET)
    except RuntimeError:  # it has no adapter for an operator
        model.ir_version = NEWER_IR_VERSION
        return model
    older.ir_version = IR_VERSION
    for node in older.graph.node:
        if node.op_type == "ReduceMean":  # the converter keeps an attribute of opset 18, at its default
            kept = [entry for entry in node.attribute if entry.name != "noop_with_empty_axes"]
            del node.attribute[:]
            node.attribute.extend(kept)
    onnx.checker.check_model(older, full_check=True)
    return older
