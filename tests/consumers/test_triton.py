"""A packaged bundle on a real Triton server: the one in the wheel of pytriton, which has the Python backend only."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from consumers.conftest import ROOT, Run, runner
from numpy.typing import NDArray
from PIL import Image

from srdeploy.cli.main import run
from srdeploy.core.imaging.read import read_image
from srdeploy.core.manifest import Source
from srdeploy.core.onnx_file import read_graph
from srdeploy.core.ort import cpu_session
from srdeploy.core.precision import Precision
from srdeploy.runtime.bundle import BundleEngine, write_bundle_manifest
from srdeploy.runtime.engines.registry import build_engine, open_engine
from srdeploy.upscale.upscaler import Upscaler

HERE = Path(__file__).parent
ENVIRONMENT = ROOT / "build" / "consumers" / "triton"

Ask = Callable[..., "dict[str, NDArray[Any]]"]


@pytest.fixture(scope="module")
def triton() -> Run:
    """Run a program of the environment of Triton."""
    return runner("triton")


@pytest.fixture(scope="module")
def bundle(triton: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a small RCAN x2 with FP32 engines for OpenVINO and ONNX Runtime, both portable here."""
    folder = tmp_path_factory.mktemp("serving") / "net.srd"
    (folder / "engines").mkdir(parents=True)
    checkpoint = ROOT / "tests" / "data" / "checkpoints" / "yulunzhang_rcan_x2" / "RCAN_BIX2.pt"
    assert run(["export", str(checkpoint), "-o", str(folder / "model.fp32.onnx")]) == 0
    engines = []
    for family, file in (("onnxruntime", "engines/ort.ort.onnx"), ("openvino", "engines/ov.blob")):
        build_engine(folder / "model.fp32.onnx", folder / file, engine=family)
        engines.append(BundleEngine(file, family, Precision.FP32, verified=True))
    contract = read_graph(folder / "model.fp32.onnx").contract
    source = Source.of("checkpoint", checkpoint)
    details = {"bench_shape": "1x3x24x32"}
    write_bundle_manifest(folder, contract=contract, checkpoint=source, engines=engines, details=details)
    return folder


