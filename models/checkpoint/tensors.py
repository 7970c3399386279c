"""Tensor records become tensors: bounds checked against the storage, bytes read once per storage.

Only the tensors of the chosen state dicts are built, so optimizer state costs nothing. Values keep the dtype they were
stored in (float16, bfloat16 and float64 checkpoints included); devices such as cuda:0 are dropped.
"""

import math
from collections.abc import Callable, Mapping

import torch

from srdeploy.models.checkpoint.filebytes import RefusedError, shown
from srdeploy.models.checkpoint.inert import ITEM_BYTES, SHARD, StorageRecord, TensorRecord

_DAMAGED = "copy or download the file again"
_SLACK_BYTES = 1 << 20
FULL_STATE = (
    "save torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True))"
)
"""What gathers the parts of a network that was trained in several processes."""


class TensorBuilder:
    """Builds tensors from records over one container's storages."""

    def __init__(self, read_storage: Callable[[StorageRecord], bytearray], file_bytes: int) -> None:
        self._read_storage = read_storage
        self._file_bytes = file_bytes
        self._blocks: dict[str, bytearray] = {}

    def build(self, records: Mapping[str, TensorRecord]) -> dict[str, torch.Tensor]:
        """Return the tensors by name. Tensors that share a storage in the file share memory here.

        Raises:
            RefusedError: a tensor leaves its storage or repeats values, or together they hold more than the file could
                honestly contain (every name over the same bytes).
        """
        total = 0
        for name, record in records.items():
            if record.dtype not in ITEM_BYTES:
                raise RefusedError(
                    f"has tensor {shown(name)} of kind {record.dtype}",
                    expected="dense tensors of " + ", ".join(sorted(ITEM_BYTES)),
                    next_step=FULL_STATE if record.dtype == SHARD else "save the network's float32 state_dict()",
                )
            _check(name, record)
            total += math.prod(record.shape) * ITEM_BYTES[record.dtype]
        if total > 4 * self._file_bytes + _SLACK_BYTES:
            raise RefusedError(f"lays {total} bytes of tensors over a file of {self._file_bytes}", next_step=_DAMAGED)
        return {name: self._tensor(name, record) for name, record in records.items()}

    def _tensor(self, name: str, record: TensorRecord) -> torch.Tensor:
        dtype = getattr(torch, record.dtype)
        if 0 in record.shape:
            return torch.empty(record.shape, dtype=dtype)
        storage = record.storage
        block = self._blocks.get(storage.key)
        if block is None:
            block = self._read_storage(storage) if storage.inline is None else bytearray(storage.inline)
            self._blocks[storage.key] = block
        start = storage.offset * _item_bytes(storage)
        length = storage.count * _item_bytes(storage) // ITEM_BYTES[record.dtype] * ITEM_BYTES[record.dtype]
        if start + length > len(block):
            raise RefusedError(f"is damaged: tensor {shown(name)} leaves its storage", next_step=_DAMAGED)
        flat = torch.frombuffer(block, dtype=dtype, count=length // ITEM_BYTES[record.dtype], offset=start)
        return flat.as_strided(record.shape, record.stride, record.offset)


def _check(name: str, record: TensorRecord) -> None:
    """Refuse shapes that leave the storage or visit a value twice (expanded views, which grow when copied)."""
    sizes_fit = all(0 <= size < 1 << 48 for size in record.shape) and len(record.shape) == len(record.stride)
    nonzero = math.prod(size for size in record.shape if size)
    if not sizes_fit or nonzero >= 1 << 48:
        raise RefusedError(f"has tensor {shown(name)} of an impossible shape", next_step=_DAMAGED)
    if 0 in record.shape:
        return
    available = record.storage.count * _item_bytes(record.storage) // ITEM_BYTES[record.dtype]
    last = record.offset + sum((size - 1) * step for size, step in zip(record.shape, record.stride, strict=True))
    if record.offset < 0 or any(step < 0 for step in record.stride) or last >= available or nonzero > available:
        raise RefusedError(
            f"has tensor {shown(name)} of shape {_short(record.shape)} that needs values up to {shown(last)} of a "
            f"storage of {available}",
            expected="tensors inside their storages",
            next_step=_DAMAGED,
        )
    if record.dtype != (record.storage.dtype or record.dtype):
        raise RefusedError(f"has tensor {shown(name)} of another dtype than its storage", next_step=_DAMAGED)


def _item_bytes(storage: StorageRecord) -> int:
    return ITEM_BYTES[storage.dtype] if storage.dtype else 1


def _short(shape: tuple[int, ...]) -> str:
    return shown("x".join(map(str, shape)) or "()")
