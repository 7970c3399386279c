"""Next steps of clusters: what is refused without one, and a Ray cluster that is started as the messages advise."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from next_steps.conftest import User
from next_steps.inventory import ROOT
from ray_cluster import Cluster, cluster

from srdeploy.core.errors import CapabilityError, InputError
from srdeploy.core.extras import is_installed
from srdeploy.core.progress import SILENT
from srdeploy.upscale.scale import cluster as driver
from srdeploy.upscale.scale import cluster_video
from srdeploy.upscale.scale.chunks import ATTEMPTS, Lost
from srdeploy.upscale.scale.cluster import Share, check_same_engine, check_versions, share_of
from srdeploy.upscale.scale.model_package import model_sha256, pack_model, unpack_model
from srdeploy.upscale.scale.segments import VideoJob, upscale_segment
from srdeploy.upscale.scale.worker import Opened, Worker, WorkerOptions, compared_versions
from srdeploy.upscale.upscaler import Upscaler

# A test that is skipped inside would miss its message; these skip it whole.
needs_ray = pytest.mark.skipif(not is_installed("ray"), reason="Ray is not installed: pip install 'srdeploy[ray]'")
needs_av = pytest.mark.skipif(not is_installed("av"), reason="PyAV is not installed: pip install 'srdeploy[video]'")
FOLDER = "upscale good.onnx photos -o out"


# ----------------------------------------------------------------------------------------------------------------------
# Without a cluster


@pytest.mark.parametrize(
    ("machines", "device", "threads", "more", "fewer"),
    [
        pytest.param(
            [(8.0, 0)], "cuda", None, (8.0, 1), ("cpu", None),
            id="GPU",
            marks=pytest.mark.advice(
                "upscale/scale/cluster.py:share_of", "pass --device cpu, or add machines with a GPU"
            ),
        ),
        pytest.param(
            [(8.0, 0)], "cpu", 9, (9.0, 0), ("cpu", 8),
            id="threads",
            marks=pytest.mark.advice("upscale/scale/cluster.py:share_of", "add machines, or pass fewer --threads"),
        ),
        pytest.param(
            [(0.0, 0)], "cpu", None, (2.0, 0), None,
            id="CPUs",
            marks=pytest.mark.advice("upscale/scale/cluster.py:share_of", "add machines with CPUs"),
        ),
    ],
)  # fmt: skip
def test_what_a_cluster_lacks(
    machines: list[tuple[float, int]],
    device: str,
    threads: int | None,
    more: tuple[float, int],
    fewer: tuple[str, int | None] | None,
) -> None:
    with pytest.raises(CapabilityError):
        share_of(machines, device, threads)
    assert share_of([*machines, more], device, threads).count == 1
    if fewer is not None:
        assert share_of(machines, *fewer) == Share(1, 8, 0)


def opened(model: str, **options: Any) -> Opened:
    path = Path(model).resolve()
    found = Worker(WorkerOptions(path, model_sha256(path), threads=1, **options)).open()
    assert isinstance(found, Opened)
    return found


@pytest.mark.advice("upscale/scale/cluster.py:check_versions", "as with pip install -c constraints.txt")
@pytest.mark.advice(
    "upscale/scale/cluster.py:check_same_engine", "choose with --engine and --precision, or pass --mixed-"
)
def test_workers_that_are_not_alike(user: User) -> None:
    """The constraints pin every package whose versions are compared; a test with a cluster passes --mixed-engines."""
    first = opened("good.onnx", engine="onnxruntime")
    with pytest.raises(CapabilityError):
        check_versions(replace(first, versions={**first.versions, "numpy": "1.0"}))
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    versions = {name: pinned[name] for name in compared_versions() if name not in ("python", "srdeploy")}
    assert versions == {name: first.versions[name] for name in versions}
    check_versions(first)

    with pytest.raises(CapabilityError):
        check_same_engine(first, opened("good.onnx", engine="openvino"))
    with pytest.raises(CapabilityError):
        check_same_engine(first, opened("fp16.onnx"))
    check_same_engine(first, opened("good.onnx", engine="onnxruntime"))


@pytest.mark.advice("upscale/scale/model_package.py:unpack_model", " there and run again")
def test_another_model_in_the_cache(user: User) -> None:
    """Where the machine does not see the model's own path."""
    made = Path("good.onnx").resolve()
    package, sha256 = pack_model(made), model_sha256(made)
    model = Path("elsewhere/good.onnx").resolve()
    copy = unpack_model(package, model, sha256)
    shutil.copy("fp16.onnx", copy)

    with pytest.raises(InputError) as caught:
        unpack_model(package, model, sha256)
    folder = re.search(r"remove (\S+) there", str(caught.value))
    assert folder is not None
    shutil.rmtree(folder[1])
    assert unpack_model(package, model, sha256).read_bytes() == made.read_bytes()


