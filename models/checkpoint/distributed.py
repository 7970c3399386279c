"""Distributed checkpoints of PyTorch: a folder with `.metadata` (a pickle) and .distcp files that hold the tensors.

`.metadata` names every tensor, its shape and the chunks that it was split into; each chunk is what torch.save makes of
one tensor, somewhere in a .distcp file. https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from srdeploy.models.checkpoint.archive import Archive
from srdeploy.models.checkpoint.arrays import contiguous
from srdeploy.models.checkpoint.container import METADATA, Container
from srdeploy.models.checkpoint.filebytes import FileBytes, RefusedError, open_file_bytes, shown
from srdeploy.models.checkpoint.inert import ITEM_BYTES, Global, Record, StorageRecord, TensorRecord
from srdeploy.models.checkpoint.tensors import TensorBuilder
from srdeploy.models.checkpoint.torch_files import open_zip
from srdeploy.models.checkpoint.unpickler import MAX_BYTES, unpickle

_MAX_FILES = 4096
_AGAIN = "copy the whole folder again"


@dataclass(frozen=True)
class Folder:
    """The open files of a distributed checkpoint, by name."""

    files: Mapping[str, FileBytes]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files.values())

    def sha256(self) -> str:
        """Return one SHA-256 for all files: of each name and the SHA-256 of its content, sorted."""
        digest = hashlib.sha256()
        for name in sorted(self.files):
            digest.update(f"{name}\0{self.files[name].sha256()}\n".encode())
        return digest.hexdigest()


@contextmanager
def open_folder(path: Path) -> Iterator[Folder]:
    """Open the metadata and all .distcp files of a folder.

    Raises:
        InputError: one of them cannot be read.
        RefusedError: there are too many.
    """
    names = sorted(entry.name for entry in path.iterdir() if entry.suffix == ".distcp")
    if len(names) > _MAX_FILES:
        raise RefusedError(f"holds {len(names)} .distcp files", expected=f"at most {_MAX_FILES}")
    with ExitStack() as stack:
        yield Folder({name: stack.enter_context(open_file_bytes(path / name)) for name in (METADATA, *names)})


def open_distributed(folder: Folder) -> Container:
    """Open a distributed checkpoint.

    Raises:
        RefusedError: it is damaged or hostile, or lacks a file.
    """
    file = folder.files[METADATA]
    metadata, _ = unpickle(file.read(0, min(file.size, MAX_BYTES), METADATA), 0, _no_storage)
    tensors = _member(metadata, "state_dict_metadata")
    chunks = _chunks(_member(metadata, "storage_data"))
    paths = _member(metadata, "planner_data")
    records = {
        name: _record(name, description)
        for name, description in tensors.items()
        if isinstance(name, str)
        and isinstance(description, Record)
        and description.kind.name == "TensorStorageMetadata"
    }

    def read_storage(storage: StorageRecord) -> bytearray:
        return _assembled(folder, storage.key, records[storage.key], chunks.get(storage.key, []))

    return Container("distributed checkpoint", _nested(records, paths), read_storage)


def _member(metadata: Any, name: str) -> dict[Any, Any]:
    value = _state(metadata).get(name)
    if not isinstance(value, dict):
        raise RefusedError(f"has a {METADATA} file without {name}", expected="what PyTorch writes", next_step=_AGAIN)
    return value


def _nested(records: Mapping[str, TensorRecord], paths: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the tree that was saved: "model.head.0.weight" is at ("model", "head.0.weight")."""
    root: dict[str, Any] = {}
    for name, record in records.items():
        path = paths.get(name)
        path = path if isinstance(path, tuple) and path and all(isinstance(part, str) for part in path) else (name,)
        node = root
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise RefusedError(f"places tensor {shown(name)} inside another", next_step=_AGAIN)
        node[path[-1]] = record
    return root


