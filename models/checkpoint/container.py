"""What every kind of checkpoint file is opened as: a tree of inert values, and a way to read the tensors' bytes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srdeploy.models.checkpoint.inert import StorageRecord

METADATA = ".metadata"
"""The file that makes a folder a distributed checkpoint."""


def is_distributed(path: Path) -> bool:
    """Return True if a path is the folder of a distributed checkpoint."""
    return path.is_dir() and (path / METADATA).is_file()


@dataclass(frozen=True)
class Container:
    """An opened file.

    Attributes:
        name: "safetensors", "torch zip", "torch legacy stream", "torch.export program", "NumPy archive", "pickle"
            or "distributed checkpoint".
        root: its tree of inert values: dicts, lists, numbers, texts, records.
        read_storage: returns a storage block's bytes in fresh memory.
        metadata: texts that a safetensors header holds beside the tensors.
    """

    name: str
    root: Any
    read_storage: Callable[[StorageRecord], bytearray]
    metadata: dict[str, str] = field(default_factory=dict)