@pytest.fixture(scope="module")
def repository(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged bundle, with its ONNX Runtime model twice more for the backend that there is.

    "planes" is that model, and "levels" its graph with uint8 in and out.
    """
    output = tmp_path_factory.mktemp("repository") / "models"
    assert run(["package", str(bundle), "--triton", str(output)]) == 0
    for name, kind in (("planes", "TYPE_FP32"), ("levels", "TYPE_UINT8")):
        shutil.copytree(output / "net_onnxruntime_fp32", output / name)
        config = (output / name / "config.pbtxt").read_text()
        for old, new in (
            ("net_onnxruntime_fp32", name),
            ('backend: "onnxruntime"', 'backend: "python"'),
            ('default_model_filename: "model.onnx"', ""),
            ("TYPE_FP32", kind),
        ):
            config = config.replace(old, new)
        (output / name / "config.pbtxt").write_text(config)
        shutil.copy(HERE / "triton_planes.py", output / name / "1" / "model.py")
    graph = str(output / "levels" / "1" / "model.onnx")
    assert run(["export", str(bundle / "model.fp32.onnx"), "--io", "uint8", "-o", graph, "--force"]) == 0
    return output


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start the server on free ports of this machine; return its addresses for "http" and "grpc"."""
    folder = tmp_path_factory.mktemp("server")
    ports = {name: _free_port() for name in ("http", "grpc")}
    command = [
        _server_files() / "bin" / "tritonserver",
        f"--model-repository={repository}",
        f"--backend-directory={_backends(folder)}",
        "--backend-config=python,shm-default-byte-size=1048576",
        "--model-control-mode=explicit",
        "--load-model=net_pictures",
        "--load-model=planes",
        "--load-model=levels",
        "--disable-auto-complete-config",  # the configurations have to be complete
        "--exit-timeout-secs=3",
        "--allow-metrics=false",
        *(
            f"--{name}-{key}={value}"
            for name in ports
            for key, value in (("port", ports[name]), ("address", "127.0.0.1"))
        ),
    ]
    environment = os.environ | {
        "PATH": f"{_python(folder)}{os.pathsep}{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{_packages() / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}",
        "OMP_NUM_THREADS": "1",
    }
    log = folder / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
    try:
        _wait(f"http://127.0.0.1:{ports['http']}/v2/health/ready", process, log)
        yield {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def ask(triton: Run, server: dict[str, str], tmp_path: Path) -> Ask:
    """Send named arrays to a model with Triton's own client; an error of the server is a RuntimeError."""

    def request(model: str, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        np.savez(tmp_path / "in.npz", **inputs)  # type: ignore[arg-type]
        files = [tmp_path / "in.npz", tmp_path / "out.npz"]
        done = triton("python", HERE / "triton_request.py", server["grpc"], model, *files)
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        with np.load(tmp_path / "out.npz") as answer:
            return dict(answer)

    return request


def _packages() -> Path:
    return next(ENVIRONMENT.glob("lib/python*/site-packages"))


def _server_files() -> Path:
    return _packages() / "pytriton" / "tritonserver"


def _backends(folder: Path) -> Path:
    """Return a folder of backends, with the stub of the Python backend for this version of Python."""
    shutil.copytree(_server_files() / "backends", folder / "backends")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = folder / "backends" / "python" / "triton_python_backend_stub"
    shutil.copy(_server_files() / "python_backend_stubs" / version / stub.name, stub)
    for program in (stub, _server_files() / "bin" / "tritonserver"):
        program.chmod(program.stat().st_mode | 0o111)
    return folder / "backends"


def _python(folder: Path) -> Path:
    """Return the programs of an environment with our packages, and the NumPy of the backend."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "python"], check=True)
    packages = next((folder / "python").glob("lib/python*/site-packages"))
    for name in ("numpy", "numpy.libs"):
        (packages / name).symlink_to(_packages() / name)
    ours = sysconfig.get_path("purelib")
    (packages / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    return folder / "python" / "bin"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(address: str, process: "subprocess.Popen[bytes]", log: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"the server is not ready: {log.read_text(errors='replace')[-2000:]}")


def test_every_configuration_is_read_by_tritons_own_protobuf(triton: Run, repository: Path, tmp_path: Path) -> None:
    files = sorted(repository.glob("net_*/config.pbtxt"))
    misspelt = tmp_path / "config.pbtxt"
    misspelt.write_text(files[0].read_text().replace("dynamic_batching", "dynamic_batch"))

    done = triton("python", HERE / "triton_config.py", *files)

    onnxruntime, openvino, pictures = (json.loads(line) for line in done.stdout.splitlines())
    assert (onnxruntime["backend"], onnxruntime["max_batch_size"], onnxruntime["dynamic_batching"]) == (
        "onnxruntime",
        8,
        {},
    )
    assert onnxruntime["input"][0]["dims"] == ["3", "-1", "-1"]
    assert onnxruntime["model_warmup"][0]["inputs"]["input"]["dims"] == ["3", "24", "32"]
    assert openvino["input"][0]["dims"] == ["-1", "3", "-1", "-1"]
    assert "max_batch_size" not in openvino  # 0
    assert [entry["optional"] for entry in pictures["input"]] == [True, True]
    refused = triton("python", HERE / "triton_config.py", misspelt)
    assert refused.returncode != 0
    assert 'no field named "dynamic_batch"' in refused.stderr


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_server_reads_the_configurations_of_backends_that_it_lacks(backend: str, server: dict[str, str]) -> None:
    address = f"http://{server['http']}/v2/repository/models/net_{backend}_fp32/load"

    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(address, data=b"", timeout=30)

    # The configuration is read and checked before the backend's library is looked for.
    with error.value as answer:
        assert f"unable to find backend library for backend '{backend}'" in answer.read().decode()


@pytest.mark.parametrize("shape", [(1, 24, 32, 3), (2, 37, 51, 3), (3, 20, 18, 4)], ids=str)
def test_pictures_come_back_as_the_upscaler_writes_them(shape: tuple[int, ...], ask: Ask, bundle: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    answer = ask("net_pictures", pixels=pictures)["upscaled_pixels"]

    with Upscaler.open(bundle, threads=1) as up:
        expected = np.stack([up(picture) for picture in pictures])
    assert answer.dtype == np.uint8
    assert (answer == expected).all()


def test_an_encoded_picture_keeps_its_format(ask: Ask, bundle: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (21, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")

    answer = ask("net_pictures", encoded=np.frombuffer(file.getvalue(), np.uint8))["upscaled_encoded"]

    (tmp_path / "answer").write_bytes(answer.tobytes())
    with Image.open(tmp_path / "answer") as image:
        assert image.format == "PNG"
    with Upscaler.open(bundle, threads=1) as up:
        assert (read_image(tmp_path / "answer").pixels == up(pixels)).all()


@pytest.mark.parametrize("shape", [(1, 3, 24, 32), (2, 3, 37, 51), (5, 3, 16, 20)], ids=str)
def test_planes_through_the_packaged_configuration_are_those_of_the_engine(
    shape: tuple[int, ...], ask: Ask, repository: Path
) -> None:
    planes = np.random.default_rng(0).random(shape, np.float32)

    answer = ask("planes", input=planes)["output"]

    graph = repository / "net_onnxruntime_fp32" / "1" / "model.onnx"
    expected = cpu_session(graph, threads=1).run(["output"], {"input": planes})[0]
    assert np.abs(answer - expected).max() == 0
    # Our engines rewrite the network's end, which adds the same numbers in another order.
    with open_engine(graph, threads=1) as engine:
        assert np.abs(answer - engine.run({"input": planes})["output"]).max() <= 1e-5


def test_a_graph_of_uint8_is_served_with_the_same_configuration(ask: Ask, bundle: Path) -> None:
    picture = np.random.default_rng(2).integers(0, 256, (19, 27, 3), dtype=np.uint8)

    answer = ask("levels", input=picture.transpose(2, 0, 1)[None].copy())["output"]

    with Upscaler.open(bundle / "model.fp32.onnx", threads=1) as up:
        assert (answer[0].transpose(1, 2, 0) == up(picture)).all()


@pytest.mark.parametrize(
    ("model", "inputs", "line"),
    [
        ("planes", {"input": np.zeros((1, 4, 16, 16), np.float32)}, "unexpected shape for input 'input'"),
        ("planes", {"input": np.zeros((9, 3, 16, 16), np.float32)}, "batch-size must be <= 8"),
        (
            "net_pictures",
            {"pixels": np.zeros((1, 8, 8, 5), np.uint8)},
            "expected (H, W) or (H, W, C) with C from 1 to 4",
        ),
        ("net_pictures", {"encoded": np.zeros(40, np.uint8)}, "the picture is"),
        ("net_openvino_fp32", {"input": np.zeros((1, 3, 8, 8), np.float32)}, "unknown model"),
    ],
    ids=["channels", "batch", "channels of pictures", "no picture", "not loaded"],
)
def test_wrong_requests_are_refused_with_one_line(
    model: str, inputs: dict[str, NDArray[Any]], line: str, ask: Ask
) -> None:
    with pytest.raises(RuntimeError) as error:
        ask(model, **inputs)

    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert "srdeploy-triton" not in str(error.value)
