"""Shared fixtures. Tests make their own small networks and images; reference data is optional."""

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, settings
from onnx import TensorProto, helper, numpy_helper

from srdeploy.core.contract import ModelContract
from srdeploy.core.precision import Precision

# Shells start background jobs with Ctrl-C ignored, and children inherit that; the tests about Ctrl-C need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

DATA = Path(__file__).parent / "data"
_TORCH_SEED = 67280421310721
"""What PyTorch begins with, so that it makes no difference whether a test is the first to import it."""

# The same examples every time, and no limit on their time: a test that fails does so on every machine, at every run.
# `pytest --hypothesis-profile=default` looks for others.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """Folder of reference data that may not be redistributed (Set5, photographs, public-format checkpoints).

    It is named by the environment variable SRDEPLOY_REFERENCE_DATA; without it these tests are skipped.
    """
    folder = os.environ.get("SRDEPLOY_REFERENCE_DATA")
    if not folder:
        pytest.skip("SRDEPLOY_REFERENCE_DATA names no folder of reference data (Set5 and photographs)")
    return Path(folder)


GraphFactory = Callable[..., Path]


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Begin every test with the same random numbers, whichever tests the process has run before."""
    random.seed(0)
    np.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.default_generator.manual_seed(_TORCH_SEED)


@pytest.fixture(autouse=True)
def _own_engine_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test's engine cache to itself."""
    monkeypatch.setenv("SRDEPLOY_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def small_onnx(tmp_path: Path) -> GraphFactory:
    """Return a function that writes a x2 network of three convolutions as ONNX.

    Its arguments: file name; `dtype` of the inner layers (numpy name, "bfloat16" too); `upsampler` "shuffle" or
    "deconvolution"; `quantized` "inputs" puts Q/DQ pairs on what the inner convolution takes, "both" also on what it
    gives; `odd_layer` is the numpy name of another type for the inner convolution.
    """

    def make(
        name: str = "small.onnx",
        *,
        dtype: str = "float32",
        upsampler: str = "shuffle",
        quantized: str | bool = False,
        odd_layer: str | None = None,
        features: int = 16,
        opset: int = 22,
        seed: int = 0,
    ) -> Path:
        path = tmp_path / name
        precision = Precision.INT8 if quantized else _PRECISIONS[dtype]
        model = _model(_Layers(dtype, seed), upsampler, quantized, odd_layer, features, opset)
        helper.set_model_props(model, contract(precision).to_metadata())
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small tmpfs cannot be mounted here: that needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


_PRECISIONS = {"float32": Precision.FP32, "float16": Precision.FP16, "bfloat16": Precision.BF16}
_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def contract(precision: Precision) -> ModelContract:
    return ModelContract(
        architecture="srdensenet",
        configuration={"note": "three layers, random weights"},
        scale=2,
        colours="rgb",
        precision=precision,
        receptive_radius=3,
        macs_per_pixel=3 * 16 * 9,
        largest_tensor_per_pixel=16,
        checkpoint_sha256="0" * 64,
    )


class _Layers:
    """Collects nodes and weights."""

    def __init__(self, dtype: str, seed: int) -> None:
        self.dtype = dtype
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"node_{output}", **attributes))
        return output

    def constant(self, name: str, value: np.ndarray, dtype: str | None = None) -> str:
        kind = dtype or self.dtype
        if kind == "bfloat16":
            tensor = helper.make_tensor(name, TensorProto.BFLOAT16, value.shape, value.astype(np.float32).ravel())
        else:
            tensor = numpy_helper.from_array(value.astype(kind), name)
        self.weights.append(tensor)
        return name

    def random_weights(self, name: str, shape: tuple[int, ...], dtype: str | None = None) -> str:
        scale = 0.7 / np.sqrt(np.prod(shape[1:]))
        return self.constant(name, self.random.standard_normal(shape) * scale, dtype)


def _model(
    layers: _Layers, upsampler: str, quantized: str | bool, odd_layer: str | None, features: int, opset: int
) -> onnx.ModelProto:
    inner = _TYPES[layers.dtype]
    image = layers.add("Cast", ["input"], "cast_in", to=inner) if inner != TensorProto.FLOAT else "input"
    weights = layers.random_weights("w_head", (features, 3, 3, 3))
    head = layers.add("Relu", [layers.add("Conv", [image, weights], "head", pads=[1] * 4)], "head_relu")
    body = layers.add("Relu", [_body(layers, head, features, quantized, odd_layer)], "body_relu")
    if quantized == "both":
        layers.add("QuantizeLinear", [body, layers.constant("y_scale", np.array(0.02)), "x_zero"], "y_q")
        body = layers.add("DequantizeLinear", ["y_q", "y_scale", "x_zero"], "y_dq")
    if upsampler == "shuffle":
        tail = layers.add("Conv", [body, layers.random_weights("w_tail", (12, features, 3, 3))], "tail", pads=[1] * 4)
        last = layers.add("DepthToSpace", [tail], "up", blocksize=2, mode="CRD")
    else:
        last = layers.add(
            "ConvTranspose", [body, layers.random_weights("w_up", (features, 3, 3, 3))], "up",
            strides=[2, 2], pads=[1] * 4, output_padding=[1, 1],
        )  # fmt: skip
    layers.add("Cast", [last], "output", to=TensorProto.FLOAT) if inner != TensorProto.FLOAT else layers.add(
        "Identity", [last], "output"
    )
    graph = helper.make_graph(
        layers.nodes,
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 3, "height2", "width2"])],
        layers.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def _body(layers: _Layers, source: str, features: int, quantized: str | bool, odd_layer: str | None) -> str:
    shape = (features, features, 3, 3)
    if quantized:
        layers.constant("x_scale", np.array(0.02))
        layers.constant("x_zero", np.array(0), "uint8")
        layers.add("QuantizeLinear", [source, "x_scale", "x_zero"], "x_q")
        source = layers.add("DequantizeLinear", ["x_q", "x_scale", "x_zero"], "x_dq")
        layers.constant("w_scale", np.full(features, 0.004))
        layers.constant("w_zero", np.zeros(features), "int8")
        layers.constant("w_body_q", layers.random.integers(-40, 40, shape), "int8")
        weights = layers.add("DequantizeLinear", ["w_body_q", "w_scale", "w_zero"], "w_body", axis=0)
        return layers.add("Conv", [source, weights], "body", pads=[1] * 4)
    if odd_layer is None:
        return layers.add("Conv", [source, layers.random_weights("w_body", shape)], "body", pads=[1] * 4)
    up = layers.add("Cast", [source], "odd_in", to=_TYPES[odd_layer])
    odd = layers.add("Conv", [up, layers.random_weights("w_body", shape, odd_layer)], "odd", pads=[1] * 4)
    return layers.add("Cast", [odd], "body", to=_TYPES[layers.dtype])
