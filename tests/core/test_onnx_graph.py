"""Layers, resolutions, types and multiply-adds of graphs, and reading them from files."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import InputError
from srdeploy.core.onnx_file import read_graph
from srdeploy.core.onnx_graph import Graph, add_outputs, name_nodes, replace_nodes
from srdeploy.core.precision import Precision

FLOAT = """
<ir_version: 10, opset_import: ["" : 20]>
small (float[batch, 3, height, width] input) => (float[batch, 3, h2, w2] output) {
  [head] a = Conv<pads = [1, 1, 1, 1]>(input, w_head)
  [pool] p = GlobalAveragePool(a)
  [squeeze] s = Conv(p, w_squeeze)
  [excite] e = Conv(s, w_excite)
  [gate] g = Mul(a, e)
  [up] u = ConvTranspose<strides = [2, 2], kernel_shape = [3, 3]>(g, w_up)
  [last] l = Conv<pads = [1, 1, 1, 1]>(u, w_last)
  [shuffle] output = DepthToSpace<blocksize = 2, mode = "CRD">(l)
}
"""
FLOAT_WEIGHTS = {
    "w_head": (8, 3, 3, 3),
    "w_squeeze": (2, 8, 1, 1),
    "w_excite": (8, 2, 1, 1),
    "w_up": (8, 4, 3, 3),
    "w_last": (12, 4, 3, 3),
}

QUANTIZED = """
<ir_version: 10, opset_import: ["" : 20]>
small (float[batch, 3, height, width] input) => (float[batch, 8, height, width] output)
<float scale = {0.02}, uint8 zero = {0}, float w_scale = {0.01}, int8 w_zero = {0}> {
  [q] i = QuantizeLinear(input, scale, zero)
  [d] x = DequantizeLinear(i, scale, zero)
  [w] weights = DequantizeLinear(codes, w_scale, w_zero)
  [conv] output = Conv<pads = [1, 1, 1, 1]>(x, weights)
}
"""

CONTRACT = ModelContract(
    architecture="rcan",
    configuration={},
    scale=4,
    colours="rgb",
    precision=Precision.FP32,
    receptive_radius=None,
    macs_per_pixel=1.0,
    largest_tensor_per_pixel=8,
    checkpoint_sha256="0" * 64,
)


def float_model() -> onnx.ModelProto:
    """A x4 network with a channel attention gate."""
    model = parser.parse_model(FLOAT)
    model.graph.initializer.extend(
        numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in FLOAT_WEIGHTS.items()
    )
    return model


def quantized_model(text: str = QUANTIZED) -> onnx.ModelProto:
    """One convolution with Q/DQ pairs."""
    model = parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((8, 3, 3, 3), np.int8), "codes"))
    return model


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A graph with srdeploy's metadata in a file."""
    graph = float_model()
    onnx.helper.set_model_props(graph, CONTRACT.to_metadata())
    path = tmp_path / "small.onnx"
    onnx.save(graph, path)
    return path


def test_layers_have_roles_resolutions_and_costs() -> None:
    graph = Graph(float_model())

    assert [(x.name, x.role, x.resolution, x.macs) for x in graph.layers] == [
        ("w_head", "first", 1.0, 8 * 3 * 9),
        ("w_squeeze", "attention", 0.0, 0.0),
        ("w_excite", "attention", 0.0, 0.0),
        ("w_up", "trunk", 2.0, 8 * 4 * 9),  # once per input pixel
        ("w_last", "last", 2.0, 12 * 4 * 9 * 4),  # on four pixels per LR pixel
    ]
    assert graph.resolution["output"] == 4.0
    assert (graph.layers[3].channels_in, graph.layers[3].channels_out) == (8, 4)


def test_a_quantized_layer_counts_as_its_float_one_and_is_typed_by_its_operands() -> None:
    graph = Graph(quantized_model())

    (layer,) = graph.layers
    assert (layer.weight, layer.macs, layer.role) == ("codes", 8 * 3 * 9, "last")
    assert graph.layer_types == {"conv": "int8"}
    assert graph.layers_by_type() == {"int8": 1}


