"""TensorRT's log: collected, kept in a file, and translated into a cause and a next step.

TensorRT reports failures as None, False or -1 and writes the reason to its log. Its error recorder crashes the process
when the builder is freed, so there are two loggers instead:

- Builds run in a process of their own with a logger written in Python, which sees every message.
- Opened engines have TensorRT's native logger. A logger in Python hangs the process when a context is freed (which
  holds the interpreter's lock) while one of TensorRT's threads logs (which waits for it).
"""

import contextlib
import ctypes
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
PROBLEMS = ("INTERNAL_ERROR", "ERROR")
MAX_PROBLEMS = 50
"""Errors that a `Log` keeps; a build's verbose log has hundreds of megabytes and goes to a file only."""
MEMORY_FULL = "the GPU's memory is full"
"""Cause of the errors that CUDA reports as out of memory."""
_LOGGERS: dict[str, Any] = {}
"""One native logger per product. TensorRT keeps a pointer to the first logger of a process, so none is ever freed."""
_HELD: list[Any] = []
_REDIRECTED = threading.RLock()
_NATIVE_LINE = re.compile(r"\[[\d/:-]+\] \[TRT\] \[([FE])\] (.*)")


@dataclass
class Log:
    """The errors of one build or opening, the oldest first."""

    problems: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Keep an error, unless there are too many already."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(text)


def build_logger(trt: Any, log: Log, path: Path | None) -> Any:
    """Return a logger for a build: errors go into a `Log`, everything goes into a file.

    Args:
        trt: the bindings.
        log: collects the errors.
        path: file for all messages. Best effort: a file that cannot be written never fails the build.
    """

    class CollectingLogger(trt.ILogger):  # type: ignore[misc]  # the base class is known at run time only
        """Never raises into native code."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.stream = _opened(path)

        def log(self, severity: Any, message: str) -> None:
            name = getattr(severity, "name", str(severity))
            if name in PROBLEMS:
                log.add(message)
            if self.stream is not None:
                try:
                    self.stream.write(f"[{name}] {message}\n")
                    self.stream.flush()
                except (OSError, ValueError):
                    self.stream = None

    logger = CollectingLogger()
    _HELD.append(logger)
    return logger


@contextlib.contextmanager
def runtime_log(trt: Any) -> Iterator[tuple[Any, Log]]:
    """Yield the native logger for opened engines, and a log that has its errors when the block has ended.

    The native logger prints to standard output, which belongs to the caller: it is redirected while the block runs, one
    block at a time, and below fatal errors it is silent outside. Lines of other threads are written out afterwards.
    """
    log = Log()
    with _REDIRECTED:
        logger = _LOGGERS.get(trt.__name__)
        if logger is None:
            logger = _LOGGERS[trt.__name__] = trt.Logger(trt.Logger.INTERNAL_ERROR)
        logger.min_severity = trt.Logger.ERROR
        try:
            with _standard_output(log):
                yield logger, log
        finally:
            logger.min_severity = trt.Logger.INTERNAL_ERROR


@contextlib.contextmanager
def _standard_output(log: Log) -> Iterator[None]:
    """Move TensorRT's lines from the process's standard output into a log."""
    library = ctypes.CDLL(None)
    with tempfile.TemporaryFile() as caught:
        _flush_output(library)
        kept = os.dup(1)
        os.dup2(caught.fileno(), 1)
        try:
            yield
        finally:
            _flush_output(library)
            os.dup2(kept, 1)
            os.close(kept)
            caught.seek(0)
            for line in caught.read().decode("utf-8", errors="replace").splitlines(keepends=True):
                found = _NATIVE_LINE.match(line)
                if found:
                    log.add(found[2])
                else:
                    os.write(1, line.encode())


def _flush_output(library: ctypes.CDLL) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    library.fflush(None)


def read_messages(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (severity, text) of a log file, message by message; texts may have several lines."""
    severity, lines = "", list[str]()
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            name, bracket, text = line[1:].rstrip("\n").partition("] ")
            if line.startswith("[") and bracket and name in SEVERITIES:
                if severity:
                    yield severity, "\n".join(lines)
                severity, lines = name, [text]
            else:
                lines.append(line.rstrip("\n"))
    if severity:
        yield severity, "\n".join(lines)


