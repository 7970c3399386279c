"""Tiny networks as ONNX graphs, and small pictures, both made from seeds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from srdeploy.calibration.images.dataset import CalibrationSet, make_calibration_set
from srdeploy.core.contract import ModelContract
from srdeploy.core.precision import Precision

OPSET = 20


class NetworkWriter:
    """Writes a small network node by node; every method returns the name of the tensor it made."""

    def __init__(self, seed: int = 0, gain: float = 1.0) -> None:
        self.random = np.random.default_rng(seed)
        self.gain = gain
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, values: NDArray[np.generic]) -> str:
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def node(self, op: str, inputs: list[str], **attributes: object) -> str:
        output = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"node_{output}", **attributes))
        return output

    def conv(self, name: str, x: str, inputs: int, outputs: int, kernel: int = 3) -> str:
        scale = self.gain / np.sqrt(inputs * kernel * kernel)
        weights = self.random.normal(0, scale, (outputs, inputs, kernel, kernel)).astype(np.float32)
        bias = self.random.normal(0, 0.05, outputs).astype(np.float32)
        names = [x, self.constant(f"{name}.weight", weights), self.constant(f"{name}.bias", bias)]
        return self.node("Conv", names, kernel_shape=[kernel, kernel], pads=[kernel // 2] * 4)

    def deconv(self, name: str, x: str, channels: int) -> str:
        weights = self.random.normal(0, 1 / np.sqrt(channels * 2.25), (channels, channels, 3, 3)).astype(np.float32)
        bias = self.random.normal(0, 0.05, channels).astype(np.float32)
        names = [x, self.constant(f"{name}.weight", weights), self.constant(f"{name}.bias", bias)]
        sizes = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]}
        return self.node("ConvTranspose", names, **sizes)

    def model(self, output: str, contract: ModelContract) -> onnx.ModelProto:
        self.nodes[-1].output[:] = ["output"] if self.nodes[-1].output[0] == output else self.nodes[-1].output
        shape = ["n", contract.channels, "h", "w"]
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", contract.channels, "H", "W"])],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
        for key, value in contract.to_metadata().items():
            entry = model.metadata_props.add()
            entry.key, entry.value = key, value
        onnx.checker.check_model(model)
        return model


def contract_of(architecture: str, colours: str, scale: int) -> ModelContract:
    return ModelContract(
        architecture=architecture,
        configuration={},
        scale=scale,
        colours=colours,  # type: ignore[arg-type]
        precision=Precision.FP32,
        receptive_radius=None,
        macs_per_pixel=1.0,
        largest_tensor_per_pixel=64,
        checkpoint_sha256="0" * 64,
    )


def dense_network(seed: int = 0) -> onnx.ModelProto:
    """SRDenseNet in small: two blocks of concatenations, a bottleneck, one deconvolution (x2), one channel."""
    net = NetworkWriter(seed, gain=1.4)
    x = net.node("Relu", [net.conv("head", "input", 1, 16)])
    channels = 16
    for block in range(2):
        for layer in range(2):
            new = net.node("Relu", [net.conv(f"blocks.{block}.{layer}", x, channels, 8)])
            x = net.node("Concat", [x, new], axis=1)
            channels += 8
    x = net.node("Relu", [net.conv("bottleneck", x, channels, 16, kernel=1)])
    x = net.node("Relu", [net.deconv("deconv", x, 16)])
    return net.model(net.conv("tail", x, 16, 1), contract_of("srdensenet", "y", 2))


def residual_network(seed: int = 0, features: int = 16) -> onnx.ModelProto:
    """RCAN in small: one group of two blocks with channel attention, a pixel shuffle (x2), RGB."""
    net = NetworkWriter(seed)
    head = x = net.conv("head", "input", 3, features)
    axes = net.constant("axes", np.array([2, 3], dtype=np.int64))
    for block in range(2):
        y = net.node("Relu", [net.conv(f"body.{block}.0", x, features, features)])
        y = net.conv(f"body.{block}.2", y, features, features)
        gate = net.node("ReduceMean", [y, axes], keepdims=1)
        gate = net.node("Relu", [net.conv(f"body.{block}.gate.0", gate, features, 4, kernel=1)])
        gate = net.node("Sigmoid", [net.conv(f"body.{block}.gate.2", gate, 4, features, kernel=1)])
        x = net.node("Add", [net.node("Mul", [y, gate]), x])
    x = net.node("Add", [net.conv("body.end", x, features, features), head])
    x = net.node("DepthToSpace", [net.conv("up", x, features, 4 * features)], blocksize=2, mode="CRD")
    return net.model(net.conv("tail", x, features, 3), contract_of("rcan", "rgb", 2))


NETWORKS: dict[str, Callable[..., onnx.ModelProto]] = {"dense": dense_network, "residual": residual_network}


def picture(seed: int, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """A picture with soft gradients, hard edges and saturated patches."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    pixels = (
        np.stack([np.sin(random.uniform(2, 9) * x + random.uniform(2, 9) * y) for _ in range(3)], axis=2) * 0.4 + 0.5
    )
    for _ in range(6):
        top, left = random.integers(0, height - 8), random.integers(0, width - 8)
        pixels[top : top + 8, left : left + 8] = random.integers(0, 2, 3)
    return np.clip(pixels * 255, 0, 255).round().astype(np.uint8)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six small pictures."""
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(6):
        Image.fromarray(picture(seed)).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="session")
def contracts() -> dict[str, ModelContract]:
    """The contracts of the tiny networks."""
    return {"dense": contract_of("srdensenet", "y", 2), "residual": contract_of("rcan", "rgb", 2)}


@pytest.fixture(scope="session")
def networks() -> dict[str, Callable[..., onnx.ModelProto]]:
    """Functions that make the tiny networks; "residual" takes its number of `features`."""
    return dict(NETWORKS)


@pytest.fixture(scope="session")
def paint() -> Callable[..., NDArray[np.uint8]]:
    """The function that paints pictures: paint(seed, height, width) -> (H, W, 3) uint8."""
    return picture


@pytest.fixture(scope="session")
def network_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny networks as ONNX files."""
    folder = tmp_path_factory.mktemp("networks")
    paths = {}
    for name, make in NETWORKS.items():
        paths[name] = folder / f"{name}.onnx"
        onnx.save(make(), paths[name])
    return paths


@pytest.fixture(scope="session")
def calibrations(photos: Path, contracts: dict[str, ModelContract]) -> dict[str, CalibrationSet]:
    """A small calibration set for each of the networks."""
    return {
        name: make_calibration_set(photos, contract=contract, hr=True, count=8, crop=16, whole=1)
        for name, contract in contracts.items()
    }


@pytest.fixture(scope="session")
def nine_pictures(contracts: dict[str, ModelContract], tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    """A calibration set for the dense network with enough images for a test set."""
    folder = tmp_path_factory.mktemp("nine")
    for seed in range(9):
        Image.fromarray(picture(seed)).save(folder / f"{seed}.png")
    return make_calibration_set(folder, contract=contracts["dense"], hr=True, count=8, crop=16, whole=1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep search journals out of the user's cache, and apart from those of other tests."""
    monkeypatch.setenv("SRDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
