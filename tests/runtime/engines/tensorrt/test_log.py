"""TensorRT's log: what is collected, read back and translated, and where it is never printed."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from srdeploy.runtime.engines.tensorrt import log
from srdeploy.runtime.engines.tensorrt.log import (
    MAX_PROBLEMS,
    Log,
    build_logger,
    read_messages,
    translated,
)


@pytest.mark.parametrize(
    ("message", "cause", "step"),
    [
        ("[api] Could not infer output types for operation: 12: deconv: x", "no BF16 or INT8 deconvolution", "rewrite"),
        ("OutOfMemory (Requested size was 12345 bytes.)", "needs 12345 bytes", "--workspace"),
        ("no tactics to implement the operation within workspace limit.", "scratch memory", "--workspace"),
        ("Could not find any implementation for node {Conv_3}", "no kernel was found", "smaller --max-shape"),
        ("No importer registered for op: Mystery. Attempting", "no operation Mystery", "export"),
        ("Compute capability 9.0 (SM90) not supported by this version", "9.0 is not one", "CPU engine"),
        ("Unable to load library: libnvinfer_lean.so.1", "lean runtime", "--version-compatible"),
        ("The engine plan file is not compatible: Version tag does not match", "another release", "build it again"),
        ("generated on an incompatible device, please rebuild", "another GPU", "build it again"),
        ("CUDA initialization failure with error: 35 cudaError 35", "driver is missing or too old", "CPU engine"),
        ("CUDA error: out of memory", "memory is full", "smaller shape"),
        ("Dynamic input tensor input is missing dimensions in profile 0", "do not fit", "--min-shape"),
        ("[E] [tag] something new went wrong", "something new went wrong", ""),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_known_errors_are_translated(message: str, cause: str, step: str) -> None:
    found, next_step = translated(Log([message]))

    assert cause in found
    assert step in next_step


@pytest.fixture
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


def test_a_build_logger_keeps_errors_in_memory_and_everything_in_a_file(trt: Any, tmp_path: Path) -> None:
    log, path = Log(), tmp_path / "folder" / "build.log"
    logger = build_logger(trt, log, path)
    severities = trt.ILogger.Severity

    logger.log(severities.VERBOSE, "Layer table\nof two lines")
    logger.log(severities.WARNING, "OutOfMemory (Requested size was 1")
    assert translated(log)[0] == "TensorRT gave no reason"
    for index in range(MAX_PROBLEMS + 5):
        logger.log(severities.ERROR, f"problem {index}")

    assert log.problems == [f"problem {index}" for index in range(MAX_PROBLEMS)]
    messages = list(read_messages(path))
    assert messages[:2] == [("VERBOSE", "Layer table\nof two lines"), ("WARNING", "OutOfMemory (Requested size was 1")]
    assert len(messages) == MAX_PROBLEMS + 7


def test_a_log_file_that_cannot_be_written_is_not_an_error(trt: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = Log()

    build_logger(trt, log, tmp_path / "file" / "build.log").log(trt.ILogger.Severity.ERROR, "problem")

    assert log.problems == ["problem"]


NATIVE = """
import tensorrt_rtx as trt
from srdeploy.runtime.engines.tensorrt.log import runtime_log

with runtime_log(trt) as (logger, log):
    print("another thread's line")
    assert trt.Runtime(logger).deserialize_cuda_engine(b"vtrt" + bytes(200)) is None
assert type(logger) is trt.Logger
assert any("Serialization" in problem for problem in log.problems), log
assert trt.Runtime(logger).deserialize_cuda_engine(b"vtrt" + bytes(200)) is None
"""


def test_the_log_of_opened_engines_is_native_and_leaves_standard_output_alone(trt: Any) -> None:
    # In a process of its own: TensorRT keeps the first logger of a process, which may be another test's.
    done = subprocess.run([sys.executable, "-c", NATIVE], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, "another thread's line\n"), done.stderr


def test_a_log_file_reads_back_with_messages_of_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "build.log"
    path.write_text("[INFO] one\n[VERBOSE] table\nName: a\n[not a severity] b\n[ERROR] bad\n")

    assert list(read_messages(path)) == [
        ("INFO", "one"),
        ("VERBOSE", "table\nName: a\n[not a severity] b"),
        ("ERROR", "bad"),
    ]


def test_threads_that_open_engines_at_once_share_one_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT keeps a pointer to the first one: it must not be freed because another took its place."""
    made: list[Any] = []
    second = threading.Event()

    class Logger:
        INTERNAL_ERROR, ERROR = 0, 1

        def __init__(self, severity: int) -> None:
            made.append(self)
            if len(made) > 1:
                second.set()
            second.wait(0.3)  # it comes by then, unless it has to wait

    bindings = SimpleNamespace(__name__="fake", Logger=Logger)
    monkeypatch.setattr(log, "_LOGGERS", {})

    def opened(index: int) -> Any:
        with log.runtime_log(bindings) as (logger, _):
            return logger

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(opened, range(2)))

    assert len(made) == 1
    assert found == made * 2
