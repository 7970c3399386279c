"""Small seeded networks as runners, for everything that stands between an engine and a picture."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from srdeploy.core.contract import ModelContract
from srdeploy.core.precision import Precision
from srdeploy.core.runner import Runner
from srdeploy.export.exporter import export_onnx
from srdeploy.models.checkpoint.load import Evidence, LoadedCheckpoint
from srdeploy.models.networks.rcan import RcanConfig
from srdeploy.models.networks.spec import NetworkConfig, network_of, spec_of
from srdeploy.models.networks.srdensenet import Deconvolution, SrDenseNetConfig
from srdeploy.runtime.engines.eager import open_eager

RunnerFactory = Callable[..., Runner]


def _rcan(**changes: object) -> RcanConfig:
    values: dict[str, object] = {
        "scale": 2, "groups": 2, "blocks": 2, "features": 8, "attention_width": 2, "upsampler": (2,),
        "value_range": 1.0, "mean_shift": "none",
    }  # fmt: skip
    return RcanConfig(**(values | changes))  # type: ignore[arg-type]


def _srdensenet(**changes: object) -> SrDenseNetConfig:
    values: dict[str, object] = {
        "growth": 4, "layers": 2, "blocks": 2, "low_level": 8, "bottleneck": 16, "upsampled": 16
    }  # fmt: skip
    return SrDenseNetConfig(**(values | changes))  # type: ignore[arg-type]


NETWORKS: dict[str, NetworkConfig] = {
    "rcan": _rcan(),
    "rcan x3": _rcan(scale=3, upsampler=(3,)),
    "rcan unshuffled": _rcan(unshuffle=2, upsampler=(2, 2)),
    "rcan on 255 with mean shift": _rcan(value_range=255.0, mean_shift="matrix"),
    "srdensenet all": _srdensenet(),
    "srdensenet h": _srdensenet(block_input="previous", reconstruction_input="last"),
    "srdensenet hl": _srdensenet(block_input="previous", reconstruction_input="low_and_last"),
    "srdensenet batchnorm": _srdensenet(reactivate_concatenations=True, normalisation="block_input"),
    "srdensenet rgb": _srdensenet(channels=3),
    "srdensenet trimmed": _srdensenet(deconvolutions=(Deconvolution(3, 2, 1, 0),) * 2),
}


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., LoadedCheckpoint]:
    """Return a function from a name in NETWORKS to a checkpoint with seeded weights and picture-like output."""

    def make(name: str, seed: int = 0) -> LoadedCheckpoint:
        config = NETWORKS[name]
        torch.manual_seed(seed)
        network = network_of(config).eval()
        with torch.no_grad():
            for key, parameter in network.named_parameters():
                if key.endswith("last.bias"):
                    parameter.fill_(0.5 * config.value_range)  # mid-gray, so that clamping flattens nothing
        evidence = Evidence("test", "test network", "seeded weights", "none", (), {}, ())
        return LoadedCheckpoint(Path("seeded.pth"), f"{seed:064d}", "test", config, spec_of(config), network, evidence)

    return make


@pytest.fixture(scope="session")
def make_runner(make_checkpoint: Callable[..., LoadedCheckpoint]) -> RunnerFactory:
    """Return a function from a name in NETWORKS to an eager runner."""

    def make(name: str, seed: int = 0) -> Runner:
        return open_eager(make_checkpoint(name, seed), threads=1)

    return make


@pytest.fixture(scope="session")
def rcan_onnx(make_checkpoint: Callable[..., LoadedCheckpoint], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the compact RCAN once."""
    path = tmp_path_factory.mktemp("rcan") / "rcan.onnx"
    export_onnx(make_checkpoint("rcan"), path)
    return path


@pytest.fixture(scope="session")
def nearest_onnx(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes a network which repeats pixels: what goes in is known to come out."""
    folder = tmp_path_factory.mktemp("nearest")

    def make(scale: int = 2, channels: int = 3, poison: float | None = None) -> Path:
        """`poison`: pixels of this value turn into NaN, as an overflow in half precision does."""
        path = folder / f"nearest_x{scale}_{channels}_{poison}.onnx"
        if not path.exists():
            onnx.save(_nearest(scale, channels, poison), path)
        return path

    return make


def _nearest(scale: int, channels: int, poison: float | None) -> onnx.ModelProto:
    weights = np.zeros((channels * scale**2, channels, 1, 1), np.float32)
    for channel in range(channels):
        weights[channel * scale**2 : (channel + 1) * scale**2, channel] = 1
    constants = [numpy_helper.from_array(weights, "weights")]
    nodes = []
    source = "input"
    if poison is not None:
        # x + 0 / (x - poison): the second term is NaN where x is the poison, and 0 elsewhere.
        constants += [
            numpy_helper.from_array(np.float32(poison), "poison"),
            numpy_helper.from_array(np.float32(0), "zero"),
        ]
        nodes = [
            helper.make_node("Sub", ["input", "poison"], ["distance"]),
            helper.make_node("Mul", ["distance", "zero"], ["nothing"]),
            helper.make_node("Div", ["nothing", "distance"], ["nan_there"]),
            helper.make_node("Add", ["input", "nan_there"], ["poisoned"]),
        ]
        source = "poisoned"
    nodes += [
        helper.make_node("Conv", [source, "weights"], ["repeated"]),
        helper.make_node("DepthToSpace", ["repeated"], ["output"], blocksize=scale, mode="CRD"),
    ]
    graph = helper.make_graph(
        nodes,
        "nearest",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", channels, "h", "w"])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", channels, "h2", "w2"])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    contract = ModelContract(
        architecture="srdensenet",
        configuration={},
        scale=scale,
        colours="rgb" if channels == 3 else "y",
        precision=Precision.FP32,
        receptive_radius=0,
        macs_per_pixel=1.0,
        largest_tensor_per_pixel=channels * scale**2,
        checkpoint_sha256="0" * 64,
    )
    helper.set_model_props(model, contract.to_metadata())
    onnx.checker.check_model(model)
    return model


@pytest.fixture(scope="session")
def picture() -> Callable[..., NDArray[np.uint8]]:
    """Return a function that draws a smooth picture with edges: (height, width[, channels]) uint8."""

    def draw(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
        rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
        planes = []
        for channel in range(channels):
            wave = np.sin(rows / (5 + channel) + seed) + np.cos(columns / (7 - channel) + seed)
            disc = (rows - height / 3) ** 2 + (columns - width / 2) ** 2 < (min(height, width) / 4) ** 2
            planes.append(120 + 40 * wave + 40 * disc)
        return np.clip(np.stack(planes, axis=2), 0, 255).astype(np.uint8)

    return draw
