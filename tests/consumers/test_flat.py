"""`package --flat`: files that the packages of chaiNNer's ONNX nodes load, with the values of the bundle's graphs."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from consumers.conftest import Run
from numpy.typing import NDArray

from srdeploy.cli.main import run
from srdeploy.core.imaging.psnr import psnr_db
from srdeploy.core.manifest import Source
from srdeploy.core.onnx_file import read_graph
from srdeploy.runtime.bundle import write_bundle_manifest
from srdeploy.runtime.engines.registry import open_engine
from srdeploy.upscale.upscaler import Upscaler

HERE = Path(__file__).parent


@pytest.fixture
def bundle(graphs: dict[str, Path], tmp_path: Path) -> Path:
    return bundle_of(tmp_path / "net.srd", {"fp32": graphs["fp32"], "fp16": graphs["fp16"]})


def bundle_of(folder: Path, graphs: dict[str, Path]) -> Path:
    folder.mkdir()
    for precision, path in graphs.items():
        shutil.copy(path, folder / f"model.{precision}.onnx")
    contract = read_graph(folder / "model.fp32.onnx").contract
    write_bundle_manifest(folder, contract=contract, checkpoint=Source("checkpoint", "a.pt", "0" * 64), engines=[])
    return folder


def computed(path: Path, planes: NDArray[np.float32]) -> NDArray[np.float32]:
    with open_engine(path, engine="onnxruntime", threads=1) as engine:
        return np.array(engine.run({"input": planes})["output"])


def test_the_values_are_those_of_the_graphs_and_opset_17_is_enough(
    bundle: Path, tmp_path: Path, picture: NDArray[np.float32]
) -> None:
    planes = picture.transpose(2, 0, 1)[None]

    assert run(["package", str(bundle), "--flat", str(tmp_path / "flat"), "--name", "Photo"]) == 0

    assert sorted(path.name for path in (tmp_path / "flat").glob("*.onnx")) == [
        "2x_Photo_fp16.onnx",
        "2x_Photo_fp32.onnx",
    ]
    for precision in ("fp32", "fp16"):
        flat = tmp_path / "flat" / f"2x_Photo_{precision}.onnx"
        model = onnx.load(flat)
        assert (model.opset_import[0].version, model.ir_version) == (17, 8)
        np.testing.assert_array_equal(computed(flat, planes), computed(bundle / f"model.{precision}.onnx", planes))


def test_chainners_packages_refuse_the_bundles_graph_and_load_the_flat_ones(
    chainner: Run, bundle: Path, tmp_path: Path, picture: NDArray[np.float32]
) -> None:
    planes = np.ascontiguousarray(picture.transpose(2, 0, 1)[None])
    np.save(tmp_path / "in.npy", planes)
    assert run(["package", str(bundle), "--flat", str(tmp_path / "flat")]) == 0

    refused = chainner(
        "python", HERE / "chainner_load.py", bundle / "model.fp32.onnx", tmp_path / "in.npy", tmp_path / "out.npy"
    )
    assert "Unsupported model IR version" in refused.stderr, "the reason for --flat"

    for precision in ("fp32", "fp16"):
        flat = tmp_path / "flat" / f"2x_net_{precision}.onnx"
        done = chainner("python", HERE / "chainner_load.py", flat, tmp_path / "in.npy", tmp_path / "out.npy")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"channels": 3, "scale": 2, "type": "tensor(float)"}
        assert psnr_db(np.load(tmp_path / "out.npy"), computed(flat, planes)) > 110


def test_a_network_of_one_channel_is_wrapped_in_rgb(
    chainner: Run,
    graphs: dict[str, Path],
    tmp_path: Path,
    picture: NDArray[np.float32],
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = bundle_of(tmp_path / "y.srd", {"fp32": graphs["y"]})
    with Upscaler.open(graphs["y"], engine="onnxruntime", threads=1) as up:
        expected = up(picture)

    assert run(["package", str(bundle), "--flat", str(tmp_path / "flat")]) == 0

    assert "the bundle has no FP16 graph" in capsys.readouterr().err
    np.save(tmp_path / "in.npy", np.ascontiguousarray(picture.transpose(2, 0, 1)[None]))
    done = chainner(
        "python",
        HERE / "chainner_load.py",
        tmp_path / "flat" / "4x_y_fp32.onnx",
        tmp_path / "in.npy",
        tmp_path / "out.npy",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scale"] == 4
    assert psnr_db(np.load(tmp_path / "out.npy")[0].transpose(1, 2, 0), expected) > 90


def test_an_edited_bundle_and_an_existing_folder_are_one_line(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["package", str(bundle), "--flat", str(tmp_path / "flat")]
    (tmp_path / "flat").mkdir()
    assert run(command) == 2
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "flat").rmdir()
    with (bundle / "model.fp16.onnx").open("ab") as stream:
        stream.write(b"\0")

    assert run(command) == 3

    assert "model.fp16.onnx" in capsys.readouterr().err
    assert not (tmp_path / "flat").exists()
