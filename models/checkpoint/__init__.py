"""From a checkpoint file to a network: safe reader, recognition of the family, answers to what tensors leave open."""

from typing import TYPE_CHECKING

from srdeploy.core.lazy import lazy_names

if TYPE_CHECKING:
    from srdeploy.models.checkpoint.container import is_distributed
    from srdeploy.models.checkpoint.load import (
        Evidence,
        Examined,
        LoadedCheckpoint,
        examine_checkpoint,
        load_checkpoint,
    )
    from srdeploy.models.checkpoint.reader import RawCheckpoint, read_checkpoint
    from srdeploy.models.checkpoint.save import save_checkpoint

__all__ = [
    "Evidence",
    "Examined",
    "LoadedCheckpoint",
    "RawCheckpoint",
    "examine_checkpoint",
    "is_distributed",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
]

__getattr__ = lazy_names(
    __name__,
    {
        "container": ("is_distributed",),
        "load": ("Evidence", "Examined", "LoadedCheckpoint", "examine_checkpoint", "load_checkpoint"),
        "reader": ("RawCheckpoint", "read_checkpoint"),
        "save": ("save_checkpoint",),
    },
)
