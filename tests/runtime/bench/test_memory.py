"""Peak memory: what a run takes from the process, and from a GPU as far as that can be tested without one."""

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srdeploy.core.contract import ModelContract
from srdeploy.core.precision import Precision
from srdeploy.core.runner import MeteredRunner, RunnerInfo
from srdeploy.runtime.bench.latency import bench, with_process_memory
from srdeploy.runtime.bench.memory import (
    ALLOCATOR,
    LOWER_BOUND,
    ON_CPU,
    OWN_DEVICE,
    OWN_PROCESS,
    LowestFree,
    Memory,
    memory_from_probe,
    process_memory,
    run_memory,
)
from srdeploy.runtime.bench.turns import Effort
from srdeploy.runtime.engines.eager import allocator_peak

SHAPE = (1, 3, 4, 4)
SHORT = Effort(warmup_runs=1, warmup_seconds=0.0, min_runs=5, max_runs=5, seconds=0.0)


def test_memory_of_a_run_is_seen() -> None:
    size = 64 * 2**20

    used = run_memory(lambda: np.ones(size, np.uint8).sum())
    nothing = run_memory(lambda: None)

    if used is None:
        pytest.skip("the kernel does not let this process reset its peak memory")
    assert used == pytest.approx(size, rel=0.1)
    assert nothing is None or nothing < size / 10


def test_an_engines_own_process_states_its_memory_and_no_gpu(small_onnx: Any) -> None:
    found = process_memory(small_onnx(), SHAPE, threads=1)

    assert found.process_bytes is not None
    assert 5e6 < found.process_bytes < 1e9, "ONNX Runtime's libraries alone take some ten megabytes"
    assert (found.process_note, found.device_bytes, found.device_note) == (OWN_PROCESS, None, ON_CPU)


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    found = process_memory(tmp_path / "missing.onnx", SHAPE)

    assert (found.process_bytes, found.device_bytes) == (None, None)
    assert "missing.onnx" in found.process_note


def test_a_gpu_that_is_not_there_is_unknown_with_its_reason(small_onnx: Any) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")

    found = process_memory(small_onnx(), SHAPE, device="cuda:0")

    assert found.device_bytes is None
    assert found.device_note.startswith("the measuring process failed: ")


@pytest.mark.parametrize(
    ("code", "out", "err", "expected"),
    [
        (0, 'noise\n{"process": 7, "device": 9}\n', "", Memory(7, OWN_PROCESS, 9, OWN_DEVICE)),
        (0, '{"process": null, "device": 9}', "", Memory(None, "the system does not report it", 9, OWN_DEVICE)),
        (1, "", "Traceback\nOutOfMemoryError: full", "the measuring process failed: OutOfMemoryError: full"),
        (-9, "", "", "the measuring process failed: exit status -9"),
        (0, "no number", "", "the measuring process failed: exit status 0"),
    ],
    ids=["both", "no-process-figure", "failed", "killed", "silent"],
)
def test_the_answer_of_a_process_is_read(code: int, out: str, err: str, expected: Memory | str) -> None:
    found = memory_from_probe(code, out, err, on_gpu=True)

    assert found == (expected if isinstance(expected, Memory) else Memory(None, expected, None, expected))


def test_the_lowest_free_memory_counts_even_when_it_was_given_back() -> None:
    free, seen = [1000], threading.Event()

    def look() -> int:
        if free[0] == 300:
            seen.set()
        return free[0]

    with LowestFree(look, interval_seconds=0.001) as watch:
        free[0] = 300
        assert seen.wait(120), "the watching thread never looked"
        free[0] = 600
        watch.look()

    assert watch.taken == 700


def test_freed_memory_is_no_negative_use() -> None:
    values = itertools.chain([1000], itertools.repeat(1500))

    with LowestFree(lambda: next(values)) as watch:
        watch.look()

    assert watch.taken == 0


class FakeCuda:
    """PyTorch's allocator statistics: 50 bytes are held by others, a run takes 30 more at its peak."""

    def __init__(self) -> None:
        self.peak, self.calls = 999, 0

    def synchronize(self, device: Any) -> None:
        self.calls += 1

    def reset_peak_memory_stats(self, device: Any) -> None:
        self.peak = 50

    def memory_allocated(self, device: Any) -> int:
        return 50

    def max_memory_allocated(self, device: Any) -> int:
        return self.peak

    def run(self) -> None:
        self.peak = 80


def test_the_allocators_peak_is_the_runs_own_and_its_weights() -> None:
    cuda = FakeCuda()

    assert allocator_peak(cuda.run, "cuda:0", cuda=cuda, held_bytes=7) == 37
    assert cuda.calls == 2, "work must have ended before and after"


class GpuRunner:
    """Claims to be on a GPU."""

    def __init__(self, name: str, device: str = "cuda:0") -> None:
        contract = ModelContract("rcan", {}, 2, "rgb", Precision.FP32, None, 1.0, 1, "0" * 64)
        self.info = RunnerInfo(name, "eager", device, contract, "FP32")

    def run(self, feeds: Any) -> Any:
        return {"output": feeds["input"]}

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class MeteredGpuRunner(GpuRunner):
    """And knows what a run took."""

    def run_metered(self, feeds: Any) -> int:
        return 4096


def test_every_row_says_what_its_memory_is() -> None:
    result = bench(
        [MeteredGpuRunner("torch"), GpuRunner("engine"), GpuRunner("processor", "cpu")], shape=SHAPE, effort=SHORT
    )

    rows = {row["runner"]["name"]: row for row in result.to_json()["rows"]}
    assert isinstance(MeteredGpuRunner("torch"), MeteredRunner)
    assert not isinstance(GpuRunner("engine"), MeteredRunner)
    assert (rows["torch"]["device_memory_bytes"], rows["torch"]["device_memory_note"]) == (4096, ALLOCATOR)
    assert rows["engine"]["device_memory_bytes"] is None
    assert "not visible" in rows["engine"]["device_memory_note"]
    assert rows["processor"]["device_memory_note"] == ON_CPU
    if rows["processor"]["memory_bytes"] is not None:
        assert rows["processor"]["memory_note"] == LOWER_BOUND


def test_engines_get_the_figures_of_their_own_process(small_onnx: Any) -> None:
    result = bench([GpuRunner("a", "cpu"), GpuRunner("b", "cpu")], shape=SHAPE, effort=SHORT)

    found = with_process_memory(result, {"b": (small_onnx(), None)}, threads=1)

    assert found.memory["a"] == result.memory["a"]
    assert found.memory["b"].process_note == OWN_PROCESS
    assert found.rows == result.rows
