"""Everything a user can cause ends in one of these errors, and each carries its exit code.

    SrdeployError
    ├── UsageError            2   options that do not fit together, or an output that exists already
    │   └── PrecisionError        the network does not fit the requested precision
    ├── InputError            3   a checkpoint, model, engine, image or bundle that is not understood
    ├── ExportError           4   the ONNX export, or its check against the network, failed
    ├── BuildError            5   an engine could not be built, or is not what was requested
    ├── GateError             6   a parity or quality gate was missed
    ├── UnstableError         7   a measurement is too noisy to be printed as a number
    └── CapabilityError       8   this machine lacks what was requested (GPU, package, disk space, permission)
        ├── GpuMemoryError
        ├── MissingExtraError
        └── OutputError

Exit code 0 is success, 1 a bug in srdeploy (with a traceback), 130 an interruption (Ctrl-C).
An error says what was found, what was expected and what to do next; the command line prints it as one line.
"""

from typing import ClassVar

REPORT = "this is a bug: please report it with the output of: srdeploy doctor --json"
"""Next step of what no user can mend."""


class SrdeployError(Exception):
    """Base of every error a user can cause.

    Args:
        found: what was found, as a sentence part that names the file, tensor or option.
        expected: what would have been right.
        next_step: what the user can do now.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, found: str, *, expected: str | None = None, next_step: str | None = None) -> None:
        self.found = found
        self.expected = expected
        self.next_step = next_step
        super().__init__(str(self))

    def __str__(self) -> str:
        line = self.found
        if self.expected:
            line += f"; expected {self.expected}"
        if self.next_step:
            line += f"; {self.next_step}"
        return " ".join(line.split())


class UsageError(SrdeployError):
    """Options that do not fit together, or an output that exists already (exit 2)."""

    exit_code = 2


class PrecisionError(UsageError):
    """A network that does not fit the requested precision: weights beyond FP16, or no layer for INT8 (exit 2)."""


class InputError(SrdeployError):
    """A checkpoint, model, engine, image or bundle that is not understood (exit 3)."""

    exit_code = 3


class ExportError(SrdeployError):
    """The ONNX export, or its check against the network, failed (exit 4)."""

    exit_code = 4


class BuildError(SrdeployError):
    """An engine could not be built, or is not what was requested (exit 5)."""

    exit_code = 5


class GateError(SrdeployError):
    """A parity or quality gate was missed (exit 6)."""

    exit_code = 6


class UnstableError(SrdeployError):
    """A measurement is too noisy to be printed as a number (exit 7)."""

    exit_code = 7


class CapabilityError(SrdeployError):
    """This machine lacks what was requested: a GPU, a package, disk space or a permission (exit 8)."""

    exit_code = 8


class GpuMemoryError(CapabilityError):
    """A GPU's memory is too small for an input, or other programs use it (exit 8)."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the GPU's memory is full: {what}",
            next_step="use smaller tiles (upscale --tile) or a smaller batch, or close other programs on the GPU",
        )


class MissingExtraError(CapabilityError):
    """An optional package is not installed (exit 8)."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed", next_step=f"install it with: pip install 'srdeploy[{extra}]'")
        self.package = package
        self.extra = extra


class OutputError(CapabilityError):
    """An output could not be written: disk full, read-only folder or no permission (exit 8)."""
