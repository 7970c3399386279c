"""The weights of programs that torch.export.save wrote (.pt2): the same names and tensors as state_dict() has.

The program itself is not looked at. Since PyTorch 2.8 a JSON file describes one binary file for each weight; before, an
entry of the archive is what torch.save makes of the state dict.
https://docs.pytorch.org/docs/stable/export/pt2_archive.html
"""

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from srdeploy.models.checkpoint.archive import Archive
from srdeploy.models.checkpoint.container import Container
from srdeploy.models.checkpoint.filebytes import RefusedError, shown
from srdeploy.models.checkpoint.inert import ITEM_BYTES, StorageRecord, TensorRecord
from srdeploy.models.checkpoint.torch_files import open_zip

NAME = "torch.export program"

_MAX_JSON_BYTES = 16 * 1024**2
_STATE = "serialized_state_dict.pt"
# torch._export.serde.schema.ScalarType
_DTYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    12: "bool",
    13: "bfloat16",
}
_AGAIN = "copy or download the file again"


def is_exported_program(archive: Archive) -> bool:
    """Return True if an archive is what torch.export.save writes."""
    return _STATE in archive.entries or bool(_configurations(archive))


def open_exported_program(archive: Archive) -> Container:
    """Open the weights of an exported program.

    Raises:
        RefusedError: it is damaged, or holds the weights of several programs.
    """
    if _STATE in archive.entries:
        state = open_zip(Archive(archive.section(_STATE)), "archive/")
        return Container(NAME, state.root, state.read_storage)
    configurations = _configurations(archive)
    if len(configurations) != 1:
        raise RefusedError(
            f"holds {len(configurations)} exported programs",
            expected="one",
            next_step="save the one that you want with torch.export.save",
        )
    tensors = _tensors(archive, configurations[0])

    def read_storage(storage: StorageRecord) -> bytearray:
        return archive.read(storage.key)

    return Container(NAME, tensors, read_storage)


def _configurations(archive: Archive) -> list[str]:
    return [name for name in archive.entries if name.endswith("_weights_config.json") and "/data/weights/" in name]


def _tensors(archive: Archive, configuration: str) -> dict[str, TensorRecord]:
    text = bytes(archive.read(configuration, limit=_MAX_JSON_BYTES))
    try:
        weights = json.loads(text)["config"]
        return {
            name: _tensor(archive, str(PurePosixPath(configuration).parent), weight) for name, weight in weights.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RefusedError(
            f"has a description of its weights that cannot be read ({shown(str(error), 60)})", next_step=_AGAIN
        ) from error


def _tensor(archive: Archive, folder: str, weight: Mapping[str, Any]) -> TensorRecord:
    meta = weight["tensor_meta"]
    numbers = [*meta["sizes"], *meta["strides"], meta["storage_offset"]]
    if weight["use_pickle"] or any(type(number["as_int"]) is not int for number in numbers):
        return TensorRecord(StorageRecord("", None, 0, "cpu"), "pickled weight", 0, (), ())
    shape = tuple(size["as_int"] for size in meta["sizes"])
    stride = tuple(step["as_int"] for step in meta["strides"])
    path = f"{folder}/{weight['path_name']}"
    entry = archive.entries.get(path)
    dtype = _DTYPES.get(meta["dtype"], f"type {shown(meta['dtype'], 8)}")
    count = entry.file_size // ITEM_BYTES.get(dtype, 1) if entry else 0
    storage = StorageRecord(path, dtype, count, "cpu", 0, count)
    return TensorRecord(storage, dtype, meta["storage_offset"]["as_int"], shape, stride)