def _record(name: str, description: Record) -> TensorRecord:
    state = _state(description)
    properties, shape = state.get("properties"), state.get("size")
    values = properties.state if isinstance(properties, Record) else None
    dtype = values[0] if isinstance(values, tuple) and values else None
    if not isinstance(dtype, Global) or not isinstance(shape, tuple) or any(type(size) is not int for size in shape):
        raise RefusedError(f"describes tensor {shown(name)} without dtype or shape", next_step=_AGAIN)
    count = math.prod(shape) if all(0 <= size < 1 << 48 for size in shape) else 0
    storage = StorageRecord(name, dtype.name, count, "cpu", 0, count)
    return TensorRecord(storage, dtype.name, 0, shape, contiguous(shape[:16]))


@dataclass(frozen=True)
class _Chunk:
    file: str
    start: int
    length: int
    offsets: tuple[int, ...]


def _chunks(storage_data: Mapping[Any, Any]) -> dict[str, list[_Chunk]]:
    """Return the chunks of each tensor by its name."""
    found: dict[str, list[_Chunk]] = {}
    for key, value in storage_data.items():
        index, place = _state(getattr(key, "value", None)), _state(value)  # keys that are no text are wrapped
        name = index.get("fqn")
        if not isinstance(name, str):
            raise RefusedError(f"has a {METADATA} file whose storage data cannot be read", next_step=_AGAIN)
        offsets = index.get("offset") or ()
        file, start, length = place.get("relative_path"), place.get("offset"), place.get("length")
        if not (isinstance(file, str) and isinstance(start, int) and isinstance(length, int) and _is_offsets(offsets)):
            raise RefusedError(f"lacks the place of tensor {shown(name)} is", next_step=_AGAIN)
        if place.get("transform_descriptors"):
            raise RefusedError("holds compressed tensors", expected="uncompressed .distcp files")
        found.setdefault(name, []).append(_Chunk(file, start, length, offsets))
    return found


def _is_offsets(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(offset) is int for offset in value)


def _state(value: Any) -> dict[Any, Any]:
    """Return the attributes of a record, {} for anything else."""
    state = value.state if isinstance(value, Record) else None
    return state if isinstance(state, dict) else {}


def _assembled(folder: Folder, name: str, record: TensorRecord, chunks: list[_Chunk]) -> bytearray:
    """Read all chunks of a tensor into one row-major block."""
    block = bytearray(math.prod(record.shape) * ITEM_BYTES[record.dtype])
    whole = torch.frombuffer(block, dtype=getattr(torch, record.dtype)).reshape(record.shape)
    filled = 0
    for chunk in chunks:
        part = _chunk_tensor(folder, name, chunk)
        offsets = chunk.offsets or (0,) * whole.ndim
        ends = [offset + size for offset, size in zip(offsets, part.shape, strict=False)]
        fits = len(offsets) == part.ndim == whole.ndim and part.dtype == whole.dtype
        if not fits or any(
            not 0 <= at <= end <= size for at, end, size in zip(offsets, ends, whole.shape, strict=True)
        ):
            raise RefusedError(f"has a chunk of tensor {shown(name)} that does not fit into it", next_step=_AGAIN)
        whole[tuple(slice(at, end) for at, end in zip(offsets, ends, strict=True))] = part
        filled += part.numel()
    if filled != whole.numel():
        raise RefusedError(f"lacks a part of tensor {shown(name)}", expected="all .distcp files", next_step=_AGAIN)
    return block


def _chunk_tensor(folder: Folder, name: str, chunk: _Chunk) -> torch.Tensor:
    if chunk.file not in folder.files:
        raise RefusedError(f"lacks its file {shown(chunk.file)}", expected="all .distcp files", next_step=_AGAIN)
    section = folder.files[chunk.file].section(chunk.start, chunk.length, f"tensor {shown(name)}")
    container = open_zip(Archive(section), "archive/")
    if not isinstance(container.root, TensorRecord):
        raise RefusedError(f"has a chunk of {shown(name)} that is no tensor", next_step=_AGAIN)
    return TensorBuilder(container.read_storage, section.size).build({name: container.root})[name]


def _no_storage(identifier: Any) -> Any:
    raise RefusedError(f"has a {METADATA} file that holds tensors", expected="their description only", next_step=_AGAIN)
