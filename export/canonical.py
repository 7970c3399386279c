"""Bring a graph from the torch exporter into the form that all later stages and engines rely on.

- Nothing that depends only on constants is computed in the graph.
- Sub-pixel layers are DepthToSpace in CRD mode, and pixel unshuffles SpaceToDepth: engines have kernels for these, and
  none for the chains of Reshape and Transpose that they could be spelled as.
- Nodes and tensors are named after their PyTorch module, `groups.3.blocks.7.conv2/Conv`, so that a layer
  that loses accuracy can be found in the source.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from onnxscript import optimizer

from srdeploy.core.contract import INPUT, OUTPUT
from srdeploy.core.errors import ExportError
from srdeploy.export.folding import INNER

MODULE = "srdeploy.module"
"""Key of the node metadata that names the PyTorch module."""

_NOWHERE = "_empty_nn_module_stack"
"""The module that the exporter names for nodes that it adds itself, for example to compute a size."""

AXES = ("batch", "height", "width")

_LAYOUT_OPERATORS = frozenset({"Reshape", "Transpose", "Shape", "Expand", "Flatten", "Unsqueeze"})
"""What a sub-pixel layer or a fixed size looks like when it was not translated canonically."""

_SIZE_ARITHMETIC = frozenset({"Shape", "Reshape"})
"""What is left, on integers only, where the graph pads to a multiple and crops again."""


def canonical_graph(model: onnx_ir.Model, *, name: str, pads_to_multiple: bool) -> None:
    """Rewrite an exported graph in place and check its form.

    Args:
        model: as the exporter left it.
        name: of the graph.
        pads_to_multiple: the network pads its input to a multiple of a factor and crops its output, so that sizes are
            computed in the graph.

    Raises:
        ExportError: the graph is not in the canonical form after all.
    """
    # Shapes are known from the tracer, except those of the sizes that such a network computes.
    optimizer.fold_constants(model, onnx_shape_inference=pads_to_multiple)
    _order_channels_in_weights(model.graph)
    optimizer.remove_unused_nodes(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _share_small_constants(model.graph)
    _name_sizes(model.graph)
    _name_by_module(model.graph)
    model.graph.name = name
    _check_form(model.graph, pads_to_multiple)


def operators(model: onnx_ir.Model) -> dict[str, int]:
    """Return how many nodes of each operator a graph has, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph).most_common())


def _order_channels_in_weights(graph: onnx_ir.Graph) -> None:
    """Move a reordering of channels between SpaceToDepth and a convolution into the convolution's weights."""
    for node in list(graph):
        if node.op_type != "Gather" or node.inputs[0] is None or node.inputs[1] is None:
            continue
        source = node.inputs[0].producer()
        order = _constant(node.inputs[1])
        if source is None or source.op_type != "SpaceToDepth" or order is None:
            continue
        for convolution in list(node.outputs[0].consumers()):
            if convolution.op_type != "Conv":
                break
            weight = convolution.inputs[1]
            assert weight is not None
            assert weight.const_value is not None
            # Input k of the convolution was channel order[k]: its weights go to place order[k].
            reordered = np.empty_like(weight.const_value.numpy())
            reordered[:, order] = weight.const_value.numpy()
            weight.const_value = onnx_ir.tensor(reordered, name=weight.name)
            convolution.replace_input_with(0, node.inputs[0])


def _share_small_constants(graph: onnx_ir.Graph) -> None:
    """Keep one copy of each small constant of whole numbers (axes, sizes). Weights are never shared."""
    shared: dict[tuple[str, tuple[int, ...], bytes], onnx_ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != onnx_ir.DataType.INT64:
            continue
        key = (str(tensor.dtype), tuple(tensor.shape.numpy()), tensor.tobytes())
        first = shared.setdefault(key, value)
        if first is value:
            graph.initializers.pop(name)
            value.name = f"constant_{len(shared) - 1}"
            graph.register_initializer(value)
        else:
            for node, index in list(value.uses()):
                node.replace_input_with(index, first)
            graph.initializers.pop(name)


def _name_sizes(graph: onnx_ir.Graph) -> None:
    """Call the dynamic sizes batch, height and width, in the input and in every expression made from them."""
    (image,) = graph.inputs
    assert image.shape is not None
    symbols = {str(image.shape[axis]): word for axis, word in zip((0, 2, 3), AXES, strict=True)}
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, symbols)) + r")\b")
    for value in _values(graph):
        if value.shape is not None:
            value.shape = onnx_ir.Shape(
                dim if isinstance(dim, int) or dim.value is None else pattern.sub(lambda m: symbols[m[0]], dim.value)
                for dim in value.shape
            )


def _name_by_module(graph: onnx_ir.Graph) -> None:
    taken: Counter[str] = Counter()
    for value in (*graph.inputs, *graph.outputs):
        value.metadata_props.clear()
    for node in graph:
        module = _module_of(node.metadata_props)
        name = f"{module}/{node.op_type}" if module else node.op_type
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name] - 1}"
        node.metadata_props.clear()
        node.metadata_props[MODULE] = module
        node.doc_string = None
        for index, output in enumerate(node.outputs):
            if output.name != OUTPUT:
                output.name = node.name if index == 0 else f"{node.name}:{index}"
            output.metadata_props.clear()
    for name, value in list(graph.initializers.items()):
        value.metadata_props.clear()
        if name.startswith(INNER):
            graph.initializers.pop(name)
            value.name = name.removeprefix(INNER)
            graph.register_initializer(value)


def _module_of(metadata: Mapping[str, str]) -> str:
    """Return the path of the module that a node belongs to; the network itself is ""."""
    scopes = ast.literal_eval(metadata.get("pkg.torch.onnx.name_scopes", "['', '']"))
    path = str(scopes[-2]) if len(scopes) > 1 else ""
    if path.startswith(_NOWHERE) or path + "." == INNER:
        return ""
    return path.removeprefix(INNER)


def _values(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _constant(value: onnx_ir.Value) -> NDArray[Any] | None:
    return None if value.const_value is None else value.const_value.numpy()


def _check_form(graph: onnx_ir.Graph, pads_to_multiple: bool) -> None:
    """Check that a graph is canonical: it would compute the right numbers, but engines would run it slowly."""
    if [value.name for value in graph.inputs] != [INPUT] or [value.name for value in graph.outputs] != [OUTPUT]:
        raise ExportError("the exported graph has other inputs and outputs", expected=f"{INPUT} and {OUTPUT}")
    forbidden = _LAYOUT_OPERATORS - _SIZE_ARITHMETIC if pads_to_multiple else _LAYOUT_OPERATORS
    for node in graph:
        mode = node.attributes.get("mode")
        if node.op_type == "DepthToSpace" and (mode is None or mode.as_string() != "CRD"):
            raise ExportError(f"{node.name} is a DepthToSpace of another channel order", expected="mode CRD")
        if node.op_type in forbidden or (node.op_type == "Reshape" and _may_be_maps(node.outputs[0])):
            raise ExportError(
                f"the exported graph contains {node.name}",
                expected="sub-pixel layers as DepthToSpace and no sizes computed in the graph",
                next_step="use the torch version pinned in constraints.txt, or report this",
            )
        if node.inputs and all(value is None or value.const_value is not None for value in node.inputs):
            raise ExportError(f"{node.name} depends on constants alone", expected="constants to be folded")


def _may_be_maps(value: onnx_ir.Value) -> bool:
    """Return True if a value may be more than a list of sizes or positions."""
    return value.shape is None or len(value.shape) > 1
