"""Put a finished graph into the form that a consumer needs: RGB around a Y network, uint8 images, one fixed shape.

The edits work on any graph of srdeploy, FP32, FP16 or INT8, and leave its network as it is:

    input (RGB) --Conv 1x1--> Y ---------------- network --------------------> Concat --Conv 1x1--> output (RGB)
                          \\-> Cb, Cr --Pad, Conv, DepthToSpace (bicubic)------/

    input (uint8) --Cast, over 255--> network --Clip 0..1, Mul 255, Round--Cast--> output (uint8)

A form is the last step: what changes the network (`quantize`, `compress`) starts from the plain graph.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from srdeploy.core.contract import FORM, INPUT, OUTPUT, GraphForm, ModelContract
from srdeploy.core.errors import InputError, UsageError
from srdeploy.core.imaging.colour import rgb_from_ycbcr, ycbcr_from_rgb
from srdeploy.core.imaging.resize import axis_weights
from srdeploy.core.onnx_file import GraphFile, set_contract
from srdeploy.core.shapes import Shape, format_shape

LUMA = "form.luma"
"""Name of the tensor that the network reads behind a color wrapper."""

_TAPS = 5
"""Input samples that an output sample of a bicubic enlargement depends on, at most, centered on its own."""
_MAX_ELEMENTS = 2**31 - 1
_COLOR_MACS = 9
"""Multiply-adds per pixel of a conversion between RGB and YCbCr."""


def check_form(form: GraphForm, contract: ModelContract) -> None:
    """Check that a graph can be put into a form, before long work.

    Raises:
        UsageError: the shape does not fit the network, or an RGB network is to be wrapped.
        InputError: the graph is in another form already.
    """
    if not contract.form.plain:
        raise InputError(
            f"the graph is in another form already ({contract.form})",
            expected="a plain graph",
            next_step="start from the graph that it was made from",
        )
    if form.color_wrapper and contract.colours != "y":
        raise UsageError(
            f"--color-wrapper on a network of {contract.colours}",
            expected="a network of one channel (y)",
            next_step="omit it: the network takes RGB already",
        )
    if form.shape is not None:
        _check_shape(form.shape, contract, channels=3 if form.color_wrapper else contract.channels)


def formed_graph(graph: GraphFile, form: GraphForm) -> GraphFile:
    """Return a copy of a graph in another form, with the contract that says so.

    Args:
        graph: a plain graph.
        form: the form to put it into.

    Raises:
        UsageError, InputError: as `check_form`.
    """
    check_form(form, graph.contract)
    contract = graph.contract
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    if form.color_wrapper:
        _wrap_colors(model, contract)
        contract = _wrapped_contract(contract)
    if form.io == "uint8":
        _take_uint8(model)
    if form.shape is not None:
        model = _with_static_shape(model, form.shape, contract.output_shape(form.shape))
    contract = replace(contract, form=form)
    set_contract(model, contract)
    return GraphFile(model, path=graph.path, sha256=graph.sha256, contract=contract)


def _check_shape(shape: Shape, contract: ModelContract, *, channels: int) -> None:
    text, pixels = format_shape(shape), shape[0] * shape[2] * shape[3]
    if shape[1] != channels:
        raise UsageError(f"--static {text} has {shape[1]} channels", expected=f"{channels}, as the graph")
    if min(shape[2:]) < contract.min_size:
        raise UsageError(f"--static {text} is below the network's minimum size", expected=f"{contract.min_size} pixels")
    if contract.largest_tensor_per_pixel * pixels > _MAX_ELEMENTS:
        raise UsageError(
            f"at --static {text} the largest tensor has {contract.largest_tensor_per_pixel * pixels:.3g} elements",
            expected=f"less than 2^31 = {_MAX_ELEMENTS + 1:,}",
            next_step="choose a smaller shape; larger images are tiled",
        )


def _wrapped_contract(contract: ModelContract) -> ModelContract:
    scale, radius = contract.scale, contract.receptive_radius
    return replace(
        contract,
        colours="rgb",
        receptive_radius=None if radius is None else max(radius, _TAPS // 2),
        macs_per_pixel=contract.macs_per_pixel + _COLOR_MACS * (1 + scale**2) + 2 * _TAPS**2 * scale**2,
        largest_tensor_per_pixel=max(contract.largest_tensor_per_pixel, 3 * scale**2),
    )


def _wrap_colors(model: onnx.ModelProto, contract: ModelContract) -> None:
    """Put the conversion from RGB before a Y network, and bicubic chroma and the conversion back behind it."""
    graph, scale = model.graph, contract.scale
    _rename_input(graph, LUMA)
    _rename_output(graph, "form.luma_out")
    identity = np.eye(3)
    to_ycbcr = ycbcr_from_rgb(identity) - ycbcr_from_rgb(np.zeros((1, 3)))  # row k: the Y, Cb, Cr of channel k alone
    to_rgb = rgb_from_ycbcr(identity) - rgb_from_ycbcr(np.zeros((1, 3)))
    constants: dict[str, NDArray[Any]] = {
        "form.to_ycbcr.weight": to_ycbcr.T[:, :, None, None].astype(np.float32),
        "form.to_ycbcr.bias": ycbcr_from_rgb(np.zeros(3)).astype(np.float32),
        "form.to_rgb.weight": to_rgb.T[:, :, None, None].astype(np.float32),
        "form.to_rgb.bias": rgb_from_ycbcr(np.zeros(3)).astype(np.float32),
        "form.planes": np.array([1, 2], np.int64),
        "form.chroma.pads": np.array([0, 0, _TAPS // 2, _TAPS // 2] * 2, np.int64),
        "form.chroma.weight": np.tile(_bicubic_weights(scale), (2, 1, 1, 1)),
    }
    before = [
        _node("Conv", [INPUT, "form.to_ycbcr.weight", "form.to_ycbcr.bias"], ["form.ycbcr"]),
        _node("Split", ["form.ycbcr", "form.planes"], [LUMA, "form.chroma"], axis=1),
    ]
    # Engines have kernels for these three, and not all of them for a cubic Resize.
    after = [
        _node("Pad", ["form.chroma", "form.chroma.pads"], ["form.chroma_padded"], mode="edge"),
        _node("Conv", ["form.chroma_padded", "form.chroma.weight"], ["form.chroma_phases"], group=2),
        _node("DepthToSpace", ["form.chroma_phases"], ["form.chroma_large"], blocksize=scale, mode="CRD"),
    ]
    chroma = "form.chroma_large"
    if contract.trim:
        constants |= {
            "form.trim.starts": np.array([0, 0], np.int64),
            "form.trim.ends": np.array([-contract.trim] * 2, np.int64),
            "form.trim.axes": np.array([2, 3], np.int64),
        }
        after.append(
            _node("Slice", [chroma, *(f"form.trim.{part}" for part in ("starts", "ends", "axes"))], ["form.trimmed"])
        )
        chroma = "form.trimmed"
    after += [
        _node("Concat", ["form.luma_out", chroma], ["form.ycbcr_out"], axis=1),
        _node("Conv", ["form.ycbcr_out", "form.to_rgb.weight", "form.to_rgb.bias"], [OUTPUT]),
    ]
    _surround(graph, before, after, constants)
    for value in (graph.input[0], graph.output[0]):
        value.type.tensor_type.shape.dim[1].dim_value = 3


def _bicubic_weights(scale: int) -> NDArray[np.float32]:
    """Return the bicubic enlargement of one plane as a convolution: (scale^2, 1, 5, 5), a channel per phase."""
    length = 4 * _TAPS
    center = length // 2
    indices, weights = axis_weights(length, length * scale, scale)
    axis = np.zeros((scale, _TAPS))
    for phase in range(scale):
        row = center * scale + phase
        np.add.at(axis[phase], indices[row] - center + _TAPS // 2, weights[row])
    kernel = axis[:, None, :, None] * axis[None, :, None, :]  # (row phase, column phase, tap, tap)
    return kernel.reshape(scale**2, 1, _TAPS, _TAPS).astype(np.float32)


def _take_uint8(model: onnx.ModelProto) -> None:
    """Make a graph take and return uint8 with the arithmetic that pictures are read and written with.

    TensorRT takes an input of uint8 only if a Cast reads it. The clipping stands between the network's last
    convolution and the multiplication, so that no engine merges the factor into the weights, which would round
    differently.
    """
    graph = model.graph
    # OpenVINO multiplies by 1/255 where a graph divides by 255, which rounds 126 of the 256 levels to another number.
    # With 1/255 in two parts, of which the product of the first is exact, every engine gets the quotient.
    coarse = float(np.float32(np.floor(2**24 / 255) / 2**24))
    _rename_input(graph, "form.values")
    _rename_output(graph, "form.values_out")
    constants: dict[str, NDArray[Any]] = {
        "form.zero": np.array(0, np.float32),
        "form.one": np.array(1, np.float32),
        "form.levels": np.array(255, np.float32),
        "form.coarse": np.array(coarse, np.float32),
        "form.fine": np.array(1 / 255 - coarse, np.float32),
    }
    before = [
        _node("Cast", [INPUT], ["form.float_levels"], to=TensorProto.FLOAT),
        _node("Mul", ["form.float_levels", "form.coarse"], ["form.most"]),
        _node("Mul", ["form.float_levels", "form.fine"], ["form.rest"]),
        _node("Add", ["form.most", "form.rest"], ["form.values"]),
    ]
    after = [
        _node("Clip", ["form.values_out", "form.zero", "form.one"], ["form.clipped"]),
        _node("Mul", ["form.clipped", "form.levels"], ["form.scaled"]),
        _node("Round", ["form.scaled"], ["form.rounded"]),  # half to even
        _node("Cast", ["form.rounded"], [OUTPUT], to=TensorProto.UINT8),
    ]
    _surround(graph, before, after, constants)
    for value in (graph.input[0], graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.UINT8


def _with_static_shape(model: onnx.ModelProto, shape: Shape, output_shape: Shape) -> onnx.ModelProto:
    """Fix the shape of the input and of everything computed from it."""
    graph = model.graph
    for value, sizes in ((graph.input[0], shape), (graph.output[0], output_shape)):
        dims = value.type.tensor_type.shape.dim
        del dims[:]
        dims.extend(onnx.TensorShapeProto.Dimension(dim_value=size) for size in sizes)
    del graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    if any(node.op_type == "Shape" for node in inferred.graph.node):
        inferred = _without_size_arithmetic(inferred)
    return inferred


def _without_size_arithmetic(model: onnx.ModelProto) -> onnx.ModelProto:
    """Compute the sizes that a graph with padding to a multiple computes: they are constants now."""
    import onnx_ir
    from onnxscript import optimizer

    program = onnx_ir.from_proto(model)
    optimizer.fold_constants(program, onnx_shape_inference=True)
    optimizer.remove_unused_nodes(program)
    return onnx_ir.to_proto(program)


def _rename_input(graph: onnx.GraphProto, name: str) -> None:
    """Let the nodes read another tensor in place of the graph's input."""
    for node in graph.node:
        for index, source in enumerate(node.input):
            if source == INPUT:
                node.input[index] = name


def _rename_output(graph: onnx.GraphProto, name: str) -> None:
    """Let the nodes write, and read, another tensor in place of the graph's output."""
    for node in graph.node:
        for names in (node.input, node.output):
            for index, tensor in enumerate(names):
                if tensor == OUTPUT:
                    names[index] = name


def _surround(
    graph: onnx.GraphProto,
    before: Sequence[onnx.NodeProto],
    after: Sequence[onnx.NodeProto],
    constants: dict[str, NDArray[Any]],
) -> None:
    """Put nodes in front of and behind those of a graph, with the constants that they read."""
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())


def _node(operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    """Return a node named after its first output, or after the form if that is the graph's output."""
    stem = outputs[0] if outputs[0].startswith(FORM) else f"{FORM}{outputs[0]}"
    return helper.make_node(operator, list(inputs), list(outputs), name=f"{stem}/{operator}", **attributes)
