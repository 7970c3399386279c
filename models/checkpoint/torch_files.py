"""The two files that torch.save has written: the zip archive since PyTorch 1.6, and the stream before it."""

from typing import Any

from srdeploy.models.checkpoint.archive import Archive
from srdeploy.models.checkpoint.container import Container
from srdeploy.models.checkpoint.filebytes import FileBytes, RefusedError, shown
from srdeploy.models.checkpoint.inert import ITEM_BYTES, OTHER_ITEM_BYTES, Global, StorageRecord, storage_dtype
from srdeploy.models.checkpoint.unpickler import MAX_BYTES, unpickle

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001
_MAGIC_BYTES = MAGIC_NUMBER.to_bytes(10, "little")

_AGAIN = "copy or download the file again"

# ----------------------------------------------------------------------------------------------------------------------
# torch.save since 1.6: a zip archive with the pickle in NAME/data.pkl and each storage in NAME/data/KEY


def open_zip(archive: Archive, folder: str) -> Container:
    """Open the zip archive of torch.save whose entries are below `folder`.

    Raises:
        RefusedError: it is damaged or hostile.
    """
    if folder + "byteorder" in archive.entries and archive.read(folder + "byteorder", limit=16) != b"little":
        raise RefusedError(
            "was saved on a big-endian machine",
            next_step="save its state_dict() as safetensors, which has one byte order",
        )
    pickled = bytes(archive.read(folder + "data.pkl", limit=MAX_BYTES))

    def persistent_load(identifier: Any) -> Any:
        return _storage(identifier, max_parts=5)

    def read_storage(storage: StorageRecord) -> bytearray:
        entry = archive.entries.get(f"{folder}data/{storage.key}")
        _check_storage_size(storage, entry.file_size if entry else 0)
        return archive.read(f"{folder}data/{storage.key}")

    root, _ = unpickle(pickled, 0, persistent_load)
    return Container("torch zip", root, read_storage)


# ----------------------------------------------------------------------------------------------------------------------
# torch.save before 1.6: five pickles (magic number, version, machine, object, storage keys), then the storages


def open_stream(file: FileBytes) -> Container:
    """Open the stream that torch.save wrote before 1.6, or a plain pickle of NumPy arrays.

    Raises:
        RefusedError: it is damaged or hostile.
    """
    data = file.read(0, min(file.size, MAX_BYTES), "head")
    if _MAGIC_BYTES not in data[:64] and not data.startswith(b"L%dL\n" % MAGIC_NUMBER):
        return _open_plain_pickle(data)
    blocks: dict[str, StorageRecord] = {}

    def persistent_load(identifier: Any) -> Any:
        if isinstance(identifier, tuple) and identifier and identifier[0] == "module":
            # (module, class, source file, source text): the source is never looked at
            if len(identifier) < 2 or not isinstance(identifier[1], Global):
                raise RefusedError("is damaged: a class in its pickle has no name", next_step=_AGAIN)
            return identifier[1]
        storage = _storage(identifier, max_parts=6)
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


def _open_plain_pickle(data: bytes) -> Container:
    """Open what pickle.dump wrote: NumPy arrays are inside the pickle; tensors would be a torch.save file each."""
    root, _ = unpickle(data, 0, _no_storage)
    if not isinstance(root, dict) or b"_load_from_bytes" in data:
        raise RefusedError(
            "is a pickle that torch.save did not write",
            expected="a checkpoint written by torch.save, or safetensors",
            next_step=(
                "if you trust it: python -c 'import pickle, sys, torch; "
                'torch.save(pickle.load(open(sys.argv[1], "rb")), sys.argv[2])\' FILE weights.pth'
            ),
        )
    return Container("pickle", root, no_storage_data)


def no_storage_data(storage: StorageRecord) -> bytearray:
    """Refuse to read a storage: for containers whose values are all inside their records."""
    raise RefusedError(f"lacks the data of storage {shown(storage.key)}", next_step=_AGAIN)


def _stream_preamble(data: bytes) -> int:
    """Check magic number, protocol version and machine description; return the position after them."""
    magic, position = unpickle(data, 0, _no_storage)
    version, position = unpickle(data, position, _no_storage)
    if magic != MAGIC_NUMBER or type(version) is not int or version != PROTOCOL_VERSION:
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


def _storage(identifier: Any, max_parts: int) -> StorageRecord:
    """Return the storage for ("storage", class, key, device, count[, (view key, offset, view count)])."""
    if not isinstance(identifier, tuple) or not 5 <= len(identifier) <= max_parts or identifier[0] != "storage":
        raise RefusedError("is damaged: a tensor's storage is not described as torch does", next_step=_AGAIN)
    _, kind, key, device, count = identifier[:5]
    if type(count) is not int or not 0 <= count < 1 << 48:
        raise RefusedError(f"is damaged: storage {shown(_key(key))} has no valid size", next_step=_AGAIN)
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
    if storage.dtype is None:
        return 1
    return ITEM_BYTES.get(storage.dtype) or OTHER_ITEM_BYTES[storage.dtype]


def _check_storage_size(storage: StorageRecord, found: int) -> None:
    expected = storage.block_count * _item_bytes(storage)
    if found != expected:
        raise RefusedError(
            f"claims {expected} bytes for storage {shown(storage.key)}, but holds {found}",
            expected="a complete file",
            next_step=_AGAIN,
        )


def _no_storage(identifier: Any) -> Any:
    raise RefusedError("is damaged: it has a tensor where the file should describe itself", next_step=_AGAIN)
