"""Workers of a cluster without the cluster: what they open, what they refuse, how models travel."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from srdeploy.cli.main import run
from srdeploy.core.errors import CapabilityError, InputError, MissingExtraError, SrdeployError, UsageError
from srdeploy.core.manifest import Source
from srdeploy.runtime.bundle import write_bundle_manifest
from srdeploy.upscale.folders import refuse_mixed_engines
from srdeploy.upscale.scale import cluster
from srdeploy.upscale.scale.cluster import Share, check_same_engine, check_versions, share_of
from srdeploy.upscale.scale.model_package import check_model, model_sha256, pack_model, unpack_model
from srdeploy.upscale.scale.worker import Opened, RemoteError, Worker, WorkerOptions


@pytest.fixture
def options(nearest_onnx: Callable[..., Path]) -> WorkerOptions:
    model = nearest_onnx()
    return WorkerOptions(model=model, model_sha256=model_sha256(model), threads=1)


def opened(options: WorkerOptions) -> Opened:
    found = Worker(options).open()
    assert isinstance(found, Opened)
    return found


def test_a_model_that_is_elsewhere_travels_once(options: WorkerOptions, tmp_path: Path) -> None:
    package = pack_model(options.model)
    elsewhere = replace(options, model=tmp_path / "nowhere" / options.model.name)

    assert Worker(elsewhere).open() is None
    assert isinstance(Worker(elsewhere).open(package), Opened)
    assert isinstance(Worker(elsewhere).open(), Opened)  # from the cache


def test_another_model_at_the_path_is_not_opened(options: WorkerOptions, rcan_onnx: Path) -> None:
    assert Worker(replace(options, model=rcan_onnx)).open() is None


def test_a_package_with_another_model_is_refused(options: WorkerOptions, rcan_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is another model"):
        unpack_model(pack_model(rcan_onnx), tmp_path / rcan_onnx.name, options.model_sha256)


def test_an_edited_bundle_is_refused_before_it_travels(
    options: WorkerOptions, rcan_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "a.srd"
    bundle.mkdir()
    model = bundle / "model.fp32.onnx"
    shutil.copy(options.model, model)
    checkpoint = Source("checkpoint", "a.pt", "0" * 64)
    write_bundle_manifest(bundle, contract=opened(options).contract, checkpoint=checkpoint, engines=())
    check_model(bundle)
    model.write_bytes(rcan_onnx.read_bytes())

    code = run(["upscale", str(bundle), str(tmp_path), "-o", str(tmp_path.parent / "out"), "--ray", "127.0.0.2:1"])

    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    assert code == 3
    assert len(errors) == 1
    assert "model.fp32.onnx has SHA-256" in errors[0]


def test_local_devices_with_other_engines_are_refused() -> None:
    refuse_mixed_engines({"cuda:0": "a", "cuda:1": "a"})
    with pytest.raises(CapabilityError, match="cuda:0 and cuda:1 run different engines"):
        refuse_mixed_engines({"cuda:0": "a", "cuda:1": "b"})


def test_folders_that_a_worker_does_not_see(options: WorkerOptions, tmp_path: Path) -> None:
    found = Worker(replace(options, visible=(tmp_path / "in",))).open()

    assert isinstance(found, RemoteError)
    assert isinstance(found.error(), CapabilityError)
    assert "folders that all machines of the cluster share" in found.line


@pytest.mark.parametrize(
    "error", [UsageError("a", expected="b"), InputError("a"), MissingExtraError("openvino", "cpu")]
)
def test_errors_keep_their_line_and_exit_code(error: SrdeployError) -> None:
    again = RemoteError.of(error).error()

    assert str(again) == str(error)
    assert again.exit_code == error.exit_code


def test_other_versions_are_refused(options: WorkerOptions) -> None:
    worker = opened(options)

    check_versions(worker)
    check_versions(replace(worker, versions={**worker.versions, "tensorrt": "1.0"}))  # not installed here
    with pytest.raises(CapabilityError, match=r"runs numpy 1\.0, and this machine 2\..*same versions"):
        check_versions(replace(worker, versions={**worker.versions, "numpy": "1.0"}))


@pytest.mark.parametrize(
    "change", [{"identity": "another"}, {"numeric_mode": "FP16"}, {"engine_versions": {"onnxruntime": "1.0"}}]
)
def test_other_engines_are_refused(options: WorkerOptions, change: dict[str, object]) -> None:
    worker = opened(options)

    check_same_engine(worker, worker)
    with pytest.raises(CapabilityError, match="one engine and precision everywhere.*--mixed-engines"):
        check_same_engine(worker, replace(worker, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("machines", "device", "threads", "share"),
    [
        ([(8.0, 0), (16.0, 0)], "auto", None, Share(3, 8, 0)),
        ([(8.0, 0), (16.0, 0)], "cpu", 4, Share(6, 4, 0)),
        ([(32.0, 4), (8.0, 0)], "auto", None, Share(4, 8, 1)),
        ([(2.0, 4)], "cuda", None, Share(4, 0, 1)),
        ([(32.0, 4), (8.0, 0)], "cpu", None, Share(5, 8, 0)),
        ([(0.0, 0), (8.0, 0)], "auto", None, Share(1, 8, 0)),
    ],
    ids=["CPUs", "threads", "GPUs", "more GPUs than CPUs", "CPU of GPU machines", "a head without CPUs"],
)
def test_share(machines: list[tuple[float, int]], device: str, threads: int | None, share: Share) -> None:
    assert share_of(machines, device, threads) == share


@pytest.mark.parametrize(
    ("machines", "device", "threads"), [([(8.0, 0)], "cuda", None), ([(8.0, 0)], "cpu", 9), ([], "auto", None)]
)
def test_what_the_cluster_lacks(machines: list[tuple[float, int]], device: str, threads: int | None) -> None:
    with pytest.raises(CapabilityError, match="cluster"):
        share_of(machines, device, threads)


def test_a_cluster_of_another_version_is_one_line() -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'srdeploy[ray]'")
    from ray._private.utils import check_version_info

    with pytest.raises(RuntimeError) as error:
        check_version_info({"ray_version": "2.50.0", "python_version": "3.10.1"}, "node")
    line, step = cluster._why_not_connected("10.0.0.1:6379", error.value), cluster._next_step(error.value)

    assert line.startswith("the cluster at 10.0.0.1:6379 runs Ray: 2.50.0, Python: 3.10.1 and this command Ray: ")
    assert step == "install the same versions on all machines"
