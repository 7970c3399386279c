"""Folders on a real Ray cluster of two raylets: what is killed does not change the result."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ray_cluster import AFTER_RENAME, Cluster

from srdeploy.cli.main import run
from srdeploy.core.journal import read_entries
from srdeploy.upscale.image_writer import write_image
from srdeploy.upscale.scale.folder_journal import JOURNALS, journal_files

COUNT = 16


@pytest.fixture
def source(tmp_path: Path, picture: Any) -> Path:
    folder = tmp_path / "in"
    for index in range(COUNT):
        path = folder / f"sub{index % 2}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels: NDArray[np.uint8] = picture(40 + index, 60, seed=index)
        write_image(path, pixels)
    return folder


@pytest.fixture
def local(source: Path, rcan_onnx: Path, tmp_path: Path) -> dict[str, bytes]:
    """What one process makes."""
    assert run(["upscale", str(rcan_onnx), str(source), "-o", str(tmp_path / "local"), "--threads", "1"]) == 0
    return outputs(tmp_path / "local")


def outputs(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if JOURNALS not in path.relative_to(folder).parents
    }


def command(cluster: Cluster, *words: object) -> list[str]:
    return [sys.executable, "-m", "srdeploy.cli.main", "upscale", *map(str, words), "--ray", cluster.address, "--json"]


def upscale(cluster: Cluster, *words: object, code: int = 0, seconds: float = 150) -> Any:
    """Run the command in a process of its own, and return its document."""
    done = subprocess.run(command(cluster, *words), capture_output=True, timeout=seconds, check=False)
    assert done.returncode == code, done.stderr.decode()
    return json.loads(done.stdout)


def engines_opened(out: Path) -> int:
    return sum(bool(entry.get("key")) for entry in read_entries(journal_files(out)) if "run" in entry)


def test_outputs_are_those_of_one_process(
    shared_cluster: Cluster, source: Path, rcan_onnx: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    found = upscale(shared_cluster, rcan_onnx, source, "-o", tmp_path / "out")

    assert outputs(tmp_path / "out") == local
    assert len(found["made"]) == COUNT
    assert found["workers"] == engines_opened(tmp_path / "out")
    assert found["workers"] in (1, 2)
    assert found["failed"] == {}


def test_a_worker_killed_after_its_rename(
    shared_cluster: Cluster, source: Path, rcan_onnx: Path, tmp_path: Path
) -> None:
    (source / "sub0" / "00.png").rename(source / Path(AFTER_RENAME).name)
    assert run(["upscale", str(rcan_onnx), str(source), "-o", str(tmp_path / "local"), "--threads", "1"]) == 0
    out = tmp_path / "out"
    assert out.as_posix().endswith("out")

    upscale(shared_cluster, rcan_onnx, source, "-o", out)

    assert (shared_cluster.folder / "was_killed").exists()
    assert outputs(out) == outputs(tmp_path / "local")  # also no temporary file
    states = [entry for entry in read_entries(journal_files(out)) if entry.get("output") == "after_rename.png"]
    assert [entry["state"] for entry in sorted(states, key=lambda entry: entry["time"])] == [
        "started", "failed", "started", "done",
    ]  # fmt: skip


def test_a_broken_picture_and_one_that_kills_its_worker_are_listed_and_the_rest_is_made(
    shared_cluster: Cluster, source: Path, rcan_onnx: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    (source / "killer.png").write_bytes((source / "sub0" / "00.png").read_bytes())
    (source / "truncated.png").write_bytes((source / "sub0" / "00.png").read_bytes()[:200])

    found = upscale(shared_cluster, rcan_onnx, source, "-o", tmp_path / "out", code=3)

    assert list(found["failed"]) == ["killer.png", "truncated.png"]
    assert "attempt 3 of 3" in found["failed"]["killer.png"]["error"]
    assert outputs(tmp_path / "out") == local


def test_a_killed_driver_is_taken_up(
    shared_cluster: Cluster, source: Path, rcan_onnx: Path, picture: Any, tmp_path: Path
) -> None:
    for index in range(60):
        write_image(source / f"more{index:02d}.png", picture(120, 160, seed=index))
    out = tmp_path / "out"
    driver = subprocess.Popen(command(shared_cluster, rcan_onnx, source, "-o", out), stderr=subprocess.DEVNULL)
    wait_for_outputs(out, 6)
    driver.send_signal(signal.SIGKILL)
    driver.wait(120)
    before = len(outputs(out))

    found = upscale(shared_cluster, rcan_onnx, source, "-o", out)

    assert before < COUNT + 60
    assert len(found["skipped"]) >= 4
    assert len(found["made"]) + len(found["skipped"]) == COUNT + 60
    assert len(outputs(out)) == COUNT + 60  # also no temporary file
    assert engines_opened(out) <= 4  # two for each driver


def test_a_killed_machine(own_cluster: Cluster, source: Path, rcan_onnx: Path, picture: Any, tmp_path: Path) -> None:
    for index in range(60):
        write_image(source / f"more{index:02d}.png", picture(120, 160, seed=index))
    assert run(["upscale", str(rcan_onnx), str(source), "-o", str(tmp_path / "local"), "--threads", "1"]) == 0
    out = tmp_path / "out"
    with subprocess.Popen(
        command(own_cluster, rcan_onnx, source, "-o", out), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as driver:
        wait_for_outputs(out, 6)
        own_cluster.kill_machine()
        _, errors = driver.communicate(timeout=150)

    assert driver.returncode == 0, errors.decode()
    assert outputs(out) == outputs(tmp_path / "local")


def test_an_output_that_cannot_be_written_is_one_line(
    shared_cluster: Cluster, source: Path, rcan_onnx: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()

    done = subprocess.run(
        command(shared_cluster, rcan_onnx, source, "-o", tmp_path / "file" / "out"), capture_output=True, check=False
    )

    assert done.returncode == 8
    assert done.stdout == b""
    assert done.stderr.count(b"error") == 1
    assert b"cannot write" in done.stderr


@pytest.mark.parametrize("address", ["127.0.0.2:1", "nonsense", "http://127.0.0.2:8265", "host.invalid:6379"])
def test_no_cluster_is_one_line(address: str, source: Path, rcan_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'srdeploy[ray]'")
    words = ["upscale", str(rcan_onnx), str(source), "-o", str(tmp_path / "out"), "--ray", address]

    done = subprocess.run(
        [sys.executable, "-m", "srdeploy.cli.main", *words], capture_output=True, timeout=120, text=True
    )

    errors = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 8, done.stderr
    assert len(errors) == 1
    assert "cluster" in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_server_that_is_no_cluster_is_one_line(source: Path, rcan_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'srdeploy[ray]'")
    import http.server
    import threading

    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        words = ["upscale", str(rcan_onnx), str(source), "-o", str(tmp_path / "out")]
        words += ["--ray", f"127.0.0.1:{server.server_port}"]
        done = subprocess.run(
            [sys.executable, "-m", "srdeploy.cli.main", *words], capture_output=True, timeout=100, text=True
        )
        server.shutdown()

    assert done.returncode == 8, done.stderr
    assert "error: no Ray cluster answers at 127.0.0.1:" in done.stderr
    assert not (tmp_path / "out").exists()


def wait_for_outputs(out: Path, count: int) -> None:
    deadline = time.monotonic() + 180
    while len(list(out.rglob("*.png"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
