"""Common to all states of the simulated TensorRT."""

from typing import Any

from gpu_simulator.cuda import Simulator

UNAVAILABLE = "CUDA initialization failure with error: 35. Please check your CUDA installation"
"""What TensorRT logs on a machine without a usable driver."""


def say(logger: Any, severity: str, text: str) -> None:
    """Give a message to a logger."""
    logger.log(getattr(type(logger).Severity, severity), text)


def error(logger: Any, where: str, kind: str, text: str) -> None:
    """Log an error in TensorRT's form: "IRuntime::f: Error Code 3: API Usage Error (what happened)"."""
    say(logger, "ERROR", f"{where}: Error Code {kind} ({text})")


API_USAGE, API_STATE = "3: API Usage Error", "6: API Usage Error"
SERIALIZATION, CUDA = "1: Serialization", "1: Cuda Runtime"


class Part:
    """Common to all states: the module and the simulated machine."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.simulator: Simulator = module.simulator
        self.handle: Any = None
        """Weak reference to the generated object around this state."""