def test_weights_alone_in_8_bits_are_no_quantized_layer() -> None:
    weights_only = quantized_model(QUANTIZED.replace("(x, weights)", "(input, weights)"))

    assert Graph(weights_only).layer_types == {"conv": "fp32"}


def test_shapes_are_inferred_without_the_weights() -> None:
    shapes, types = Graph(float_model()).inferred

    assert shapes["e"] == (1, 8, 1, 1)
    assert shapes["l"] == (1, 12, 65, 65)
    assert types["l"] == onnx.TensorProto.FLOAT


def test_unnamed_and_doubly_named_nodes_get_names_of_their_own() -> None:
    graph = float_model()
    graph.graph.node[0].name = ""
    graph.graph.node[2].name = "excite"

    name_nodes(graph)

    names = [node.name for node in graph.graph.node]
    assert len(set(names)) == len(names)
    assert "" not in names


def test_added_outputs_are_added_once() -> None:
    graph = add_outputs(float_model(), ["a", "a", "output"])

    assert [value.name for value in graph.graph.output] == ["output", "a"]


def test_replaced_nodes_drop_the_constants_that_nothing_reads() -> None:
    whole = float_model()

    cut = replace_nodes(whole, whole.graph.node[:1], [])

    assert [tensor.name for tensor in cut.graph.initializer] == ["w_head"]
    assert len(whole.graph.node) == 8


def test_a_file_has_its_contract_hash_and_tensors(written: Path) -> None:
    graph = read_graph(written)

    assert graph.contract == CONTRACT
    assert len(graph.sha256) == 64
    assert [str(spec) for spec in (*graph.inputs, *graph.outputs)] == [
        "'input' float32 ?x3x?x?",
        "'output' float32 ?x3x?x?",
    ]


def test_the_hash_covers_external_weights(written: Path) -> None:
    graph = onnx.load(written)
    onnx.save(graph, written, save_as_external_data=True, location="small.data", size_threshold=0)
    before = read_graph(written).sha256

    data = bytearray((written.parent / "small.data").read_bytes())
    data[0] ^= 1
    (written.parent / "small.data").write_bytes(data)

    assert read_graph(written).sha256 != before


def test_missing_external_weights_are_named(written: Path) -> None:
    onnx.save(onnx.load(written), written, save_as_external_data=True, location="small.data", size_threshold=0)
    (written.parent / "small.data").unlink()

    with pytest.raises(InputError, match=r"external weights small\.data"):
        read_graph(written)


def test_an_unknown_inner_tensor_is_refused(written: Path) -> None:
    with pytest.raises(InputError, match="has no tensor named 'nowhere'"):
        read_graph(written).serialized(extra_outputs=["nowhere"])


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no ONNX graph"), (b"not a graph at all", "is not an ONNX file"), (None, "cannot read")],
    ids=["empty", "text", "missing"],
)
def test_files_that_are_no_graph(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(InputError, match=message):
        read_graph(path)


def test_an_unknown_input_name_is_refused(written: Path) -> None:
    graph = onnx.load(written)
    graph.graph.input[0].name = graph.graph.node[0].input[0] = "image"
    onnx.save(graph, written)

    with pytest.raises(InputError, match=r"has inputs \['image'\].*expected \['input'\]"):
        read_graph(written)


def test_a_truncated_file_is_refused(written: Path) -> None:
    written.write_bytes(written.read_bytes()[:-300])

    with pytest.raises(InputError):
        read_graph(written)


def test_a_newer_opset_than_known_is_refused(written: Path) -> None:
    graph = onnx.load(written)
    graph.opset_import[0].version = onnx.defs.onnx_opset_version() + 1
    written.write_bytes(graph.SerializeToString())

    with pytest.raises(InputError, match="is of ONNX opset"):
        read_graph(written)
