"""The checks catch what exporters get wrong, each beside a graph that is right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnx_ir.passes
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import ExportError
from srdeploy.core.precision import Precision
from srdeploy.export import checks
from srdeploy.export.canonical import canonical_graph
from srdeploy.export.checks import Expected, check_against_expected, check_against_network, check_structure, expected_of
from srdeploy.export.exporter import export_onnx
from srdeploy.models.checkpoint.load import LoadedCheckpoint
from srdeploy.models.networks.spec import NetworkConfig

CONTRACT = ModelContract("rcan", {}, 2, "rgb", Precision.FP32, None, 1.0, 1, "0" * 64)

HEADER = '<ir_version: 10, opset_import: ["" : 20]>'

GOOD = """
subpixel (float[batch,3,height,width] input) => (float[batch,3,h2,w2] output)
{
    maps = Conv <pads = [1, 1, 1, 1]> (input, weight, bias)
    output = DepthToSpace <blocksize = 2, mode = "CRD"> (maps)
}
"""

FIXED_BATCH = """
subpixel (float[batch,3,height,width] input) => (float[batch,3,h2,w2] output)
{
    maps = Conv <pads = [1, 1, 1, 1]> (input, weight, bias)
    shuffled = DepthToSpace <blocksize = 2, mode = "CRD"> (maps)
    sizes = Shape <start = 1> (shuffled)
    one = Constant <value_ints = [1]> ()
    fixed = Concat <axis = 0> (one, sizes)
    output = Reshape (shuffled, fixed)
}
"""

SPELLED_OUT = """
subpixel (float[batch,3,height,width] input) => (float[batch,3,h2,w2] output)
{
    maps = Conv <pads = [1, 1, 1, 1]> (input, weight, bias)
    apart_shape = Constant <value_ints = [-1, 3, 2, 2, 8, 8]> ()
    apart = Reshape (maps, apart_shape)
    turned = Transpose <perm = [0, 1, 4, 2, 5, 3]> (apart)
    together_shape = Constant <value_ints = [-1, 3, 16, 16]> ()
    output = Reshape (turned, together_shape)
}
"""

UNSHUFFLED = """
unshuffled (float[batch,3,height,width] input) => (float[batch,8,h2,w2] output)
{
    blocks = SpaceToDepth <blocksize = 2> (input)
    order = Constant <value_ints = [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]> ()
    unshuffled = Gather <axis = 1> (blocks, order)
    output = Conv <pads = [1, 1, 1, 1]> (unshuffled, weight, bias)
}
"""


class SubPixel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.convolution = nn.Conv2d(3, 12, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return nn.functional.pixel_shuffle(self.convolution(image), 2)


def model_of(text: str, convolution: nn.Conv2d) -> onnx.ModelProto:
    model = onnx.parser.parse_model(HEADER + text)
    assert convolution.bias is not None
    for name, tensor in (("weight", convolution.weight), ("bias", convolution.bias)):
        model.graph.initializer.append(numpy_helper.from_array(tensor.detach().numpy(), name))
    return model


def saved(text: str, network: SubPixel, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(model_of(text, network.convolution), path)
    return path


def test_right_graph_passes(tmp_path: Path) -> None:
    network = SubPixel()

    check = check_against_network(saved(GOOD, network, tmp_path), network, CONTRACT)

    assert check.evaluator.startswith("onnxruntime")
    assert check.max_abs < 1e-6
    assert [entry.shape for entry in check.deviations[:4]] == [(1, 3, 1, 1), (2, 3, 1, 1), (3, 3, 1, 1), (1, 3, 1, 7)]


def test_reference_evaluator_serves_where_onnxruntime_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = SubPixel()
    path = saved(GOOD, network, tmp_path)
    monkeypatch.setattr(checks, "is_installed", lambda module: False)
    monkeypatch.setattr(checks, "GRID", (((1, 1), (1,)), ((3, 4), (2,))))

    check = check_against_network(path, network, CONTRACT)

    assert check.evaluator.startswith("onnx.reference")
    assert check.max_abs < 1e-6


def test_fixed_batch_is_caught(tmp_path: Path) -> None:
    network = SubPixel()

    with pytest.raises(ExportError, match="2x3x1x1"):
        check_against_network(saved(FIXED_BATCH, network, tmp_path), network, CONTRACT)


@pytest.mark.parametrize("mode", ["CRD", "DCR"])
def test_channel_order_of_the_shuffle_is_caught(mode: str, tmp_path: Path) -> None:
    network = SubPixel()
    path = saved(GOOD.replace("CRD", mode), network, tmp_path)

    if mode == "CRD":
        check_against_network(path, network, CONTRACT)
    else:
        with pytest.raises(ExportError, match="differs from the network by"):
            check_against_network(path, network, CONTRACT)


def test_wrong_border_is_caught(tmp_path: Path) -> None:
    network = SubPixel()
    path = saved(GOOD.replace("pads = [1, 1, 1, 1]", "pads = [2, 2, 0, 0]"), network, tmp_path)

    with pytest.raises(ExportError, match="differs from the network"):
        check_against_network(path, network, CONTRACT)


def test_wrong_output_size_is_caught(tmp_path: Path) -> None:
    network = SubPixel()
    path = saved(GOOD.replace("pads = [1, 1, 1, 1]", "pads = [1, 1, 2, 1]"), network, tmp_path)

    with pytest.raises(ExportError, match="gives 1x3x4x2 on an input of 1x3x1x1; expected 1x3x2x2"):
        check_against_network(path, network, CONTRACT)


@pytest.mark.parametrize("amplitude", [1.0, 1e4], ids=["small outputs", "large outputs"])
def test_tolerance_follows_the_networks_own_roundings(amplitude: float, tmp_path: Path) -> None:
    network = SubPixel()
    for parameter in network.parameters():
        parameter.data *= amplitude
    model = model_of(GOOD, network.convolution)
    onnx.save(model, tmp_path / "model.onnx")

    check = check_against_network(tmp_path / "model.onnx", network, CONTRACT)

    assert check.network_error < 1e-6  # relative
    assert max(entry.tolerance for entry in check.deviations) < 1e-5 * amplitude
    assert check.to_json()["reference"] == "the network in float64"


def test_a_network_that_overflows_is_refused(tmp_path: Path) -> None:
    network = SubPixel()
    network.convolution.weight.data.fill_(1e38)

    with pytest.raises(ExportError, match="the network gives values that are not finite"):
        check_against_network(saved(GOOD, network, tmp_path), network, CONTRACT)


Perturbation = Callable[[onnx.ModelProto, onnx.NodeProto], None]


def weight_of(model: onnx.ModelProto, node: onnx.NodeProto) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])


def put(tensor: onnx.TensorProto, weights: NDArray[np.float32]) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(weights), tensor.name))


def pads_of(node: onnx.NodeProto) -> Any:
    return next((entry.ints for entry in node.attribute if entry.name == "pads"), [0, 0, 0, 0])


def change_one_weight(checkpoint: LoadedCheckpoint) -> Perturbation:
    """Change the weight that the output depends on most by 1 %."""
    image = torch.rand(1, checkpoint.config.channels, 17, 22)
    output = checkpoint.reference(image)
    (output * torch.randn_like(output)).sum().backward()
    most = {}
    for name, values in checkpoint.network.named_parameters():
        assert values.grad is not None
        most[name] = int((values * values.grad).abs().argmax())

    def perturb(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
        tensor = weight_of(model, node)
        weights = numpy_helper.to_array(tensor).copy()
        weights.ravel()[most[tensor.name]] *= 1.01
        put(tensor, weights)

    return perturb


def shuffle_channels(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    """Give each output channel the weights of its neighbor."""
    tensor = weight_of(model, node)
    put(tensor, np.roll(numpy_helper.to_array(tensor), 1, axis=0 if node.op_type == "Conv" else 1))


def shift_by_a_pixel(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    pads = pads_of(node)
    pads[:] = [pads[0] + 1, pads[1], pads[2] - 1, pads[3]]


def repeat_the_border(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    """Pad with the outermost pixels instead of zeros."""
    pads = pads_of(node)
    sizes = np.array([0, 0, *pads[:2], 0, 0, *pads[2:]], dtype=np.int64)
    model.graph.initializer.append(numpy_helper.from_array(sizes, "border"))
    pad = onnx.helper.make_node("Pad", [node.input[0], "border"], ["padded"], mode="edge")
    model.graph.node.insert(list(model.graph.node).index(node), pad)
    node.input[0] = "padded"
    pads[:] = [0, 0, 0, 0]


def passes(path: Path, expected: tuple[Expected, ...], contract: ModelContract) -> bool:
    try:
        check_against_expected(path, expected, contract)
    except ExportError as error:
        return "differs from the network" not in error.found
    return True


@pytest.mark.parametrize("name", ["rcan-x2", "rcan-255-matrix", "srdensenet-all", "srdensenet-shuffles-rgb-matrix"])
def test_a_small_mistake_in_any_layer_is_caught(
    name: str,
    checkpoint_of: Callable[[NetworkConfig], LoadedCheckpoint],
    variants: dict[str, NetworkConfig],
    tmp_path: Path,
) -> None:
    checkpoint, path = checkpoint_of(variants[name]), tmp_path / "model.onnx"
    with torch.no_grad():
        for key, values in checkpoint.network.named_parameters():
            # No gate is shut by its ReLU or saturated: what nothing depends on can be anything.
            if key.endswith("squeeze.bias"):
                values += 1.0
            elif key.endswith("squeeze.weight"):
                values /= checkpoint.spec.value_range**0.5
    export_onnx(checkpoint, path)
    contract = checkpoint.contract()
    expected = expected_of(checkpoint.reference, contract)
    plain = onnx.load(path)
    layers = [node for node in plain.graph.node if node.op_type in ("Conv", "ConvTranspose")]
    padded = [node.name for node in layers if node.op_type == "Conv" and any(pads_of(node))]
    several = [node.name for node in layers if weight_of(plain, node).dims[0 if node.op_type == "Conv" else 1] > 1]
    perturbations: dict[Perturbation, list[str]] = {
        change_one_weight(checkpoint): [node.name for node in layers],
        shuffle_channels: several,
        shift_by_a_pixel: padded,
        repeat_the_border: padded,
    }

    missed = []
    for perturb, names in perturbations.items():
        for layer in names:
            model = onnx.load(path)
            perturb(model, next(node for node in model.graph.node if node.name == layer))
            onnx.save(model, tmp_path / "wrong.onnx")
            if passes(tmp_path / "wrong.onnx", expected, contract):
                missed.append((perturb.__name__, layer))

    assert passes(path, expected, contract)
    assert padded
    assert missed == []


def test_structure_of_a_broken_graph_is_refused(tmp_path: Path) -> None:
    network = SubPixel()
    check_structure(saved(GOOD, network, tmp_path))
    path = saved(GOOD.replace("float[batch,3,h2,w2] output", "float[batch,5,h2,w2] output"), network, tmp_path)

    with pytest.raises(ExportError, match="not valid"):
        check_structure(path)


def graph_of(text: str) -> onnx_ir.Model:
    convolution = SubPixel().convolution if "unshuffled" not in text else nn.Conv2d(12, 8, 3, padding=1)
    return onnx_ir.serde.deserialize_model(model_of(text, convolution))


def test_canonical_graph_is_accepted() -> None:
    model = graph_of(GOOD)

    canonical_graph(model, name="good", pads_to_multiple=False)

    assert [node.name for node in model.graph] == ["Conv", "DepthToSpace"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SPELLED_OUT, "contains Reshape"),
        (FIXED_BATCH, "contains Shape"),
        (GOOD.replace("CRD", "DCR"), "another channel order"),
        (GOOD.replace("output", "result"), "other inputs and outputs"),
    ],
    ids=["spelled-out-shuffle", "computed-size", "dcr", "names"],
)
def test_other_forms_are_refused(text: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        canonical_graph(graph_of(text), name="bad", pads_to_multiple=False)


def test_channel_reordering_moves_into_the_weights() -> None:
    image = np.random.default_rng(2).random((2, 3, 6, 8), dtype=np.float32)
    convolution = nn.Conv2d(12, 8, 3, padding=1)
    model = onnx_ir.serde.deserialize_model(model_of(UNSHUFFLED, convolution))

    canonical_graph(model, name="unshuffled", pads_to_multiple=False)

    assert [node.op_type for node in model.graph] == ["SpaceToDepth", "Conv"]
    evaluator = onnx.reference.ReferenceEvaluator(onnx_ir.to_proto(model))
    with torch.inference_mode():
        expected = convolution(nn.functional.pixel_unshuffle(torch.from_numpy(image), 2)).numpy()
    outputs = list(evaluator.run(None, {"input": image}))
    np.testing.assert_allclose(np.asarray(outputs[0]), expected, atol=1e-6)
