"""benchmarks/gpu.py runs from end to end; its figures on a simulated GPU mean nothing and say so."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.once
def test_the_benchmark_runs_and_names_its_gpu(
    machine: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Minutes for a busy machine: by default it stops after eight.
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), "--brief", "--minutes", "600", "-o", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARK), run_name="__main__")

    assert ended.value.code == 0
    (path,) = tmp_path.glob("gpu-*.json")
    found = json.loads(path.read_text())
    assert ("simulated" in path.name) is (machine is not None)
    assert found["command"] == f"python benchmarks/gpu.py --brief --minutes 600 -o {tmp_path}"
    assert found["brief"]
    assert {"torch", "onnxruntime"} <= set(found["versions"])
    assert found["stopped"] is None
    network = found["networks"]["small"]
    times = 1 if "tensorrt int8" in network["skipped"] else 2  # FP16, then INT8
    assert [table["shape"] for table in network["latency"]] == times * ["1x3x24x32", "1x3x16x24"]
    if machine is not None:
        rows = {row["runner"]["name"] for row in network["latency"][0]["rows"]}
        families = ("tensorrt fp16", "tensorrt-rtx fp16", "onnxruntime-cuda fp16", "onnxruntime-tensorrt fp16")
        assert {"eager fp32", *families, "tensorrt fp16 without CUDA graphs"} <= rows
        int8 = {row["runner"]["name"] for row in network["latency"][-1]["rows"]}
        assert int8 == {"eager fp32", "tensorrt fp16", "tensorrt int8"}
        floors = {row["runner"]: 25 if "int8" in row["runner"] else 50 for row in network["parity"]}
        assert all(row["psnr_db"] is None or row["psnr_db"] > floors[row["runner"]] for row in network["parity"])
        assert not any(table["failed"] for table in network["latency"])