@needs_av
@pytest.mark.parametrize(
    "dies",
    [
        pytest.param(
            True,
            id="workers die",
            marks=pytest.mark.advice(
                "upscale/scale/cluster_video.py:_Driver._take", "finished segments are kept; the same command resumes"
            ),
        ),
        pytest.param(
            False,
            id="a segment is missing",
            marks=pytest.mark.advice("upscale/scale/cluster_video.py:_Driver._finished", "upscale it without --ray"),
        ),
    ],
)
def test_segments_that_fail(user: User, monkeypatch: pytest.MonkeyPatch, dies: bool) -> None:
    """The driver's own bookkeeping; the run that takes up its segments is a whole one."""
    from clips import Clips

    from srdeploy.upscale.video.plan import VideoOptions, VideoPlan
    from srdeploy.upscale.video.reader import VideoReader

    source = Clips().make(Path("a.mkv"), range(12))
    monkeypatch.setattr(VideoOptions.__init__, "__defaults__", (None, None, False, False, 5))
    options = VideoOptions()
    up = Upscaler.open(Path("good.onnx"), threads=1)
    reader = VideoReader(source)
    plan = VideoPlan(reader, Path("out.mkv"), options, up.contract, up.identity)
    job = VideoJob(source, reader.survey, False, 5, plan.encoding, plan.size, seek=False)
    made = cluster_video._Driver(None, None, plan, options)  # type: ignore[arg-type]

    def advance(amount: float = 1, note: str | None = None) -> None:
        pass

    made._take(0, upscale_segment(up, job, 0, plan.parts.path(0)), SILENT, advance)
    with pytest.raises(InputError) as caught:
        if dies:
            for _ in range(ATTEMPTS):
                made._take(1, Lost("killed"), SILENT, advance)
        else:
            made._take(2, upscale_segment(up, job, 2, plan.parts.path(2)), SILENT, advance)
            made._finished(3)
    plan.keep_or_remove_parts(caught.value, SILENT)
    plan.close()
    reader.close()

    assert "resuming after 5 frames" in user.runs("upscale good.onnx a.mkv -o out.mkv --threads 1")
    assert len(Clips().shown(Path("out.mkv")).numbers) == 12


# ----------------------------------------------------------------------------------------------------------------------
# On a Ray cluster


@pytest.fixture(scope="module")
def advised() -> Iterator[Cluster]:
    """Two machines, started with `ray start --head` and `ray start --address HEAD:PORT`."""
    with cluster() as made:
        yield made


@needs_ray
@pytest.mark.advice("upscale/scale/cluster.py:_check_reachable", "start one with `ray start --head` and ")
@pytest.mark.advice("upscale/scale/cluster.py:connected", "start one with `ray start --head` and ")
def test_no_cluster(user: User, advised: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """`advised` runs on this machine, and is hidden from --ray auto, as others that may run here are."""
    user.refused(f"{FOLDER} --ray 127.0.0.2:1")
    with monkeypatch.context() as patch:
        patch.setattr("ray._private.services.find_gcs_addresses", set)
        patch.setattr("ray._private.services.find_bootstrap_address", lambda folder: None)
        user.refused(f"{FOLDER} --ray auto")
    user.runs(f"{FOLDER} --ray {advised.address} --mixed-engines")
    assert len(list(Path("out").glob("*.png"))) == 4


@needs_ray
@pytest.mark.advice("upscale/scale/cluster.py:connected", "install the same versions on all machines")
def test_a_cluster_of_another_version(user: User, advised: Cluster) -> None:
    """What a cluster says about its versions is changed, and set to this machine's again."""
    from ray._raylet import GcsClient

    client = GcsClient(address=advised.address)
    key, space = b"CLUSTER_METADATA", b"cluster"
    stated = client.internal_kv_get(key, namespace=space)
    older = json.dumps({**json.loads(stated), "ray_version": "2.50.0"}).encode()

    client.internal_kv_put(key, older, overwrite=True, namespace=space)
    assert "runs Ray: 2.50.0" in user.refused(f"{FOLDER} --ray {advised.address}")
    client.internal_kv_put(key, stated, overwrite=True, namespace=space)
    user.runs(f"{FOLDER} --ray {advised.address}")


_HOG = """
import sys, ray
ray.init(address=sys.argv[1], logging_level="error")
hogs = [ray.remote(num_cpus=1)(type("Hog", (), {"here": lambda self: True})).remote() for _ in range(2)]
ray.get([hog.here.remote() for hog in hogs])
print("ready", flush=True)
sys.stdin.read()
"""


@needs_ray
@pytest.mark.advice("upscale/scale/cluster.py:RayPool.wait", "look at `ray status --address ")
def test_a_cluster_that_is_busy(user: User, advised: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", _HOG, advised.address], **pipes) as hog:  # type: ignore[call-overload]
        assert hog.stdout.readline() == b"ready\n"
        with monkeypatch.context() as patch:
            patch.setattr(driver, "_PATIENCE_SECONDS", 1.0)
            message = user.refused(f"{FOLDER} --ray {advised.address}")
        command = re.search(r"look at `(ray status [^`]+)`", message)
        assert command is not None
        words = [sys.executable, "-m", "ray.scripts.scripts", *shlex.split(command[1])[1:]]
        environment = {**os.environ, "RAY_ADDRESS": ""}
        shown, deadline = "", time.monotonic() + 180  # the cluster collects it every few seconds
        while "2.0/2.0 CPU" not in shown:
            assert time.monotonic() < deadline, shown
            shown = subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout
        hog.stdin.close()

    assert "upscaling images" in user.runs(f"{FOLDER} --ray {advised.address}")