def translated(log: Log) -> tuple[str, str]:
    """Return cause and next step for the errors in a log. An unknown error is quoted, without a next step."""
    for pattern, cause, step in _TRANSLATIONS:
        for problem in log.problems:
            match = pattern.search(problem)
            if match:
                values = {name: value or "" for name, value in match.groupdict().items()}
                return cause.format(**values), step.format(**values)
    first = log.problems[0] if log.problems else "TensorRT gave no reason"
    return " ".join(_untagged(first).split())[:300], ""


_TRANSLATIONS: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), cause, step)
    for pattern, cause, step in (
        (
            r"Could not infer output types for operation.*deconv",
            "there is no BF16 or INT8 deconvolution for this GPU",
            "quantize again with --deconvolution rewrite: an exact convolution and pixel shuffle",
        ),
        (
            r"OutOfMemory \(Requested size was (?P<size>\d+)",
            "the network needs {size} bytes of memory in one piece, but the limit is lower",
            "omit --workspace, or build for a smaller --max-shape",
        ),
        (
            r"within workspace limit|workspace size if applicable",
            "no kernel fits into the scratch memory limit",
            "omit --workspace, or raise it",
        ),
        (
            r"[Cc]ould not find any implementation for node",
            "no kernel was found for one of the layers; usually the memory is too small for the largest shape",
            "build for a smaller --max-shape, or on a GPU with more memory free",
        ),
        (
            r"(?:No importer registered for op|Unsupported op(?:erator)?)[:\s]*(?P<op>\w+)",
            "TensorRT has no operation {op}",
            "export the checkpoint with srdeploy export, or build for another engine",
        ),
        (
            r"(?:opset|Opset|ir_version|IR version)[^\n]*(?:not supported|unsupported|newer|maximum)",
            "this TensorRT does not read this version of ONNX",
            "export again with a lower --opset, or use a newer TensorRT",
        ),
        (
            r"Compute capability (?P<sm>[\d.]+)[^\n]*not supported",
            "compute capability {sm} is not one that this release builds for",
            "use a CPU engine, or another release of TensorRT on this GPU",
        ),
        (
            r"libnvinfer_lean",
            "version-compatible engines need TensorRT's lean runtime, which is not installed",
            "omit --version-compatible, or install the full TensorRT packages",
        ),
        (
            r"(?:[Vv]ersion tag does not match|[Vv]ersion mismatch|serialization(?:\w|\s)*version)",
            "the engine was written by another release",
            "build it again with the release installed here",
        ),
        (
            r"(?:incompatible device|checkEngineDeviceCompatible|different (?:GPU|device)|not compatible with)",
            "the engine was built for another GPU",
            "build it again for this GPU",
        ),
        (
            r"(?:cudaError(?:\w|\s)*35|CUDA driver version is insufficient|libcuda\.so)",
            "the NVIDIA driver is missing or too old for this TensorRT",
            "install a driver of the 580 series or newer, or use a CPU engine",
        ),
        (
            r"(?:[Cc]uda ?[Ee]rror|CUDA error)[^\n]*(?:2\b|[Oo]ut ?[Oo]f ?[Mm]emory)",
            MEMORY_FULL,
            "close other programs on the GPU, or use a smaller shape",
        ),
        (
            r"(?:missing dimensions|optimization profile|profile[^\n]*not been specified)",
            "the shapes of the profile do not fit the graph's inputs",
            "check --min-shape, --opt-shape and --max-shape",
        ),
    )
)


def _opened(path: Path | None) -> TextIO | None:
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8", errors="replace")
    except OSError:
        return None


def _untagged(message: str) -> str:
    """Drop the leading source position and API tag of a message."""
    return re.sub(r"^(?:\[[^\]]*\]\s*)+", "", message)
