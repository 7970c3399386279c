"""The three containers a checkpoint comes in: safetensors, torch's zip archive and torch's older stream.

Each is opened as a `Container`: a tree of inert values (`srdeploy.models.checkpoint.inert`) and a way to read the
bytes of the storages that the tree mentions. Which one it is follows from the first bytes, never from the file's name.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from srdeploy.models.checkpoint.archive import Archive
from srdeploy.models.checkpoint.filebytes import FileBytes, RefusedError, shown
from srdeploy.models.checkpoint.inert import ITEM_BYTES, Global, StorageRecord, storage_dtype
from srdeploy.models.checkpoint.safetensors_header import read_header
from srdeploy.models.checkpoint.unpickler import MOST_BYTES, unpickle

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001

_AGAIN = "copy or download the file again"


@dataclass(frozen=True)
class Container:
    """An opened file: `root` is its tree of inert values.

    Attributes:
        name: "safetensors", "torch zip" or "torch legacy stream".
        root: dicts, lists, numbers, texts, records.
        read_storage: gives a storage block's bytes by key, in fresh memory.
        metadata: what a safetensors header says beside the tensors.
    """

    name: str
    root: Any
    read_storage: Callable[[StorageRecord], bytearray]
    metadata: dict[str, str] = field(default_factory=dict)


def open_container(file: FileBytes) -> Container:
    """Open whichever container the file is.

    Raises:
        RefusedError: it is none of them, or it is damaged or hostile.
    """
    head = file.read(0, min(file.size, 512), "head")
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _open_zip(file)
    if head[8:9] == b"{":
        return _open_safetensors(file)
    if head[:1] == b"\x80" or head.startswith(b"L%dL\n" % MAGIC_NUMBER):  # protocol 2 and later, or the first two
        return _open_stream(file)
    raise _not_a_checkpoint(head)


# ----------------------------------------------------------------------------------------------------------------------
# torch.save since 1.6: a zip archive with the pickle in NAME/data.pkl and each storage in NAME/data/KEY


def _open_zip(file: FileBytes) -> Container:
    archive = Archive(file)
    folder = _pickle_folder(archive)
    if folder + "byteorder" in archive.entries and archive.read(folder + "byteorder", most=16) != b"little":
        raise RefusedError(
            "was saved on a big-endian machine", next_step="load and save it again on a little-endian one"
        )
    pickled = bytes(archive.read(folder + "data.pkl", most=MOST_BYTES))

    def persistent_load(identifier: Any) -> Any:
        return _storage(identifier, most_parts=5)

    def read_storage(storage: StorageRecord) -> bytearray:
        entry = archive.entries.get(f"{folder}data/{storage.key}")
        _check_storage_size(storage, entry.size if entry else 0)
        return archive.read(f"{folder}data/{storage.key}")

    root, _ = unpickle(pickled, 0, persistent_load)
    return Container("torch zip", root, read_storage)


def _pickle_folder(archive: Archive) -> str:
    names = archive.entries
    folders = [name.removesuffix("data.pkl") for name in names if name.rpartition("/")[2] == "data.pkl"]
    if any(name.rpartition("/")[2] == "constants.pkl" for name in names):
        raise RefusedError(
            "is a TorchScript archive, which holds a program",
            expected="a checkpoint written by torch.save",
            next_step="save the network's state_dict() with torch.save",
        )
    if len(folders) != 1:
        inner = next((name for name in names if name.endswith((".pth", ".pt", ".tar", ".safetensors"))), None)
        raise RefusedError(
            "is a zip archive, but not one that torch.save wrote",
            expected="one entry NAME/data.pkl",
            next_step=f"unpack it and give the file {shown(inner)} inside" if inner else _AGAIN,
        )
    return folders[0]


# ----------------------------------------------------------------------------------------------------------------------
# torch.save before 1.6: five pickles (magic number, version, machine, object, storage keys), then the storages


def _open_stream(file: FileBytes) -> Container:
    data = file.read(0, min(file.size, MOST_BYTES), "head")
    blocks: dict[str, StorageRecord] = {}

    def persistent_load(identifier: Any) -> Any:
        if isinstance(identifier, tuple) and identifier and identifier[0] == "module":
            # (module, class, source file, source text): the source is never looked at
            if len(identifier) < 2 or not isinstance(identifier[1], Global):
                raise RefusedError("is damaged: a class in its pickle has no name", next_step=_AGAIN)
            return identifier[1]
        storage = _storage(identifier, most_parts=6)
        blocks.setdefault(storage.key, storage)
        return storage

    position = _stream_preamble(data)
    root, position = unpickle(data, position, persistent_load)
    keys, position = unpickle(data, position, _no_storage)
    places = _stream_places(file, keys, blocks, position)

    def read_storage(storage: StorageRecord) -> bytearray:
        if storage.key not in places:
            raise RefusedError(f"lacks the data of storage {shown(storage.key)}", next_step=_AGAIN)
        offset, length = places[storage.key]
        _check_storage_size(storage, length)
        return file.buffer(offset, length, f"storage {shown(storage.key)}")

    return Container("torch legacy stream", root, read_storage)


def _stream_preamble(data: bytes) -> int:
    """Check magic number, protocol version and machine description; return the position after them."""
    magic, position = unpickle(data, 0, _no_storage)
    if type(magic) is not int or magic != MAGIC_NUMBER:
        raise RefusedError(
            "is a pickle that torch.save did not write",
            expected="a checkpoint written by torch.save, or safetensors",
            next_step="save the network's state_dict() with torch.save",
        )
    version, position = unpickle(data, position, _no_storage)
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise RefusedError(
            "is a torch stream of another version", expected=f"version {PROTOCOL_VERSION}", next_step=_AGAIN
        )
    _, position = unpickle(data, position, _no_storage)
    return position


def _stream_places(
    file: FileBytes, keys: Any, blocks: dict[str, StorageRecord], position: int
) -> dict[str, tuple[int, int]]:
    """Return offset and length in bytes of each storage's data, checked against the file's end."""
    if not isinstance(keys, list) or len(keys) > len(blocks):
        raise RefusedError("is damaged: its list of storages does not fit its tensors", next_step=_AGAIN)
    places: dict[str, tuple[int, int]] = {}
    for key in map(_key, keys):
        block = blocks.get(key)
        if block is None or key in places:
            raise RefusedError(f"is damaged: storage {shown(key)} is listed, but not used once", next_step=_AGAIN)
        count = int.from_bytes(file.read(position, 8, f"storage {shown(key)}"), "little", signed=True)
        if count != block.block_count:
            raise RefusedError(f"is damaged: storage {shown(key)} has {count} values", expected=str(block.block_count))
        length = count * _item_bytes(block)
        if length < 0 or position + 8 + length > file.size:
            raise RefusedError(
                f"is truncated: storage {shown(key)} claims {length} bytes, {file.size - position - 8} are left",
                next_step=_AGAIN,
            )
        places[key] = (position + 8, length)
        position += 8 + length
    return places


# ----------------------------------------------------------------------------------------------------------------------
# What the two torch containers share


def _storage(identifier: Any, most_parts: int) -> StorageRecord:
    """Return the storage for ("storage", class, key, device, count[, (view key, offset, view count)])."""
    if not isinstance(identifier, tuple) or not 5 <= len(identifier) <= most_parts or identifier[0] != "storage":
        raise RefusedError("is damaged: a tensor's storage is not described as torch does", next_step=_AGAIN)
    _, kind, key, device, count = identifier[:5]
    if type(count) is not int or not 0 <= count < 1 << 48:
        raise RefusedError(f"is damaged: storage {shown(_key(key))} has no sensible size", next_step=_AGAIN)
    view = identifier[5] if len(identifier) == 6 else None
    offset, view_count = 0, count
    if view is not None:
        if not isinstance(view, tuple) or len(view) != 3 or any(type(number) is not int for number in view[1:]):
            raise RefusedError(f"is damaged: the view of storage {shown(_key(key))} cannot be read", next_step=_AGAIN)
        _, offset, view_count = view
        if offset < 0 or view_count < 0 or offset + view_count > count:
            raise RefusedError(f"is damaged: a view of storage {shown(_key(key))} leaves it", next_step=_AGAIN)
    return StorageRecord(_key(key), storage_dtype(kind), view_count, shown(device, 16), offset, count)


def _key(key: Any) -> str:
    if type(key) is int and 0 <= key < 1 << 64:
        return str(key)
    if isinstance(key, str) and 0 < len(key) <= 64 and key.isprintable() and not set(key) & set("/\\"):
        return key
    raise RefusedError("is damaged: the key of a storage is not a name", next_step=_AGAIN)


def _item_bytes(storage: StorageRecord) -> int:
    return ITEM_BYTES[storage.dtype] if storage.dtype else 1


def _check_storage_size(storage: StorageRecord, found: int) -> None:
    expected = storage.block_count * _item_bytes(storage)
    if found != expected:
        raise RefusedError(
            f"claims {expected} bytes for storage {shown(storage.key)}, but holds {found}",
            expected="a complete file",
            next_step=_AGAIN,
        )


def _no_storage(identifier: Any) -> Any:
    raise RefusedError("is damaged: a tensor stands where the file should describe itself", next_step=_AGAIN)


# ----------------------------------------------------------------------------------------------------------------------
# safetensors


def _open_safetensors(file: FileBytes) -> Container:
    header = read_header(file)

    def read_storage(storage: StorageRecord) -> bytearray:
        offset, length = header.places[storage.key]
        return file.buffer(offset, length, f"tensor {shown(storage.key)}")

    return Container("safetensors", dict(header.tensors), read_storage, header.metadata)


# ----------------------------------------------------------------------------------------------------------------------
# Neither

_OTHER_FILES: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself", "run: git lfs pull"),
    (b"\x1f\x8b", "is a gzip file", "unpack it first"),
    (b"\x89HDF", "is an HDF5 (Keras) file", "convert its weights to a PyTorch state_dict first"),
    (b"\x89PNG", "is a PNG image", "give the checkpoint first and images with their own option"),
    (b"\xff\xd8\xff", "is a JPEG image", "give the checkpoint first and images with their own option"),
    (b"7z\xbc\xaf", "is a 7-Zip archive", "unpack it first"),
    (b"Rar!", "is a RAR archive", "unpack it first"),
)


def _not_a_checkpoint(head: bytes) -> RefusedError:
    expected = "a checkpoint written by torch.save, or safetensors"
    for magic, what, step in _OTHER_FILES:
        if head.startswith(magic):
            return RefusedError(what, expected=expected, next_step=step)
    if head[257:262] == b"ustar":
        return RefusedError("is a tar archive", expected=expected, next_step="unpack it and give the file inside")
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return RefusedError("is a web page: the download went wrong", expected=expected, next_step="download it again")
    if not head.strip(b"\0"):
        return RefusedError("holds only zeros: the download or copy went wrong", expected=expected, next_step=_AGAIN)
    return RefusedError("is not a checkpoint", expected=expected)
