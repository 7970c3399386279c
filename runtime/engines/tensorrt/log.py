"""TensorRT's log: collected, kept in a file, and translated into a cause and a next step.

TensorRT reports failures as None, False or -1 and puts the reason into its log. Its error recorder crashes the
process when the builder is freed, so everything goes through one logger per flavour that lives as long as the process
(TensorRT keeps using the first logger it was given).
"""

import contextlib
import re
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
PROBLEMS = ("INTERNAL_ERROR", "ERROR")
_LOGGERS: dict[str, Any] = {}


@dataclass
class Log:
    """Messages of one build or opening: (severity, text)."""

    path: Path | None = None
    messages: list[tuple[str, str]] = field(default_factory=list)

    def problems(self) -> list[str]:
        """Return the error messages."""
        return [text for severity, text in self.messages if severity in PROBLEMS]


@contextlib.contextmanager
def captured(trt: Any, path: Path | None = None) -> Iterator[tuple[Any, Log]]:
    """Yield TensorRT's logger and the log that it writes to while the block runs; one block at a time.

    Args:
        trt: the bindings.
        path: file for the whole log; it is a help, so a file that cannot be written is left out.
    """
    logger = _LOGGERS.get(trt.__name__)
    if logger is None:
        logger = _LOGGERS[trt.__name__] = _new_logger(trt)
    log = Log(path)
    with logger.lock:
        stream = _opened(path)
        log.path = path if stream else None
        logger.log_to, logger.stream = log, stream
        try:
            yield logger, log
        finally:
            logger.log_to, logger.stream = None, None
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def last_problem(trt: Any) -> str:
    """Return the cause of the newest error that TensorRT reported while nothing was captured: while engines run."""
    logger = _LOGGERS.get(trt.__name__)
    messages = list(logger.unheard) if logger else []
    if logger:
        logger.unheard.clear()
    return translated(Log(messages=messages))[0]


def read_log(path: Path) -> Log:
    """Read a log file back into messages."""
    log = Log(path)
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        severity, bracket, text = line[1:].partition("] ")
        if line.startswith("[") and bracket and severity in SEVERITIES:
            log.messages.append((severity, text))
        elif log.messages:  # messages may have several lines
            last, before = log.messages[-1]
            log.messages[-1] = (last, f"{before}\n{line}")
    return log


def translated(log: Log) -> tuple[str, str]:
    """Return cause and next step for the errors in a log, in words a user can act on.

    The raw first error is part of the cause when nothing is known about it.
    """
    problems = log.problems()
    for pattern, cause, step in _TRANSLATIONS:
        for problem in problems:
            match = pattern.search(problem)
            if match:
                words = {name: value or "" for name, value in match.groupdict().items()}
                return cause.format(**words), step.format(**words)
    first = problems[0] if problems else "TensorRT gave no reason"
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
            "the network needs {size} bytes of memory in one piece, and less is allowed",
            "leave --workspace out, or build for a smaller --max-shape",
        ),
        (
            r"within workspace limit|workspace size if applicable",
            "no kernel fits into the scratch memory that is allowed",
            "leave --workspace out, or allow more",
        ),
        (
            r"[Cc]ould not find any implementation for node",
            "no kernel fits one of the layers; most often the memory does not suffice for the largest shape",
            "build for a smaller --max-shape, or on a GPU with more memory free",
        ),
        (
            r"(?:No importer registered for op|Unsupported op(?:erator)?)[:\s]*(?P<op>\w+)",
            "TensorRT has no operation {op}",
            "export the checkpoint with srdeploy export, or build for another engine",
        ),
        (
            r"(?:opset|Opset|ir_version|IR version)[^\n]*(?:not supported|unsupported|newer|maximum)",
            "the ONNX file is of a version that this TensorRT does not read",
            "export again with a lower --opset, or use a newer TensorRT",
        ),
        (
            r"Compute capability (?P<sm>[\d.]+)[^\n]*not supported",
            "compute capability {sm} is not one that this release builds for",
            "see srdeploy doctor for the list",
        ),
        (
            r"libnvinfer_lean",
            "version-compatible engines need TensorRT's lean runtime, which is not installed",
            "leave --version-compatible out, or install the full TensorRT packages",
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
            "there is no NVIDIA driver that fits this TensorRT",
            "install a driver of the 580 series or newer, or use a CPU engine",
        ),
        (
            r"(?:[Cc]uda ?[Ee]rror|CUDA error)[^\n]*(?:2\b|[Oo]ut ?[Oo]f ?[Mm]emory)",
            "the GPU's memory is full",
            "close other programs on the GPU, or use a smaller shape",
        ),
        (
            r"(?:missing dimensions|optimization profile|profile[^\n]*not been specified)",
            "the shapes of the profile do not fit the graph's inputs",
            "check --min-shape, --opt-shape and --max-shape",
        ),
    )
)


def _new_logger(trt: Any) -> Any:
    class CollectingLogger(trt.ILogger):  # type: ignore[misc]  # the base class is known at run time only
        """Hands messages to the log that is being captured; never raises into native code."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lock = threading.RLock()
            self.log_to: Log | None = None
            self.stream: TextIO | None = None
            self.unheard: deque[tuple[str, str]] = deque(maxlen=20)

        def log(self, severity: Any, message: str) -> None:
            log = self.log_to
            name = getattr(severity, "name", str(severity))
            if log is None:
                if name in PROBLEMS:
                    self.unheard.appendleft((name, message))
                return
            log.messages.append((name, message))
            if self.stream is not None:
                try:
                    self.stream.write(f"[{name}] {message}\n")
                except (OSError, ValueError):
                    self.stream = None

    return CollectingLogger()


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
