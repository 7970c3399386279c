"""From a network to an FP32 ONNX file that is checked against it.

`export_onnx` is the stage; what it returns is an `ExportResult`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srdeploy.export.exporter import ExportResult, export_onnx

__all__ = ["ExportResult", "export_onnx"]


def __getattr__(name: str) -> Any:
    """Import the exporter, and with it PyTorch, when a name is used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from srdeploy.export import exporter

    return getattr(exporter, name)
